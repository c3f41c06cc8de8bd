# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What a recipe's YAML asks for, with the defaults of its trainer: what is trained, how, on how many tokens."""

from __future__ import annotations

import ast
import runpy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .._trl import ModelConfig, TrlParser
from .cluster import Cluster, read_settings
from .episodes import Episode, Reading, measure_reading


PROMPT_TOKENS = 256  # of a question, where no environment says
COUNTS = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation", "num_iterations")
METHODS = ("full", "lora", "qlora")
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2, None: 4}


@dataclass(frozen=True)
class Adapter:
    """
    Args:
        rank (`int`):
            Of the LoRA matrices.
        targets (`str` or `tuple[str, ...]`, *optional*):
            Layers that get one, by the end of their names; `"all-linear"`: all but the output head. Defaults to
            PEFT's choice for the architecture.
        bits (`int`, *optional*, defaults to `16`):
            Of the base model's linear layers: 4 (QLoRA), 8, or 16 for as they were loaded.
        double_quantization (`bool`, *optional*, defaults to `False`):
            Whether the scales of 4-bit weights are quantised too.
    """

    rank: int
    targets: str | tuple[str, ...] | None = "all-linear"
    bits: int = 16
    double_quantization: bool = False


@dataclass(frozen=True)
class Plan:
    """
    What one GPU does.

    Args:
        recipe, trainer (`str`):
            Name of the script; `"grpo"`, `"ppo"`, `"dpo"` or `"sft"`.
        model (`str`, *optional*):
            The YAML's own.
        adapter ([`Adapter`], *optional*):
            None trains all weights.
        weight_bytes (`int`):
            Of a weight as it is loaded.
        bf16 (`bool`):
            Whether matrix products are in bfloat16.
        optimizer (`str`):
            transformers' name.
        checkpointing (`bool`):
            Gradient checkpointing.
        attention (`str`):
            transformers' name.
        kl (`bool`):
            Whether rows are scored by a reference: the model without its adapter, or a second one.
        separate_critic, reward_model (`bool`):
            Models that are held beside.
        rows, row_length (`int`):
            Of one forward pass of an update, the longest possible.
        accumulation (`int`):
            Such passes of an update.
        updates (`int`):
            Updates of a rollout (of an epoch of one batch, where there is no rollout).
        old_logps (`bool`):
            Whether rows are scored by the old policy as well.
        mean_row_length (`float`):
            What times are reckoned with.
        episodes, side_by_side (`int`):
            Of a rollout; 0: no rollout.
        episode ([`Episode`], *optional*):
            One of them, at its typical length.
        longest (`int`):
            Most tokens of one, cache and reply.
        grown_by (`int`):
            Steps in which the cache grows.
        env_delay (`float`):
            Seconds a turn.
        vllm_share (`float`):
            Of a GPU's memory, kept by vLLM beside the training; 0 without it.
    """

    recipe: str
    trainer: str
    model: str | None
    adapter: Adapter | None
    weight_bytes: int
    bf16: bool
    optimizer: str
    checkpointing: bool
    attention: str
    kl: bool
    separate_critic: bool
    reward_model: bool
    rows: int
    row_length: int
    accumulation: int
    updates: int
    old_logps: bool
    mean_row_length: float
    episodes: int = 0
    side_by_side: int = 0
    episode: Episode | None = None
    longest: int = 0
    grown_by: int = 1
    env_delay: float = 0.0
    vllm_share: float = 0.0

    @property
    def reference(self) -> bool:
        """Whether a reference model is held."""
        return self.kl and self.adapter is None

    def by(self, method: str) -> Plan:
        """The same with another of [`METHODS`]; one that the plan has already stays as it is."""
        if method not in METHODS:
            raise ValueError(f"method={method!r} is unknown: choose one of {', '.join(METHODS)}.")
        own = "full" if self.adapter is None else "qlora" if self.adapter.bits == 4 else "lora"
        if method == own:
            return self
        if method == "full":
            # As one trains all weights: in mixed precision, by Adam
            return replace(self, adapter=None, weight_bytes=4, optimizer="adamw_torch_fused")
        if method == "lora":
            adapter = replace(self.adapter or Adapter(16), bits=16)
            return replace(self, adapter=adapter, separate_critic=False, weight_bytes=2)
        adapter = replace(self.adapter or Adapter(16), bits=4, double_quantization=True)
        changes = {"separate_critic": False, "weight_bytes": 2, "optimizer": "paged_adamw_8bit"}
        return replace(self, adapter=adapter, **changes)


def read_plan(
    config: str | Path,
    cluster: Cluster,
    changes: Mapping[str, Any] | None = None,
    *,
    script: str | Path | None = None,
    reply_tokens: int | None = None,
    prompt_tokens: int | None = None,
    turns: int | None = None,
    env_delay: float = 0.0,
    positions: int | None = None,
) -> Plan:
    """
    Read a recipe's YAML as its script would on `cluster`.

    Args:
        config (`str` or `Path`):
            The YAML.
        cluster ([`Cluster`]):
            How many processes there are decides how many rows each gets.
        changes (`Mapping[str, Any]`, *optional*):
            Arguments in place of the YAML's, as on the command line.
        script (`str` or `Path`, *optional*):
            The recipe. Found by the YAML's name if it lies where recipes' do.
        reply_tokens (`int`, *optional*):
            Typical length of a reply; memory is always reckoned with the budget. Defaults to the budget.
        prompt_tokens (`int`, *optional*):
            Length of a prompt. Defaults to what the environment says at its start, or [`PROMPT_TOKENS`].
        turns (`int`, *optional*):
            Turns of an episode. Defaults to those of one that is played at random.
        env_delay (`float`, *optional*, defaults to `0.0`):
            Seconds the environment takes a turn.
        positions (`int`, *optional*):
            Most tokens the model reads.
    """
    path = Path(config).expanduser()
    if not path.is_file():
        raise ValueError(f"There is no YAML {config}: give one of recipes/configs/, or one of your own.")
    given = read_settings(path) | dict(changes or {})
    script = find_script(path) if script is None else Path(script)
    script_args, args, model_args, names = _parse(script, path, cluster.n_gpus, changes or {})
    for name in COUNTS:
        if getattr(args, name, None) is not None and getattr(args, name) < 1:
            raise ValueError(f"{name}={getattr(args, name)!r}: give a number of at least 1.")
    plays, trainer = hasattr(args, "num_generations"), _trainer_of(args)
    adapter = _adapter_of(model_args)
    if positions is None or getattr(args, "max_episode_length", None):
        limits = [positions, getattr(args, "max_episode_length", None)]
        positions = min((limit for limit in limits if limit), default=None)
    bf16 = given.get("bf16", not given.get("fp16", False))  # as TRL, whatever the launch file says
    common: dict[str, Any] = {
        "recipe": script.stem,
        "trainer": trainer,
        "model": model_args.model_name_or_path,
        "adapter": adapter,
        "weight_bytes": BYTES[model_args.dtype],
        "bf16": str(bf16).lower() == "true",
        "optimizer": str(getattr(args.optim, "value", args.optim)),
        "checkpointing": bool(args.gradient_checkpointing),
        "attention": model_args.attn_implementation or "sdpa",
        "env_delay": env_delay,
    }
    if not plays:
        budget = getattr(script_args, "max_new_tokens", None) or PROMPT_TOKENS
        length = args.max_length or (prompt_tokens or PROMPT_TOKENS) + budget
        dpo = trainer == "dpo"
        return Plan(
            **common,
            kl=dpo and not args.precompute_ref_log_probs,
            separate_critic=False,
            reward_model=False,
            rows=args.per_device_train_batch_size * (2 if dpo else 1),
            row_length=length,
            mean_row_length=(prompt_tokens or PROMPT_TOKENS) + (reply_tokens or budget) if not dpo else length,
            accumulation=args.gradient_accumulation_steps,
            updates=1,
            old_logps=False,
        )

    reading = _reading_of(script_args, args, names, prompt_tokens, turns)
    longest = reading.episode(args.max_completion_length, positions)
    typical = reading.episode(min(reply_tokens or args.max_completion_length, args.max_completion_length), positions)
    episodes = args.per_device_train_batch_size * args.steps_per_generation
    rows = -(-episodes * len(longest.rows) // args.steps_per_generation)
    by_env = _env_of(script_args, names) is not None
    side_by_side = min(args.rollout_batch_size or episodes, episodes) if by_env else episodes
    passes = args.steps_per_generation * args.num_iterations
    return Plan(
        **common,
        kl=args.beta != 0.0,
        separate_critic=bool(getattr(args, "separate_critic", False)),
        reward_model=trainer == "ppo" and hasattr(script_args, "rm_epochs"),
        rows=rows,
        row_length=max(longest.rows),
        mean_row_length=sum(typical.rows) / len(typical.rows),
        accumulation=args.gradient_accumulation_steps,
        updates=max(passes // args.gradient_accumulation_steps, 1),
        old_logps=trainer == "ppo" or args.gradient_accumulation_steps % passes != 0 or args.use_vllm,
        episodes=episodes,
        side_by_side=side_by_side,
        episode=typical,
        longest=max(longest.rows),
        grown_by=256 if by_env else 1,
        vllm_share=args.vllm_gpu_memory_utilization if args.use_vllm and args.vllm_mode == "colocate" else 0.0,
    )


def find_script(config: Path) -> Path:
    """The recipe that a YAML is for, by its name: `grpo_bandit_paper.yaml` is for `grpo_bandit.py`."""
    folders = [config.parent, config.parent.parent, Path("recipes")]
    scripts = [script for folder in folders for script in sorted(folder.glob("*.py"))]
    fitting = [script for script in scripts if config.stem.startswith(script.stem)]
    if not fitting:
        known = ", ".join(dict.fromkeys(script.stem for script in scripts)) or "none"
        raise ValueError(
            f"Which recipe {config.name} is for is not to be seen from its name (scripts near it: {known}): "
            "say --recipe recipes/NAME.py."
        )
    return max(fitting, key=lambda script: len(script.stem))


def _parse(script: Path, config: Path, world_size: int, changes: Mapping[str, Any]) -> tuple[Any, Any, Any, dict]:
    """A script's arguments as they would be in one of `world_size` processes; and the script's own names."""
    if not script.is_file():
        raise ValueError(f"There is no recipe {script}.")
    names = runpy.run_path(str(script), run_name="recipe")
    types = [names[name] for name in _argument_types(script)]
    # How many rows each process gets depends on their number, which is one here
    types = [
        type(one.__name__, (one,), {"world_size": property(lambda self: world_size)})
        if hasattr(one, "world_size")
        else one
        for one in types
    ]
    # bfloat16 is refused on computers without it, and what the recipe says of it is read apart
    arguments = ["--config", str(config), "--use_cpu", "true", "--bf16", "false", "--report_to", "none"]
    for name, value in changes.items():
        if name not in ("bf16", "use_cpu", "report_to"):
            values = value if isinstance(value, list) else [value]
            arguments += [f"--{name}", *(str(one) for one in values)]
    try:
        parsed = TrlParser(types).parse_args_and_config(arguments)
    except SystemExit:
        raise ValueError(f"{config} or --set has an argument that {script.name} does not know (see above).") from None
    script_args, args, model_args = (
        next(one for one in parsed if fits(one))
        for fits in (
            lambda one: not isinstance(one, ModelConfig) and not hasattr(one, "optim"),
            lambda one: hasattr(one, "optim"),
            lambda one: isinstance(one, ModelConfig),
        )
    )
    return script_args, args, model_args, names


def _argument_types(script: Path) -> Sequence[str]:
    """Names of the dataclasses that a script hands to `run` or `parse_arguments` of [`script`]."""
    before = {"run": 2, "parse_arguments": 1}  # arguments of another kind
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and (name := getattr(node.func, "id", "")) in before:
            return [argument.id for argument in node.args[before[name] :]]
    raise ValueError(
        f"{script} calls neither `run` nor `parse_arguments`, as the recipes do: it is none that can be estimated."
    )


def _trainer_of(args: Any) -> str:
    if hasattr(args, "num_generations"):
        return "ppo" if getattr(args, "has_critic", False) else "grpo"
    return "dpo" if hasattr(args, "precompute_ref_log_probs") else "sft"


def _adapter_of(model_args: ModelConfig) -> Adapter | None:
    if not model_args.use_peft:
        return None
    targets = model_args.lora_target_modules
    return Adapter(
        rank=model_args.lora_r,
        targets=tuple(targets) if isinstance(targets, list) else targets,
        bits=4 if model_args.load_in_4bit else 8 if model_args.load_in_8bit else 16,
        double_quantization=model_args.use_bnb_nested_quant,
    )


def _env_of(script_args: Any, names: Mapping[str, Any]) -> str | None:
    return getattr(script_args, "env_id", None) or names.get("ENV_ID")


def _reading_of(
    script_args: Any, args: Any, names: Mapping[str, Any], prompt_tokens: int | None, turns: int | None
) -> Reading:
    env = _env_of(script_args, names)
    if env is None:
        return Reading("chat", (prompt_tokens or PROMPT_TOKENS,))
    reading = measure_reading(env, args.env_kwargs or {}, args.context, args.window, turns or args.max_turns)
    if turns and turns > len(reading.turns):  # the random player's episode was shorter
        reading = replace(reading, turns=reading.turns + (reading.turns[-1],) * (turns - len(reading.turns)))
    if prompt_tokens:
        reading = replace(reading, turns=(prompt_tokens, *reading.turns[1:]))
    return reading
