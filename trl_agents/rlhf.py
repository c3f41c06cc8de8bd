# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What learning from preferences begins and ends with, whichever way the policy learns: PPO and DPO share it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForSequenceClassification

from .lora import StageAdapters
from .preference_eval import evaluate_replies
from .preferences import PreferenceArguments, utility_reward
from .questions import load_model
from .recipe import machine_settings
from .reward_model import fit_reward_model, get_model_reward
from .sft import fine_tune
from .stages import Stages
from .tables import Interval, table_of
from .tiny import save_tiny_start


@dataclass(frozen=True)
class Beginning:
    """
    Where every policy starts from.

    `settings` are those of the first stages, for the stamps of what is built on them.
    """

    stages: Stages
    settings: Mapping[str, Any]
    pairs: Dataset
    test: Dataset
    sft: Path
    reward_model: Path
    has_utility: bool  # the preferences are made up, and the true utility is known

    def load_rewards(self, device: Any) -> dict[str, Callable]:
        """TRL's reward functions by name: the reward model's score and, where it is known, the true utility."""
        judge = load_model(self.reward_model, device, AutoModelForSequenceClassification)
        utility = {"true utility": utility_reward} if self.has_utility else {}
        return {"proxy reward": get_model_reward(*judge), **utility}


def begin(
    script_args: PreferenceArguments,
    training_args: Any,
    model: str | None,
    adapters: StageAdapters | None = None,
    data: tuple[Dataset, Dataset, Dataset] | None = None,
) -> Beginning:
    """
    Run the first stages, unless they are done: a model (made on the spot if None is named), fine-tuned on
    demonstrations (`sft`), and from there a reward model fitted to the preferences (`reward_model`).

    Args:
        script_args ([`PreferenceArguments`]):
            The data and how the two are trained.
        training_args ([`~transformers.TrainingArguments`]):
            Of the policy: where, on which machine, by which seed.
        model (`str`, *optional*):
            Folder or name of the model to start from.
        adapters ([`StageAdapters`], *optional*):
            What the stages train in place of all weights.
        data (`tuple`, *optional*):
            What `script_args.load` gave, where it was looked at before.
    """
    adapters = adapters or StageAdapters()
    demonstrations, pairs, test = data or script_args.load(training_args.seed)
    machine = {**machine_settings(training_args), "adapters": adapters}
    sft_settings, rm_settings = script_args.sft_settings, script_args.rm_settings
    stages = Stages(
        training_args.output_dir,
        model=model,
        data=script_args.data_settings,
        seed=training_args.seed,
        **adapters.settings,
    )
    start = model or stages.run(
        "start", lambda folder: save_tiny_start(demonstrations, folder, seed=training_args.seed)
    )
    sft = stages.run(
        "sft", lambda folder: fine_tune(start, demonstrations, folder, **sft_settings, **machine), **sft_settings
    )
    judge = stages.run(
        "reward_model",
        lambda folder: fit_reward_model(sft, pairs, folder, **rm_settings, **machine),
        **{"sft": sft_settings, **rm_settings},
    )
    settings = {"sft": sft_settings, "reward_model": rm_settings}
    return Beginning(stages, settings, pairs, test, sft, judge, script_args.has_utility)


def evaluate_policies(
    beginning: Beginning, policies: Mapping[str, Path], training_args: Any, **sampling: Any
) -> dict[str, dict[str, Interval]]:
    """
    Let each policy answer the test prompts: its rewards, and how far it is from `sft`. What it wrote is kept in
    `replies_<policy>.txt`.

    Args:
        beginning ([`Beginning`]):
            With the test prompts, the first policy and the reward model.
        policies (`Mapping[str, Path]`):
            Folders by the names to report.
        training_args ([`~transformers.TrainingArguments`]):
            Where and on which machine.
        **sampling:
            As for [`evaluate_replies`]: `max_new_tokens`, `temperature`.

    Returns:
        measure -> policy -> [`Interval`].
    """
    rewards = beginning.load_rewards(training_args.device)
    measured = {}
    for name, folder in policies.items():
        measured[name] = evaluate_replies(
            *load_model(folder, training_args.device),
            beginning.test["prompt"][:],
            rewards,
            reference=load_model(beginning.sft, training_args.device)[0],
            samples=Path(training_args.output_dir) / f"replies_{name}.txt",
            progress=not training_args.disable_tqdm,
            **sampling,
        )
    return table_of(measured)
