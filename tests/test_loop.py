# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""`recipes/loop.py`, the method without a trainer, against the trainer: the same loss and gradients."""

import copy
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
from scripted import generate, loss_and_gradients, make_config, perturb, ready, save_tiny_model
from transformers import AutoModelForCausalLM

from trl_agents import AgentGRPOTrainer


def load_loop():
    path = Path(__file__).resolve().parents[1] / "recipes" / "loop.py"
    spec = spec_from_file_location("loop", path)
    loop = sys.modules["loop"] = module_from_spec(spec)  # its dataclasses look themselves up there
    spec.loader.exec_module(loop)
    return loop


loop = load_loop()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), num_hidden_layers=2)


def test_loss_and_gradients_equal_the_trainers(model_dir, tmp_path):
    settings = loop.Settings(num_generations=4, epsilon=0.1, beta=0.5, discount=0.9)
    args = make_config(
        tmp_path,
        env_kwargs={"n_arms": 3, "horizon": 3, "distribution": "bernoulli"},
        per_device_train_batch_size=8,
        num_generations=settings.num_generations,
        advantage_estimator="turn",
        discount=settings.discount,
        scale_rewards="batch",
        epsilon=settings.epsilon,
        beta=settings.beta,
        num_iterations=2,  # each batch is used again after an update: the policy is no longer the one that played
    )
    trainer = ready(AgentGRPOTrainer(model_dir, env="trl_agents/Bandit-v0", args=args))
    batch = generate(trainer)
    perturb(trainer.model)
    trainer_loss, trainer_gradients = loss_and_gradients(trainer, batch)

    # The same episodes, told to the loop by their tokens and rewards
    episodes = []
    for trajectory in trainer.trajectories:
        episode = loop.Episode([], [], [turn.reward + turn.penalty for turn in trajectory.turns])
        for number, turn in enumerate(trajectory.turns):
            episode.ids += [*turn.input_ids, *turn.action_ids]
            episode.turn_index += [-1] * len(turn.input_ids) + [number] * len(turn.action_ids)
        episodes.append(episode)
    assert any(turn.penalty for trajectory in trainer.trajectories for turn in trajectory.turns)

    played = AutoModelForCausalLM.from_pretrained(model_dir)  # before it was perturbed; the reference too
    model = copy.deepcopy(played)
    perturb(model)
    pad_id = trainer.processing_class.pad_token_id
    ids, mask, advantages = loop.to_batch(episodes, settings, pad_id)
    old_logps = loop.log_probs(played, ids).detach()
    logps = loop.log_probs(model, ids)
    loss = loop.policy_loss(logps, old_logps, old_logps, advantages, mask, settings.epsilon, settings.beta, mask.sum())
    loss.backward()

    ratio = (logps - old_logps).exp()[mask]
    assert (ratio < 0.9).any() and (ratio > 1.1).any()  # so far that both clips act, and the KL
    torch.testing.assert_close(loss.detach(), trainer_loss, rtol=0, atol=1e-6)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert max(gradient.abs().max() for gradient in gradients.values()) > 1e-2
    torch.testing.assert_close(gradients, trainer_gradients, rtol=0, atol=1e-6)


def test_a_short_run(capsys):
    settings = loop.Settings(n_arms=2, horizon=3, warmup_steps=3, num_updates=2, num_prompts=2, num_generations=2)
    regrets = loop.main(settings)
    assert len(regrets) == 2 and all(0 <= regret <= 3 for regret in regrets)
    # Random means on (0, 1): the best of two is 2/3 on average, a random arm 1/2
    assert "A player by chance: 0.50." in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.slow
def test_it_learns():
    regrets = loop.main(loop.Settings())
    by_chance = 20 * (5 / 6 - 1 / 2)
    assert sum(regrets[-20:]) / 20 < 0.8 * by_chance  # 0.67 of it where this was written


def test_settings_have_help(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["loop.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        loop.TrlParser(loop.Settings).parse_args_and_config()
    assert stop.value.code == 0
    assert "--num_generations" in capsys.readouterr().out
