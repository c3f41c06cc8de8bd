# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What can be known to fail before anything is loaded or written."""

from __future__ import annotations

from typing import Any

from .agent_grpo_config import AgentGRPOConfig


def check_settings(args: AgentGRPOConfig, model: Any, reward_funcs: list, kwargs: dict[str, Any]) -> None:
    """Raises `ValueError` for settings that an environment rules out. `kwargs` are the trainer's other arguments."""
    for name in ("rollout_func", "environment_factory", "tools"):
        if kwargs.get(name):
            raise ValueError(f"`{name}` and `env` both say how completions are made: pass only one of them.")
    if args.reward_weights is not None and len(args.reward_weights) != len(reward_funcs):
        raise ValueError(
            f"reward_weights={args.reward_weights} for {len(reward_funcs)} reward functions: give one weight for "
            "each of `reward_funcs`. The environment's own reward weighs 1."
        )
    if args.max_completion_length is None or args.max_completion_length < 1:
        raise ValueError(
            f"max_completion_length={args.max_completion_length} is the token budget of one reply: give a "
            "positive number."
        )
    if args.remove_unused_columns:
        raise ValueError(
            "remove_unused_columns=True would remove the dataset's column 'seed'. Use False with an environment."
        )
    with_adapter = kwargs.get("peft_config") is not None or hasattr(model, "peft_config")
    if args.beta != 0.0 and not with_adapter and not isinstance(model, str) and not model.config.name_or_path:
        raise ValueError(
            f"beta={args.beta} needs a reference model, which TRL loads from where `model` came from, but this "
            "one was made in memory. Save it and pass the folder, or use beta=0.0."
        )
    if args.mask_truncated_completions:
        raise ValueError(
            "mask_truncated_completions=True would drop an episode for its last reply alone. Use False with an "
            "environment: a reply that ran out of tokens already costs `invalid_action_penalty`."
        )
    if args.multi_objective_aggregation != "sum_then_normalize":
        raise ValueError(
            f"multi_objective_aggregation={args.multi_objective_aggregation!r} normalises each reward function "
            "over episodes, which has no meaning for rewards per turn. Use 'sum_then_normalize'."
        )
    if not args.use_vllm and (args.generation_kwargs or args.use_transformers_continuous_batching):
        raise ValueError(
            f"generation_kwargs={args.generation_kwargs} and use_transformers_continuous_batching="
            f"{args.use_transformers_continuous_batching} have no effect on episodes: use temperature, top_p, "
            "top_k and min_p, or use_vllm."
        )
    if args.repetition_penalty != 1.0:
        raise ValueError(
            f"repetition_penalty={args.repetition_penalty} would punish naming an action twice in an episode. Use "
            "1.0 with an environment."
        )


def check_dataset(dataset: Any, at_least: int = 0) -> None:
    """Raises `ValueError` for a dataset that does not say which episodes to play, or has fewer than `at_least`."""
    for part in dataset.values() if isinstance(dataset, dict) else [dataset]:
        columns = getattr(part, "column_names", None)
        if columns is not None and "seed" not in columns:
            raise ValueError(
                f"With `env`, a dataset says which episodes to play in a column 'seed', but its columns are {columns}."
                " Add one, or leave the dataset out."
            )
        if hasattr(part, "__len__") and len(part) < at_least:
            raise ValueError(
                f"{len(part)} seeds to train on, but each generation batch takes {at_least} (generation_batch_size / "
                "num_generations): nothing would be trained. Give more seeds, or a smaller batch."
            )
