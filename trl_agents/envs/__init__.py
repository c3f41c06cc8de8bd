# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Text environments. Importing this package registers their ids with Gymnasium."""

import gymnasium

from .bandit import Bandit
from .check import check_env
from .contextual_bandit import ContextualBandit
from .make import make_env
from .tictactoe import TicTacToe


__all__ = ["Bandit", "ContextualBandit", "TicTacToe", "check_env", "make_env", "register_environments"]

# A change of behaviour bumps the number, so that an id keeps meaning what its results were measured on.
_ENTRY_POINTS = {
    "trl_agents/Bandit-v0": "trl_agents.envs.bandit:Bandit",
    "trl_agents/ContextualBandit-v0": "trl_agents.envs.contextual_bandit:ContextualBandit",
    "trl_agents/TicTacToe-v0": "trl_agents.envs.tictactoe:TicTacToe",
}


def register_environments() -> None:
    """Registers every id of this package with Gymnasium; ids that are already there are left alone."""
    for id_, entry_point in _ENTRY_POINTS.items():
        if id_ not in gymnasium.registry:
            # Unwrapped: these environments check order and actions themselves, keep their own time, and Gymnasium's
            # wrappers would hide `instructions`.
            gymnasium.register(id_, entry_point=entry_point, order_enforce=False, disable_env_checker=True)


register_environments()
