# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Frequency bias: histories, scores against plain forward passes, and players whose answer is known."""

import functools
import math
import re

import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from trl_agents import make_env
from trl_agents.agents import Agent, GreedyAgent, LinUCBAgent, RandomAgent, ThompsonAgent
from trl_agents.diagnostics.frequency_bias import categories, choices, entropy, frequency_bias, windows
from trl_agents.diagnostics.histories import NotMeasurable, random_histories
from trl_agents.diagnostics.players import AgentPlayer, ModelPlayer, TextPlayer, read_all
from trl_agents.diagnostics.scoring import TreeScorer, action_probabilities, score_plainly
from trl_agents.tiny import tiny_model, tiny_tokenizer


def bandit(**kwargs):
    return functools.partial(make_env, "trl_agents/Bandit-v0", **{"n_arms": 10, **kwargs})


# -- histories --------------------------------------------------------------------------------------------------------


def test_histories_end_in_their_targets():
    histories = random_histories(bandit(), range(25))
    targets = [history.transitions[-1].action for history in histories]
    assert len(set(targets)) == 5 and all(targets.count(target) == 5 for target in targets)
    lengths = [len(history.transitions) for history in histories]
    assert set(lengths) <= set(range(2, 11)) and len(set(lengths)) > 3
    assert len({tuple(step.action for step in history.transitions) for history in histories}) == 25
    assert histories == random_histories(bandit(), range(25))
    assert histories != random_histories(bandit(), range(25), seed=1)


def test_repetition_adds_the_last_line_with_the_step_going_on():
    history = random_histories(bandit(), [3], lengths=(2, 2))[0]
    first, second = (step.info["transition"] for step in history.transitions)
    again = history.repeated(2)
    ending = second.removeprefix("Step=1 ")
    assert [step.observation for step in again.transitions] == [first, second, f"Step=2 {ending}", f"Step=3 {ending}"]
    assert [step.info["transition"] for step in again.transitions] == [step.observation for step in again.transitions]
    assert len({step.reward for step in again.transitions[1:]}) == 1
    assert history.repeated(0) == history


def test_an_open_step_goes_on_counting_as_well():
    history = random_histories(functools.partial(make_env, "trl_agents/ContextualBandit-v0"), [0], lengths=(2, 2))[0]
    told = [re.findall(r"(?m)^Step=(\d+)", step.observation) for step in history.repeated(2).transitions]
    assert told == [["0", "1"], ["1", "2"], ["2", "3"], ["3", "4"]]
    probabilities, _ = AgentPlayer(LinUCBAgent(), "linucb").probabilities(history, 2)
    assert probabilities.shape == (3, len(history.legal_actions)) and set(probabilities.sum(1)) == {1.0}


def test_fewer_actions_than_targets_and_short_episodes():
    histories = random_histories(bandit(n_arms=3, horizon=4), range(9))
    assert {history.transitions[-1].action for history in histories} == {"blue", "green", "red"}
    assert max(len(history.transitions) for history in histories) == 4


def test_where_it_means_nothing():
    with pytest.raises(NotMeasurable, match="change from step to step"):
        random_histories(functools.partial(make_env, "trl_agents/TicTacToe-v0"), range(3))
    with pytest.raises(NotMeasurable, match="after one step"):
        random_histories(bandit(horizon=1), range(3))


# -- categories and figures -------------------------------------------------------------------------------------------


def test_categories_by_hand():
    of = categories(["red", "red", "red", "blue"], [0, 0, 1, 1], ["red", "blue", "green"])
    assert of == {"red": "frequent", "blue": "greedy", "green": "other"}
    # The most frequent is the best as well: greedy wins, and nothing is frequent
    assert categories(["red", "red", "blue"], [1, 1, 0], ["red", "blue"]) == {"red": "greedy", "blue": "other"}
    assert categories(["red", "blue"], [1, 1], ["red", "blue"]) == {"red": "greedy", "blue": "greedy"}
    assert categories(["red", "blue", "green"], [1, 0, 0], ["red", "blue", "green"]) == {
        "red": "greedy",
        "blue": "frequent",
        "green": "frequent",
    }


def test_entropy_choices_and_windows_by_hand():
    assert entropy([[0.5, 0.5], [1.0, 0.0]]) == pytest.approx([math.log(2), 0.0])
    assert choices(np.array([[0.4, 0.4, 0.2], [0.1, 0.2, 0.7]])).tolist() == [[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]
    assert list(windows(100)) == ["0-10", "45-55", "90-100"]
    assert list(windows(20)) == ["0-2", "9-11", "18-20"]


def test_one_reply_that_begins_another():
    """ "1" is said with .5 - .3 (what goes on to "10" or "100"), "10" with .3 - .1."""
    logprobs = np.log([[0.5, 0.3, 0.1, 0.2]])
    probabilities, stated = action_probabilities(logprobs, [[1], [1, 0], [1, 0, 0], [2]])
    assert probabilities[0] == pytest.approx(np.array([0.2, 0.2, 0.1, 0.2]) / 0.7)
    assert stated[0] == pytest.approx(0.7)


def test_replies_too_improbable_for_a_float():
    probabilities, stated = action_probabilities(np.array([[-900.0, -900.0 + math.log(3)]]), [[1, 2], [1, 3]])
    assert probabilities[0] == pytest.approx([0.25, 0.75]) and stated[0] == 0.0


# -- scores -----------------------------------------------------------------------------------------------------------

SMALL = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
MODELS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4, n_positions=4096)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    # Every other layer looks back 16 tokens only, and logits are capped
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SMALL, head_dim=8, sliding_window=16, attn_implementation="eager")
    ),
    "mamba": lambda: MambaForCausalLM(MambaConfig(**SMALL | {"state_size": 8})),
}


def make_model(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)  # small weights say the same of everything
    return model


@torch.no_grad()
def naive_scores(model, prompts, continuations):
    """Every (prompt, continuation) from scratch, in a forward pass by itself."""

    def score(prompt, ids):
        logprobs = model(input_ids=torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0].float().log_softmax(-1)
        return sum(logprobs[len(prompt) - 1 + place, token].item() for place, token in enumerate(ids))

    return np.array([[score(prompt, ids) for ids in continuations] for prompt in prompts])


def growing_prompts(n=8, tail=4, seed=0):
    rng = np.random.default_rng(seed)
    text, end = rng.integers(1, 300, 20).tolist(), rng.integers(1, 300, tail).tolist()
    prompts = []
    for _ in range(n):
        prompts.append(text + end)
        text = text + rng.integers(1, 300, 5).tolist()
    return prompts


CONTINUATIONS = [[5, 6, 7], [5, 6, 8], [5, 6, 7, 9], [5, 9], [11]]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("block", [1, 40, 1024])
def test_scores_are_those_of_plain_forward_passes(name, block):
    model, prompts = make_model(name), growing_prompts()
    if name == "mamba" and block > 1:
        pytest.skip("it is read plainly, whatever the block")
    expected = naive_scores(model, prompts, CONTINUATIONS)
    scorer = TreeScorer(model, block)
    assert (scorer.reader is None) == (name == "mamba")
    assert np.ptp(expected) > 5  # the prompts do matter
    np.testing.assert_allclose(scorer.score(prompts, CONTINUATIONS), expected, atol=1e-4)
    # Again, with what the cache still holds of the first time, and in another order
    np.testing.assert_allclose(scorer.score(prompts[::-1], CONTINUATIONS)[::-1], expected, atol=1e-4)
    others = growing_prompts(3, tail=0, seed=1)  # each prompt begins the next one
    np.testing.assert_allclose(
        scorer.score(others, CONTINUATIONS[:1]), naive_scores(model, others, CONTINUATIONS[:1]), atol=1e-4
    )
    np.testing.assert_allclose(score_plainly(model, prompts, CONTINUATIONS)[0], expected, atol=1e-4)


def test_every_prefix_is_read_once():
    prompts = growing_prompts()
    scorer = TreeScorer(make_model("llama"))
    scorer.score(prompts, CONTINUATIONS)
    prefixes = {
        tuple((prompt + ids)[:end])
        for prompt in prompts
        for ids in CONTINUATIONS
        for end in range(1, len(prompt + ids))
    }
    assert scorer.cost.tokens == len(prefixes)
    assert scorer.cost.forward_passes == 2  # what all share, and what branches off
    assert scorer.cost.naive_forward_passes == len(prompts) * len(CONTINUATIONS)
    assert scorer.cost.naive_tokens == sum(len(prompt + ids) for prompt in prompts for ids in CONTINUATIONS)


def test_an_interrupted_pass_leaves_nothing_behind(monkeypatch):
    model, prompts = make_model("llama"), growing_prompts()
    scorer = TreeScorer(model, block=16)
    scorer.score(prompts, CONTINUATIONS)
    read, calls = scorer.reader._forward, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return read(*args)

    monkeypatch.setattr(scorer.reader, "_forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scorer.score(growing_prompts(seed=2), CONTINUATIONS)
    expected = naive_scores(model, prompts, CONTINUATIONS)
    np.testing.assert_allclose(scorer.score(prompts, CONTINUATIONS), expected, atol=1e-4)


def test_nothing_to_score_is_refused():
    scorer = TreeScorer(make_model("llama"))
    for prompts, continuations in [([[]], [[1]]), ([[1]], [[1], []])]:
        with pytest.raises(ValueError, match="is empty"):
            scorer.score(prompts, continuations)


# -- a model in the protocol ------------------------------------------------------------------------------------------

THINKING = (  # a template that puts something after the assistant's opening
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}"
)


def model_player(model=None, template=None, context="window", **kwargs):
    text = (
        "Step=1 Action=blue Reward=0.53\nStep=2 Action=olive Reward=-1.00\nSo far you have tried/seen:\nWhat? ACTION="
    )
    tokenizer = tiny_tokenizer([text], vocab_size=300)  # colours of several tokens
    tokenizer.chat_template = template or tokenizer.chat_template
    model = model or tiny_model(tokenizer, hidden_size=32, num_hidden_layers=2)
    return ModelPlayer(model, tokenizer, "me", context=context, **kwargs)


@pytest.mark.parametrize("context", ["window", "chat"])
@pytest.mark.parametrize("template", [None, THINKING])
@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_distribution_is_that_of_whole_replies(context, template, name):
    """From the texts up: what is read at each repetition, each colour's own tokens, each pair by itself."""
    player = model_player(None if name == "qwen3" else make_model(name), template, context)
    history = random_histories(bandit(), [5], lengths=(3, 3))[0]
    probabilities, stated = player.probabilities(history, 4)
    encode = functools.partial(player.tokenizer.encode, add_special_tokens=False)
    replies = [encode(f"ACTION={action}") for action in history.legal_actions]
    assert len({len(ids) for ids in replies}) > 1
    for times in range(5):
        lines = [step.info["transition"] for step in history.repeated(times).transitions]
        if context == "window":
            env = bandit()()
            parts = [env.instructions, "So far you have tried/seen:", *lines, "What do you predict next?"]
            messages = [{"role": "user", "content": "\n".join(parts)}]
            prompt = encode(player.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        else:
            prompt = read_all(player.context, player.parser, history.repeated(times))[-1]
            told = player.tokenizer.decode(prompt)
            assert all(line in told for line in lines) and told.count("ACTION=") >= len(lines)
        expected = np.exp(naive_scores(player.model, [prompt], replies)[0])
        assert stated[times] == pytest.approx(expected.sum(), abs=1e-4)
        np.testing.assert_allclose(probabilities[times], expected / expected.sum(), atol=1e-4)


def test_model_in_the_protocol():
    measured, invalid = frequency_bias(model_player(), bandit(), range(6), n_targets=3, n_repetitions=20)
    assert measured["repetitions"] == list(range(21)) and measured["n_histories"] == 6
    assert measured["max_entropy"] == pytest.approx(math.log(10))
    assert all(
        0 <= low <= high <= measured["max_entropy"]
        for low, high in zip(measured["entropy"]["low"], measured["entropy"]["high"], strict=True)
    )
    assert -1 <= measured["correlation"] <= 1
    for shares in measured["windows"].values():
        assert sum(shares.values()) == pytest.approx(1)
    for place in range(21):
        assert sum(
            measured["mean_probability"][name][place] for name in measured["mean_probability"]
        ) == pytest.approx(1)
    assert measured["naive_forward_passes"] == 6 * 21 * 10 and measured["forward_passes"] <= 6 * 6
    assert measured["tokens"] < measured["naive_tokens"] / 40
    assert 0.9 < invalid["mean"] <= 1  # random weights answer with an action next to never


def test_correlation_is_pearson_s():
    """An entropy that falls with every repetition, the same for all: by hand from two columns."""

    class Falling(AgentPlayer):
        def probabilities(self, history, n_repetitions):
            rows = np.array([[1 - p, p, *[0.0] * 8] for p in np.linspace(0.5, 0.1, n_repetitions + 1)])
            return rows, np.ones(len(rows))

    measured, _ = frequency_bias(Falling(RandomAgent(), "f"), bandit(), range(4), n_repetitions=10)
    column = entropy(np.array([[1 - p, p] for p in np.linspace(0.5, 0.1, 11)]))
    x, y = np.arange(11) - 5.0, column - column.mean()
    assert measured["correlation"] == pytest.approx((x @ y) / math.sqrt((x @ x) * (y @ y)))


def test_a_model_with_few_positions_is_asked_as_far_as_it_reads():
    player = model_player()
    history = random_histories(bandit(), range(4))
    longest = max(len(read_all(player.context, player.parser, one.repeated(6))[-1]) for one in history)
    replies = [player.tokenizer.encode(f"ACTION={action}") for action in history[0].legal_actions]
    player.model.config.max_position_embeddings = longest + max(map(len, replies))
    with pytest.warns(UserWarning, match="repetitions fit the model's positions"):
        measured, _ = frequency_bias(player, bandit(), range(4), n_repetitions=20)
    assert measured["repetitions"] == list(range(7)) and list(measured["windows"]) == ["0-1", "2-4", "5-6"]
    player.model.config.max_position_embeddings = 20
    with pytest.raises(NotMeasurable, match="positions"):
        frequency_bias(player, bandit(), range(4), n_repetitions=20)


# -- players whose answer is known ------------------------------------------------------------------------------------


def shares(player, **kwargs):
    measured, invalid = frequency_bias(player, bandit(**kwargs), range(25), n_repetitions=100)
    return measured, invalid["mean"]


def lines_of(prompt):
    return [(name, float(reward)) for name, reward in re.findall(r"Action=(\w+) Reward=(-?[\d.]+)", prompt)]


def copycat(prompt):
    names = [name for name, _ in lines_of(prompt)]
    return f"ACTION={max(names, key=names.count)}"


def best_so_far(prompt):
    rewards = {}
    for name, reward in lines_of(prompt):
        rewards.setdefault(name, []).append(reward)
    return f"ACTION={max(rewards, key=lambda name: sum(rewards[name]) / len(rewards[name]))}"


def test_uniform_player():
    measured, invalid = shares(AgentPlayer(RandomAgent(), "random"))
    assert np.allclose(measured["entropy"]["mean"], math.log(10)) and invalid == 0
    assert measured["correlation"] is None  # of a constant there is none
    late = measured["windows"]["90-100"]
    assert late["frequent"] + late["greedy"] + late["other"] == pytest.approx(1)
    assert late["frequent"] <= 0.1  # one of ten arms, where it is not the best


def test_copycat_is_frequent_wherever_the_frequent_arm_is_a_worse_one():
    measured, invalid = shares(TextPlayer(copycat, "copycat"))
    histories = random_histories(bandit(), range(25))
    worse = 0
    for history in histories:
        steps = history.repeated(100).transitions
        of = categories([s.action for s in steps], [s.reward for s in steps], history.legal_actions)
        worse += of[steps[-1].action] == "frequent"
    assert 10 < worse < 25
    late = measured["windows"]["90-100"]
    assert late["frequent"] == pytest.approx(worse / 25) and late["other"] == 0
    assert np.allclose(measured["entropy"]["mean"], 0) and invalid == 0


class FirstIsBest:
    """Of ten arms the one that is played first pays 9, and whatever follows pays nothing."""

    instructions, legal = "Choose.", list("abcdefghij")

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return "", {"legal_actions": self.legal}

    def step(self, action):
        reward = 0.0 if self.steps else 9.0
        line = f"Step={self.steps} Action={action} Reward={reward:.0f}"
        self.steps += 1
        return line, reward, False, False, {"legal_actions": self.legal, "transition": line}

    def close(self):
        pass


def test_copycat_is_always_frequent_and_the_greedy_player_never_where_what_repeats_is_worse():
    def repeats_a_worse_arm(seed):
        histories = random_histories(FirstIsBest, range(25), seed=seed)
        return all(history.transitions[0].action != history.transitions[-1].action for history in histories)

    seed = next(seed for seed in range(500) if repeats_a_worse_arm(seed))
    late = frequency_bias(TextPlayer(copycat, "c"), FirstIsBest, range(25), seed=seed)[0]["windows"]["90-100"]
    assert late == {"frequent": 1.0, "greedy": 0.0, "other": 0.0}
    late = frequency_bias(TextPlayer(best_so_far, "b"), FirstIsBest, range(25), seed=seed)[0]["windows"]["90-100"]
    assert late == {"frequent": 0.0, "greedy": 1.0, "other": 0.0}


def test_greedy_player_is_greedy():
    measured, _ = shares(TextPlayer(best_so_far, "greedy"))
    for window in measured["windows"].values():
        assert window == {"frequent": 0.0, "greedy": 1.0, "other": 0.0}


def test_greedy_agent_is_greedy_once_all_was_tried():
    agent = AgentPlayer(GreedyAgent(), "greedy")
    measured, _ = shares(agent, n_arms=2)
    assert measured["windows"]["90-100"]["frequent"] == 0 and measured["windows"]["90-100"]["greedy"] > 0.5


def test_distribution_of_a_player_who_draws_lots():
    history = random_histories(bandit(distribution="bernoulli", n_arms=3), [1])[0]
    probabilities, _ = AgentPlayer(ThompsonAgent(), "t").probabilities(history, 2)
    assert probabilities.shape == (3, 3) and np.allclose(probabilities.sum(1), 1)
    assert 0 < entropy(probabilities).min()
    repeating, _ = AgentPlayer(RandomAgent(repeat=0.4), "r").probabilities(history, 1)
    target = history.legal_actions.index(history.transitions[-1].action)
    assert repeating[:, target] == pytest.approx(0.4 + 0.2)


def test_an_agent_sees_what_happened():
    class Counts(Agent):
        def reset(self, **kwargs):
            super().reset(**kwargs)
            self.seen = []

        def act(self, observation, info):
            return self.legal_actions[len(self.seen) % 2]

        def update(self, action, reward, info):
            self.seen.append((action, reward))

    agent = Counts()
    history = random_histories(bandit(n_arms=2), [0], lengths=(3, 3))[0]
    probabilities, _ = AgentPlayer(agent, "counts").probabilities(history, 2)
    assert probabilities.tolist() == [[0, 1], [1, 0], [0, 1]]  # after 3, 4 and 5 steps
    assert not hasattr(agent, "seen")  # a copy was asked


def test_nonsense_is_counted_and_left_out():
    replies = iter(range(10**6))

    def sometimes(prompt):
        return "ACTION=blue" if next(replies) % 2 else "I would rather not."

    measured, invalid = frequency_bias(TextPlayer(sometimes, "s"), bandit(), range(5), n_repetitions=9)
    assert invalid["mean"] == 0.5
    assert None in measured["entropy"]["mean"] and 0.0 in measured["entropy"]["mean"]
    for window in measured["windows"].values():
        assert sum(window.values()) == pytest.approx(1)
    with pytest.raises(NotMeasurable, match="no reply stated an action"):
        frequency_bias(TextPlayer(lambda prompt: "?", "s"), bandit(), range(5), n_repetitions=9)


def test_a_player_who_returns_no_text_is_told_so():
    with pytest.raises(ValueError, match="must return a text"):
        frequency_bias(TextPlayer(lambda prompt: 3, "s"), bandit(), range(1), n_repetitions=1)
