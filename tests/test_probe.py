# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What is found out of an environment before a run: whatever it does, nobody waits for ever, and the run goes on."""

import functools
import multiprocessing
import threading
import time
from contextlib import closing

import pytest
from faulty_env import Broken, Deadly, Fatal, Misspelt, Nonce, Stuck
from scripted import Pay, make_config, save_tiny_model

from trl_agents import AgentGRPOTrainer, check_run
from trl_agents.rollout.probe import Probe


MAKERS = {"check_run": check_run, "trainer": functools.partial(AgentGRPOTrainer, "no/model")}


@pytest.fixture(params=MAKERS)
def make(request, tmp_path):
    def make(env, **settings):
        started = time.monotonic()
        try:
            MAKERS[request.param](env=env, args=make_config(tmp_path / "out", **settings))
        finally:
            assert time.monotonic() - started < 60
            assert multiprocessing.active_children() == []

    return make


def test_a_reset_that_hangs(make):
    with pytest.raises(ValueError, match=r"no answer to `reset` within 0.2 s\).*more time \(env_reset_timeout"):
        make(Stuck, env_timeout=0.2)


def test_a_factory_that_hangs(make):
    with pytest.raises(ValueError, match="no answer to `reset` within 0.2 s"):
        make(lambda: threading.Event().wait(), env_reset_timeout=0.2)


class Exits(Nonce):
    def reset(self, *, seed=None, options=None):
        raise SystemExit(3)


def test_one_that_ends_the_program(make):
    with pytest.raises(ValueError, match=r"could not be begun.*SystemExit: 3 \(test_probe.py"):
        make(Exits)


@pytest.mark.parametrize(
    ("env", "timeout", "message"),
    [
        (Stuck, 1.0, "no answer to `reset` within 1 s"),
        (Deadly, 60.0, "the environment's process ended with exit code 7"),
    ],
)
def test_in_a_process(make, env, timeout, message):
    with pytest.raises(ValueError, match=message):
        make(env, env_timeout=timeout, env_processes=True)


def begin(env, processes, seed=1, **kwargs):
    with closing(Probe(env, 60.0, processes=processes, **kwargs)) as probe:
        return probe.begin(seed)


def test_a_process_tells_what_a_thread_does():
    there, here = begin(Nonce, True), begin(Nonce, False)
    assert there == here and here.name == "Nonce" and here.info["legal_actions"][1] == "never"
    assert here.texts == {"instructions": "Say it.", "history_header": "", "question": ""}
    assert begin(Nonce, False, resets=False).observation == ""


@pytest.mark.parametrize(
    ("env", "processes", "kind", "message"),
    [
        (Misspelt, False, KeyError, "legal_action"),
        (Misspelt, True, KeyError, "legal_action"),
        (Broken, True, ValueError, r"Picky: no luck, again \(faulty_env.py"),
    ],
)
def test_what_it_raises_is_raised(env, processes, kind, message):
    with pytest.raises(kind, match=message) as caught:
        begin(env, processes)
    *told, last = caught.value.__notes__
    assert last == "trl_agents.check_env explains what is wrong with an environment."
    if processes:  # where no traceback is to be seen
        assert "in reset" in told[0] and told[0].startswith("In the environment's process:\nTraceback")
    else:
        assert any(entry.name == "reset" and "faulty_env" in str(entry.path) for entry in caught.traceback)


def test_a_mistake_is_told_in_full(make):
    """A fault would be told in so many characters."""
    with pytest.raises(ValueError, match="Did you mean.*The ids of trl_agents are.*pass a class or a factory"):
        make("trl_agents/Bandid-v0", env_processes=True)


def test_steps_are_taken_there_too(tmp_path):
    args = make_config(tmp_path / "out", env_processes=True, exploration=["epsilon_greedy"])
    check_run(Fatal, args)  # one that fails later is for the rollout, which survives it


class Unmade(Nonce):
    def __init__(self):
        threading.Event().wait()


def test_another_environment_to_play_in(tmp_path):
    args = make_config(tmp_path / "out", env_reset_timeout=0.2)
    trainer = AgentGRPOTrainer(save_tiny_model(tmp_path / "model"), env=Pay, args=args)
    with pytest.raises(ValueError, match="no answer to `reset` within 0.2 s"):
        trainer.play([1], env=Unmade)
