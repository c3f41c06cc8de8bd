# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Plugins for TRL that fine-tune language models to act."""

from typing import TYPE_CHECKING

from ._version import __version__
from .envs import register_environments


# Loaded when first used: `import trl_agents` registers the environments and costs no torch.
_EXPORTS = {
    "ActionParser": "actions",
    "AgentGRPOConfig": "trainers.agent_grpo_config",
    "AgentGRPOTrainer": "trainers.agent_grpo_trainer",
    "AgentPPOConfig": "trainers.agent_ppo_config",
    "AgentPPOTrainer": "trainers.agent_ppo_trainer",
    "ModelOpponent": "model_opponent",
    "OpponentPool": "self_play",
    "check_env": "envs",
    "check_run": "trainers.checks",
    "make_env": "envs",
}

__all__ = ["__version__", *_EXPORTS]

if TYPE_CHECKING:
    from .actions import ActionParser
    from .envs import check_env, make_env
    from .model_opponent import ModelOpponent
    from .self_play import OpponentPool
    from .trainers.agent_grpo_config import AgentGRPOConfig
    from .trainers.agent_grpo_trainer import AgentGRPOTrainer
    from .trainers.agent_ppo_config import AgentPPOConfig
    from .trainers.agent_ppo_trainer import AgentPPOTrainer
    from .trainers.checks import check_run

register_environments()


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
