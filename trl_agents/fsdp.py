# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What PyTorch's FSDP2 has in pieces, whole for as long as a rollout takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.distributed.fsdp import FSDPModule


HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """The modules of `model` whose parameters FSDP2 shards; none where it does not."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """
    While open, parameters that FSDP2 shards are whole on every process, and forward passes call no collective: each
    process may make as many as it likes. To open it is a collective, to close it is not.

    FSDP2 gathers weights before and drops them after each module's forward pass, by hooks. They rest meanwhile: that
    the weights are whole would keep them from gathering, but not from dropping. Do not take a `state_dict` while this
    is open, which shards the weights again.
    """
    modules = sharded_modules(model)
    kept = []
    for module in modules:
        module.unshard()
    try:
        for module in modules:
            for kind in HOOKS:
                hooks = getattr(module, kind)
                others = type(hooks)((key, hook) for key, hook in hooks.items() if not _is_fsdps(hook))
                if len(others) == len(hooks):
                    raise RuntimeError(
                        f"This release of PyTorch has other FSDP hooks than known (none of {kind} of "
                        f"{type(module).__name__}): rollouts would wait for each other for ever. Use DeepSpeed "
                        "(accelerate_configs/zero3.yaml)."
                    )
                kept.append((module, kind, hooks))
                setattr(module, kind, others)
        yield
    finally:
        for module, kind, hooks in kept:
            setattr(module, kind, hooks)
        for module in modules:
            module.reshard()


def _is_fsdps(hook) -> bool:
    return (getattr(hook, "__module__", None) or "").startswith("torch.distributed.fsdp.")
