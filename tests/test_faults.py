# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Environments that fail, in the real loop: what is begun again, what is lost, and that nothing else is."""

import collections
import dataclasses
import functools
import itertools
import math
import re
import threading
import time

import numpy as np
import pytest
from fault_checks import ALL, check_nonce, echo, play_counting
from faulty_env import Moody, Nonce
from scripted_rollout import Scripted, Steps, bandit, go, play, seeds, tokenizer

from trl_agents.actions import ActionParser
from trl_agents.contexts import Briefing, ChatContext, WindowContext
from trl_agents.rollout.faults import MAX_CHARACTERS, Fault
from trl_agents.rollout.generation import Sampling, SlotBackend
from trl_agents.rollout.metrics import combine_metrics, rollout_metrics
from trl_agents.rollout.places import REPLACEMENTS
from trl_agents.rollout.play import Episode, Player, Rules
from trl_agents.rollout.workers import EnvPool
from trl_agents.tiny import tiny_model
from trl_agents.types import StopReason


class TestAnswersGoWhereTheyBelong:
    @pytest.mark.parametrize("context", [ChatContext, WindowContext])
    def test_with_random_delays(self, context):
        check_nonce(play(Nonce, echo, seeds(30), n_slots=8, context=context))

    def test_with_faults_among_them(self):
        class Unlucky(Moody):
            begun = collections.Counter()

        trajectories, clock = play_counting(Unlucky, echo, seeds(60), n_slots=8, timeout=0.2, patience=0.02)
        check_nonce(trajectories)
        faults = clock.faults
        assert faults.kinds[Fault.CRASH] > 0 and faults.kinds[Fault.TIMEOUT] > 0
        assert faults.retried > 0 and faults.calls >= 60 + sum(len(t.turns) for t in trajectories)

    def test_a_late_answer_shifts_nothing(self):
        """The first environment hangs; it comes back in the middle of a later episode, in the same place."""
        hang, came_back, number = threading.Event(), threading.Event(), itertools.count()

        class Hanging(Nonce):
            def __init__(self):
                self.number = next(number)

            def step(self, action):
                if self.number == 0:
                    assert hang.wait(20)
                    came_back.set()
                    return "say w000000", 100.0, False, False, {"legal_actions": ["w000000"]}
                return super().step(action)

        class Releasing(Scripted):
            def step(self):
                if len(self.asked) == 3:
                    hang.set()
                    assert came_back.wait(20)
                    time.sleep(0.01)  # its answer is in the queue now
                return super().step()

        trajectories, clock = play_counting(
            Hanging, Releasing(echo), [Episode(1), Episode(2), Episode(3)], timeout=2, patience=0.02
        )
        check_nonce(trajectories)
        assert clock.faults.first == ["seed 1, turn 0: no answer to `step` within 2 s"]

    @pytest.mark.parametrize("interruption", [KeyboardInterrupt, ValueError])
    def test_after_an_interruption(self, interruption):
        """A pool is used again: what it owes to the rollout that was broken off must not reach the next."""
        gate = threading.Event()

        class Gated(Nonce):
            def reset(self, *, seed=None, options=None):
                self.seed = seed
                return super().reset(seed=seed)

            def step(self, action):
                assert self.seed != 2 or gate.wait(20)
                return super().step(action)

        class Interrupted(Scripted):
            def step(self):
                if len(self.asked) >= 8:
                    raise interruption
                return super().step()

        pool = EnvPool(Gated, 4, timeout=20)
        with pytest.raises(interruption):
            play(None, Interrupted(echo), seeds(12), pool=pool)  # in the place of the third, a question is open
        gate.set()
        check_nonce(play(None, echo, seeds(12), pool=pool))
        pool.close()


def failing(at, error):
    """Steps, of which one with the seed 3 fails."""

    class Failing(Steps):
        def reset(self, *, seed=None, options=None):
            self.seed = seed
            if at == "reset" and seed == 3:
                raise error.with_traceback(None)
            return super().reset(seed=seed)

        def step(self, action):
            if at == "step" and self.seed == 3 and self.left == 2:
                raise error.with_traceback(None)
            return super().step(action)

    return Failing


class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError


class Unshowable(SyntaxError):
    """Python's own way to show it fails, on what the environment says was wrong where."""

    def __init__(self):
        super().__init__("x", ("f", 1, object(), "x"))


ERRORS = [RuntimeError("no disk"), SystemExit(3), KeyboardInterrupt(), Unprintable(), Unshowable(), OSError("\udcff")]


class TestStartingAnew:
    @pytest.mark.parametrize("at", ["reset", "step"])
    @pytest.mark.parametrize("error", ERRORS)
    def test_one_of_eight_always_fails(self, at, error):
        made = []

        class Counted(failing(at, error)):
            def __init__(self):
                made.append(self)

        trajectories, clock = play_counting(Counted, go, [Episode(seed) for seed in range(1, 9)], n_slots=8)
        assert [trajectory.stop.is_fault for trajectory in trajectories] == [seed == 3 for seed in range(1, 9)]
        lost = trajectories[2]
        assert lost.stop is StopReason.ENV_ERROR
        assert type(error).__name__ in lost.error
        assert lost.error.encode()  # it is logged and written to files
        if isinstance(error, RuntimeError):
            assert re.fullmatch(rf"RuntimeError: no disk \(test_faults.py, line \d+, in {at}\)", lost.error)
            assert clock.faults.first == [f"seed 3, turn {int(at == 'step')}: {lost.error}"] * 3
        assert [len(trajectory.turns) for trajectory in trajectories] == [1, 2, int(at == "step"), 4, 5, 6, 7, 8]
        assert len(made) == 8 + ALL - 1  # a fresh environment each time
        assert clock.faults.kinds == {Fault.CRASH: ALL}
        assert (clock.faults.retried, clock.faults.replaced) == (1, 1)
        metrics = combine_metrics(rollout_metrics(trajectories, clock))
        shares = [metrics[f"agents/{name}_share"] for name in ("retried", "replaced", "lost")]
        assert shares == [1 / 8] * 3 and metrics["agents/stop_env_error"] == 1 / 8
        # Resets: 8 and one a start; steps: 33 of the others, 1 or 2 a start of the one that fails
        calls = 7 + 33 + ALL * (1 if at == "reset" else 3)
        assert metrics["agents/fault_crash"] == ALL / calls and metrics["agents/fault_timeout"] == 0

    def test_the_first_time_with_the_same_luck_then_with_another(self):
        class Lucky(Scripted):
            drawn = []

            def submit(self, slot, prompt_ids, max_new_tokens, rng):
                self.drawn.append(rng.random())
                super().submit(slot, prompt_ids, max_new_tokens, rng)

        backend = Lucky(go)
        (trajectory,), _ = play_counting(failing("step", OSError()), backend, [Episode(3, (5,))])
        assert trajectory.stop.is_fault
        drawn = backend.drawn[::2]  # two turns each
        assert len(drawn) == ALL and drawn[::2] == drawn[1::2] and len(set(drawn)) == 1 + REPLACEMENTS

    def test_a_fault_that_does_not_repeat_leaves_no_trace(self):
        """Sampling and all: the model's replies are those of a run without the fault."""
        model = tiny_model(tokenizer(), hidden_size=32, max_position_embeddings=1024).eval()
        sampling = Sampling((tokenizer().eos_token_id,), temperature=1.0)
        numbers = itertools.count()

        def factory(fails):
            """The first three fail in their third step."""
            env, steps, is_first = bandit(horizon=4), itertools.count(), next(numbers) < 3
            step = env.step

            def failing_step(action):
                if fails and is_first and next(steps) == 2:
                    raise ConnectionError
                return step(action)

            env.step = failing_step
            return env

        def replies(fails):
            pool = EnvPool(functools.partial(factory, fails), 3)
            rules = Rules(max_new_tokens=6, max_length=1024)
            player = Player(
                pool,
                SlotBackend(model, 3, sampling),
                ChatContext(tokenizer()),
                ActionParser(),
                Briefing.of(bandit()),
                rules,
            )
            trajectories, clock = player.play([Episode(seed % 2, (seed,)) for seed in range(6)])
            pool.close()
            return [dataclasses.replace(trajectory, env_seconds=0.0) for trajectory in trajectories], clock

        failed, clock = replies(True)
        healthy, none = replies(False)
        assert not none.faults.kinds and clock.faults.kinds == {Fault.CRASH: 3} and clock.faults.retried == 3
        assert failed == healthy

    def test_a_factory_that_fails_at_times(self):
        attempts = itertools.count()

        def factory():
            if next(attempts) % 2 == 0:
                raise OSError("no licence")
            return Steps()

        trajectories, clock = play_counting(factory, go, [Episode(2)] * 3)
        assert [trajectory.stop for trajectory in trajectories] == [StopReason.TERMINATED] * 3
        assert clock.faults.kinds == {Fault.MAKE: 1}
        assert clock.faults.first[0].startswith("seed 2, turn 0: OSError: no licence")

    def test_a_factory_that_never_works(self):
        def factory():
            raise OSError("no licence")

        trajectories, clock = play_counting(factory, go, [Episode(2)] * 3, n_slots=2)
        assert [trajectory.stop for trajectory in trajectories] == [StopReason.ENV_ERROR] * 3
        assert clock.faults.kinds == {Fault.MAKE: 3 * ALL}

    def test_an_error_is_told_in_short(self):
        (trajectory,), _ = play_counting(failing("step", RuntimeError("x" * 10**6)), go, [Episode(3)])
        assert len(trajectory.error) < 1000


class TestMalformedAnswers:
    @pytest.mark.parametrize(
        ("answer", "error"),
        [
            (("ok", math.nan, False, False, {}), "reward nan"),
            (("ok", math.inf, False, False, {}), "reward inf"),
            (("ok", None, False, False, {}), "reward None"),
            (("ok", "1.0", False, False, {}), r"reward '1.0' \(str\), not a number"),
            (("ok", 10**400, False, False, {}), "reward 1000.*not a number"),
            ((None, 1.0, False, False, {}), r"observation None \(NoneType\) is no str"),
            ((b"ok", 1.0, False, False, {}), r"observation b'ok' \(bytes\) is no str"),
            (("x" * 10**6, 1.0, False, False, {}), "observation has 1,000,000 characters"),
            (("half \ud800", 1.0, False, False, {}), "observation is no text that can be encoded"),
            (("ok", 1.0, False, {}), "not .observation, reward, terminated, truncated, info"),
            (None, "returned None"),
            ("okiko", "returned 'okiko'"),
            (("ok", 1.0, False, False, None), r"info None \(NoneType\) is no dict"),
            (("ok", 1.0, np.zeros(2), False, {}), "terminated=array.*not a bool"),
            (("ok", 1.0, "no", False, {}), "terminated='no'.*not a bool"),
            (("ok", 1.0, False, None, {}), "truncated=None.*not a bool"),
            (("ok", 1.0, False, False, {"legal_actions": [0, 1]}), r"legal_actions'\] is \[0, 1\] .*no list of str"),
            (("ok", 1.0, False, False, {"legal_actions": "go"}), "legal_actions'. is 'go'.*no list of str"),
            (("ok", 1.0, False, False, {"legal_actions": ["\udfff"]}), "legal action is no text"),
            (("ok", 1.0, False, False, {"transition": 7}), "transition'. is 7 .int., no str"),
            (("ok", 1.0, False, False, {"legal_actions": []}), "legal_actions'. is empty"),
            (("ok", 1e200, False, False, {}), r"reward 1e\+200: finite ones up to 1e\+15"),
        ],
    )
    def test_of_a_step(self, answer, error):
        class Malformed(Steps):
            def step(self, action):
                return answer if self.left == 7 else super().step(action)

        trajectories, clock = play_counting(Malformed, go, [Episode(7), Episode(2)], n_slots=2)
        assert trajectories[0].stop is StopReason.ENV_ERROR and trajectories[0].turns == ()
        assert re.search(error, trajectories[0].error)
        assert trajectories[1].stop is StopReason.TERMINATED
        assert clock.faults.kinds == {Fault.MALFORMED: ALL}

    @pytest.mark.parametrize(
        "answer",
        [
            *("ok", ("ok",), (1, {}), ("ok", {"instructions": 1}), ("ok", None), ("x" * 10**6, {})),
            ("ok", {"legal_actions": []}),
            ("ok", {"instructions": "word " * 2000}),  # of this episode, which has no room for them
        ],
    )
    def test_of_a_reset(self, answer):
        class Malformed(Steps):
            def reset(self, *, seed=None, options=None):
                return answer if seed == 7 else super().reset(seed=seed)

        trajectories, clock = play_counting(Malformed, go, [Episode(7), Episode(2)], max_length=500)
        assert [trajectory.stop for trajectory in trajectories] == [StopReason.ENV_ERROR, StopReason.TERMINATED]
        assert clock.faults.kinds == {Fault.MALFORMED: ALL}

    def test_regret_that_is_no_number(self):
        """Nobody asks environments for it, so nothing is lost where it is something else."""

        class Regretting(Steps):
            def step(self, action):
                regret = {7: math.nan, 6: 10**400, 5: "much", 4: None}.get(self.left, 0.5)
                return *super().step(action)[:4], {"legal_actions": ["go"], "regret": regret}

        trajectories, clock = play_counting(Regretting, go, [Episode(7), Episode(2)])
        metrics = combine_metrics(rollout_metrics(trajectories, clock))
        assert metrics["agents/regret_mean"] == (1.5 + 1.0) / 2 and not clock.faults.kinds

    def test_observations_that_are_long_but_no_fault(self):
        """One that does not fit ends the episode there; as the first one it leaves nothing to learn from."""

        class Long(Steps):
            def reset(self, *, seed=None, options=None):
                answer = super().reset(seed=seed)
                return ("word " * 2000, answer[1]) if seed == 7 else answer

            def step(self, action):
                answer = super().step(action)
                return ("x" * MAX_CHARACTERS, *answer[1:]) if self.left == 1 else answer

        first, later = play(Long, go, [Episode(7), Episode(3)], max_length=500)
        assert (later.stop, len(later.turns)) == (StopReason.CONTEXT_FULL, 2)
        assert first.stop is StopReason.ENV_ERROR and re.search(r"takes \d{4} tokens .* may have 500", first.error)

    def test_values_of_numpy_are_welcome(self):
        class Numbers(Steps):
            def step(self, action):
                observation, reward, terminated, truncated, info = super().step(action)
                return observation, np.float32(reward), np.bool_(terminated), np.bool_(truncated), info

        (trajectory,) = play(Numbers, go, [Episode(2)])
        assert trajectory.stop is StopReason.TERMINATED
        assert [type(turn.reward) for turn in trajectory.turns] == [float, float]

    def test_the_past_stands_as_it_was(self):
        """An environment that goes on changing what it handed out."""

        class Changing(Steps):
            def reset(self, *, seed=None, options=None):
                self.info = {"legal_actions": ["go", "stop"], "n": 0}
                return super().reset(seed=seed)[0], self.info

            def step(self, action):
                self.info["n"] += 1
                self.info["legal_actions"].append("more")
                return *super().step(action)[:4], self.info

        (trajectory,) = play(Changing, go, [Episode(3)])
        assert [turn.info["n"] for turn in trajectory.turns] == [1, 2, 3]
        assert [len(turn.info["legal_actions"]) for turn in trajectory.turns] == [3, 4, 5]
        assert trajectory.reset_info == {"legal_actions": ["go", "stop"], "n": 0}


class TestTimeouts:
    def test_all_hang(self):
        release = threading.Event()

        class Hanging(Steps):
            def reset(self, *, seed=None, options=None):
                release.wait(20)
                return super().reset(seed=seed)

        trajectories, clock = play_counting(Hanging, go, [Episode(1)] * 3, n_slots=3, timeout=0.05)
        release.set()
        assert clock.faults.kinds == {Fault.TIMEOUT: 3 * ALL}
        assert [trajectory.stop for trajectory in trajectories] == [StopReason.ENV_TIMEOUT] * 3
        assert all(trajectory.env_seconds >= 0.05 for trajectory in trajectories)

    def test_a_timeout_counts_from_each_question(self):
        class Steady(Steps):
            def step(self, action):
                time.sleep(0.03)
                return super().step(action)

        trajectories = play(Steady, go, [Episode(24)] * 2, n_slots=2, timeout=0.6)
        assert [trajectory.stop for trajectory in trajectories] == [StopReason.TERMINATED] * 2

    def test_slow_decoding_is_no_timeout(self):
        """The answer is there, only nobody has looked."""

        class Busy(EnvPool):
            def _ask(self, *question):
                super()._ask(*question)
                time.sleep(0.3)

        pool = Busy(Steps, 1, timeout=0.2)
        (trajectory,) = play(None, go, [Episode(2)], pool=pool)
        pool.close()
        assert trajectory.stop is StopReason.TERMINATED

    def test_a_reset_may_have_a_time_of_its_own(self):
        release = threading.Event()

        class Slow(Steps):
            def reset(self, *, seed=None, options=None):
                time.sleep(0.6)
                return super().reset(seed=seed)

            def step(self, action):
                release.wait(20)
                return super().step(action)

        pool = EnvPool(Slow, 1, timeout=0.1, reset_timeout=20)
        pool.reset(0, 1)
        assert [reply.fault for reply in pool.collect(0.0, block=True)] == [None]
        pool.step(0, "go")
        (reply,) = pool.collect(0.0, block=True)
        assert (reply.fault, reply.error) == (Fault.TIMEOUT, "no answer to `step` within 0.1 s")
        release.set()
        pool.close()

    @pytest.mark.parametrize("name", ["timeout", "reset_timeout"])
    def test_misuse(self, name):
        with pytest.raises(ValueError, match=f"^{name}=0"):
            EnvPool(Steps, 1, **{name: 0})
