# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Experts and their data. The thoughts are read by parsers of the test's own, and every number in them is worked out
again from nothing but the text that the model would have read before it.
"""

import functools
import math
import re
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from datasets import Dataset
from scripted import Pay
from trl import SFTConfig, SFTTrainer

from trl_agents.actions import ActionParser
from trl_agents.agents import GreedyAgent, RandomAgent, UCBAgent, play_episode
from trl_agents.envs import make_env
from trl_agents.evaluation import play_agents
from trl_agents.expert_data import agreement, expert_dataset, expert_episodes
from trl_agents.experts import Expert, LinUCBExpert, MinimaxExpert, UCBExpert, make_expert
from trl_agents.seeds import expert_seeds
from trl_agents.tiny import CHAT_TEMPLATE, tiny_model, tiny_tokenizer
from trl_agents.types import InvalidReason, ParsedAction


BANDIT, GAME, MOVIES = "trl_agents/Bandit-v0", "trl_agents/TicTacToe-v0", "trl_agents/ContextualBandit-v0"
SMALL = {"n_arms": 3, "horizon": 9}
BONUSES = {
    "sqrt_n": (r"sqrt\(1 / (?P<n>\d+)\)", lambda t, n: math.sqrt(1 / n)),
    "ucb1": (r"sqrt\(2 \* ln\((?P<t>\d+)\) / (?P<n>\d+)\)", lambda t, n: math.sqrt(2 * math.log(t) / n)),
    "half_ln": (r"sqrt\(0\.5 \* ln\((?P<t>\d+)\) / (?P<n>\d+)\)", lambda t, n: math.sqrt(0.5 * math.log(t) / n)),
}
NUMBER = r"-?\d+\.\d\d"


def asked_and_answered(rows):
    """(what the model has read, what it is to write) of every reply."""
    for row in rows:
        messages = row["messages"] if "messages" in row else row["prompt"] + row["completion"]
        for number, message in enumerate(messages):
            if message["role"] == "assistant":
                read = "\n".join(other["content"] for other in messages[:number] if other["role"] == "user")
                yield read, message["content"]


def close(written, exact):
    """Whether a number is the exact one, rounded to two decimals (halves either way)."""
    return abs(float(written) - exact) <= 0.005 + 1e-9 and re.fullmatch(NUMBER, written) and written != "-0.00"


def first_best(values):
    return next(action for action, value in values.items() if value == max(values.values()))


# -- UCB --------------------------------------------------------------------------------------------------------------


def check_ucb(read, reply, bonus, most_listed=None):
    """Works the thought out again from the history in `read`."""
    labels = re.search(r"labelled (.+)\. Each", read)[1].split(", ")
    history = re.findall(r"Step=\d+ Action=(\S+) Reward=(\S+)", read)
    formula, size = BONUSES[bonus]
    title, *lines, end, stated = reply.split("\n")
    assert len(lines) == len(labels) and title
    values = {}
    for label, line in zip(labels, lines, strict=True):
        rewards = [reward for action, reward in history if action == label]
        n = len(rewards)
        if n == 0:
            assert line == f"Count for action {label} = 0, Mean = NaN, UCB = NaN"
            values[label] = math.inf
            continue
        found = re.fullmatch(
            rf"Count for action {label} = {n}, Mean = \((?P<sum>[^()]+)\) / {n} = (?P<mean>\S+), "
            rf"UCB = (?P<again>\S+) \+ {formula} = (?P<ucb>\S+)",
            line,
        )
        assert found, line
        groups = found.groupdict()
        terms = groups["sum"].split(" + ")
        if most_listed is not None and n > most_listed:
            earlier, total = re.fullmatch(r"(\d+) earlier: (\S+)", terms[0]).groups()
            assert int(earlier) == n - most_listed and terms[1:] == rewards[-most_listed:]
            assert Fraction(total) == sum(map(Fraction, rewards[:-most_listed]))
        else:
            assert terms == rewards  # as the history writes them, in its order
        assert int(groups["n"]) == n and int(groups.get("t") or len(history)) == len(history)
        assert close(groups["mean"], float(sum(map(Fraction, rewards)) / n)) and groups["again"] == groups["mean"]
        assert close(groups["ucb"], float(groups["mean"]) + size(len(history), n))
        values[label] = float(groups["ucb"])
    action = stated.removeprefix("ACTION=")
    assert action == first_best(values) and end.endswith(f": {action}.")
    if math.inf in values.values():
        assert end.startswith("Not all actions have been selected yet")
    else:
        assert f"The highest UCB value is {max(values.values()):.2f}, so" in end
        assert ("equals" in end) == (list(values.values()).count(max(values.values())) > 1)
    return action


@pytest.mark.parametrize("context", ["chat", "window"])
@pytest.mark.parametrize("distribution", ["gaussian", "bernoulli"])
@pytest.mark.parametrize("bonus", list(BONUSES))
def test_every_number_of_a_ucb_thought(bonus, distribution, context):
    kwargs = {"n_arms": 4, "horizon": 15, "distribution": distribution, "noise": "high"}
    rows = expert_dataset(BANDIT, UCBExpert(bonus), seeds=expert_seeds(12), env_kwargs=kwargs, context=context)
    replies = [check_ucb(read, reply, bonus) for read, reply in asked_and_answered(rows)]
    assert len(replies) == 12 * 15 and len(set(replies)) == 4
    assert len(rows) == (12 if context == "chat" else 12 * 15)


@pytest.mark.parametrize("most_listed", [1, 3])
def test_a_long_sum_is_cut_and_still_right(most_listed):
    expert = UCBExpert(most_listed=most_listed)
    rows = expert_dataset(BANDIT, expert, seeds=range(4), env_kwargs={"n_arms": 2, "horizon": 30})
    replies = list(asked_and_answered(rows))
    for read, reply in replies:
        check_ucb(read, reply, "sqrt_n", most_listed)
    assert sum("earlier" in reply for _, reply in replies) > 60
    longest = max(len(line) for _, reply in replies for line in reply.split("\n"))
    assert (
        longest
        < 140
        < max(
            len(line)
            for row in expert_dataset(BANDIT, seeds=range(4), env_kwargs={"n_arms": 2, "horizon": 30})
            for line in row["messages"][-1]["content"].split("\n")
        )
    )


def test_equal_values_are_told():
    """Bernoulli rewards make ties: the first of the best is played, and the thought says so."""
    kwargs = {"n_arms": 3, "horizon": 4, "means": [1.0, 1.0, 1.0], "distribution": "bernoulli"}
    (row,) = expert_dataset(BANDIT, seeds=[0], env_kwargs=kwargs)
    assert "2.00, so its action is selected, the first of equals: blue.\nACTION=blue" in row["messages"][-1]["content"]


def test_the_expert_plays_as_well_as_the_exact_player():
    """Rounding what is known to two decimals changes a choice now and then, and costs nothing to speak of."""
    players = {"exact": UCBAgent("sqrt_n"), "expert": UCBExpert(), "greedy": GreedyAgent()}
    played = play_agents(BANDIT, players, range(100), env_kwargs={"n_arms": 5, "horizon": 30, "noise": 0.3})
    regret, actions = {}, {}
    for name, own in played.items():
        regret[name] = np.mean([sum(turn.info["regret"] for turn in episode.turns) for episode in own])
        actions[name] = [turn.executed for episode in own for turn in episode.turns]
    same = {
        name: np.mean([a == b for a, b in zip(actions["exact"], own, strict=True)]) for name, own in actions.items()
    }
    assert abs(regret["expert"] - regret["exact"]) < 0.1
    assert same["expert"] > 0.8 > same["greedy"]


def test_rewards_of_environments_without_a_line_of_their_own():
    """The history writes whole rewards without decimals, and so does the thought."""
    rows = expert_dataset(Pay, seeds=[0], context="window")
    assert re.search(r"Action=\S+ Reward=\d\n", rows[1]["prompt"][0]["content"] + "\n")
    found = re.search(r"= 1, Mean = \((\S+)\) / 1 = (\S+),", rows[1]["completion"][0]["content"])
    assert found and f"Reward={found[1]}" in rows[1]["prompt"][0]["content"] and close(found[2], float(found[1]))


# -- LinUCB and minimax -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["chat", "window"])
@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_every_number_of_a_linucb_thought(alpha, context):
    kwargs = {"n_arms": 4, "horizon": 12, "rank": 3}
    rows = expert_dataset(MOVIES, LinUCBExpert(alpha), seeds=range(5), env_kwargs=kwargs, context=context)
    step = re.compile(r"^Step=\d+ .*\[(?P<x>[^\]]+)\](?: Action=(?P<a>\S+) Reward=(?P<r>\S+))?$", re.MULTILINE)
    n_replies = 0
    for read, reply in asked_and_answered(rows):
        labels = re.search(r"movies: (.+?)\. Your reward", read)[1].split(", ")
        steps = [(np.array(eval(found["x"])), found["a"], found["r"]) for found in step.finditer(read)]
        history, (x, *_) = [one for one in steps if one[1]], steps[-1]
        _, *lines, end, stated = reply.split("\n")
        scores = {}
        for label, line in zip(labels, lines, strict=True):
            own = [(features, float(reward)) for features, action, reward in history if action == label]
            inverse = np.linalg.inv(np.eye(3) + sum((np.outer(f, f) for f, _ in own), np.zeros((3, 3))))
            theta = inverse @ sum((f * reward for f, reward in own), np.zeros(3))
            found = re.fullmatch(
                r"Count for action (\S+) = (\d+), Estimate = (\S+), Bonus = (\S+), Score = (\S+) \+ (\S+) = (\S+)",
                line,
            )
            name, count, estimate, bonus, estimate_again, bonus_again, score = found.groups()
            assert name == label and int(count) == len(own)
            assert close(estimate, theta @ x) and close(bonus, alpha * math.sqrt(x @ inverse @ x))
            assert (estimate_again, bonus_again) == (estimate, bonus)
            assert Fraction(score) == Fraction(estimate) + Fraction(bonus) and score != "-0.00"
            scores[label] = float(score)
        assert stated == f"ACTION={first_best(scores)}" and f"{max(scores.values()):.2f}, so" in end
        n_replies += 1
    assert n_replies == 5 * 12


LINES = [(0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6)]


@functools.cache
def outcome(board, mover):
    """(result for `mover`, moves until the end) with perfect play: wins soon, losses late."""
    other = "21"[mover == "2"]
    if any(all(board[i] == other for i in line) for line in LINES):
        return -1, 0
    if "0" not in board:
        return 0, 0
    ends = [after_move(board, square, mover) for square in range(9) if board[square] == "0"]
    return max(ends, key=lambda end: (end[0], -end[1] if end[0] > 0 else end[1]))


def after_move(board, square, mover):
    result, moves = outcome(board[:square] + mover + board[square + 1 :], "21"[mover == "2"])
    return -result, moves + 1


@pytest.mark.parametrize("fastest", [True, False])
@pytest.mark.parametrize("form", ["digits", "grid"])
def test_every_value_of_a_minimax_thought(form, fastest):
    kwargs = {"seat": "random", "board": form, "opponent": ["random", "noisy"]}
    rows = expert_dataset(GAME, MinimaxExpert(fastest), seeds=range(40), env_kwargs=kwargs, context="window", window=0)
    names = list("012345678") if form == "digits" else [row + column for row in "abc" for column in "123"]
    ends, results = set(), set()
    for read, reply in asked_and_answered(rows):
        shown = re.findall(r"State=(\S+)", read)[-1]
        board = shown.translate(str.maketrans(".xo", "012", "/"))
        thought, stated = reply.split("\n")
        assert thought.startswith(f"State {shown}. ")
        told = re.search(r"both sides: (.+?)\. The best is a (.+), so (\S+) is selected\.", thought)
        values = {}
        for move in told[1].split(", "):
            name, result, moves = re.fullmatch(r"(\S+) (win|draw|loss) in (\d)", move).groups()
            values[name] = {"win": 1, "draw": 0, "loss": -1}[result], int(moves)
        squares = {names[square]: square for square in range(9) if board[square] == "0"}
        assert values == {name: after_move(board, square, "1") for name, square in squares.items()}
        action = stated.removeprefix("ACTION=")
        result, moves = outcome(board, "1")
        said = {1: "win", 0: "draw", -1: "loss"}[result]
        assert told[3] == action and values[action][0] == result
        assert told[2] == (f"{said} in {moves}" if fastest else said)
        if fastest:
            assert action == next(name for name, value in values.items() if value == (result, moves))
        ends.add(said)
        results |= {value[0] for value in values.values()}
    assert ends == {"win", "draw"} and results == {1, 0, -1}  # it never gets into a lost game


# -- datasets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", ["chat", "window"])
def test_both_forms_hold_the_same_actions(context):
    made = {
        form: expert_dataset(BANDIT, form=form, seeds=range(6), env_kwargs=SMALL, context=context)
        for form in ("thought", "behaviour")
    }
    thoughts, actions = (list(asked_and_answered(rows)) for rows in made.values())
    assert [read for read, _ in thoughts] == [read for read, _ in actions]
    assert [reply.split("\n")[-1] for _, reply in thoughts] == [reply for _, reply in actions]
    assert all(re.fullmatch("ACTION=(blue|green|red)", reply) for _, reply in actions)
    again = expert_dataset(BANDIT, form="behaviour", seeds=range(6), env_kwargs=SMALL, context=context)
    assert again[:] == made["behaviour"][:]
    if context == "window":
        rows = made["behaviour"]
        assert [(row["seed"], row["step"]) for row in rows] == [(seed, step) for seed in range(6) for step in range(9)]
        assert all(row["completion"][0]["content"] == f"ACTION={row['action']}" for row in rows)
    else:
        assert made["thought"]["seed"][:] == list(range(6))
        assert all(row["messages"][-1]["role"] == "assistant" for row in made["thought"])


def test_the_parser_states_the_action():
    rows = expert_dataset(BANDIT, seeds=[0], env_kwargs=SMALL, parser=ActionParser(r"I play (\w+)"), context="window")
    assert rows[0]["completion"][0]["content"].split("\n")[-1] == "I play blue"


def test_a_window_may_hide_what_a_behaviour_went_by():
    kwargs = {"seeds": range(2), "env_kwargs": SMALL, "context": "window"}
    rows = expert_dataset(BANDIT, form="behaviour", window=2, **kwargs)
    assert rows[8]["prompt"][0]["content"].count("Step=") == 2
    assert len(expert_dataset(BANDIT, window=8, **kwargs)) == 18
    with pytest.raises(ValueError, match="window=7 hides steps that the thoughts of UCBExpert count"):
        expert_dataset(BANDIT, window=7, **kwargs)


@pytest.mark.parametrize("form", ["json", "parquet"])
def test_saved_and_loaded(tmp_path, form):
    rows = expert_dataset(BANDIT, seeds=range(2), env_kwargs=SMALL, context="window")
    getattr(rows, f"to_{form}")(tmp_path / f"rows.{form}")
    loaded = getattr(Dataset, f"from_{form}")(str(tmp_path / f"rows.{form}"), cache_dir=str(tmp_path / "cache"))
    assert loaded[:] == rows[:] and loaded.column_names == rows.column_names


def test_rows_that_are_written_as_they_are_made(tmp_path):
    kwargs = {"seeds": range(70), "env_kwargs": SMALL, "context": "window", "form": "behaviour"}
    rows = expert_dataset(BANDIT, cache_dir=str(tmp_path), **kwargs)
    assert rows.cache_files[0]["filename"].startswith(str(tmp_path)) and rows[:] == expert_dataset(BANDIT, **kwargs)[:]


def test_agreement_is_with_what_was_chosen():
    """All of one's own; of another's what happens to be the same; nothing of what was played for an invalid reply."""
    env = make_env(BANDIT, n_arms=2, horizon=6)
    own, other = play_episode(env, UCBExpert(), seed=3), play_episode(env, RandomAgent(), seed=3)
    assert agreement(own, UCBExpert()) == 1
    (row,) = expert_dataset(BANDIT, seeds=[3], env_kwargs={"n_arms": 2, "horizon": 6})
    assert row["messages"][-1]["content"].endswith(f"ACTION={own.turns[-1].executed}")
    expert, same = UCBExpert(), 0
    expert.reset(legal_actions=["blue", "green"], seed=0)
    for turn in other.turns:
        same += expert.act("", {}) == turn.executed
        expert.update(turn.executed, turn.reward, turn.info)
    assert 0 < same < 6 and agreement(other, UCBExpert()) == same / 6
    invalid = [replace(turn, parsed=ParsedAction(None, InvalidReason.NO_MATCH)) for turn in own.turns[:3]]
    assert agreement(replace(own, turns=(*invalid, *own.turns[3:])), UCBExpert()) == 0.5
    assert agreement(replace(own, turns=()), UCBExpert()) is None
    movies = play_episode(make_env(MOVIES, horizon=5), LinUCBExpert(), seed=0)
    assert agreement(movies, LinUCBExpert()) == 1


def test_any_player_s_behaviour():
    kwargs = {**SMALL, "distribution": "bernoulli"}
    for expert in ("thompson", "random", "greedy", GreedyAgent()):
        rows = expert_dataset(BANDIT, expert, "behaviour", seeds=range(2), env_kwargs=kwargs)
        assert len(rows) == 2
    assert make_expert("ucb", bonus="ucb1").bonus == "ucb1" and isinstance(make_expert("linucb"), LinUCBExpert)


def test_an_expert_of_one_s_own():
    class First(Expert):
        looks_back = False

        def act(self, observation, info):
            return self.legal(info)[0]

        def explain(self, observation, info, action):
            return f"{action} stands first."

    rows = expert_dataset(BANDIT, First(), seeds=[0], env_kwargs=SMALL, context="window", window=0)
    assert rows[5]["completion"][0]["content"] == "blue stands first.\nACTION=blue"


def test_instructions_of_an_episode():
    """An environment may tell other instructions in each episode: what is asked there is what is learnt from."""

    class Told(Pay):
        def reset(self, *, seed=None, options=None):
            observation, info = super().reset(seed=seed, options=options)
            return observation, {**info, "instructions": f"Round {seed}."}

    for context in ("chat", "window"):
        rows = expert_dataset(Told, seeds=[4], context=context)
        read, _ = next(asked_and_answered(rows))
        assert read.startswith("Round 4.") and Pay().instructions not in read


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"form": "thoughts"}, "form='thoughts' is unknown: use one of 'thought', 'behaviour'"),
        ({"expert": "ucb2"}, "Expert 'ucb2' is unknown"),
        ({"expert": "greedy"}, "GreedyAgent has no thoughts to clone"),
        ({"context": "page"}, "context='page' is unknown"),
        ({"window": 3}, "window=3 with context='chat'"),
        ({"context": "window", "window": -1}, "window=-1"),
        ({"seeds": []}, "seeds is empty"),
        ({"expert": "linucb"}, "this environment does not tell"),
        ({"env": Pay(), "env_kwargs": None}, "an instance does not do"),
    ],
)
def test_mistakes_are_told(arguments, said):
    kwargs = {"env": BANDIT, "seeds": range(2), "env_kwargs": SMALL, **arguments}
    with pytest.raises(ValueError, match=re.escape(said)):
        expert_dataset(**kwargs)


def test_most_listed_is_positive():
    with pytest.raises(ValueError, match="most_listed=0"):
        UCBExpert(most_listed=0)
    with pytest.raises(ValueError, match="bonus='ucb'"):
        UCBExpert("ucb")


# -- what TRL makes of them -------------------------------------------------------------------------------------------

MARKED = CHAT_TEMPLATE.replace(
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}",
    "{{ '<|im_start|>' + message['role'] + '\\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ message['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\\n' }}",
)


@pytest.mark.parametrize(
    ("context", "tokens", "settings"),
    [
        ("window", False, {}),
        ("chat", False, {"assistant_only_loss": True}),
        ("chat", True, {}),
        ("window", True, {}),
    ],
)
def test_only_replies_carry_loss(tmp_path, context, tokens, settings):
    """TRL's trainer takes the rows as they are, bookkeeping and all; it learns the replies, their ends, no more."""
    kwargs = {"seeds": range(2), "env_kwargs": SMALL, "context": context}
    texts = expert_dataset(BANDIT, **kwargs)
    tokenizer = tiny_tokenizer([read + reply for read, reply in asked_and_answered(texts)])
    tokenizer.chat_template = MARKED if settings else CHAT_TEMPLATE
    rows = expert_dataset(BANDIT, tokenizer=tokenizer, **kwargs) if tokens else texts
    args = SFTConfig(
        str(tmp_path),
        max_length=None,
        per_device_train_batch_size=4,
        max_steps=1,
        bf16=False,
        report_to=[],
        **settings,
    )
    trainer = SFTTrainer(tiny_model(tokenizer, 32, 1), args, train_dataset=rows, processing_class=tokenizer)
    replies = [reply for _, reply in asked_and_answered(texts)]
    learnt = []
    for batch in trainer.get_train_dataloader():
        assert set(batch) <= {"input_ids", "labels", "attention_mask", "position_ids"}
        for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
            assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
            learnt.append(tokenizer.decode([label for label in labels if label != -100]))
    # TRL's completion goes on to the line's end behind the last token of a reply
    learnt = [text.replace("<|im_end|>\n", "<|im_end|>") for text in learnt]
    assert sorted("".join(learnt).split("<|im_end|>")) == sorted([*replies, ""])
    assert len(learnt) == len(rows) == (2 if context == "chat" else 18)
    assert math.isfinite(trainer.train().training_loss)


def test_a_chat_without_marks_is_refused_by_trl(tmp_path):
    """Why rows of tokens are there."""
    texts = expert_dataset(BANDIT, seeds=[0], env_kwargs=SMALL)
    tokenizer = tiny_tokenizer([read + reply for read, reply in asked_and_answered(texts)])
    args = SFTConfig(str(tmp_path), assistant_only_loss=True, bf16=False, report_to=[])
    with pytest.raises(ValueError, match="not training-compatible"):
        SFTTrainer(tiny_model(tokenizer, 32, 1), args, train_dataset=texts, processing_class=tokenizer)


def test_an_expert_s_episodes_are_ones_to_log(tmp_path):
    from trl_agents.episodes import log_episodes, read_episodes, write_episodes

    episodes = list(expert_episodes(BANDIT, seeds=range(2), env_kwargs=SMALL))
    write_episodes(tmp_path / "episodes.jsonl", log_episodes(episodes, BANDIT, SMALL))
    read = read_episodes(tmp_path / "episodes.jsonl")
    assert [turn.text for turn in read[1].trajectory.turns] == [turn.text for turn in episodes[1].turns]
    assert make_env(BANDIT, **SMALL).instructions == read[0].briefing.instructions
