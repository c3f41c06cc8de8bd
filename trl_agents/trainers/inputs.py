# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What a trainer is given to train on: arguments that it does not have, datasets that it cannot use."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

from .._trl import GRPOConfig, GRPOTrainer


# What they hold, and how one gets there
_COLUMNS = {
    "seed": (
        "With `env`, a dataset says which episodes to play in a column 'seed'",
        "Add one, or leave the dataset out.",
    ),
    "prompt": (
        "Without `env`, a dataset holds what the model answers in a column 'prompt'",
        "Rename one (`rename_column`), let `trl_agents.data.prompt_completion` make it of questions, or pass the "
        "environment to play in as `env`.",
    ),
}


def check_arguments(trainer: str, config: type, kwargs: dict[str, Any]) -> None:
    """Raises `ValueError` for arguments that a trainer does not have: `kwargs` are those beside its own."""
    for name in sorted(set(kwargs) - set(inspect.signature(GRPOTrainer.__init__).parameters)):
        if name in {field.name for field in fields(config)}:
            mend = f"It is a setting: args={config.__name__}({name}=...)."
        elif name.startswith("env"):
            mend = "Pass the environment (its id, class or factory) as `env`."
        else:
            mend = "It has those of TRL's `GRPOTrainer`, `env` and `action_parser`; settings go into `args`."
        raise ValueError(f"`{trainer}` has no argument {name!r}. {mend}")


def check_questions(
    args: GRPOConfig | None, reward_funcs: Any, train_dataset: Any, eval_dataset: Any, kwargs: dict[str, Any]
) -> None:
    """Raises `ValueError` for what cannot be trained on without an environment. `kwargs`: the other arguments."""
    if kwargs.get("environment_factory"):  # TRL's own environments bring rewards, and maybe prompts
        return
    if not reward_funcs:
        raise ValueError(
            "There is neither `env` nor `reward_funcs`, so nothing says what is worth learning. Pass the environment "
            "to play in as `env` (an id, a class or a factory), or `reward_funcs` and a `train_dataset` of prompts."
        )
    if train_dataset is None:
        raise ValueError(
            "There is neither `env` nor `train_dataset`, so there is nothing to answer. Pass a dataset with a column "
            "'prompt', or the environment to play in as `env`."
        )
    at_least = args.generation_batch_size // args.num_generations if args is not None else 1
    check_dataset(train_dataset, at_least, column="prompt")
    check_dataset(eval_dataset, column="prompt")


def check_dataset(dataset: Any, at_least: int = 0, column: str = "seed") -> None:
    """
    Raises `ValueError` for a dataset without what is read of it, or with fewer rows than `at_least`: TRL's sampler
    leaves out batches that are not full, also the only one. What has no length, or no known columns, passes.
    """
    for part in dataset.values() if isinstance(dataset, dict) else [dataset]:
        columns = getattr(part, "column_names", None)
        if columns is not None and column not in columns:
            wanted, mend = _COLUMNS[column]
            raise ValueError(f"{wanted}, but its columns are {columns}. {mend}")
        if hasattr(part, "__len__") and len(part) < at_least:
            raise ValueError(
                f"{len(part)} {column}s to train on, but each generation batch takes {at_least} "
                f"(generation_batch_size / num_generations): nothing would be trained. Give more {column}s, or a "
                "smaller batch (per_device_train_batch_size, gradient_accumulation_steps)."
            )
