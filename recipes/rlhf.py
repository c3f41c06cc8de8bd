# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
RLHF: a language model is fine-tuned on demonstrations, a reward model on people's preferences, and PPO raises the
reward model's score, with a KL that holds it near where it started and, for comparison, without.

    accelerate launch recipes/rlhf.py                           # minutes, on any computer
    accelerate launch recipes/rlhf.py --beta 0.02 --output_dir outputs/rlhf_far

Without --config it runs recipes/configs/rlhf_tiny.yaml; without --model_name_or_path it makes a small model, which
learns from nothing, on preferences whose true utility is known: what the score is worth can be seen. A stage that is
done is not trained again. recipes/README.md says what to expect.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer
from trl import ModelConfig, get_peft_config, get_quantization_config

from trl_agents import AgentPPOConfig, AgentPPOTrainer, check_run
from trl_agents.lora import StageAdapters
from trl_agents.plots import plot_overoptimization
from trl_agents.preferences import PreferenceArguments
from trl_agents.recipe import check_stages, stage_arguments, trainer_settings
from trl_agents.report import report_stages
from trl_agents.rlhf import begin, evaluate_policies
from trl_agents.script import argument, check_positive, run
from trl_agents.stages import train_and_save


METHODS = ("ppo", "ppo_no_kl")
# TRL reads no reference at a beta of 0, and then nobody knows the KL: this one is read, and weighs nothing
NO_KL = 1e-6
DEFAULT_CONFIG = Path(__file__).parent / "configs" / "rlhf_tiny.yaml"


@dataclass
class ScriptArguments(PreferenceArguments):
    """Arguments of the recipe."""

    methods: list[str] = argument(list(METHODS), "What to train.", choices=list(METHODS))
    no_kl_steps: int | None = argument(None, "Updates of PPO without the KL. Default: as many as with it.")


def main(script_args: ScriptArguments, training_args: AgentPPOConfig, model_args: ModelConfig) -> None:
    output_dir = Path(training_args.output_dir)
    own = ["reward_weights", "value_head_init", "exploration"]
    check_stages(training_args, model_args, adapters=True, refuses=own)
    if training_args.beta <= 0.0 or training_args.kl_in != "reward":
        raise ValueError(
            f"beta={training_args.beta} and kl_in={training_args.kl_in!r}: the stage `ppo` has the KL in its reward, "
            "`ppo_no_kl` has none."
        )
    check_positive(script_args, "no_kl_steps")
    adapters = StageAdapters(get_peft_config(model_args), get_quantization_config(model_args), model_args.dtype)
    _, pairs, _ = data = script_args.load(training_args.seed)
    # The reward is a model that a stage makes
    check_run(None, training_args, reward_funcs="reward_model", train_dataset=pairs, **adapters.trainer)
    beginning = begin(script_args, training_args, model_args.model_name_or_path, adapters, data)
    sft, judge, rewards = beginning.sft, beginning.reward_model, beginning.load_rewards(training_args.device)

    def ppo(args):
        trainer = AgentPPOTrainer(
            str(sft),
            reward_funcs=list(rewards.values()),
            args=args,
            train_dataset=pairs.select_columns(["prompt"]),
            processing_class=AutoTokenizer.from_pretrained(sft, padding_side="left"),
            **adapters.trainer,
        )
        train_and_save(trainer, args.output_dir, start=sft, adapters=adapters)

    trained = {"sft": sft}
    for name in script_args.methods:
        args = stage_arguments(training_args, output_dir / name, value_head_init=str(judge), **adapters.config)
        args.reward_weights = [1.0] + [0.0] * (len(rewards) - 1)  # the true utility is looked at, not trained on
        if name == "ppo_no_kl":
            args.beta, args.max_steps = NO_KL, script_args.no_kl_steps or args.max_steps
        keep = {**beginning.settings, **trainer_settings(args)}
        trained[name] = beginning.stages.run(name, lambda folder, args=args: ppo(args), **keep)

    table = evaluate_policies(
        beginning,
        trained,
        training_args,
        max_new_tokens=training_args.max_completion_length,
        temperature=training_args.temperature,
    )
    curves = {name: curve(folder, rewards) for name, folder in trained.items() if name != "sft"}
    report_stages(
        output_dir,
        table,
        f"{len(beginning.test)} test prompts",
        folders=[*trained.values(), judge],
        label="mean",
        shares=False,
        more={"curves": curves},
        push=training_args,
    )
    if training_args.process_index == 0:
        before = {measure: table[measure]["sft"].mean for measure in rewards}
        plot_overoptimization(curves, before, output_dir / "overoptimization.png")


def curve(folder, rewards):
    """Each measure along training, from the log of the replies that were trained on."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    names = {"kl": "agents/kl_mean"}
    names |= {measure: f"rewards/{reward.__name__}/mean" for measure, reward in rewards.items()}
    logged = [entry for entry in history if all(name in entry for name in names.values())]
    return {measure: [entry[name] for entry in logged] for measure, name in [("step", "step"), *names.items()]}


if __name__ == "__main__":
    run(main, DEFAULT_CONFIG, ScriptArguments, AgentPPOConfig, ModelConfig)
