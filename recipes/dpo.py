# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
DPO: a language model learns people's preferences from the pairs themselves, by TRL's `DPOTrainer`, without sampling
and without a reward model, which is only fitted to judge the result. The preferences, the supervised model and the
judge are those of rlhf.py.

    accelerate launch recipes/dpo.py                            # minutes, on any computer
    accelerate launch recipes/dpo.py --output_dir outputs/rlhf_tiny    # beside rlhf.py, whose first stages it finds

Without --config it runs recipes/configs/dpo_tiny.yaml; without --model_name_or_path it makes a small model, which
learns from nothing. A stage that is done is not trained again. recipes/README.md says what to expect.
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer, ModelConfig

from trl_agents.evaluation import interval
from trl_agents.plots import plot_learning_curve
from trl_agents.preference_eval import evaluate_replies
from trl_agents.preferences import PreferenceArguments, utility_reward
from trl_agents.questions import load_model
from trl_agents.recipe import check_stages, machine_settings, parse_arguments, trainer_settings
from trl_agents.report import report_stages
from trl_agents.reward_model import fit_reward_model, get_model_reward
from trl_agents.sft import fine_tune
from trl_agents.stages import Stages, last_checkpoint
from trl_agents.tiny import save_tiny_start


DEFAULT_CONFIG = Path(__file__).parent / "configs" / "dpo_tiny.yaml"


@dataclass
class ScriptArguments(PreferenceArguments):
    """Arguments of the recipe."""

    max_new_tokens: int = field(default=64, metadata={"help": "Token budget of the replies that are evaluated."})


def main(script_args: ScriptArguments, training_args: DPOConfig, model_args: ModelConfig) -> None:
    output_dir = Path(training_args.output_dir)
    check_stages(training_args, model_args)
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

    def dpo(folder):
        args = copy.copy(training_args)
        args.output_dir = str(folder)
        trainer = DPOTrainer(
            str(sft),
            args=args,
            train_dataset=pairs,
            processing_class=AutoTokenizer.from_pretrained(sft, padding_side="left"),
        )
        trainer.train(resume_from_checkpoint=last_checkpoint(folder))
        trainer.save_model(folder)
        trainer.create_model_card()
        if trainer.is_world_process_zero():
            history, metric = trainer.state.log_history, "rewards/accuracies"
            plot_learning_curve(history, output_dir / "dpo_curve.png", metric, "pairs told right")

    keep = trainer_settings(training_args)
    trained = {"sft": sft, "dpo": stages.run("dpo", dpo, sft=sft_settings, **keep)}

    device = training_args.device
    rewards = {"proxy reward": get_model_reward(*load_model(judge, device, AutoModelForSequenceClassification))}
    if script_args.has_utility:
        rewards["true utility"] = utility_reward
    table = {}
    for name, folder in trained.items():
        measured = evaluate_replies(
            *load_model(folder, device),
            test["prompt"][:],
            rewards,
            reference=load_model(sft, device)[0],
            max_new_tokens=script_args.max_new_tokens,
            samples=output_dir / f"replies_{name}.txt",
            progress=not training_args.disable_tqdm,
        )
        for measure, values in measured.items():
            table.setdefault(measure, {})[name] = interval(values)
    folders = [*trained.values(), judge]
    report_stages(output_dir, table, f"{len(test)} test prompts", folders=folders, label="mean", shares=False)


if __name__ == "__main__":
    main(*parse_arguments(DEFAULT_CONFIG, ScriptArguments, DPOConfig, ModelConfig))
