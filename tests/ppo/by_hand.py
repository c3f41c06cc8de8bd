# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""`AgentPPOTrainer` with replies that are written down, and its numbers worked out one sequence at a time."""

import pytest
import torch
from scripted import ScriptedTrainer

from trl_agents import AgentPPOTrainer


class ScriptedPPOTrainer(ScriptedTrainer, AgentPPOTrainer):
    """The real trainer, whose model's replies are written down."""


class Spy(ScriptedPPOTrainer):
    """Keeps what the loss of the latest batch was made of."""

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        results = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self.logps = results[0]
        return results

    def _value_loss(self, values, inputs):
        self.values, self.trained_on = values, inputs
        return super()._value_loss(values, inputs)


def no_reward(completions, **kwargs):
    return [0.0] * len(completions)


# -- reading by hand: one sequence at a time, without padding, without the trainer's forward pass -----------------


def read(trainer, ids, model=None):
    """Log-probability of each token but the first, and the value of the state after each token."""
    model = model or trainer.causal_lm
    training = model.training
    model.eval()
    with torch.no_grad():
        states = model.base_model(torch.tensor([list(ids)])).last_hidden_state[0]
        logps = (model.lm_head(states) / trainer.temperature).log_softmax(-1)
        values = states @ trainer.value_head.weight[0] + trainer.value_head.bias
    model.train(training)
    picked = logps[:-1].gather(1, torch.tensor(list(ids))[1:, None])[:, 0]
    return picked.tolist(), values.tolist()


def teach(trainer, told):
    """Sets the head so that the state after each of the sequences `told` has the value it is told."""
    with torch.no_grad():
        states = [trainer.causal_lm.base_model(torch.tensor([list(ids)])).last_hidden_state[0, -1] for ids, _ in told]
        features = torch.cat([torch.stack(states), torch.ones(len(told), 1)], dim=1).double()
        solution = torch.linalg.pinv(features) @ torch.tensor([value for _, value in told]).double()
        trainer.value_head.weight.copy_(solution[None, :-1])
        trainer.value_head.bias.copy_(solution[-1:])
    for ids, value in told:
        assert read(trainer, ids)[1][-1] == pytest.approx(value, abs=1e-4)


PROMPT, PAD, EOS = [40, 41, 42], 0, 2


def answers(*completions, prompts=None, pad=PAD, width=0, left=0, **tensors):
    """TRL's batch of completions that are given as token ids."""
    prompts = prompts or [PROMPT] * len(completions)
    width, left = max([width, *map(len, completions)]), left + max(map(len, prompts))
    batch = {
        "prompt_ids": torch.tensor([[pad] * (left - len(ids)) + list(ids) for ids in prompts]),
        "prompt_mask": torch.tensor([[0] * (left - len(ids)) + [1] * len(ids) for ids in prompts]),
        "completion_ids": torch.tensor([list(ids) + [pad] * (width - len(ids)) for ids in completions]),
        "completion_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in completions]),
        "num_items_in_batch": torch.tensor(sum(map(len, completions))),
    }
    return batch | tensors


def credited(trainer, rewards, batch):
    """The batch with the credit that the trainer assigns for `rewards`."""
    if "old_per_token_logps" in batch:  # TRL has scored it then
        trainer.score_batch(batch)
    return batch | trainer.assign_credit(None, torch.tensor(rewards), batch)


# One completion of three tokens, whose values are told
GOLDEN = [50, 51, EOS]

GOLDEN_VALUES = [0.2, 0.5, 0.4]


def golden_trainer(make_trainer, **config):
    trainer = make_trainer(env=None, **config)
    teach(trainer, [(PROMPT + GOLDEN[:n], value) for n, value in enumerate(GOLDEN_VALUES)])
    return trainer


def assert_row(found, expected):
    torch.testing.assert_close(found, torch.tensor([expected]), rtol=0, atol=2e-4)


# -- KL and its controller ----------------------------------------------------------------------------------------


def hash_of(model):
    return {name: value.clone() for name, value in model.state_dict().items() if "value_head" not in name}
