# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
A language model learns to explore: GRPO on a multi-armed bandit, in the setting of "LLMs are Greedy Agents".

    accelerate launch recipes/grpo_bandit.py                                          # minutes, on any computer
    accelerate launch --config_file accelerate_configs/zero2.yaml recipes/grpo_bandit.py \
        --config recipes/configs/grpo_bandit_paper.yaml --model_name_or_path google/gemma-2-2b-it

Without --config it runs recipes/configs/grpo_bandit_tiny.yaml; without --model_name_or_path it makes a small model and
warms it up on a random player's episodes. recipes/README.md says what to expect.
"""

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer
from trl import ModelConfig, get_peft_config, get_quantization_config

from trl_agents import ActionParser, AgentGRPOConfig, AgentGRPOTrainer, check_run
from trl_agents.evaluation import held_out_seeds, play_agents
from trl_agents.recipe import announce_training, check_resumption, load_as, warm_up
from trl_agents.report import report_players
from trl_agents.script import argument, check_positive, run
from trl_agents.stages import announce


DEFAULT_CONFIG = Path(__file__).parent / "configs" / "grpo_bandit_tiny.yaml"


@dataclass
class ScriptArguments:
    """Arguments of the recipe."""

    env_id: str = argument("trl_agents/Bandit-v0", "Id of the environment, or MODULE:CLASS.")
    action_pattern: str | None = argument(
        None, "Regular expression with one group that finds the action. Default: ACTION=X."
    )
    players: list[str] = argument(["random", "ucb", "thompson"], "Scripted players to compare with.")
    num_eval_episodes: int = argument(256, "Held-out episodes that are played before and after training.")
    num_transcripts: int = argument(1000, "Episodes of the random player that warm up the small model.")


def main(script_args: ScriptArguments, training_args: AgentGRPOConfig, model_args: ModelConfig) -> None:
    output_dir = Path(training_args.output_dir)
    env_kwargs = training_args.env_kwargs or {}
    parser = ActionParser(script_args.action_pattern)

    # Find out now what the trainer would refuse after the warm-up, and whether the folder can be written
    adapters, quantization = get_peft_config(model_args), get_quantization_config(model_args)
    check_positive(script_args, "num_eval_episodes", "num_transcripts")
    check_run(script_args.env_id, training_args, parser, peft_config=adapters, quantization_config=quantization)
    check_resumption(training_args)
    # The same held-out episodes for everybody
    seeds = held_out_seeds(script_args.num_eval_episodes)
    game = {"env_kwargs": env_kwargs, "max_turns": training_args.max_turns}
    played = play_agents(script_args.env_id, script_args.players, seeds, **game)
    output_dir.mkdir(parents=True, exist_ok=True)
    model = model_args.model_name_or_path or warm_up(
        script_args.env_id, training_args, script_args.num_transcripts, parser=parser
    )
    source = load_as(training_args, model_args)
    trainer = AgentGRPOTrainer(
        model,
        args=training_args,
        env=script_args.env_id,
        action_parser=parser,
        processing_class=AutoTokenizer.from_pretrained(model, padding_side="left", **source),
        quantization_config=quantization,
        peft_config=adapters,
    )

    announce(f"Playing {len(seeds)} held-out episodes before training")
    played["before"] = trainer.play(seeds)
    announce_training(training_args)
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model(training_args.output_dir)  # first of all: nothing below may cost the training
    announce(f"Playing {len(seeds)} held-out episodes after training")
    played["after"] = trainer.play(seeds)
    trainer.close_environments()

    report_players(trainer, played, ", ".join(f"{name}={value}" for name, value in env_kwargs.items()))
    if training_args.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    run(main, DEFAULT_CONFIG, ScriptArguments, AgentGRPOConfig, ModelConfig)
