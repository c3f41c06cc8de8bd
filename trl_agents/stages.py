# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The stages of a recipe, each in a folder of its own: what is done already is not done again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, broadcast_object_list

from .cards import card_name, correct_card
from .checkpoints import last_checkpoint
from .lora import StageAdapters
from .plots import plot_learning_curve


STAMP = "stage.json"
BEGUN = "stage_begun.json"


class Stages:
    """
    Runs stages and remembers them. A stage that ended leaves `stage.json` with its settings, written last: one that
    was interrupted has none and is run again, from its [`~checkpoints.last_checkpoint`] if it makes use of that.

    Every process of a distributed run must make the same calls.

    Args:
        output_dir (`str` or `Path`):
            Where the stages' folders are.
        **settings:
            What all stages depend on (data, seed, the model they start from); values that JSON can hold.

    Example:

    ```python
    >>> stages = Stages("outputs/run", dataset="gsm8k", seed=0)
    >>> warmup = stages.run("warmup", lambda folder: fine_tune(model, rows, folder, epochs=2), epochs=2)
    ```
    """

    def __init__(self, output_dir: str | Path, **settings: Any):
        self.output_dir, self.settings = Path(output_dir), settings

    def run(self, name: str, make: Callable[[Path], Any], **settings: Any) -> Path:
        """
        Run a stage, unless it is done.

        Args:
            name (`str`):
                Its folder.
            make (`Callable[[Path], Any]`):
                Does the work, and leaves the results in the folder it is given.
            **settings:
                What this stage depends on besides.

        Returns:
            `Path`: the folder.

        Raises:
            `ValueError`: if the stage was done, or begun, with other settings.
        """
        state, folder = PartialState(), self.output_dir / name
        asked = json.loads(json.dumps({**self.settings, **settings}, default=str))
        # One process looks and tells the others: each for itself might look while another writes
        found = [None, None]
        if state.is_main_process:
            found = [
                json.loads((folder / stamp).read_text()) if (folder / stamp).exists() else None
                for stamp in (STAMP, BEGUN)
            ]
        done, begun = broadcast_object_list(found) if state.num_processes > 1 else found
        earlier = begun if done is None else done
        if earlier is not None and earlier != asked:
            differ = {
                key: (earlier.get(key), asked.get(key))
                for key in {*earlier, *asked}
                if earlier.get(key) != asked.get(key)
            }
            told = ", ".join(f"{key} {was!r}, now {now!r}" for key, (was, now) in sorted(differ.items()))
            raise ValueError(
                f"{str(folder)!r} holds a stage that was {'begun' if done is None else 'run'} with other settings "
                f"({told}): use another output_dir, or delete the folder and those of the stages after it."
            )
        announce(f"Stage {name}" + (", done already" if done is not None else ""))
        if done is None:
            self._stamp(folder / BEGUN, asked)
            make(folder)
            let_another_trainer_follow()
            self._stamp(folder / STAMP, asked)
        return folder

    def _stamp(self, path: Path, settings: dict[str, Any]) -> None:
        state = PartialState()
        state.wait_for_everyone()
        if state.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_suffix(".part")
            part.write_text(json.dumps(settings, indent=2))
            part.replace(path)  # whole or not at all
        state.wait_for_everyone()


def announce(text: str) -> None:
    """Tell who watches a recipe what it does now: the main process does, for all."""
    if PartialState().is_main_process:
        print(text, flush=True)


def what_is_kept(output_dir: str | Path) -> list[str]:
    """What a run that is interrupted can go on from: the stages that are done, and the last checkpoint of others."""
    output_dir = Path(output_dir)
    kept = sorted(stamp.parent.name for stamp in output_dir.glob(f"*/{STAMP}"))
    begun = [stamp.parent for stamp in sorted(output_dir.glob(f"*/{BEGUN}")) if stamp.parent.name not in kept]
    found = [last_checkpoint(folder) for folder in (*begun, output_dir)]
    return kept + [str(Path(checkpoint).relative_to(output_dir)) for checkpoint in found if checkpoint]


def stage_config(
    config_class: type,
    output_dir: str | Path,
    n_rows: int,
    *,
    epochs: float,
    learning_rate: float,
    batch_size: int,
    seed: int,
    **changes: Any,
) -> Any:
    """
    The arguments of a trainer that is one stage among others: a linear schedule after a warm-up of a tenth of the
    steps, `batch_size` rows a step over all processes, no checkpoints.

    Args:
        config_class (`type`):
            Such as [`~trl.SFTConfig`].
        output_dir (`str` or `Path`):
            The stage's folder.
        n_rows (`int`):
            Rows of the dataset.
        epochs, learning_rate, batch_size, seed:
            As for [`~sft.fine_tune`].
        **changes:
            Arguments of `config_class` in place of the defaults here.
    """
    n_steps = max(round(epochs * n_rows / batch_size), 1)
    defaults = {
        "max_steps": n_steps,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": n_steps // 10,
        "per_device_train_batch_size": max(batch_size // PartialState().num_processes, 1),
        "max_length": None,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 25,
        "save_strategy": "no",
        "report_to": [],
        "seed": seed,
    }
    return config_class(str(output_dir), **{**defaults, **changes})


def train_and_save(
    trainer: Any,
    output_dir: str | Path,
    *,
    start: str | Path | None = None,
    adapters: StageAdapters | None = None,
    curves: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """
    Train a stage, from its last checkpoint if it has one, save what came of it, and make way for the next trainer.

    Args:
        trainer ([`~transformers.Trainer`]):
            TRL's or one of this package.
        output_dir (`str` or `Path`):
            The stage's folder: for the model, its card, and `trainer_state.json` with the log.
        start (`str` or `Path`, *optional*):
            With `adapters`, the model that they were trained on.
        adapters ([`StageAdapters`], *optional*):
            What was trained in place of all weights, and is merged into `start`.
        curves (`Mapping[str, Sequence[str]]`, *optional*):
            Pictures to draw: file name -> metric of the log and its name on the axis, or nothing for the defaults of
            [`plot_learning_curve`].

    Returns:
        `str`: `output_dir`, for `from_pretrained`.
    """
    folder = Path(output_dir)
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    trainer.save_model(str(folder))
    trainer.save_state()
    trainer.create_model_card(model_name=card_name(trainer.args))
    if trainer.is_world_process_zero():
        correct_card(folder, trainer.args.hub_model_id or str(folder))
    trainer.accelerator.wait_for_everyone()
    if adapters is not None:
        adapters.merge(start, folder)
    if trainer.is_world_process_zero():
        for name, shown in (curves or {}).items():
            plot_learning_curve(trainer.state.log_history, folder / name, *shown)
    let_another_trainer_follow()
    return str(output_dir)


def let_another_trainer_follow() -> None:
    """
    Call it when a trainer has done its work and another follows in the same process: accelerate keeps one trainer's
    DeepSpeed settings, batch size and all, and refuses a second's. The first one cannot be used any more.
    """
    if AcceleratorState._shared_state and AcceleratorState().distributed_type == DistributedType.DEEPSPEED:
        AcceleratorState._reset_state()
