# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
A language model learns what to recommend to whom: GRPO on a contextual bandit of movies, in the setting of "LLMs are
Greedy Agents".

    accelerate launch recipes/contextual_bandit.py                                    # minutes, on any computer
    accelerate launch --config_file accelerate_configs/zero2.yaml recipes/contextual_bandit.py \
        --config recipes/configs/contextual_bandit_paper.yaml --model_name_or_path google/gemma-2-2b-it

Trained on some people, evaluated on others. Without --config it runs recipes/configs/contextual_bandit_tiny.yaml;
without --model_name_or_path it makes a small model and warms it up on a random player's episodes. recipes/README.md
says what to expect.
"""

import functools
import re
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer
from trl import ModelConfig, get_peft_config, get_quantization_config

from trl_agents import ActionParser, AgentGRPOConfig, AgentGRPOTrainer, check_run, make_env
from trl_agents.agents import Agent, make_agent
from trl_agents.evaluation import held_out_seeds, play_agents
from trl_agents.recipe import announce_training, check_resumption, load_as, warm_up
from trl_agents.report import report_players
from trl_agents.script import argument, check_positive, run
from trl_agents.stages import announce


ENV_ID = "trl_agents/ContextualBandit-v0"
DEFAULT_CONFIG = Path(__file__).parent / "configs" / "contextual_bandit_tiny.yaml"


@dataclass
class ScriptArguments:
    """Arguments of the recipe."""

    num_eval_episodes: int = argument(256, "Held-out episodes that are played before and after training.")
    num_transcripts: int = argument(1000, "Episodes of the random player that warm up the small model.")


class FixedAgent(Agent):
    """Recommends the same movie to everybody."""

    def __init__(self, action: str):
        self.action = action

    def act(self, observation, info):
        return self.action


def taste(observation: str, action: str) -> str:
    """The small model's thought: the open step's vector, copied to where the choice is made."""
    return f"Taste {re.findall(r'Their taste: ([^]]*])', observation)[-1]}."


def main(script_args: ScriptArguments, training_args: AgentGRPOConfig, model_args: ModelConfig) -> None:
    output_dir = Path(training_args.output_dir)
    env_kwargs = training_args.env_kwargs or {}
    if "users" in env_kwargs:
        raise ValueError("This recipe trains on 'train' and evaluates on 'eval': leave `users` out of env_kwargs.")

    # Find out now what would fail after the warm-up, and whether the folder can be written
    check_positive(script_args, "num_eval_episodes", "num_transcripts")
    adapters, quantization = get_peft_config(model_args), get_quantization_config(model_args)
    check_run(ENV_ID, training_args, ActionParser(), peft_config=adapters, quantization_config=quantization)
    check_resumption(training_args)
    output_dir.mkdir(parents=True, exist_ok=True)
    rationale = taste if env_kwargs.get("reasoning", True) else None
    model = model_args.model_name_or_path or warm_up(
        ENV_ID, training_args, script_args.num_transcripts, rationale=rationale
    )
    source = load_as(training_args, model_args)
    trainer = AgentGRPOTrainer(
        model,
        args=training_args,
        env=ENV_ID,
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left", **source),
        quantization_config=quantization,
        peft_config=adapters,
    )

    # The same held-out episodes for everybody, with people whom training never met
    seeds, held_out = held_out_seeds(script_args.num_eval_episodes), {**env_kwargs, "users": "eval"}
    strangers = functools.partial(make_env, ENV_ID, **held_out)
    met = make_env(ENV_ID, **env_kwargs)
    players = {"random": make_agent("random"), "best_fixed": FixedAgent(met.best_arm), "linucb": make_agent("linucb")}
    played = play_agents(strangers, players, seeds, max_turns=training_args.max_turns)
    announce(f"Playing {len(seeds)} held-out episodes before training")
    played["before"] = trainer.play(seeds, env=strangers)
    announce_training(training_args)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)  # first of all: nothing below may cost the training
    announce(f"Playing {len(seeds)} held-out episodes after training")
    played["after"] = trainer.play(seeds, env=strangers)
    trainer.close_environments()

    report_players(trainer, played, f"{met.n_arms} movies, people who were not trained on")
    if training_args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    run(main, DEFAULT_CONFIG, ScriptArguments, AgentGRPOConfig, ModelConfig)
