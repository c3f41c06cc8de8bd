# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
THE SEAM: the only package that touches TRL, and TRL's private names.

[`RolloutGRPOTrainer`] turns private methods of `GRPOTrainer` and of its base into public hooks, and says when it is
imported, not in the middle of a run, that TRL is not the one it knows.

Reading order: release.py, checkpoints.py, scoring.py, rollouts.py; each trainer extends the one before it.
"""

from typing import Any

from .release import UnsupportedTRL, check_trl  # refuses other releases before anything is imported that they may lack


# isort: split
from trl import (
    GRPOConfig,
    GRPOTrainer,
    ModelConfig,
    RewardConfig,
    RewardTrainer,
    RichProgressCallback,
    SFTConfig,
    SFTTrainer,
    TrlParser,
)
from trl.import_utils import is_liger_kernel_available, is_vllm_available
from trl.trainer.utils import disable_dropout_in_model

from .rollouts import RolloutGRPOTrainer, RolloutRows


try:
    from trl.trainer.utils import add_fused_lm_head
except ImportError:  # trl 1.14

    def add_fused_lm_head(model: Any, **kwargs: Any) -> None:
        """Nothing: this release makes whole logits."""


__all__ = [
    "GRPOConfig",
    "GRPOTrainer",
    "ModelConfig",
    "RewardConfig",
    "RewardTrainer",
    "RichProgressCallback",
    "RolloutGRPOTrainer",
    "RolloutRows",
    "SFTConfig",
    "SFTTrainer",
    "TrlParser",
    "UnsupportedTRL",
    "add_fused_lm_head",
    "check_trl",
    "disable_dropout_in_model",
    "is_liger_kernel_available",
    "is_vllm_available",
]
