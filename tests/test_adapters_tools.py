# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""TRL's environment classes as ours, tool calls as text, and our environments as TRL's."""

import asyncio
import functools
import importlib.resources
import json
import random

import numpy as np
import pytest
from adapted import check_100_episodes, train_two_steps
from datasets import Dataset
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scripted import save_tiny_model
from transformers import AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from trl_agents.actions import ActionParser
from trl_agents.envs import check_env, make_env
from trl_agents.envs.adapters import ToolEnvironment, as_trl_environment
from trl_agents.envs.adapters.tool_calls import read_call


class Guess:
    """As TRL's documentation shows such classes: `reset` takes the dataset's columns, chance is the global one."""

    def __init__(self, top: int = 8):
        self.top = top

    def reset(self, **kwargs) -> str:
        self.number, self.done, self.asked = random.randint(1, self.top), False, 0
        return f"A number from 1 to {self.top}."

    def guess(self, number: int) -> str:
        """
        Guesses the number.

        Args:
            number: The guess.
        """
        self.done = number == self.number
        return "right" if self.done else "higher" if number < self.number else "lower"

    async def hint(self, kind: str = "parity"):
        """Tells something."""
        await asyncio.sleep(0)
        if kind != "parity":
            raise KeyError(kind)
        return {"even": self.number % 2 == 0}

    def get_reward(self) -> float:
        self.asked += 1
        return float(self.done)

    def _private(self):
        raise AssertionError("no tool")


class Dice:
    """Tools that draw, no text at the beginning, an asynchronous reward."""

    instructions = "Roll a six."

    def reset(self, seed=None):
        self.best = 0

    def roll(self, times: int = 1) -> int:
        """Rolls a die."""
        self.best = max(random.randint(1, 6) for _ in range(times))
        return self.best

    async def get_reward(self):
        return self.best / 6


class Silent:
    """No reward of its own."""

    def reset(self, *, options=None, **row):
        return [{"type": "text", "text": f"row {sorted(row)}"}]

    def note(self, text: str) -> None:
        """Takes a note."""


class Counted(Silent):
    """Is done after a note, as numpy says it."""

    def note(self, text: str) -> None:
        """Takes a note."""
        self.done = np.int64(1) == 1


def test_done_as_numpy_says_it():
    env = ToolEnvironment(Counted)
    env.reset(seed=0)
    assert env.step("note('a')")[2:4] == (True, False)


CLASSES = {
    "Guess": (Guess, {}, ["guess(number=3)", "guess(5)", "hint()", '{"name": "guess", "arguments": {"number": 2}}']),
    "Dice": (Dice, {"tools_draw": True, "max_calls": 3}, ["roll()", "roll(times=2)", "roll(0)", "finish()"]),
    "Silent": (Silent, {"instructions": "Take notes.", "max_calls": 2}, ["note('a')", "finish", "nothing", "note("]),
}


@pytest.mark.parametrize("name", CLASSES)
def test_100_episodes(name):
    environment, kwargs, answers = CLASSES[name]
    episodes = check_100_episodes(functools.partial(ToolEnvironment, environment, **kwargs), answers=answers)
    assert {episode[-1][2:4] for episode in episodes.values()} == {(True, False), (False, True)}
    assert all(step[1] == 0 for episode in episodes.values() for step in episode[:-1])
    rewards = {episode[-1][1] for episode in episodes.values()}
    assert rewards == {0.0} if name == "Silent" else len(rewards) > 1


@pytest.mark.parametrize("name", CLASSES)
def test_trains(name, tmp_path):
    environment, kwargs, answers = CLASSES[name]
    train_two_steps(functools.partial(ToolEnvironment, environment, **kwargs), tmp_path, answers[0])


def test_an_episode_by_hand():
    env = ToolEnvironment(Guess, top=4)
    for text in ("guess(number: int)\n    Guesses the number.", "hint(kind: str = 'parity')", "finish()"):
        assert text in env.instructions
    assert "_private" not in env.instructions and "get_reward" not in env.instructions
    observation, info = env.reset(seed=0)
    assert observation == "A number from 1 to 4." and "legal_actions" not in info
    number, answers = env.env.number, []
    for action in ("hint()", "hint(kind='all')", "guess(numbr=1)", "shout(1)", "not a call", "_private()"):
        answers.append(env.step(action)[0])
    assert answers[0] == json.dumps({"even": number % 2 == 0})
    assert answers[1] == "Error: KeyError: 'all'" and "unexpected keyword argument 'numbr'" in answers[2]
    assert "no tool shout. The tools are: guess, hint, finish." in answers[3] and "tool(name=" in answers[4]
    assert "no tool _private" in answers[5]
    assert env.step(f"guess({number})") == ("right", 1.0, True, False, {"tool": "guess"})
    assert env.env.asked == 1
    with pytest.raises(ValueError, match="No episode is on"):
        env.step("finish")


def test_ends():
    env = ToolEnvironment(Guess, max_calls=2)
    env.reset(seed=0)
    assert env.step("hint()")[2:4] == (False, False) and env.step("hint()")[1:4] == (0.0, False, True)
    env.reset(seed=0)
    assert env.step("finish()")[:4] == ("", 0.0, True, False)


def test_truncation_is_paid():
    env = ToolEnvironment(Dice, max_calls=1)
    env.reset(seed=0)
    text, reward, terminated, truncated, _ = env.step("roll()")
    assert (reward, terminated, truncated) == (int(text) / 6, False, True)


def test_rows_reach_reset():
    env = ToolEnvironment(Silent)
    assert env.reset(seed=4, options={"level": 2})[0] == "row ['level', 'seed']"


def test_by_name_and_mistakes():
    env = make_env("tools:test_adapters_tools:Guess", top=3)
    assert env.reset(seed=1)[0] == "A number from 1 to 3."
    for environment, message in (
        ("tools:test_adapters_tools:Nope", "'test_adapters_tools:Nope' is not `package.module:Class`"),
        ("tools:Nope", "'Nope' is not `package.module:Class`"),
        (functools.partial(ToolEnvironment, object), "object has no method `reset`"),
        (functools.partial(ToolEnvironment, type("Bare", (), {"reset": lambda self: None})), "no public methods"),
        (functools.partial(ToolEnvironment, Guess, max_calls=0), "max_calls=0"),
    ):
        with pytest.raises(ValueError, match=message):
            make_env(environment)
    with pytest.raises(ValueError, match=r"pass trl_agents.envs.adapters.ToolEnvironment"):
        check_env(Guess)


# -- calls as text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "call"),
    [
        ("guess(word='crane')", ("guess", (), {"word": "crane"})),
        ("guess", ("guess", (), {})),
        ("add(1, -2.5, [3, {'a': None}], flag=True)", ("add", (1, -2.5, [3, {"a": None}]), {"flag": True})),
        ('{"name": "f", "arguments": {"x": 1}}', ("f", (), {"x": 1})),
        ('{"name": "f", "arguments": "{\\"x\\": 1}"}', ("f", (), {"x": 1})),
        ('{"function": {"name": "f", "parameters": {"x": 1}}}', ("f", (), {"x": 1})),
        ('<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', ("f", (), {})),
        ("```python\nf(1)\n```", ("f", (1,), {})),
    ],
)
def test_calls(text, call):
    assert read_call(text) == call


@pytest.mark.parametrize(
    "text",
    ["", "f(", "f(x)", "f(**{'a': 1})", "a.f(1)", "f(1)(2)", "{", "{}", '{"name": 3}', "[1]", "f(__import__('os'))"],
)
def test_no_calls(text):
    with pytest.raises(ValueError, match="Write a call such as"):
        read_call(text)


@settings(max_examples=500, deadline=None)
@given(st.text() | st.text("(){}[]\"'\\:,=*fx01 \n\0", max_size=300))
@example("(" * 9999)
@example("{" * 99999)
@example("-" * 99999)
@example("f(" + "not " * 20000 + "1)")
@example("a." * 49999 + "a")
@example('{"a":' * 19999)
@example("1" * 99999)
def test_no_text_raises_anything_else(text):
    try:
        read_call(text)
    except ValueError:
        pass


def test_calls_of_templates_through_the_parser():
    parser = ActionParser(r"(?s)<tool_call>(.*?)</tool_call>")
    text = 'Let me see.\n<tool_call>\n{"name": "guess", "arguments": {"number": 3}}\n</tool_call>'
    assert read_call(parser.parse(text).action) == ("guess", (), {"number": 3})
    assert read_call(ActionParser().parse('So. ACTION=guess(word="crane")').action) == ("guess", (), {"word": "crane"})


# -- the other way round ----------------------------------------------------------------------------------------------

OURS = {"trl_agents/Bandit-v0": {"horizon": 3}, "trl_agents/TicTacToe-v0": {}, "gymnasium:FrozenLake-v1": {}}


@pytest.mark.parametrize("name", OURS)
def test_ours_as_trl_s_is_the_same_episode(name):
    """100 episodes through the tool, against the same played directly."""
    made, env = as_trl_environment(name, **OURS[name])(), make_env(name, **OURS[name])
    for seed in range(100):
        rng, total, ended = random.Random(seed), 0.0, False
        opening = made.reset(seed=seed, prompt=[{"role": "user", "content": ""}])
        observation, info = env.reset(seed=seed)
        assert env.instructions in opening and observation in opening
        while not ended:
            action = rng.choice(info["legal_actions"])
            observation, reward, terminated, truncated, info = env.step(action)
            total, ended = total + reward, terminated or truncated
            assert made.act(action).startswith(observation.strip())
        assert made.get_reward() == pytest.approx(total) and "over" in made.act(action)


def test_invalid_actions_in_trl():
    env = as_trl_environment("trl_agents/TicTacToe-v0")()
    env.reset(seed=0)
    assert env.act("9").startswith("That is no legal action. Legal actions: 0, 1, 2") and "Action=4" in env.act("4")
    assert "no legal action" in env.act("") and "no legal action" in env.act("4") and env.get_reward() == 0


class Calling(GRPOTrainer):
    """TRL's trainer, whose model writes a call of the tool, and after its answer a last word."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        texts = []
        for ids in prompt_ids:
            answered = self.processing_class.decode(ids).count("<tool_response>")
            call = json.dumps({"name": "act", "arguments": {"action": str(2 * len(texts))}})
            texts.append("Done." if answered else f"<tool_call>\n{call}\n</tool_call>")
        ids = [[*self.processing_class.encode(text), self.processing_class.eos_token_id] for text in texts]
        return ids, None


@pytest.mark.parametrize("name", OURS)
def test_ours_train_in_trl(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    folder = save_tiny_model(tmp_path / "model", ["act", "Done."], max_position_embeddings=8192)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = importlib.resources.files("trl") / "chat_templates" / "qwen3.jinja"
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    rows = [{"prompt": [{"role": "user", "content": "Play."}], "seed": seed} for seed in range(8)]
    args = GRPOConfig(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=2048,
        max_steps=2,
        report_to="none",
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
    )
    factory = as_trl_environment(name, **OURS[name])
    trainer = Calling(
        folder,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        environment_factory=factory,
    )
    trainer.train()
    assert trainer.state.global_step == 2
    assert [tool.__name__ for tool in trainer.tools] == ["act"]
    logs = trainer.state.log_history[0]
    assert logs["tools/call_frequency"] == 1 and logs["tools/failure_frequency"] == 0
    assert "rewards/TextEnvironment/mean" in logs
