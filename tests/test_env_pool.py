# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Environments side by side, in threads and processes: in order, on time, and gone when they are closed."""

import collections
import functools
import gc
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import gymnasium
import pytest
from fault_checks import ALL, check_nonce, echo, env_threads, wait_until
from faulty_env import Doomed, Moody, MoodyAlone, Nonce
from gymnasium.wrappers import TimeLimit
from scripted_rollout import Scripted, Steps, go, play, seeds, tokenizer

from trl_agents.actions import ActionParser
from trl_agents.contexts import Briefing, ChatContext
from trl_agents.envs.make import show_through
from trl_agents.rollout.faults import Fault
from trl_agents.rollout.play import Episode, Player, Rules
from trl_agents.rollout.workers import EnvPool
from trl_agents.types import StopReason


class Inner(gymnasium.Env):
    """Gymnasium's own kind around another."""

    instructions = "Play."

    def __init__(self, steps):
        self.env = steps

    def reset(self, **kwargs):
        return self.env.reset(**kwargs)

    def step(self, action):
        return self.env.step(action)


class TestEnvPool:
    def test_closing_leaves_nothing(self):
        closed = []

        class Closing(Steps):
            def close(self):
                closed.append(threading.current_thread().name)
                raise RuntimeError("cannot close")

        before = env_threads()
        pool = EnvPool(Closing, 4)
        play(None, go, [Episode(2)] * 6, pool=pool)
        assert len(env_threads() - before) == 4
        pool.close()
        assert not env_threads() - before
        assert sorted(closed) == [f"trl-agents-env-{slot}" for slot in range(4)]  # each where it was made
        pool.close()
        # And it may be used again
        assert len(play(None, go, [Episode(2)], pool=pool)) == 1
        pool.close()
        assert not env_threads() - before

    def test_closing_does_not_wait_for_one_that_hangs(self):
        release = threading.Event()

        class Hanging(Steps):
            def reset(self, *, seed=None, options=None):
                release.wait(60)
                return super().reset(seed=seed)

        pool = EnvPool(Hanging, 2)
        pool.reset(0, 1)
        started = time.perf_counter()
        pool.close()
        assert time.perf_counter() - started < 5
        release.set()

    def test_patience_is_spent_once(self):
        """A slow environment must not slow down every decoding step of the others."""
        release = threading.Event()

        class Slow(Steps):
            def reset(self, *, seed=None, options=None):
                release.wait(20)
                return super().reset(seed=seed)

        pool = EnvPool(Slow, 1)
        pool.reset(0, 1)
        started = time.perf_counter()
        for _ in range(20):
            assert pool.collect(0.2, block=False) == []
        assert 0.2 <= time.perf_counter() - started < 2  # each time anew: 4
        release.set()
        (reply,) = pool.collect(0.05, block=True)
        assert reply.observation == "1 to go"
        assert pool.collect(0.05, block=True) == []  # nothing is outstanding
        pool.close()

    def test_answers_come_in_the_order_of_the_slots(self):
        pool = EnvPool(Nonce, 6)
        for slot in (3, 5, 0, 1, 4, 2):
            pool.reset(slot, slot)
        assert [reply.slot for reply in pool.collect(20.0, block=True)] == [0, 1, 2, 3, 4, 5]
        pool.close()

    @pytest.mark.parametrize("wrap", [lambda env: env, Inner, lambda env: show_through(TimeLimit(env, 99))])
    def test_one_for_all_is_refused(self, wrap):
        """Each would be paid for the steps of all."""
        shared = Inner(Steps())
        with pytest.raises(ValueError, match="one environment to several episodes .*make a new one at each call"):
            play(lambda: wrap(shared), go, seeds(6), n_slots=3)
        assert len(play(lambda: wrap(shared), go, seeds(6), n_slots=1)) == 6

    def test_one_that_nobody_closes(self):
        closed = []

        class Closing(Steps):
            def close(self):
                closed.append(True)

        pool = EnvPool(Closing, 2)
        play(None, go, [Episode(2)] * 2, pool=pool)
        del pool
        gc.collect()
        assert closed == [True] * 2


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def helpers(folder):
    """The processes that environments have started, and those they were in."""
    return [int(pid) for path in Path(folder).iterdir() for pid in (path.name, path.read_text())]


linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the table of processes from /proc")


@linux
class TestProcesses:
    @pytest.mark.slow
    def test_whatever_befalls_it(self, tmp_path):
        """Hangs, ends its process, will not be closed: it and its helper are gone, the neighbours notice nothing."""
        factory = functools.partial(Doomed, str(tmp_path))
        episodes = [Episode(seed) for seed in (1, 13, 14, 15)]
        pool = EnvPool(factory, 4, timeout=1, reset_timeout=60, processes=True)
        player = Player(pool, Scripted(echo), ChatContext(tokenizer()), ActionParser(), Briefing("Play."), Rules())
        trajectories, clock = player.play(episodes)
        check_nonce([trajectories[number] for number in (0, 3)])
        assert [trajectories[number].stop for number in (1, 2)] == [StopReason.ENV_TIMEOUT, StopReason.ENV_ERROR]
        assert trajectories[2].error == "the environment's process ended with exit code 7"
        assert clock.faults.kinds == {Fault.TIMEOUT: ALL, Fault.CRASH: ALL}
        started = helpers(tmp_path)
        assert os.getpid() not in started and len(started) == 2 * (2 + 2 * ALL)
        assert wait_until(lambda: sum(map(is_running, started)) == 4)  # the two that are well, and their helpers
        pool.close()
        assert wait_until(lambda: not any(map(is_running, started))), "left behind"

    def test_one_that_crashes_and_will_not_be_closed(self, tmp_path, monkeypatch):
        """It is gone long before the pool is closed: a run may see thousands of them."""
        monkeypatch.setattr("trl_agents.rollout.processes.CLOSE_SECONDS", 0.2)
        pool = EnvPool(functools.partial(Doomed, str(tmp_path)), 1, reset_timeout=60, processes=True)
        pool.reset(0, 15)
        assert pool.collect(60, True)[0].fault is None
        pool.renew(0)
        assert wait_until(lambda: not any(map(is_running, helpers(tmp_path)))) and len(helpers(tmp_path)) == 2
        pool.close()

    def test_what_cannot_be_pickled(self):
        class Local(Steps):
            pass

        with pytest.raises(ValueError, match="process of its own.*Define its class or factory at the top of a module"):
            EnvPool(Local, 1, processes=True)


INTERRUPTED = """
import functools, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit it as ignored
sys.path[:0] = {path!r}
from faulty_env import Doomed
from trl_agents.rollout.workers import EnvPool

if __name__ == "__main__":
    pool = EnvPool(functools.partial(Doomed, {folder!r}), 3, processes={processes})
    for slot, seed in enumerate((1, 2, 13 if {processes} else 3)):
        pool.reset(slot, seed)
        pool.collect(60, True)
    if {processes}:
        pool.step(2, "hangs")
    print("ready", flush=True)
    if {how!r} == "exit":
        sys.exit(3)
    pool.step(0, "") if not {processes} else None
    while True:
        pool.collect(0.01, False)
"""


@linux
@pytest.mark.parametrize("processes", [False, True])
@pytest.mark.parametrize("how", ["exit", "Ctrl-C", "kill"])
def test_nothing_is_left_behind(tmp_path, processes, how):
    """The run ends without closing its pool. (A thread's helpers are lost to a kill: nobody is left to close them.)"""
    folder, script = tmp_path / "helpers", tmp_path / "script.py"
    folder.mkdir()
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    script.write_text(INTERRUPTED.format(path=paths, folder=str(folder), processes=processes, how=how))
    run = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert run.stdout.readline() == "ready\n"
        started = helpers(folder)
        assert len(started) == 6
        if how != "exit":
            assert all(map(is_running, started))
            run.send_signal(signal.SIGINT if how == "Ctrl-C" else signal.SIGKILL)
        _, error = run.communicate(timeout=60)
        assert run.returncode == {"exit": 3, "Ctrl-C": -signal.SIGINT, "kill": -signal.SIGKILL}[how], error
        own = started if processes or how != "kill" else started[1::2]
        assert wait_until(lambda: not any(map(is_running, own))), [pid for pid in own if is_running(pid)]
    finally:
        run.kill()
        for pid in helpers(folder):
            if is_running(pid):
                os.kill(pid, signal.SIGKILL)


def memory():
    """Peak resident memory in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Brief(Moody):
    """Its hangs end: a thread cannot be ended from outside."""

    hang = 0.1
    begun = collections.Counter()


@pytest.mark.parametrize(
    ("n_rollouts", "processes"),
    [
        (100, False),
        pytest.param(1000, False, marks=pytest.mark.slow),
        pytest.param(1000, True, marks=[pytest.mark.slow, pytest.mark.long]),
    ],
)
def test_no_leak(n_rollouts, processes):
    threads = env_threads()
    factory = MoodyAlone if processes else Brief
    timeouts = {"timeout": 0.3, "reset_timeout": 30} if processes else {"timeout": 0.05}
    pool = EnvPool(factory, 4, processes=processes, **timeouts)
    player = Player(pool, Scripted(echo), ChatContext(tokenizer()), ActionParser(), Briefing("Play."), Rules())
    kinds, lost, used = {}, 0, []
    for number in range(n_rollouts):
        trajectories, clock = player.play([Episode(number % 8), Episode(number % 8, (1,))])
        check_nonce([trajectory for trajectory in trajectories if not trajectory.stop.is_fault])
        lost += sum(trajectory.stop.is_fault for trajectory in trajectories)
        for fault, count in clock.faults.kinds.items():
            kinds[fault] = kinds.get(fault, 0) + count
        player.backend.asked.clear()
        if number >= n_rollouts // 5:
            used.append(memory())
    pool.close()
    assert wait_until(lambda: not env_threads() - threads)
    assert kinds[Fault.CRASH] > n_rollouts / 10 and kinds[Fault.TIMEOUT] > n_rollouts / 40
    # By luck one of 4000 is lost; where the computer is busy, answers may be late as well. Begun once: one of five
    assert lost < n_rollouts / 20
    assert used[-1] - used[0] < 8, "MiB more"
