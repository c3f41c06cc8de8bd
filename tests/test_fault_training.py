# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Training with environments that fail."""

import collections
import itertools
import multiprocessing

import pytest
from fault_checks import ALL, check_nonce, echo, env_threads, wait_until
from faulty_env import Moody, Nonce
from scripted import ScriptedTrainer, make_config, save_tiny_model

from trl_agents.rollout.faults import Fault
from trl_agents.rollout.generation import Reply
from trl_agents.rollout.processes import EnvProcess


class Echo:
    """A backend that says what the last observation asks for."""

    def __init__(self, tokenizer):
        self.tokenizer, self.replies = tokenizer, []

    busy = property(lambda self: bool(self.replies))

    def submit(self, slot, prompt_ids, max_new_tokens, rng):
        ids = self.tokenizer.encode(echo(self.tokenizer.decode(prompt_ids)))
        self.replies.append((slot, Reply((*ids, self.tokenizer.eos_token_id), cut_off=False)))

    def step(self):
        replies, self.replies = self.replies, []
        return replies

    def drain(self):
        pass


class EchoTrainer(ScriptedTrainer):
    """Checks each rollout."""

    def _make_backend(self, *args):
        return Echo(self.text_tokenizer)

    def _record(self, trajectories, clock, mode):
        self.healthy = [trajectory for trajectory in trajectories if not trajectory.stop.is_fault]
        check_nonce(self.healthy)
        self.counts = [*getattr(self, "counts", []), (len(self.healthy), len(trajectories), clock.faults)]
        super()._record(trajectories, clock, mode)


@pytest.mark.filterwarnings("ignore:.*were lost to a fault")
@pytest.mark.parametrize("max_steps", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_crashes_in_5_and_hangs_in_2_of_100_steps_train_to_the_end(tmp_path, max_steps):
    texts = ["Say it. say w0123456789", *(f"ACTION=w{number:06d}" for number in range(0, 10**6, 99991))]
    folder = save_tiny_model(tmp_path / "model", texts)
    args = make_config(
        tmp_path / "out",
        max_steps=max_steps,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=32,
        advantage_estimator="group",
        env_timeout=0.2,
        env_reset_timeout=5.0,
    )
    before = env_threads()

    class Unlucky(Moody):
        begun = collections.Counter()

    trainer = EchoTrainer(folder, env=Unlucky, args=args)
    trainer.train()
    assert trainer.state.global_step == max_steps
    kept, played = (sum(counts[n] for counts in trainer.counts) for n in range(2))
    assert played == 8 * max_steps and kept >= 0.95 * played
    logs = [log for log in trainer.state.log_history if "agents/lost_share" in log]
    assert len(logs) == max_steps
    assert sum(log["agents/fault_crash"] for log in logs) > 0 and sum(log["agents/retried_share"] for log in logs) > 0
    if max_steps > 50:
        calls = sum(counts[2].calls for counts in trainer.counts)
        steps = calls - sum(counts[2].kinds[Fault.CRASH] + 8 for counts in trainer.counts)
        assert sum(counts[2].kinds[Fault.CRASH] for counts in trainer.counts) / steps == pytest.approx(0.05, abs=0.02)
    assert wait_until(lambda: set(env_threads()) <= set(before))  # those of earlier tests may go meanwhile


class Fails(Nonce):
    def step(self, action):
        raise ConnectionError("gone")


@pytest.mark.filterwarnings("ignore:.*were lost to a fault")
@pytest.mark.parametrize(
    ("share", "max_steps", "steps", "rollouts"),
    [(0.0, 4, 0, "rollout"), (0.5, 4, 1, "2 rollouts"), (0.9, 4, 2, "3 rollouts"), (1.0, 4, 4, None)]
    # The end comes before there were as many as the share is averaged over
    + [(0.5, 1, 1, "rollout"), (0.9, 2, 2, "2 rollouts"), (1.0, 1, 1, None)],
)
def test_training_stops_above_a_share(tmp_path, share, max_steps, steps, rollouts):
    folder = save_tiny_model(tmp_path / "model")
    args = make_config(tmp_path / "out", max_steps=max_steps, max_fault_share=share, advantage_estimator="group")
    before = env_threads()
    trainer = EchoTrainer(folder, env=Fails, args=args)
    if rollouts is None:
        trainer.train()
    else:
        told = rf"^100% of the episodes of the last {rollouts} were lost to .*max_fault_share={share}.*"
        told += r"seed \d, turn 0: ConnectionError: gone \(test_fault_training.py.*env_timeout"
        with pytest.raises(RuntimeError, match=told):
            trainer.train()
    assert trainer.state.global_step == steps
    assert not env_threads() - before


class FailsOnce(Nonce):
    """In the first rollout, always."""

    steps = itertools.count()

    def step(self, action):
        if next(self.steps) < 4 * ALL:
            raise ConnectionError("gone")
        return super().step(action)


@pytest.mark.filterwarnings("ignore:.*were lost to a fault")
@pytest.mark.parametrize(("share", "trains"), [(0.5, True), (0.3, False)])
def test_one_bad_rollout_is_forgiven_up_to_a_third(tmp_path, share, trains):
    FailsOnce.steps = itertools.count()
    settings = {"max_steps": 2, "max_completion_length": 32, "advantage_estimator": "group"}
    args = make_config(tmp_path / "out", max_fault_share=share, **settings)
    trainer = EchoTrainer(save_tiny_model(tmp_path / "model"), env=FailsOnce, args=args)
    if trains:
        trainer.train()
        assert list(trainer.lost_shares["train"]) == [1.0, 0.0]
    else:
        with pytest.raises(RuntimeError, match="^100% of the episodes of the last rollout were lost"):
            trainer.train()


class FailsOnOthers(Nonce):
    """In the episodes of evaluations, or only in those of training."""

    evaluations = True

    def reset(self, *, seed=None, options=None):
        self.fails = (seed >= 4) is self.evaluations
        return super().reset(seed=seed)

    def step(self, action):
        if self.fails:
            raise ConnectionError("gone")
        return super().step(action)


class FailsOnOwn(FailsOnOthers):
    evaluations = False


@pytest.mark.filterwarnings("ignore:.*were lost to a fault")
@pytest.mark.parametrize(
    ("env", "share", "steps", "told"),
    [
        (FailsOnOthers, 1.0, 3, None),
        (FailsOnOthers, 0.7, 3, "3 batches of evaluation"),  # with good rollouts in between
        (FailsOnOthers, 0.5, 2, "2 batches of evaluation"),
        (FailsOnOthers, 0.0, 1, "batch of evaluation"),
        (FailsOnOwn, 0.5, 1, "2 rollouts"),  # with a good evaluation in between
    ],
)
def test_rollouts_and_evaluations_do_not_make_up_for_each_other(tmp_path, env, share, steps, told):
    settings = {"max_steps": 3, "max_completion_length": 32, "advantage_estimator": "group", "num_train_seeds": 4}
    settings |= {"eval_strategy": "steps", "eval_steps": 1, "num_eval_seeds": 2, "per_device_eval_batch_size": 4}
    args = make_config(tmp_path / "out", max_fault_share=share, **settings)
    trainer = EchoTrainer(save_tiny_model(tmp_path / "model"), env=env, args=args)
    if told is None:
        trainer.train()
    else:
        with pytest.raises(RuntimeError, match=rf"^100% of .* of the last {told} were lost.*seed \d+, turn 0"):
            trainer.train()
    assert trainer.state.global_step == steps


class Interrupted(Echo):
    """Ctrl-C at the third reply."""

    replied = 0

    def step(self):
        Interrupted.replied += 1
        if Interrupted.replied == 3:
            raise KeyboardInterrupt
        return super().step()


def test_ctrl_c_leaves_no_threads(tmp_path):
    closed, before = [], env_threads()

    class Closing(Nonce):
        def close(self):
            closed.append(True)

    trainer = EchoTrainer(save_tiny_model(tmp_path / "model"), env=Closing, args=make_config(tmp_path / "out"))
    trainer._make_backend = lambda *args: Interrupted(trainer.text_tokenizer)
    closed.clear()
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert wait_until(lambda: not env_threads() - before) and len(closed) == 4


def test_environments_in_processes(tmp_path):
    args = make_config(tmp_path / "out", max_steps=1, env_processes=True, advantage_estimator="group")
    args.max_completion_length = 32
    trainer = EchoTrainer(save_tiny_model(tmp_path / "model"), env=Nonce, args=args)
    pools, make = [], trainer._make_pool
    trainer._make_pool = lambda *arguments: pools.append(make(*arguments)) or pools[-1]
    trainer.train()
    assert trainer.counts[0][:2] == (4, 4) and pools[0].factory.func is EnvProcess
    assert multiprocessing.active_children() == []


def test_what_cannot_be_pickled_is_refused_when_the_trainer_is_made(tmp_path):
    class Local(Nonce):
        pass

    args = make_config(tmp_path / "out", env_processes=True)
    with pytest.raises(ValueError, match="process of its own.*Local"):
        EchoTrainer(save_tiny_model(tmp_path / "model"), env=Local, args=args)


def test_an_environment_that_fails_once_when_the_trainer_is_made(tmp_path):
    attempts = itertools.count()

    def factory():
        if next(attempts) == 0:
            raise OSError("the server is not up yet")
        return Nonce()

    trainer = EchoTrainer(save_tiny_model(tmp_path / "model"), env=factory, args=make_config(tmp_path / "out"))
    assert trainer.briefing.instructions == Nonce.instructions


class Unclosable(Nonce):
    def close(self):
        raise OSError("still busy")


class Asleep(Nonce):
    """Fails at every `reset`, but for the one when the trainer is made."""

    resets = itertools.count()

    def reset(self, *, seed=None, options=None):
        if next(Asleep.resets) > 0:
            raise ConnectionError("gone")
        return super().reset(seed=seed)


@pytest.mark.filterwarnings("ignore:.*were lost to a fault")
@pytest.mark.parametrize("env", [Unclosable, Asleep])
def test_trains_to_the_end(tmp_path, env):
    args = make_config(tmp_path / "out", max_fault_share=1.0, advantage_estimator="group", max_completion_length=32)
    trainer = EchoTrainer(save_tiny_model(tmp_path / "model"), env=env, args=args)
    trainer.train()
    assert trainer.state.global_step == 2
    assert [counts[:2] for counts in trainer.counts] == [(0 if env is Asleep else 4, 4)] * 2


@pytest.mark.parametrize(
    ("reset", "message"),
    [
        (lambda self, *, seed=None, options=None: "go", r"`reset` returned 'go' \(str\), not \(observation, info\)"),
        (lambda self, *, seed=None, options=None: (None, {}), "observation None .* is no str"),
        (lambda self, seed: ("go", {}), "unexpected keyword argument 'options'"),
    ],
)
def test_an_environment_that_cannot_be_played_is_told_when_the_trainer_is_made(tmp_path, reset, message):
    env = type("Odd", (Nonce,), {"reset": reset})
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        EchoTrainer(save_tiny_model(tmp_path / "model"), env=env, args=make_config(tmp_path / "out"))
    assert caught.value.__notes__ == ["trl_agents.check_env explains what is wrong with an environment."]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"env_reset_timeout": -1}, "env_reset_timeout=-1"),
        ({"max_fault_share": 1.5}, "max_fault_share=1.5 is a share"),
    ],
)
def test_settings_that_make_no_sense(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **settings)
