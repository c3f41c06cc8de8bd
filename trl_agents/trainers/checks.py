# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What can be known to fail before anything is loaded or written."""

from __future__ import annotations

import dataclasses
import functools
import random
import warnings
from collections.abc import Callable
from contextlib import closing
from typing import Any

from .._trl import check_trl
from ..actions import ActionParser
from ..contexts import Briefing
from ..envs.make import make_env
from ..envs.names import check_model_source
from ..exploration import Exploration, make_exploration
from ..launch import check_processes
from ..rollout.probe import Probe
from ..rollout.processes import refuse_in_process_of_env
from ..rollout.rules import Episode
from .agent_grpo_config import AgentGRPOConfig
from .inputs import check_arguments, check_dataset, check_questions
from .packages import check_packages


# How far an episode is played to see whether its legal actions change.
PROBED_STEPS = 8


def check_run(
    env: str | Callable[..., Any] | None,
    args: AgentGRPOConfig,
    action_parser: ActionParser | None = None,
    **kwargs: Any,
) -> None:
    """
    Raises now what would be raised when the trainer is made: for scripts that prepare for minutes before they have a
    model. Nothing is loaded or written.

    Args:
        env (`str` or `Callable`):
            Environment id, class or factory; None for questions, which `kwargs` bring.
        args ([`AgentGRPOConfig`]):
            Configuration of the trainer.
        action_parser ([`ActionParser`], *optional*):
            What the trainer will be given.
        **kwargs:
            Other arguments that the trainer will be given (`model` by its name, `reward_funcs`, `train_dataset`,
            `peft_config`, ...).
    """
    refuse_in_process_of_env()
    check_trl()
    check_processes()
    check_arguments("check_run", type(args), kwargs)
    check_model(kwargs.get("model"))
    check_separate_critic(args, kwargs.get("model"), kwargs)
    if env is None:
        check_unplayed(args, action_parser)
        names = ("reward_funcs", "train_dataset", "eval_dataset")
        check_questions(args, *(kwargs.get(name) for name in names), kwargs)
        check_packages(args, kwargs)
        return
    check_types(args, action_parser)
    reward_funcs = kwargs.pop("reward_funcs", None) or []
    check_settings(args, None, reward_funcs if isinstance(reward_funcs, list) else [reward_funcs], kwargs)
    check_packages(args, kwargs)
    dataset = kwargs.get("train_dataset")
    if dataset is None:
        dataset = [{"seed": seed} for seed in range(args.num_train_seeds)]
    check_dataset(dataset, args.generation_batch_size // args.num_generations)
    check_dataset(kwargs.get("eval_dataset"))
    env_kwargs = {**(args.env_kwargs or {}), **make_exploration(args.exploration).env_kwargs}
    check_environment(
        functools.partial(make_env, env, **env_kwargs),
        action_parser or ActionParser(),
        args,
        next(iter(dataset)),
    )


def check_critic(args: Any, has_critic: bool) -> None:
    """Raises `ValueError` for settings of PPO without its critic: a group of one has no baseline, and a loss of 0."""
    if getattr(args, "has_critic", False) and not has_critic:
        raise ValueError(
            f"`args` is a `{type(args).__name__}`, whose baseline is a critic's, and this trainer has none: use "
            "`AgentPPOTrainer`, or pass an `AgentGRPOConfig`."
        )


def check_separate_critic(args: Any, model: Any, kwargs: dict[str, Any]) -> None:
    """Raises `ValueError` for an adapter beside a second trunk. `kwargs` are the trainer's other arguments."""
    if getattr(args, "separate_critic", False) and has_adapter(model, kwargs):
        raise ValueError(
            "separate_critic=True trains a second trunk in full, which adapters are there to avoid: leave out "
            "`separate_critic`, or the adapter."
        )


def has_adapter(model: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an adapter is trained: the model's own, or one among the trainer's other arguments."""
    return kwargs.get("peft_config") is not None or hasattr(model, "peft_config")


def check_unplayed(args: Any, action_parser: Any) -> None:
    """Raises `ValueError` for what would have no effect without an environment."""
    if action_parser is not None:
        raise ValueError("`action_parser` was given without `env`: pass the environment to play in.")
    if getattr(args, "exploration", None):
        raise ValueError(f"exploration={args.exploration} has no effect without `env`: leave it out.")


def check_model(model: Any) -> None:
    """Raises `ValueError` for a model's name that is no folder of one, and no Hub id."""
    if isinstance(model, str):
        check_model_source(model)


def check_types(args: Any, action_parser: Any) -> None:
    """Raises `ValueError` for arguments of another kind than an environment needs."""
    if not isinstance(args, AgentGRPOConfig):
        raise ValueError(f"`args` is a `{type(args).__name__}`: with `env`, pass an `AgentGRPOConfig`.")
    if action_parser is not None and not hasattr(action_parser, "check_legal_actions"):
        raise ValueError(
            f"action_parser={action_parser!r} is a `{type(action_parser).__name__}`: pass an `ActionParser`, such as "
            "`ActionParser(pattern)`."
        )


def check_settings(args: AgentGRPOConfig, model: Any, reward_funcs: list, kwargs: dict[str, Any]) -> None:
    """
    Raises `ValueError` for settings that an environment rules out. `kwargs` are the trainer's other arguments; a
    `model` of None is one that is not there yet.
    """
    for name in ("rollout_func", "environment_factory", "tools"):
        if kwargs.get(name):
            raise ValueError(f"`{name}` and `env` both say how completions are made: pass only one of them.")
    make_exploration(args.exploration).check_context(args.context)
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
    for name in ("missing_eos_reward", "missing_eos_penalty"):
        if (value := getattr(args, name, None)) is not None:
            raise ValueError(
                f"{name}={value} has no effect on episodes, which their environment pays: leave it out. A reply that "
                "ran out of tokens before its action costs `invalid_action_penalty`."
            )
    in_memory = not (model is None or isinstance(model, str) or model.config.name_or_path)
    if args.beta != 0.0 and not has_adapter(model, kwargs) and in_memory:
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
    if not args.use_vllm and not args.ds3_gather_for_generation:
        raise ValueError(
            "ds3_gather_for_generation=False gathers the weights in every forward pass, of which processes make as "
            "many as their own episodes need: they would wait for each other for ever. Use True, or use_vllm."
        )
    if args.action_stop and args.use_vllm:
        raise ValueError(
            "action_stop=True ends replies token by token, and vLLM knows only whole ones. Leave one of them out, or "
            "let the model end its replies itself (a few steps of SFT teach it)."
        )
    if args.repetition_penalty != 1.0:
        raise ValueError(
            f"repetition_penalty={args.repetition_penalty} would punish naming an action twice in an episode. Use "
            "1.0 with an environment."
        )
    if args.loss_type == "dr_grpo" and args.max_turns != 1:
        warnings.warn(
            f"loss_type='dr_grpo' divides a row's loss by max_completion_length={args.max_completion_length}, the "
            "budget of one reply, but a row holds all replies of an episode: loss and gradients are larger by as many "
            "times as an episode has turns. Adam's steps do not depend on that, but gradients are clipped sooner: "
            f"raise max_grad_norm={args.max_grad_norm} as many times, or use loss_type='dapo'.",
            stacklevel=3,
        )


def check_fsdp(trainer: Any) -> None:
    """Raises `ValueError` for kinds of FSDP that a rollout, or the reference model, would not survive."""
    plugin = trainer.accelerator.state.fsdp_plugin
    ours = trainer.plays or trainer.has_critic  # else everything is TRL's
    if ours and plugin.fsdp_version != 2 and not trainer.use_vllm:
        raise ValueError(
            f"fsdp_version: {plugin.fsdp_version} gathers the weights in every forward pass, of which processes make "
            "as many as their own episodes need: they would wait for each other for ever. Use fsdp_version: 2 "
            "(accelerate_configs/fsdp2.yaml), DeepSpeed (accelerate_configs/zero3.yaml), or use_vllm=True."
        )
    several = trainer.accelerator.num_processes > 1
    if several and plugin.cpu_ram_efficient_loading and trainer.ref_model is not None:
        raise ValueError(
            f"fsdp_cpu_ram_efficient_loading: true loads weights in the first process alone, and TRL does not hand "
            f"those of the reference model (beta={trainer.beta}) to the others. Set it to false, use an adapter, or "
            "beta=0.0."
        )


def check_evaluation(trainer: Any, dataset: Any) -> None:
    """Raises `ValueError` for what cannot be evaluated on, which without `eval_strategy` nobody has looked at."""
    check_dataset(dataset)
    if hasattr(dataset, "column_names") and hasattr(dataset, "__len__") and len(dataset) == 0:
        raise ValueError(
            f"There is no episode to evaluate on: raise num_eval_seeds={trainer.args.num_eval_seeds}, or pass an "
            "`eval_dataset` with a column 'seed'."
        )
    size, generations = trainer.args.eval_batch_size * trainer.accelerator.num_processes, trainer.num_generations_eval
    if size % generations:
        raise ValueError(
            f"An evaluation batch of {size} episodes holds no whole groups of num_generations_eval={generations}: "
            f"make per_device_eval_batch_size={trainer.args.per_device_eval_batch_size} a multiple of it."
        )


def check_environment(
    factory: Callable[[], Any], parser: ActionParser, args: AgentGRPOConfig, row: dict[str, Any]
) -> tuple[Briefing, str, dict[str, Any]]:
    """
    Starts the episode of `row`, to find out now what would otherwise fail in the middle of a run. Returns how it
    begins: the standing texts, the first observation and its info.
    """
    limits = args.env_timeout, args.env_reset_timeout, args.env_processes
    with closing(Probe(factory, *limits)) as probe:
        begun = probe.begin(Episode(row["seed"]).seed, row.get("options"))
        briefing = begun.briefing
        legal_actions = begun.info.get("legal_actions")
        exploration = make_exploration(args.exploration)
        exploration.check_actions(legal_actions, legal_actions)
        if legal_actions:
            parser.check_legal_actions(legal_actions)
        elif args.invalid_action == "random":
            warnings.warn(
                f"{begun.name} lists no info['legal_actions'], so invalid_action='random' has nothing to "
                "choose from: a reply without an action ends the episode. Say invalid_action='end' or 'retry' to "
                "choose.",
                stacklevel=3,
            )
        _check_steady(probe, legal_actions, exploration)
    return briefing, begun.observation, begun.info


def check_room(trainer: Any, briefing: Briefing, observation: str, info: dict[str, Any]) -> None:
    """Raises `ValueError` where `max_episode_length` has no room for a reply to an episode's first question."""
    limit = trainer.args.max_episode_length
    if limit is None:
        return
    briefing = dataclasses.replace(briefing, instructions=info.get("instructions", briefing.instructions))
    length = len(trainer.context.begin(briefing, observation, info).prompt_ids)
    if length >= limit:
        raise ValueError(
            f"max_episode_length={limit} leaves no room for a reply: the first question takes {length} tokens with "
            "the instructions. Raise it, or leave it out for the model's number of positions."
        )


def _check_steady(probe: Probe, legal_actions: list[str] | None, exploration: Exploration) -> None:
    """Plays on at random for a few steps where a mechanism needs legal actions."""
    rng, now = random.Random(0), legal_actions
    for _ in range(PROBED_STEPS if exploration.needs_actions else 0):
        reply = probe.step(rng.choice(now))
        if reply.fault is not None or reply.terminated or reply.truncated:  # a rollout survives a fault
            return
        now = reply.info.get("legal_actions")
        exploration.check_actions(legal_actions, now)
