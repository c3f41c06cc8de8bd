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

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import ModelConfig

from trl_agents import AgentPPOConfig, AgentPPOTrainer
from trl_agents.evaluation import interval
from trl_agents.plots import plot_overoptimization
from trl_agents.preference_eval import evaluate_replies
from trl_agents.preferences import PreferenceArguments, utility_reward
from trl_agents.questions import load_model
from trl_agents.recipe import check_stages, machine_settings, parse_arguments, trainer_settings
from trl_agents.report import report_stages
from trl_agents.reward_model import fit_reward_model, get_model_reward
from trl_agents.sft import fine_tune
from trl_agents.stages import Stages, last_checkpoint
from trl_agents.tiny import save_tiny_start


METHODS = ("ppo", "ppo_no_kl")
# TRL reads no reference at a beta of 0, and then nobody knows the KL: this one is read, and weighs nothing
NO_KL = 1e-6
DEFAULT_CONFIG = Path(__file__).parent / "configs" / "rlhf_tiny.yaml"


@dataclass
class ScriptArguments(PreferenceArguments):
    """Arguments of the recipe."""

    methods: list[str] = field(
        default_factory=lambda: list(METHODS), metadata={"help": "What to train.", "choices": list(METHODS)}
    )
    no_kl_steps: int | None = field(
        default=None, metadata={"help": "Updates of PPO without the KL. Default: as many as with it."}
    )


def main(script_args: ScriptArguments, training_args: AgentPPOConfig, model_args: ModelConfig) -> None:
    output_dir = Path(training_args.output_dir)
    check_stages(training_args, model_args)
    if training_args.beta <= 0.0 or training_args.kl_in != "reward":
        raise ValueError(
            f"beta={training_args.beta} and kl_in={training_args.kl_in!r}: the stage `ppo` has the KL in its reward, "
            "`ppo_no_kl` has none."
        )
    demonstrations, pairs, test = script_args.load(training_args.seed)
    settings = machine_settings(training_args)
    sft_settings, rm_settings = script_args.sft_settings, script_args.rm_settings
    stages = Stages(
        output_dir, model=model_args.model_name_or_path, data=script_args.data_settings, seed=training_args.seed
    )
    start = model_args.model_name_or_path or stages.run(
        "start", lambda folder: save_tiny_start(demonstrations, folder, seed=training_args.seed)
    )
    sft = stages.run(
        "sft", lambda folder: fine_tune(start, demonstrations, folder, **sft_settings, **settings), **sft_settings
    )
    judge = stages.run(
        "reward_model",
        lambda folder: fit_reward_model(sft, pairs, folder, **rm_settings, **settings),
        **{"sft": sft_settings, **rm_settings},
    )
    device = training_args.device
    rewards = {"proxy reward": get_model_reward(*load_model(judge, device, AutoModelForSequenceClassification))}
    if script_args.has_utility:
        rewards["true utility"] = utility_reward

    def ppo(args):
        trainer = AgentPPOTrainer(
            str(sft),
            reward_funcs=list(rewards.values()),
            args=args,
            train_dataset=pairs.select_columns(["prompt"]),
            processing_class=AutoTokenizer.from_pretrained(sft, padding_side="left"),
        )
        trainer.train(resume_from_checkpoint=last_checkpoint(Path(args.output_dir)))
        trainer.save_model(args.output_dir)
        trainer.save_state()  # with the log, which the picture is made of
        trainer.create_model_card()

    trained = {"sft": sft}
    for name in script_args.methods:
        args = copy.copy(training_args)
        args.output_dir, args.value_head_init = str(output_dir / name), str(judge)
        args.reward_weights = [1.0] + [0.0] * (len(rewards) - 1)  # the true utility is looked at, not trained on
        if name == "ppo_no_kl":
            args.beta, args.max_steps = NO_KL, script_args.no_kl_steps or args.max_steps
        keep = trainer_settings(args)
        trained[name] = stages.run(
            name, lambda folder, args=args: ppo(args), sft=sft_settings, reward_model=rm_settings, **keep
        )

    table, curves = {}, {}
    for name, folder in trained.items():
        measured = evaluate_replies(
            *load_model(folder, device),
            test["prompt"][:],
            rewards,
            reference=load_model(sft, device)[0],
            max_new_tokens=training_args.max_completion_length,
            temperature=training_args.temperature,
            samples=output_dir / f"replies_{name}.txt",
            progress=not training_args.disable_tqdm,
        )
        for measure, values in measured.items():
            table.setdefault(measure, {})[name] = interval(values)
        if name != "sft":
            curves[name] = curve(folder, rewards)
    report_stages(
        output_dir,
        table,
        f"{len(test)} test prompts",
        folders=[*trained.values(), judge],
        label="mean",
        shares=False,
        more={"curves": curves},
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
    main(*parse_arguments(DEFAULT_CONFIG, ScriptArguments, AgentPPOConfig, ModelConfig))
