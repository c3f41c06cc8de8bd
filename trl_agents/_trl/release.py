# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Which TRL this is, and that the private members which the seam relies on are there."""

from __future__ import annotations

import inspect
import os

import torch
import trl
from packaging.specifiers import SpecifierSet
from packaging.version import Version


# The releases the tests pass on. `pyproject.toml` says the same to pip.
SUPPORTED_TRL = SpecifierSet(">=1.14,<1.17")
INSTALL = f'Install it with `pip install "trl{SUPPORTED_TRL}"`.'


class UnsupportedTRL(ImportError, ValueError):
    """The installed TRL is not one this package was tested with."""


def check_trl_version(version: str) -> None:
    """Raises [`UnsupportedTRL`] unless `version` is one that this package was tested with."""
    if not SUPPORTED_TRL.contains(Version(version), prereleases=True):
        raise UnsupportedTRL(f"trl-agents works with trl{SUPPORTED_TRL}, but trl {version} is installed. {INSTALL}")


def check_trl_device(version: str) -> None:
    """Raises [`UnsupportedTRL`] on trl 1.15 without a GPU: a Triton kernel alone computes its log-probabilities."""
    has_gpu = torch.cuda.is_available() or torch.xpu.is_available()
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # how the tests run it
    if Version(version).release[:2] == (1, 15) and not has_gpu and not interpreted:
        raise UnsupportedTRL(
            f"trl {version} trains on GPUs alone, and there is none. Install another: `pip install "
            f'"trl{SUPPORTED_TRL},!=1.15.*"`.'
        )


check_trl_version(trl.__version__)  # before anything is imported from TRL that another release may lack

from trl import GRPOTrainer  # noqa: E402


# Private members the seam relies on, and the parameters they are called with.
SEAM = {
    "_generate_and_score_completions": ("self", "inputs"),
    "_generate": ("self", "prompts"),
    "_calculate_rewards": ("self", "inputs", "prompts", "completions", "completion_ids_list"),
    "_prepare_inputs": ("self", "generation_batch"),
    "_save": ("self", "output_dir", "state_dict"),
    "_save_checkpoint": ("self", "model", "trial"),
    "_get_output_dir": ("self", "trial"),
    "_get_train_sampler": ("self", "dataset"),
    "_load_from_checkpoint": ("self", "resume_from_checkpoint", "model"),
    "_load_best_model": ("self",),
    "_push_from_checkpoint": ("self", "checkpoint_folder"),
    "_finish_current_push": ("self",),
}
# Likewise, of which only the first parameters are relied on, in any of these forms.
SEAM_PREFIXES = {
    "_get_per_token_logps_and_entropies": (
        ("self", "model", "input_ids", "attention_mask", "logits_to_keep"),
        ("self", "model", "args", "batch_size"),  # trl 1.14 hands the first three on as they come
    ),
}


def check_trl(trainer_class: type = GRPOTrainer, version: str = trl.__version__) -> None:
    """Raises [`UnsupportedTRL`] unless the installed TRL is one this package was tested with, and trains here."""
    check_trl_version(version)
    check_trl_device(version)
    known = {name: (parameters,) for name, parameters in SEAM.items()} | SEAM_PREFIXES
    for name, forms in known.items():
        method = getattr(trainer_class, name, None)
        found = tuple(inspect.signature(method).parameters) if method is not None else ()
        starts = [found[: len(form)] if name in SEAM_PREFIXES else found for form in forms]
        if not any(start == form for start, form in zip(starts, forms, strict=True)):
            raise UnsupportedTRL(
                f"trl {version} has moved `{trainer_class.__name__}.{name}`, which trl-agents builds on (expected the "
                f"parameters {' or '.join(map(str, forms))}, found {found}). {INSTALL}"
            )
