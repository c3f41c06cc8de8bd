# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""LoRA and QLoRA in recipes of several stages: each stage trains an adapter and leaves a whole model."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from .agent_config import AGENT_CONFIG_FILE


ADAPTER_FOLDER = "adapter"  # within a stage's folder: the adapter by itself
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class StageAdapters:
    """
    How stages train: an adapter on the model that the stage before left, in 4 bits if asked for, which is merged into
    that model's own weights at the end (and kept beside, in `adapter/`). So the next stage, and whoever evaluates,
    finds a whole model, and the reference of a KL is the stage's first model: the policy without its adapter, no
    second one.

    Without `peft` all weights are trained, and nothing here has an effect.

    Args:
        peft ([`~peft.PeftConfig`], *optional*):
            The adapter.
        quantization ([`~transformers.BitsAndBytesConfig`], *optional*):
            How the weights under it are kept while it is trained.
        dtype (`str`, *optional*):
            In which the model is loaded, and saved when the adapter is merged.
    """

    peft: PeftConfig | None = None
    quantization: Any = None
    dtype: str | None = None

    @property
    def trainer(self) -> dict[str, Any]:
        """Arguments of a trainer."""
        return {"peft_config": self.peft, "quantization_config": self.quantization} if self.peft else {}

    @property
    def config(self) -> dict[str, Any]:
        """Arguments of a trainer's configuration."""
        return {"model_init_kwargs": {"dtype": self.dtype}} if self.peft else {}

    @property
    def settings(self) -> dict[str, Any]:
        """What a stage's result depends on, for its stamp."""
        if self.peft is None:
            return {}
        modules = self.peft.target_modules
        bits = {"load_in_4bit": 4, "load_in_8bit": 8}
        kept = next((n for name, n in bits.items() if getattr(self.quantization, name, False)), None)
        named = sorted(modules) if isinstance(modules, (set, list)) else modules
        return {"adapter": [self.peft.r, self.peft.lora_alpha, named, kept, self.dtype]}

    def of_reward_model(self) -> StageAdapters:
        """For a classifier: its new head is trained whole, and the weights under the adapter are not quantised."""
        if self.peft is None:
            return self
        peft = replace(self.peft, task_type="SEQ_CLS", modules_to_save=["score"])
        return replace(self, peft=peft, quantization=None)

    def merge(self, base: str | Path, folder: str | Path, model_class: type = AutoModelForCausalLM) -> None:
        """
        Make the saved adapter in `folder` a whole model there. Every process calls this, one of them works.

        Args:
            base (`str` or `Path`):
                The model that was trained on.
            folder (`str` or `Path`):
                Where the trainer has saved the adapter.
            model_class (`type`, *optional*, defaults to `AutoModelForCausalLM`):
                Of the model.
        """
        if self.peft is None:
            return
        state = PartialState()
        state.wait_for_everyone()
        if state.is_main_process:
            merge_adapter(base, folder, self.dtype, model_class)
        state.wait_for_everyone()


def merge_adapter(
    base: str | Path, folder: str | Path, dtype: str | None = None, model_class: type = AutoModelForCausalLM
) -> None:
    """
    Merge the adapter in `folder` into its base model, loaded without quantisation, and save the whole model there. The
    adapter itself moves to `folder/adapter`.

    Args:
        base (`str` or `Path`):
            Folder or name of the base model.
        folder (`str` or `Path`):
            Of the adapter.
        dtype (`str`, *optional*):
            In which it is loaded and saved. Defaults to that of the base model's files.
        model_class (`type`, *optional*, defaults to `AutoModelForCausalLM`):
            Of the model.
    """
    folder = Path(folder)
    kept = folder / ADAPTER_FOLDER
    if not (folder / ADAPTER_FILES[0]).exists():
        raise ValueError(f"{str(folder)!r} holds no adapter ({ADAPTER_FILES[0]}) to merge.")
    kept.mkdir(exist_ok=True)
    for name in (*ADAPTER_FILES, AGENT_CONFIG_FILE):
        if (folder / name).exists():
            shutil.copy(folder / name, kept / name)
    unset_hf_deepspeed_config()  # or the weights would be in pieces
    classifier = {} if model_class is AutoModelForCausalLM else {"num_labels": 1}
    model = model_class.from_pretrained(base, dtype=dtype or "auto", **classifier)
    PeftModel.from_pretrained(model, kept).merge_and_unload().save_pretrained(folder)
    for name in ADAPTER_FILES:  # last: a folder is an adapter's as long as these are there
        (folder / name).unlink()
