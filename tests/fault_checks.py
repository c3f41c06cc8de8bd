# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What the tests of failing environments share."""

import threading
import time

from faulty_env import Nonce
from scripted_rollout import Scripted, tokenizer

from trl_agents.actions import ActionParser
from trl_agents.contexts import Briefing, ChatContext
from trl_agents.rollout.places import REPLACEMENTS, STARTS
from trl_agents.rollout.play import Player, Rules
from trl_agents.rollout.workers import EnvPool
from trl_agents.types import StopReason


ALL = STARTS * (1 + REPLACEMENTS)  # how often an episode that always fails is begun


def echo(prompt):
    return f"ACTION={prompt.rpartition('say ')[2][:7]}"


def check_nonce(trajectories):
    """All words came back to where they were said."""
    for trajectory in trajectories:
        assert trajectory.stop is StopReason.TERMINATED
        env = Nonce()
        said = env.reset(seed=trajectory.seed)[0]
        assert len(trajectory.turns) == env.left
        for turn in trajectory.turns:
            assert (turn.observation, turn.parsed.is_valid, turn.reward) == (said, True, 1.0)
            said = env.step(turn.executed)[0]
        assert trajectory.final_observation == said


def play_counting(factory, answer, episodes, n_slots=1, timeout=None, processes=False, max_length=None, **kwargs):
    """Trajectories, and how many faults there were."""
    pool = EnvPool(factory, n_slots, timeout, processes=processes)
    backend = Scripted(answer) if callable(answer) else answer
    player = Player(
        pool,
        backend,
        ChatContext(tokenizer()),
        ActionParser(),
        Briefing("Play."),
        Rules(max_length=max_length),
        **{"patience": 10, **kwargs},
    )
    try:
        trajectories, clock = player.play(episodes)
        return trajectories, clock
    finally:
        pool.close()


def env_threads():
    """Those that run environments. What another test has left behind may end at any moment: subtract it."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("trl-agents-env")}


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()
