# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Episodes in a file and back, the best of them, and rows that hold token for token what a rollout read and wrote."""

import dataclasses
import json

import pytest
import torch
from scripted import Pay, ScriptedBackend, save_tiny_model
from test_contexts import CASES, every_template, spelled, tokenizer_with
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from trl_agents.actions import ActionParser
from trl_agents.agents import RandomAgent, UCBAgent, play_episode
from trl_agents.contexts import Briefing, make_context
from trl_agents.envs import make_env
from trl_agents.episodes import (
    LoggedEpisode,
    best_episodes,
    log_answers,
    log_episodes,
    read_episodes,
    sample_episodes,
    training_rows,
    write_episodes,
)
from trl_agents.evaluation import play_model
from trl_agents.questions import answer_questions
from trl_agents.rollout.generation import Reply
from trl_agents.rollout.play import Episode, Player, Rules
from trl_agents.rollout.workers import EnvPool
from trl_agents.tiny import tiny_model, tiny_tokenizer
from trl_agents.transcripts import plain_rationale, play_transcripts, put_into_words
from trl_agents.types import InvalidReason, ParsedAction, StopReason, Trajectory, Turn


BANDIT = "trl_agents/Bandit-v0"
GAME = "trl_agents/TicTacToe-v0"
SMALL = {"n_arms": 2, "horizon": 3, "distribution": "bernoulli"}
CONTEXTS = pytest.mark.parametrize(
    "reading",
    [{"context": "chat"}, {"context": "window"}, {"context": "window", "window": 1}],
    ids=["chat", "window", "window-1"],
)


class Spelled(ScriptedBackend):
    """Samples letter by letter: tokens that no tokenizer would make of the text."""

    def submit(self, slot, prompt_ids, max_new_tokens, rng):
        ids = (*spelled(self.tokenizer, next(self.texts[slot])), self.tokenizer.eos_token_id)
        self.replies.append((slot, Reply(ids[:max_new_tokens], cut_off=len(ids) > max_new_tokens)))


class Note(Pay):
    """Words its own line of history, as tic-tac-toe does, and a standing question."""

    question = "Which?"

    def step(self, action):
        observation, reward, terminated, truncated, info = super().step(action)
        info["transition"] = f"{action} came"
        return f"{info['transition']}\nnow {self.steps}", reward, terminated, truncated, info


def play(texts, tokenizer, reading, env=Pay, backend=ScriptedBackend, **rules):
    """One episode in which the model writes `texts`."""
    pool = EnvPool(env, 1)
    try:
        context = make_context(tokenizer=tokenizer, name=reading["context"], window=reading.get("window"))
        rules = Rules(**{"max_new_tokens": 64, **rules})
        player = Player(pool, backend(tokenizer, [texts]), context, ActionParser(), Briefing.of(env()), rules)
        (trajectory,) = player.play([Episode(0)])[0]
    finally:
        pool.close()
    return trajectory


def logged(trajectory, env=Pay, **kwargs):
    return dataclasses.replace(
        LoggedEpisode(trajectory.return_, trajectory, Briefing.of(env())), env_id=env.__name__, **kwargs
    )


def through_a_file(folder, episodes):
    write_episodes(folder / "episodes.jsonl", episodes)
    return read_episodes(folder / "episodes.jsonl")


def rollout_rows(trajectory, appends):
    """By hand from the rollout's own tokens: what was fed and sampled, and of it what is to be learnt."""
    ids, labels, rows = [], [], []
    for turn in trajectory.turns:
        if not appends:
            ids, labels = [], []
        ids = [*ids, *turn.input_ids, *turn.action_ids]
        learnt = turn.action_ids if turn.parsed.is_valid else [-100] * len(turn.action_ids)
        labels = [*labels, *[-100] * len(turn.input_ids), *learnt]
        if not appends:
            rows.append((ids, labels))
    return [row for row in (rows or [(ids, labels)]) if set(row[1]) != {-100}]


def pairs(rows):
    return list(zip(rows["input_ids"][:], rows["labels"][:], strict=True))


# -- rows are the rollout's tokens ------------------------------------------------------------------------------------


@CONTEXTS
@every_template
@pytest.mark.parametrize("env", [Pay, Note])
def test_rows_are_what_the_rollout_fed_and_sampled(tmp_path, case, reading, env):
    """Thoughts, an invalid reply that is asked again, one that is cut off; also read back from a file."""
    tokenizer = case.tokenizer()
    texts = ["hm</think>\n\nACTION=b", "what?", "\nACTION=a ", "ACTION=c"]
    trajectory = play(texts, tokenizer, reading, env, invalid_action="retry")
    assert [turn.parsed.is_valid for turn in trajectory.turns] == [True, False, True, True]
    expected = rollout_rows(trajectory, reading["context"] == "chat")
    assert len(expected) == (1 if reading["context"] == "chat" else 3)
    (read,) = through_a_file(tmp_path, [logged(trajectory, env)])
    assert pairs(training_rows([read], tokenizer, **reading)) == expected
    # Without the sampled ids, as in others' logs, the text gives the same ones: they were the tokenizer's own
    turns = tuple(dataclasses.replace(turn, input_ids=(), action_ids=()) for turn in trajectory.turns)
    without = logged(dataclasses.replace(trajectory, turns=turns), env)
    assert pairs(training_rows([without], tokenizer, **reading)) == expected


@CONTEXTS
def test_what_was_sampled_is_not_tokenised_again(tmp_path, reading):
    tokenizer = CASES["chatml"].tokenizer()
    trajectory = play(["I try. ACTION=b", "?", "ACTION=c"], tokenizer, reading, backend=Spelled)
    assert tuple(tokenizer.encode("ACTION=c")) != trajectory.turns[2].action_ids[:-1]
    expected = rollout_rows(trajectory, reading["context"] == "chat")
    assert pairs(training_rows(through_a_file(tmp_path, [logged(trajectory)]), tokenizer, **reading)) == expected
    # Another model's tokenizer: the ids mean nothing to it, the text does
    other = tiny_tokenizer(["ACTION=b ACTION=c"], 300)
    rows = training_rows([logged(trajectory)], other, **reading)
    learnt = [[label for label in labels if label != -100] for labels in rows["labels"][:]]
    assert "".join(other.decode(ids) for ids in learnt) == "I try. ACTION=b<|im_end|>ACTION=c<|im_end|>"


def test_a_reply_that_was_cut_off_learns_no_end():
    tokenizer = CASES["chatml"].tokenizer()
    n_tokens = len(tokenizer.encode("ACTION=b"))
    trajectory = play(
        ["ACTION=b and more", "ACTION=b", "x" * 50], tokenizer, {"context": "chat"}, max_new_tokens=n_tokens
    )
    assert trajectory.turns[0].cut_off and trajectory.turns[0].parsed.is_valid
    for action_ids in (None, ()):
        turns = tuple(
            dataclasses.replace(turn, **({} if action_ids is None else {"action_ids": ()}))
            for turn in trajectory.turns
        )
        (labels,) = training_rows([logged(dataclasses.replace(trajectory, turns=turns))], tokenizer)["labels"][:]
        assert tokenizer.decode([label for label in labels if label != -100]) == "ACTION=bACTION=b"


def test_a_reply_ends_as_the_template_ends_it():
    """Gemma's way: the tokenizer's own end token is another than the one that closes a turn."""
    tokenizer = tokenizer_with(CASES["gemma"].template, "<bos>", "</s>")
    ends = tokenizer.convert_tokens_to_ids(["</s>", "<end_of_turn>"])
    trajectory = put_into_words(play_episode(make_env(BANDIT, **SMALL), RandomAgent(), seed=0), rationale=None)
    rows = training_rows(log_episodes([trajectory], BANDIT, SMALL), tokenizer, eos_token_ids=ends)
    learnt = tokenizer.decode([label for label in rows["labels"][0] if label != -100])
    assert learnt == "".join(f"{turn.text}<end_of_turn>" for turn in trajectory.turns)
    assert "<end_of_turn><end_of_turn>" not in tokenizer.decode(rows["input_ids"][0])


def test_an_episode_without_a_valid_turn_is_no_row():
    tokenizer = CASES["chatml"].tokenizer()
    trajectory = play(["?", "?", "?"], tokenizer, {"context": "chat"})
    assert trajectory.steps == 3  # random actions were played
    assert len(training_rows([logged(trajectory)], tokenizer)) == 0


@pytest.fixture(scope="module")
def tiny():
    env = make_env(BANDIT, **SMALL)
    tokenizer = tiny_tokenizer([env.instructions, "ACTION=blue ACTION=green"], 400)
    return tiny_model(tokenizer, hidden_size=32).eval(), tokenizer


@CONTEXTS
@pytest.mark.parametrize(("env_id", "env_kwargs"), [(BANDIT, SMALL), (GAME, {})], ids=["bandit", "tictactoe"])
def test_a_model_s_own_episodes(tmp_path, tiny, env_id, env_kwargs, reading):
    """Random weights write rubbish. It is taken for valid here, so that every sampled token is in a row."""
    model, tokenizer = tiny
    trajectories = play_model(model, tokenizer, env_id, range(3), env_kwargs=env_kwargs, max_new_tokens=5, **reading)
    trajectories = [
        dataclasses.replace(
            one, turns=tuple(dataclasses.replace(turn, parsed=ParsedAction(turn.executed)) for turn in one.turns)
        )
        for one in trajectories
    ]
    episodes = through_a_file(tmp_path, log_episodes(trajectories, env_id, env_kwargs))
    expected = [row for one in trajectories for row in rollout_rows(one, reading["context"] == "chat")]
    assert pairs(training_rows(episodes, tokenizer, **reading)) == expected


def test_sft_trains_on_these_tokens_and_no_others(tmp_path):
    """TRL's trainer takes the rows as they are: its loss is the mean over the labels, worked by hand."""
    folder = save_tiny_model(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    episodes = [
        logged(play(texts, tokenizer, {"context": "chat"})) for texts in (["ACTION=a"] * 3, ["?", "ACTION=b", "?"])
    ]
    rows = training_rows(episodes, tokenizer)
    args = SFTConfig(
        str(tmp_path / "out"), max_length=None, bf16=False, use_cpu=True, report_to=[], per_device_train_batch_size=2
    )
    trainer = SFTTrainer(folder, args, train_dataset=rows, processing_class=tokenizer)
    batch = next(iter(trainer.get_train_dataloader()))
    for ids, labels in pairs(rows):
        (row,) = [number for number, other in enumerate(batch["labels"].tolist()) if other[: len(labels)] == labels]
        assert batch["input_ids"][row, : len(ids)].tolist() == ids
        assert set(batch["labels"][row, len(labels) :].tolist()) <= {-100}
    model = trainer.model.eval()
    losses = []
    for ids, labels in pairs(rows):
        with torch.no_grad():
            logps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        losses += [-logps[place - 1, label].item() for place, label in enumerate(labels) if label != -100]
    with torch.no_grad():
        assert trainer.compute_loss(model, batch).item() == pytest.approx(sum(losses) / len(losses), abs=1e-5)


# -- other forms ------------------------------------------------------------------------------------------------------


def test_answers_are_asked_as_in_sampling(tmp_path, tiny, monkeypatch):
    """A text prompt and a conversation: the ids before the answer are those that `answer_questions` feeds."""
    model, tokenizer = tiny
    prompts = ["What is 1+1?\n", [{"role": "user", "content": "And 2+2?"}]]
    asked = []

    def spy(backend, prompt_ids, *args, **kwargs):
        asked.extend(prompt_ids)
        return answer_prompts(backend, prompt_ids, *args, **kwargs)

    from trl_agents import questions

    answer_prompts = questions.answer_prompts
    monkeypatch.setattr(questions, "answer_prompts", spy)
    answer_questions(model, tokenizer, prompts, max_new_tokens=2)
    episodes = through_a_file(tmp_path, log_answers(prompts, [["two"], ["four", "five", "six"]], [1, 0.5, 0, None]))
    assert [episode.reward for episode in episodes] == [1, 0.5, 0]
    assert episodes[1].group == episodes[2].group != episodes[0].group
    for (ids, labels), prompt_ids, text in zip(
        pairs(training_rows(episodes, tokenizer)), [asked[0], asked[1], asked[1]], ["two", "four", "five"], strict=True
    ):
        assert ids[: len(prompt_ids)] == prompt_ids and set(labels[: len(prompt_ids)]) == {-100}
        assert ids[len(prompt_ids) :] == labels[len(prompt_ids) :] == [*tokenizer.encode(text), tokenizer.eos_token_id]


def test_conversations_of_others(tmp_path):
    """Every assistant message is learnt, but those of a given prompt; the rest is read."""
    user, model, system = ({"role": role, "content": f"{role} says"} for role in ("user", "assistant", "system"))
    lines = [
        {"messages": [system, user, model, user, model], "reward": 1},
        {"prompt": [user, model, user], "completion": [model], "reward": 2.5, "from": "elsewhere"},
    ]
    (tmp_path / "logs.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    episodes = read_episodes(tmp_path / "logs.jsonl")
    assert [episode.reward for episode in episodes] == [1, 2.5]
    assert read_episodes(tmp_path / "logs.jsonl") == through_a_file(tmp_path, episodes)
    tokenizer = CASES["chatml"].tokenizer()
    rows = pairs(training_rows(episodes, tokenizer))
    reply = "assistant says<|im_end|>"
    assert [tokenizer.decode([label for label in labels if label != -100]) for _, labels in rows] == [reply * 2, reply]
    assert tokenizer.decode(rows[0][0]).startswith("<|im_start|>system\nsystem says<|im_end|>\n<|im_start|>user")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "this is no JSON"),
        ("[1]", "an episode is an object, and this is list"),
        ("{}", "this nothing"),
        ('{"prompt": "a", "reward": 1}', "this prompt, reward"),
        ('{"prompt": "a", "completion": "b"}', "`reward` is missing"),
        ('{"prompt": "a", "completion": "b", "reward": "1"}', "`reward` must be a number, and is '1'"),
        ('{"prompt": "a", "completion": "b", "reward": NaN}', "`reward` must be a number, and is nan"),
        ('{"prompt": "a", "completion": [], "reward": 1}', "both texts or both lists"),
        ('{"prompt": [], "completion": [], "reward": 1}', "nothing to learn"),
        ('{"messages": [{"role": "user", "content": "a"}], "reward": 1}', "nothing to learn"),
        ('{"messages": [{"role": "user"}], "reward": 1}', "each with the texts `role` and `content`"),
        ('{"turns": [1]}', "`turns` must be a list of objects"),
        ('{"turns": {}}', "`turns` must be of type list"),
        (
            '{"turns": [{"text": "a"}, {"action": "a"}]}',
            "turn 1: `text`, what the player wrote, is missing among action",
        ),
        ('{"turns": [{"text": "a", "valid": "no"}]}', "turn 0: `valid` must be of type bool"),
        (
            '{"turns": [{"text": "a", "valid": false, "reason": "ugly"}]}',
            "turn 0: `reason` is 'ugly': use one of no_ma",
        ),
        ('{"turns": []}', "`turns` is empty"),
        ('{"messages": [{"role": "assistant", "content": "a"}], "reward": 1}', "begins with the assistant"),
        ('{"turns": [{"text": "a"}], "stop": "bored"}', "`stop` is 'bored': use one of terminated, truncated"),
        ('{"turns": [{"text": "a"}], "seed": "7"}', "`seed` must be of type int"),
        ('{"turns": [{"text": "a"}], "env_id": 7}', "`env_id` must be of type str"),
        ('{"turns": [{"text": "a", "action": 7}]}', "turn 0: `action` must be a text or null, and is 7"),
        ('{"turns": [{"text": "a", "action_ids": ["a"]}]}', "turn 0: `action_ids` must be a list of whole numbers"),
        (
            f'{{"prompt": "a", "completion": "b", "reward": {"9" * 400}}}',
            "`reward` must be a number, and has 400 digits",
        ),
        ("[" * 100_000, "this is no JSON"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, said):
    path = tmp_path / "logs.jsonl"
    path.write_text('{"prompt": "a", "completion": "b", "reward": 1}\n\n' + line)
    with pytest.raises(ValueError) as error:
        read_episodes(path)
    assert f"{path}, line 3: " in str(error.value) and said in str(error.value)


def test_an_empty_file(tmp_path):
    (tmp_path / "logs.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no episode"):
        read_episodes(tmp_path / "logs.jsonl")


def test_an_episode_of_the_least_words(tmp_path):
    """`turns` with `text` are enough: what is not said has the values of a log of valid actions."""
    (tmp_path / "logs.jsonl").write_text(
        '{"turns": [{"text": "ACTION=b", "reward": 0.5}, {"text": "c", "reward": 1}]}'
    )
    (episode,) = read_episodes(tmp_path / "logs.jsonl")
    assert episode.reward == 1.5 and [turn.executed for turn in episode.trajectory.turns] == ["ACTION=b", "c"]
    assert not episode.has_invalid and not episode.is_fault
    assert len(training_rows([episode], CASES["chatml"].tokenizer())) == 1


def test_a_scripted_player_s_episodes(tmp_path):
    """In words, they are the conversations of the warm-up, reply for reply."""
    env = make_env(BANDIT, **SMALL)
    trajectories = [put_into_words(play_episode(env, RandomAgent(), seed=seed)) for seed in range(3)]
    episodes = log_episodes(trajectories, BANDIT, SMALL)
    assert through_a_file(tmp_path, episodes)[0].trajectory.turns[1].text.endswith(trajectories[0].turns[1].executed)
    messages = play_transcripts(lambda: make_env(BANDIT, **SMALL), RandomAgent(), range(3))["messages"][:]
    for row, trajectory in zip(messages, trajectories, strict=True):
        assert [message["content"] for message in row[1::2]] == [turn.text for turn in trajectory.turns]
        assert trajectory.turns[0].text.startswith(plain_rationale("", trajectory.turns[0].executed))
    row = training_rows(episodes[:1], tiny_tokenizer(["a"], 300))[0]
    tokenizer = tiny_tokenizer(["a"], 300)
    context = tokenizer.apply_chat_template(messages[0][:-1], tokenize=False).removesuffix("\n")
    assert tokenizer.decode(row["input_ids"]) == context


# -- the best of them -------------------------------------------------------------------------------------------------


def answer(prompt, completion, reward):
    return LoggedEpisode(reward, prompt=prompt, completion=completion)


POOL = [
    answer("easy", "a", 5),
    answer("easy", "b", 4),
    answer("easy", "b", 4),
    answer("hard", "c", 1),
    answer("hard", "d", 2),
    answer("hard", "e", 0),
    answer("easy", "f", 3),
]


@pytest.mark.parametrize(
    ("kwargs", "kept"),
    [
        ({}, "abcdef"),
        ({"share": 0.5}, "abf"),
        ({"share": 0.51}, "abdf"),
        ({"share": 0.34, "by_group": True}, "abcd"),
        ({"share": 0.01, "by_group": True}, "ad"),
        ({"min_reward": 2}, "abdf"),
        ({"min_reward": 9}, ""),
        ({"share": 0.01, "by_group": True, "min_reward": 3}, "a"),
        ({"most": 1}, "ad"),
        ({"most": 2}, "abcd"),
        ({"most": 2, "min_reward": 2, "share": 0.5}, "ab"),
    ],
)
def test_the_best(kwargs, kept):
    assert "".join(episode.completion for episode in best_episodes(POOL, **kwargs)) == kept


def test_equal_rewards_keep_their_order():
    pool = [answer(str(number), "x", number % 2) for number in range(6)]
    assert [episode.prompt for episode in best_episodes(pool, share=0.6)] == ["0", "1", "3", "5"]


@pytest.mark.parametrize(
    ("kwargs", "said"), [({"share": 0}, "share=0"), ({"share": 2}, "share=2"), ({"most": 0}, "most=0")]
)
def test_impossible_choices(kwargs, said):
    with pytest.raises(ValueError, match=said):
        best_episodes([], **kwargs)


def test_faults_and_invalid_turns():
    def episode(stop=StopReason.TERMINATED, valid=True, text="a", seed=0):
        parsed = ParsedAction("a") if valid else ParsedAction(None, InvalidReason.NO_MATCH)
        turn = Turn(observation="", input_ids=(), action_ids=(), text=text, parsed=parsed, executed="a", reward=1.0)
        return logged(Trajectory(seed, (turn,), stop))

    fine, broken, invalid = episode(), episode(StopReason.ENV_ERROR, text="b"), episode(valid=False, text="c")
    pool = [broken, fine, invalid, episode(), episode(seed=1)]
    assert best_episodes(pool) == [fine, invalid, pool[4]]  # the same words at another seed are no duplicate
    assert best_episodes(pool, allow_invalid=False) == [fine, pool[4]]
    assert best_episodes(pool, by_group=True, share=0.1) == [fine, pool[4]]


def test_groups_are_of_one_start():
    one = play_episode(make_env(BANDIT, **SMALL), UCBAgent(), seed=3)
    other = play_episode(make_env(BANDIT, **SMALL), RandomAgent(), seed=3)
    (first,), (second,) = log_episodes([one], BANDIT, SMALL), log_episodes([other], BANDIT, SMALL)
    assert first.group == second.group
    assert first.group != log_episodes([one], BANDIT, {**SMALL, "horizon": 4})[0].group
    assert first.group != log_episodes([dataclasses.replace(one, seed=4)], BANDIT, SMALL)[0].group


def test_sampling_gives_groups_that_differ_by_luck(tiny):
    model, tokenizer = tiny
    played = sample_episodes(model, tokenizer, BANDIT, range(5, 8), n=3, env_kwargs=SMALL, max_new_tokens=4)
    assert [trajectory.seed for trajectory in played] == [5, 5, 5, 6, 6, 6, 7, 7, 7]
    texts = [tuple(turn.text for turn in trajectory.turns) for trajectory in played]
    assert len(set(texts)) == 9
    again = sample_episodes(model, tokenizer, BANDIT, range(5, 8), n=3, env_kwargs=SMALL, max_new_tokens=4)
    assert [tuple(turn.text for turn in trajectory.turns) for trajectory in again] == texts
    other = sample_episodes(model, tokenizer, BANDIT, range(5, 8), n=3, seed=1, env_kwargs=SMALL, max_new_tokens=4)
    assert not {tuple(turn.text for turn in trajectory.turns) for trajectory in other} & set(texts)
