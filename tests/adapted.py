# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What every adapter must do, for the tests of each: many episodes side by side, and two steps of training."""

import math
import random
import warnings

import numpy as np
import torch
from scripted import ScriptedTrainer, make_config, save_tiny_model

from trl_agents.envs import check_env
from trl_agents.rollout.workers import EnvPool


def play(factory, seeds, n_slots=8, max_steps=40, answers=None):
    """What a random player sees and gets in the episodes of `seeds`, `n_slots` of them at a time, by seed."""
    pool, waiting, seen, players, legal = EnvPool(factory, n_slots, timeout=60), list(seeds), {}, {}, {}
    free, live = list(range(n_slots)), {}
    try:
        while waiting or live:
            while waiting and free:
                slot, seed = free.pop(), waiting.pop(0)
                live[slot], seen[seed], players[seed] = seed, [], random.Random(seed)
                pool.reset(slot, seed)
            for reply in pool.collect(0.0, block=True):
                seed = live[reply.slot]
                assert reply.fault is None, reply.error
                assert isinstance(reply.observation, str) and "\x1b" not in reply.observation
                assert isinstance(reply.reward, float) and math.isfinite(reply.reward)
                legal[seed] = reply.info.get("legal_actions")
                seen[seed].append((reply.observation, reply.reward, reply.terminated, reply.truncated, legal[seed]))
                if reply.terminated or reply.truncated or len(seen[seed]) > max_steps:
                    free.append(reply.slot)
                    del live[reply.slot]
                else:
                    assert legal[seed] or answers, "no legal actions, and no answers to choose from"
                    pool.step(reply.slot, players[seed].choice(legal[seed] or answers))
    finally:
        pool.close()
    return seen


def check_100_episodes(factory, answers=None, max_steps=40):
    """The contract; 100 episodes that are the same side by side and one after the other; no global luck is used."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of what is allowed: no legal actions, no end
        check_env(factory, max_steps=max_steps)
    random.seed(0), np.random.seed(0)
    before = random.random(), np.random.random()
    random.seed(0), np.random.seed(0)
    together = play(factory, range(100), 8, max_steps, answers)
    assert (random.random(), np.random.random()) == before
    assert len(together) == 100 and all(len(episode) > 1 for episode in together.values())
    few = range(0, 100, 5)
    assert {seed: together[seed] for seed in few} == play(factory, few, 1, max_steps, answers)
    assert len({str(episode) for episode in together.values()}) > 1  # seeds differ
    return together


def train_two_steps(env, folder, action, **settings):
    """
    Two steps of the real trainer. In every group the first episode answers with `action` and the second with nonsense,
    which costs the penalty, so there is something to learn. Returns the trainer.
    """
    model = save_tiny_model(folder / "model", ["ACTION=x", "what?"], max_position_embeddings=8192)
    settings = {"invalid_action": "end", "max_turns": 3, "advantage_estimator": "group", **settings}
    args = make_config(folder / "out", max_completion_length=64, **settings)
    trainer = ScriptedTrainer(model, env=env, args=args)
    trainer.script = [[f"So. ACTION={action}"] * 4, ["what?"] * 4] * 2
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.train()
    assert trainer.state.global_step == 2
    assert not any(trajectory.stop.is_fault for trajectory in trainer.trajectories)
    for number, trajectory in enumerate(trainer.trajectories):
        assert trajectory.turns[0].executed == (None if number % 2 else action)
        assert trajectory.turns[0].penalty == (-5.0 if number % 2 else 0.0)
    changed = [not torch.equal(old, new) for old, new in zip(before, trainer.model.parameters(), strict=True)]
    assert any(changed)
    return trainer
