# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""TRL's vLLM connection as a generation backend, with a scripted stand-in for the engine."""

import math

import pytest
from scripted import Pay, generate, make_config, ready, save_tiny_model

from trl_agents import AgentGRPOTrainer


LOGPROB = -0.25


class StandIn:
    """Answers as `VLLMGeneration.generate` does: ids and top-1 log-probabilities, one completion a prompt."""

    def __init__(self, tokenizer, text):
        self.reply = [*tokenizer.encode(text), tokenizer.eos_token_id]
        self.temperature = 1.0
        self.prompts, self.temperatures, self.syncs = [], [], 0

    def sync_weights(self):
        self.syncs += 1

    def generate(self, prompts, images, num_generations, profiler=None):
        assert images is None and num_generations == 1
        self.prompts.append([list(prompt) for prompt in prompts])
        self.temperatures.append(self.temperature)
        logprobs = [[[LOGPROB]] * (len(self.reply) - 1) + [[None]] for _ in prompts]  # None: vLLM's for NaN
        return prompts, [list(self.reply) for _ in prompts], logprobs, None


@pytest.fixture
def trainer(tmp_path):
    config = make_config(tmp_path / "out", max_steps=2, temperature=0.7, eval_temperature=0.0)
    trainer = AgentGRPOTrainer(save_tiny_model(tmp_path / "model"), env=Pay, args=config)
    trainer.use_vllm, trainer._last_loaded_step = True, -1
    trainer.vllm_generation = StandIn(trainer.processing_class, "ACTION=b")
    trainer.vllm_generation.temperature = trainer.temperature
    return trainer


def test_prompts_are_whole_and_replies_verbatim(trainer):
    batch = generate(ready(trainer))
    engine, rows = trainer.vllm_generation, len(batch["completion_ids"])
    assert len(engine.prompts) == 3, "one call a turn, for all episodes together"
    assert [len(prompts) for prompts in engine.prompts] == [rows] * 3
    for earlier, later in zip(engine.prompts[0], engine.prompts[1], strict=True):
        assert later[: len(earlier) + len(engine.reply)] == earlier + engine.reply
    for row in range(rows):
        mask = batch["tool_mask"][row].bool() & batch["completion_mask"][row].bool()
        assert batch["completion_ids"][row][mask].tolist() == engine.reply * 3
        logprobs = batch["sampling_per_token_logps"][row][mask].tolist()
        assert logprobs[0] == LOGPROB and math.isnan(logprobs[len(engine.reply) - 1])


def test_training_syncs_the_weights_once_a_step(trainer):
    trainer.train()
    assert trainer.vllm_generation.syncs == 2
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    assert any("sampling/importance_sampling_ratio/mean" in entry for entry in trainer.state.log_history)


def test_evaluation_has_its_own_temperature(trainer):
    trainer.play([0, 1])
    assert set(trainer.vllm_generation.temperatures) == {0.0}
    assert trainer.vllm_generation.temperature == 0.7


def test_an_episode_ends_before_vllm_has_no_room(tmp_path):
    args = make_config(tmp_path / "out", vllm_max_model_length=70, max_episode_length=90)
    trainer = AgentGRPOTrainer(save_tiny_model(tmp_path / "model"), args=args, env=Pay)
    assert trainer._rules(trainer.model).max_length == 70
