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

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer, ModelConfig, get_peft_config, get_quantization_config

from trl_agents.lora import StageAdapters
from trl_agents.preferences import PreferenceArguments
from trl_agents.recipe import check_stages, stage_arguments, trainer_settings
from trl_agents.report import report_stages
from trl_agents.rlhf import begin, evaluate_policies
from trl_agents.script import argument, check_positive, run
from trl_agents.stages import train_and_save


DEFAULT_CONFIG = Path(__file__).parent / "configs" / "dpo_tiny.yaml"


@dataclass
class ScriptArguments(PreferenceArguments):
    """Arguments of the recipe."""

    max_new_tokens: int = argument(64, "Token budget of the replies that are evaluated.")


def main(script_args: ScriptArguments, training_args: DPOConfig, model_args: ModelConfig) -> None:
    check_stages(training_args, model_args, adapters=True)
    check_positive(script_args, "max_new_tokens")
    adapters = StageAdapters(get_peft_config(model_args), get_quantization_config(model_args), model_args.dtype)
    beginning = begin(script_args, training_args, model_args.model_name_or_path, adapters)

    curves = {"learning_curve.png": ("rewards/accuracies", "pairs told right")}

    def dpo(folder):
        trainer = DPOTrainer(
            str(beginning.sft),
            args=stage_arguments(training_args, folder, **adapters.config),
            train_dataset=beginning.pairs,
            processing_class=AutoTokenizer.from_pretrained(beginning.sft, padding_side="left"),
            **adapters.trainer,
        )
        train_and_save(trainer, folder, start=beginning.sft, adapters=adapters, curves=curves)

    keep = {**beginning.settings, **trainer_settings(training_args)}
    trained = {"sft": beginning.sft, "dpo": beginning.stages.run("dpo", dpo, **keep)}
    table = evaluate_policies(beginning, trained, training_args, max_new_tokens=script_args.max_new_tokens)
    report_stages(
        training_args.output_dir,
        table,
        f"{len(beginning.test)} test prompts",
        folders=[*trained.values(), beginning.reward_model],
        label="mean",
        shares=False,
        push=training_args,
    )


if __name__ == "__main__":
    run(main, DEFAULT_CONFIG, ScriptArguments, DPOConfig, ModelConfig)
