# Licensed under the Apache License, Version 2.0 (see LICENSE).
import copy
import functools
import pickle
import random
import sys
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.wrappers import TimeLimit

from trl_agents.envs import Bandit, check_env, make_env


class Guess:
    """Guess a digit in three steps: the contract, and nothing of Gymnasium."""

    instructions = "Guess the digit, 0 or 1."

    def reset(self, *, seed=None, options=None):
        self.rng = random.Random(seed)
        self.steps = 0
        return "Guess!", {"legal_actions": ["0", "1"]}

    def step(self, action):
        self.steps += 1
        right = action == self.rng.choice("01")
        return f"{action} is {'right' if right else 'wrong'}", float(right), self.steps == 3, False, self.info()

    def info(self):
        return {"legal_actions": [] if self.steps == 3 else ["0", "1"]}

    def close(self):
        pass


def broken(name, **attributes):
    return type(name, (Guess,), attributes)


def reset_gives(*result):
    def reset(self, *, seed=None, options=None):
        Guess.reset(self, seed=seed)
        return result if len(result) != 1 else result[0]

    return broken("ResetGives", reset=reset)


def step_gives(**changes):
    names = ("observation", "reward", "terminated", "truncated", "info")

    def step(self, action):
        return tuple({**dict(zip(names, Guess.step(self, action), strict=True)), **changes}.values())

    return broken("StepGives", step=step)


def legal_actions_are(value):
    return reset_gives("Guess!", {"legal_actions": value})


class NeedsLength(Guess):
    def __init__(self, length):
        self.length = length


class CannotBegin(Guess):
    def __init__(self):
        self.length = {}["length"]


class OldReset(Guess):
    def reset(self):
        return Guess.reset(self)


class OldStep(Guess):
    def step(self, action):
        return Guess.step(self, action)[:4]


class NoSeed(Guess):
    def reset(self, *, seed=None, options=None):
        return f"Guess! ({random.SystemRandom().random()})", Guess.reset(self, seed=seed)[1]


class GlobalSeed(Guess):
    """Repeats its episode when played alone, and not beside another."""

    def reset(self, *, seed=None, options=None):
        random.seed(seed)
        result = Guess.reset(self, seed=seed)
        self.rng = random
        return result


class SeedOfInstance(Guess):
    made = 0

    def __init__(self):
        SeedOfInstance.made += 1
        self.number = SeedOfInstance.made

    def reset(self, *, seed=None, options=None):
        return Guess.reset(self, seed=1000 * seed + self.number if seed is not None else None)


class Leftover(Guess):
    episodes = 0

    def reset(self, *, seed=None, options=None):
        self.episodes += 1
        return f"Episode {self.episodes}", Guess.reset(self, seed=seed)[1]


class OneList(Guess):
    def reset(self, *, seed=None, options=None):
        Guess.reset(self, seed=seed)
        self.legal = ["0", "1", "2"]
        return "Guess!", {"legal_actions": self.legal}

    def step(self, action):
        self.legal.remove(action)
        return *Guess.step(self, action)[:4], {"legal_actions": self.legal}


class Crashes(Guess):
    def step(self, action):
        if self.steps == 2:
            raise KeyError("board")
        return Guess.step(self, action)


class ClosesOnce(Guess):
    def close(self):
        del self.steps


class Numbers(Guess):
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        return Guess.reset(self, seed=seed)[0], {}


class FreeText(Guess):
    """A question: any text is an answer."""

    def reset(self, *, seed=None, options=None):
        return Guess.reset(self, seed=seed)[0], {}

    def info(self):
        return {}


class Endless(Guess):
    def step(self, action):
        return "", 0.0, False, False, {"legal_actions": ["0", "1"]}


SHARED = Guess()


class TestGood:
    @pytest.mark.parametrize(
        "env",
        [
            "trl_agents/Bandit-v0",
            Bandit,
            lambda: Bandit(scenario="number", distribution="bernoulli", reasoning=False),
            lambda: TimeLimit(gymnasium.make("trl_agents/Bandit-v0"), 5),
            Guess,
            Guess(),
            Bandit(n_arms=30, means="normal"),
            TimeLimit(Bandit(), 5),
            step_gives(reward=np.float32(0.5), truncated=np.False_),
            step_gives(reward=1),
        ],
    )
    def test_is_quiet(self, env):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert check_env(env) is None


class Unshowable(Exception):
    def __repr__(self):
        raise RuntimeError("no repr")

    __str__ = __repr__


def raises(error):
    def step(self, action):
        raise error

    return broken("Raises", step=step)


class TestBroken:
    @pytest.mark.parametrize(
        ("env", "message"),
        [
            (broken("A", instructions=None), "`instructions` is None. Set it"),
            (broken("B", instructions=" \n"), "`instructions` is"),
            (broken("C", question=3), "`question` is 3"),
            (broken("D", step=None), "D has no method `step`. Define `def step"),
            (broken("E", close=None), "has no method `close`"),
            (object(), "object has no method `reset`"),
            (OldReset, "`reset` cannot be called as `reset.self, .*seed"),
            (broken("F", step=lambda self: None), "`step` cannot be called"),
            (reset_gives("Guess!"), "reset.. returned 'Guess!' .str.. Return the tuple"),
            (reset_gives("Guess!", {}, {}), "reset.. returned .*tuple"),
            (reset_gives(5, {}), "observation 5 .int.. Return a str"),
            (reset_gives("Guess!", None), "None .NoneType. as `info`. Return a dict"),
            (reset_gives("Guess!", {"state": 5}), "info.'state'.` as 5"),
            (legal_actions_are(("0", "1")), r"\('0', '1'\) \(tuple\). Give a list of str"),
            (legal_actions_are(None), "None .NoneType.. Give a list of str, or leave the key out"),
            (legal_actions_are([0, 1]), r"\[0, 1\] \(list\). Give a list of str"),
            (legal_actions_are([]), "no legal action in an episode that goes on"),
            (legal_actions_are(["0", ""]), "the legal action ''"),
            (legal_actions_are(["0", "1 "]), "the legal action '1 '"),
            (legal_actions_are(["up", "Up"]), "the same but for case"),
            (legal_actions_are(["up", "up"]), "the same but for case"),
            (OldStep, "step.'.'. returned .*tuple.. Return `.observation, reward, terminated"),
            (step_gives(observation=np.zeros(2)), "Return a str"),
            (step_gives(reward=float("nan")), "reward nan .float.. Return a finite float"),
            (step_gives(reward=float("inf")), "reward inf"),
            (step_gives(reward=1e16), r"reward 1e\+16 .*up to 1e\+15"),
            (
                step_gives(observation="x" * 10**6),
                "an observation of 1,000,000 characters, where 500,000 are the most",
            ),
            (reset_gives("\udcff", {}), "an observation that cannot be encoded"),
            (reset_gives("Guess!", {"instructions": 5}), "info.'instructions'.` as 5"),
            (broken("G", instructions="x" * 10**6), "`instructions` is a text of 1,000,000 characters"),
            (step_gives(reward="1"), "reward '1'"),
            (step_gives(reward=None), "reward None"),
            (step_gives(reward=True), "reward True"),
            (step_gives(terminated=None), "terminated=None .NoneType.. Return a bool"),
            (step_gives(truncated=0), "truncated=0"),
            (step_gives(info=[]), "as `info`. Return a dict"),
            (step_gives(info={"legal_actions": ["0"], "transition": None}), "info.'transition'.` as None"),
            (NoSeed, "With seed 0, played again, .*another observation after 0 steps.*Draw all randomness"),
            (GlobalSeed, "played in two instances side by side, the same actions gave another"),
            (SeedOfInstance, "in two instances side by side"),
            (lambda: SHARED, "The factory gave the same environment twice"),
            (reset_gives(Unshowable(), {}), "observation something that cannot be shown .Unshowable.. Return a str"),
            (raises(Unshowable), "raised Unshowable, which cannot be shown. It must not fail"),
            (raises(SystemExit), "raised SystemExit: . It must not fail"),
            (Leftover, "played again, .*another observation after 0 steps: 'Episode 3'"),
            (OneList, "changed the list"),
            (Crashes, "step.'.'. raised KeyError: 'board'"),
            (ClosesOnce, "close.., called a second time, raised AttributeError"),
            (Numbers, "`action_space` samples"),
        ],
    )
    def test_is_named(self, env, message):
        with pytest.raises(ValueError, match=message):
            check_env(env)

    def test_side_by_side_is_what_finds_a_global_generator(self):
        check_env(GlobalSeed())  # one instance: nothing to play beside it

    def test_keeps_the_cause(self):
        with pytest.raises(ValueError) as caught:
            check_env(Crashes)
        assert isinstance(caught.value.__cause__, KeyError)


class TestDoubtful:
    @pytest.mark.parametrize(
        ("env", "message"),
        [
            (FreeText, "`info.'legal_actions'.` is missing in 3 of 3 steps"),
            (reset_gives("Guess!", {}), "is missing in 1 of 3 steps"),
            (Endless, "did not end within 20 random steps"),
        ],
    )
    def test_warns(self, env, message):
        with pytest.warns(UserWarning, match=message) as caught:
            check_env(env, max_steps=20)
        assert [warning.filename for warning in caught] == [__file__]

    def test_text_space_is_sampled(self):
        played = []

        class Shouts(FreeText):
            action_space = gymnasium.spaces.Text(3, min_length=3, charset="!")

            def step(self, action):
                played.append(action)
                return FreeText.step(self, action)

        with pytest.warns(UserWarning, match="missing"):
            check_env(Shouts)
        assert set(played) == {"!!!"}


class TestMakeEnv:
    def test_id_with_kwargs(self):
        env = make_env("trl_agents/Bandit-v0", n_arms=3, horizon=9)
        assert (type(env), env.n_arms, env.horizon) == (Bandit, 3, 9)

    @pytest.mark.parametrize("env", [Guess, lambda: Guess()])
    def test_class_and_factory(self, env):
        assert type(make_env(env)) is Guess
        assert make_env(env) is not make_env(env)

    def test_factory_with_kwargs(self):
        assert make_env(Bandit, n_arms=4).n_arms == 4

    def test_wrappers_hide_nothing(self):
        env = make_env("trl_agents/Bandit-v0", max_episode_steps=2)
        bandit = Bandit()
        assert (env.instructions, env.question, env.history_header) == (
            bandit.instructions,
            bandit.question,
            bandit.history_header,
        )
        env.reset(seed=0)
        assert [env.step("blue")[2:4] for _ in range(2)] == [(False, False), (False, True)]
        assert getattr(env, "nothing_of_the_kind", None) is None
        with pytest.raises(AttributeError, match="nothing_of_the_kind"):
            _ = env.nothing_of_the_kind

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
    def test_wrapped_can_be_copied(self, duplicate):
        env = make_env(lambda: TimeLimit(Bandit(n_arms=3), 5))
        assert duplicate(env).instructions == env.instructions

    @pytest.mark.parametrize("id_", ["trl_agents/Bandt-v0", "trl_agents/Bandit-v99", "Bandit-v0", "bandit game", ""])
    def test_unknown_id(self, id_):
        with pytest.raises(ValueError, match=f"'{id_}'.*ids of trl_agents are: .*trl_agents/Bandit-v0"):
            make_env(id_)

    @pytest.mark.parametrize("env", [Guess(), None, 3])
    def test_not_a_recipe(self, env):
        with pytest.raises(ValueError, match="neither an id nor a class or factory"):
            make_env(env)

    def test_mistakes_in_kwargs_come_through(self):
        with pytest.raises(ValueError, match="horizon=0"):
            make_env("trl_agents/Bandit-v0", horizon=0)


@pytest.mark.parametrize(
    ("env", "said"),
    [
        (NeedsLength, r"TypeError: .*'length'. If it needs arguments, pass `functools.partial\(Class, .*env_kwargs"),
        (CannotBegin, "KeyError: 'length'"),
        (lambda: sys.exit(3), "SystemExit: 3"),
    ],
)
def test_what_cannot_be_made_is_explained(env, said):
    with pytest.raises(ValueError, match=f"The environment could not be made: {said}"):
        check_env(env)
    check_env(functools.partial(NeedsLength, 3))


def test_a_constructor_that_fails_the_second_time_is_explained():
    made = [Guess()]
    with pytest.raises(ValueError, match="could not be made: IndexError: pop from empty list"):
        check_env(lambda: made.pop())
