# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What recipes share between beginning and end ([`script`]): a warm-up, questions, what stages refuse and pass on."""

from __future__ import annotations

import copy
import functools
from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset

from ._trl import GRPOConfig, ModelConfig
from .actions import ActionParser
from .agent_config import AgentConfig
from .checkpoints import find_checkpoint, last_checkpoint
from .data import as_settings, load_questions
from .envs.make import make_env
from .hub import Token, stage_repository
from .script import argument, check_positive, default_of
from .script import parse_arguments as parse_arguments  # where recipes of one's own may have them from
from .script import run as run
from .stages import Stages, announce
from .tiny import make_tiny_model
from .transcripts import plain_rationale


# Arguments of trainers that no result depends on
NO_RESULT = ("output_dir", "report_to", "disable_tqdm", "use_cpu", "resume_from_checkpoint", "run_name", "push_to_hub")
NO_RESULT += ("overwrite_output_dir", "log_completions", "num_completions_to_print", "accelerator_config")
NO_RESULT_PREFIXES = ("logging_", "log_level", "save_", "hub_", "dataloader_", "ddp_", "report_", "wandb_", "trackio_")


def announce_training(training_args: Any) -> None:
    """Tell how long a training will be, and from which checkpoint it goes on."""
    length = f"{training_args.max_steps} updates"
    if training_args.max_steps < 0:
        length = f"{training_args.num_train_epochs} epochs"
    resumed = training_args.resume_from_checkpoint
    announce(f"Training: {length}" + (f", from {resumed}" if resumed else ""))


def check_resumption(training_args: Any) -> None:
    """
    Find the checkpoint to resume from now, for a warm-up that nothing goes on from would be in vain. Tells of one that
    is not asked for: the run that begins anew replaces it.
    """
    asked = training_args.resume_from_checkpoint
    training_args.resume_from_checkpoint = find_checkpoint(
        training_args.resume_from_checkpoint, training_args.output_dir
    )
    if not asked and (kept := last_checkpoint(training_args.output_dir)):
        announce(
            f"This run begins anew, although {training_args.output_dir} holds {Path(kept).name}: "
            "--resume_from_checkpoint true goes on from it."
        )


def warm_up(
    env_id: str, training_args: Any, n_transcripts: int, *, rationale: Any = plain_rationale, **how: Any
) -> str:
    """
    The model that a recipe starts from where none was named: [`~tiny.make_tiny_model`] as the stage `warmup` of
    [`Stages`], so that a run that is resumed, or begun again, finds it done.

    Args:
        env_id (`str`):
            What it will play, with `env_kwargs` and `max_turns` of `training_args`.
        training_args ([`AgentGRPOConfig`]):
            Of the recipe's trainer.
        n_transcripts (`int`):
            Number of episodes to learn from.
        rationale (*optional*):
            As for [`~transcripts.play_transcripts`].
        **how:
            Other arguments of [`~tiny.make_tiny_model`].

    Returns:
        `str`: its folder.

    Raises:
        `ValueError`: if the folder holds one that was made with other settings.
    """
    env_kwargs = training_args.env_kwargs or {}
    reading = {name: getattr(training_args, name) for name in ("seed", "context", "window")}
    running = {name: getattr(training_args, name) for name in ("disable_tqdm", "use_cpu", "max_completion_length")}
    limit = {} if training_args.max_turns is None else {"max_turns": training_args.max_turns}
    env = functools.partial(make_env, env_id, **env_kwargs)
    settings = {"n_transcripts": n_transcripts, "rationale": rationale, **reading, **running, **limit, **how}

    def make(folder):
        announce(f"Warming up a small model on {n_transcripts} episodes")
        make_tiny_model(env, folder, **settings)
        if PartialState().is_main_process:  # the trainer lets it play so before training
            AgentConfig.of_training(training_args, env_id, how.get("parser") or ActionParser()).save(folder)

    stages = Stages(training_args.output_dir, env=[env_id, env_kwargs], **reading)
    spoken = {"rationale": getattr(rationale, "__name__", None), "parser": repr(how.get("parser"))}
    spoken |= {"agent": repr(how["agent"])} if "agent" in how else {}
    return str(stages.run("warmup", make, n_transcripts=n_transcripts, **limit, **spoken))


def trained_play(training_args: Any, env_id: str, parser: ActionParser | None = None) -> dict[str, Any]:
    """
    What lets a model play outside of its trainer as the trainer lets it: arguments of [`~evaluation.play_model`] and
    [`~episodes.sample_episodes`].

    Args:
        training_args ([`AgentGRPOConfig`]):
            Of the trainer.
        env_id (`str`):
            What is played.
        parser ([`ActionParser`], *optional*):
            Takes actions out of replies. Defaults to `ACTION=X`.
    """
    waiting = {name: getattr(training_args, name) for name in ("env_timeout", "env_reset_timeout", "env_processes")}
    how = AgentConfig.of_training(training_args, env_id, parser or ActionParser()).arguments()
    whole = {"env_kwargs": training_args.env_kwargs, "exploration": training_args.exploration}  # not as in a file
    return {**how, **whole, **waiting}


@dataclass
class QuestionArguments:
    """The questions that a recipe trains and tests on."""

    dataset: str = argument(
        "arithmetic", "gsm8k, svamp, math_qa, math_qa_numeric, arithmetic (made on the spot), or a local file."
    )
    dataset_kwargs: dict | str | None = argument(None, "Settings of the arithmetic problems, as JSON.")
    test_dataset: str | None = argument(None, "Local file of test questions.")
    num_train: int | None = argument(None, "Use so many training questions.")
    num_test: int | None = argument(None, "Use so many test questions.")

    @property
    def question_settings(self) -> dict[str, Any]:
        return as_settings(self.dataset_kwargs)

    def load(self, split: str, **changes: Any) -> Dataset:
        """
        The questions to train or to test on.

        Args:
            split (`str`):
                `"train"` or `"test"`.
            **changes:
                Settings in place of those of `dataset_kwargs`.
        """
        if Path(self.dataset).suffix and self.test_dataset is None:
            raise ValueError(f"dataset={self.dataset!r} is one file: name another to test on, --test_dataset.")
        check_positive(self, "num_train", "num_test")
        name, most = self.dataset, self.num_train
        if split == "test":
            name, most = self.test_dataset or self.dataset, self.num_test
        rows = load_questions(name, split, **{**self.question_settings, **changes})
        return rows if most is None else rows.select(range(min(most, len(rows))))


def machine_settings(training_args: Any) -> dict[str, Any]:
    """Of the arguments of a recipe's main trainer, those that hold for the trainers of its other stages too."""
    names = ("seed", "bf16", "gradient_checkpointing", "use_cpu", "disable_tqdm")
    return {name: getattr(training_args, name) for name in names}


def trainer_settings(training_args: Any) -> dict[str, Any]:
    """
    What the result of a stage depends on, for its stamp: all of a trainer's arguments that are not the defaults, but
    for those that say where to write and what to show. (Not the number of processes: models that eight have trained
    may be evaluated by one.)
    """
    settings = {}
    for each in fields(training_args):
        value = getattr(training_args, each.name)
        if each.name not in NO_RESULT and not each.name.startswith(NO_RESULT_PREFIXES) and value != each.default:
            if value is None or isinstance(value, (str, int, float, list, dict)):
                settings[each.name] = value
    return settings


def load_as(training_args: Any, model_args: ModelConfig) -> dict[str, Any]:
    """Let a trainer load its model as `model_args` say. Returns what holds for its tokenizer too."""
    source = {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}
    training_args.model_init_kwargs = {
        **source,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    return source


def stage_arguments(training_args: Any, folder: str | Path, **changes: Any) -> Any:
    """
    The arguments of a recipe's trainer for one stage: in its folder, for its repository on the Hub, `changes`.

    With them trainers of TRL's own do not push, for they die of a push that fails: [`~report.push_stages`] pushes what
    they leave. None writes the token into its folder, which is pushed.
    """
    args = copy.copy(training_args)
    if training_args.push_to_hub or training_args.hub_model_id:  # else its card would name what is nowhere
        args.hub_model_id = stage_repository(training_args, folder)
    args.hub_token = Token(args.hub_token) if args.hub_token else None
    args.push_to_hub = args.push_to_hub and isinstance(args, GRPOConfig)  # ours extend it, and survive
    for name, value in {"output_dir": str(folder), **changes}.items():
        setattr(args, name, value)
    return args


def check_stages(
    training_args: Any,
    model_args: ModelConfig,
    uses: Collection[str] = (),
    adapters: bool = False,
    refuses: Collection[str] = (),
) -> None:
    """
    Raises `ValueError` for arguments that a recipe of several stages has no use for, and for those that its trainers
    would refuse after the first stages.

    Args:
        training_args ([`~transformers.TrainingArguments`]):
            Of its main trainer.
        model_args ([`~trl.ModelConfig`]):
            Of the model that it starts from.
        uses (`Collection[str]`, *optional*):
            Arguments of the model that it does use.
        adapters (`bool`, *optional*, defaults to `False`):
            Whether its stages can train adapters ([`StageAdapters`]).
        refuses (`Collection[str]`, *optional*):
            Arguments of the trainer that it sets itself, or has no use for.
    """
    for each in fields(training_args):
        value = getattr(training_args, each.name)
        if each.name in refuses and value != default_of(each):
            raise ValueError(
                f"{each.name}={value!r}: this recipe sets {each.name} itself or has no use for it, leave it out."
            )
    check_positive(training_args, *(name for name in ("max_completion_length",) if hasattr(training_args, name)))
    adapted = adapters and model_args.use_peft
    uses = {*uses, "dtype"} if adapted else uses
    unused = [
        name
        for name in ("model_revision", "dtype", "attn_implementation", "trust_remote_code")
        if hasattr(model_args, name) and name not in uses and getattr(model_args, name) != getattr(ModelConfig(), name)
    ]
    if unused:
        raise ValueError(f"This recipe's stages load models as they were saved: leave out {', '.join(unused)}.")
    if adapters and not adapted and (model_args.load_in_4bit or model_args.load_in_8bit):
        raise ValueError("Quantised weights are not trained, adapters on them are: add use_peft.")
    if adapted and getattr(training_args, "separate_critic", False):
        raise ValueError("separate_critic=True trains a second trunk in full, which use_peft is there to avoid.")
    if adapted and getattr(training_args, "sync_ref_model", False):
        raise ValueError("sync_ref_model=True needs a reference of its own, and use_peft holds none: leave one out.")
    if not adapted and (model_args.use_peft or model_args.load_in_4bit or model_args.load_in_8bit):
        raise ValueError("This recipe trains all weights in each of its stages: leave out use_peft and load_in_*bit.")
    if training_args.resume_from_checkpoint:
        raise ValueError("Stages go on by themselves where they were interrupted: leave resume_from_checkpoint out.")
