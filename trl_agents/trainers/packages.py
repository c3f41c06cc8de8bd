# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Packages that settings need."""

from __future__ import annotations

from typing import Any

from transformers import integrations
from transformers.utils import is_bitsandbytes_available, is_peft_available

from .._trl import is_liger_kernel_available, is_vllm_available


# Of what `report_to` may name, what is a package of its own: whether it is installed.
TRACKERS = {
    "tensorboard": integrations.is_tensorboard_available,
    "wandb": integrations.is_wandb_available,
    "trackio": integrations.is_trackio_available,
    "mlflow": integrations.is_mlflow_available,
    "swanlab": integrations.is_swanlab_available,
    "comet-ml": integrations.is_comet_available,
    "clearml": integrations.is_clearml_available,
    "codecarbon": integrations.is_codecarbon_available,
    "dvclive": integrations.is_dvclive_available,
}


def check_packages(args: Any, kwargs: dict[str, Any]) -> None:
    """Raises `ImportError` for packages that are not installed. `kwargs` are the trainer's other arguments."""
    for name in args.report_to or ():
        package = name.replace("_", "-")
        if package in TRACKERS:
            _need(f"report_to={name!r}", package, TRACKERS[package], f"pip install {package}")
    if args.use_vllm:
        _need("use_vllm=True", "vllm", is_vllm_available, 'pip install -e ".[vllm]"')
    if args.use_liger_kernel:
        _need("use_liger_kernel=True", "liger-kernel", is_liger_kernel_available, "pip install liger-kernel")
    if kwargs.get("peft_config") is not None:
        _need("`peft_config`", "peft", is_peft_available, "pip install peft")
    quantization = kwargs.get("quantization_config") or (args.model_init_kwargs or {}).get("quantization_config")
    if getattr(quantization, "quant_method", None) == "bitsandbytes":
        _need("`quantization_config`", "bitsandbytes", is_bitsandbytes_available, 'pip install -e ".[qlora]"')


def _need(setting: str, package: str, available: Any, command: str) -> None:
    if not available():
        raise ImportError(f"{setting} needs {package}, which is not installed: `{command}`, or leave the setting out.")
