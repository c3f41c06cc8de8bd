# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""GEM's environments as ours."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

from .evaluated import UNREADABLE, evaluates, harmless
from .luck import episode_luck, own_luck
from .suites import NotMade, check_lists_moves, how_to_answer, import_suite, joined, unknown_id


_MOST_CODES = 500  # beyond that, a list of codes says less than the rules do


def _directions(game: Any) -> list[str]:
    return ["up", "down", "left", "right"]


def _codes(game: Any) -> list[str] | None:
    digits = [str(number) for number in range(1, game.num_numbers + 1)]
    if math.perm(len(digits), game.code_length) > _MOST_CODES or game.duplicate_numbers:
        return None
    return [" ".join(code) for code in itertools.permutations(digits, game.code_length)]


def _cells(game: Any) -> list[str]:
    cells = [(r, c) for r in range(game.rows) for c in range(game.cols) if not game.revealed[r][c]]
    return [f"{act} {r} {c}" for act in ("reveal", "flag") for r, c in cells if act == "flag" or not game.flags[r][c]]


def _hanoi(game: Any) -> list[str]:
    pairs = itertools.permutations(game.board, 2)
    return [
        f"{a} {b}" for a, b in pairs if game.board[a] and (not game.board[b] or game.board[a][-1] < game.board[b][-1])
    ]


# What may stand in \boxed{ }, by the name of the game's class.
MOVES: dict[str, Callable[[Any], list[str] | None]] = {
    "GuessTheNumberEnv": lambda game: [str(number) for number in range(game.min_number, game.max_number + 1)],
    "Game2048Env": _directions,
    "FifteenPuzzleEnv": _directions,
    "SokobanEnv": _directions,
    "TowerofHanoiEnv": _hanoi,
    "MastermindEnv": _codes,
    "MinesweeperEnv": _cells,
}


class GemEnvironment:
    r"""
    An environment of GEM's: `"gem:game:GuessTheNumber-v0-easy"`, `"gem:rg:countdown"`, `"gem:math:Math12K"`.

    In games the rules are the instructions, and what follows (with GEM's `suffix`, the board) is observed; elsewhere
    the question is observed. The legal actions of some games are known ([`MOVES`]); in the others, and for questions,
    any text may be answered, and a reply without an answer ends the episode (or `invalid_action="retry"`). GEM is
    given the action as `\boxed{action}`.

    An end that GEM calls terminated and truncated at once (its games' turn limits, which the rules announce and which
    are rewarded) is terminated.

    Args:
        env_id (`str`):
            GEM's id.
        legal_actions (`Callable`, *optional*):
            `legal_actions(env) -> list[str]`, given GEM's environment, for games whose moves are not known.
        how_to_answer (`str`, *optional*):
            The last paragraph of the instructions.
        **kwargs:
            Arguments of [`gem.make`].
    """

    def __init__(
        self,
        env_id: str,
        *,
        legal_actions: Callable[[Any], list[str] | None] | None = None,
        how_to_answer: str | None = None,
        **kwargs: Any,
    ):
        check_lists_moves(legal_actions)
        gem = import_suite("gem")
        registry = import_suite("gem.envs.registration").ENV_REGISTRY
        if env_id not in registry:
            raise unknown_id("GEM", env_id, registry)
        with own_luck(0):
            try:
                self.env = gem.make(env_id, **kwargs)
            except (LookupError, OSError, ImportError) as error:
                raise NotMade("GEM", env_id, error) from error
        self.is_game = env_id.startswith("game:")
        self._moves = legal_actions or MOVES.get(type(self.env).__name__) or (lambda env: None)
        self._form = _HOW[self.is_game] if how_to_answer is None else how_to_answer
        self.instructions = self._form
        self._luck = self._calls = 0
        grader = getattr(self.env, "reward_fn", None) if env_id.startswith("rg:") else None
        self._evaluates = grader is not None and evaluates(grader)
        if self.is_game:
            self.reset(seed=0)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        self._luck, self._calls = episode_luck(seed), 0
        if hasattr(self.env, "idx"):
            self.env.idx = 0  # counts the episodes, and changes the data when it has counted enough
        with own_luck(self._luck, 0):
            text, info = self.env.reset(seed=self._luck)
        if not self.is_game:
            return str(text), self._info(info)
        self.instructions = joined(text, self._form)
        return str(info.get("suffix", "")), {**self._info(info), "instructions": self.instructions}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self._calls += 1
        if self._evaluates and action != self.env.data["answer"] and not harmless(action):
            action = UNREADABLE
        answer = f"\\boxed{{{action}}}"  # GEM reads the innermost, so one that the model wrote does no harm
        if self.is_game:
            with own_luck(self._luck, self._calls):
                result = self.env.step(answer)
        else:  # grading an answer may take long, and draws nothing
            result = self.env.step(answer)
        text, reward, terminated, truncated, info = result
        ended = bool(terminated or truncated)
        text = "" if text == _terminal() else str(text)
        if not ended:
            text = "\n".join(part for part in (text, info.get("suffix")) if part)
        info = {**self._info(info), **({"legal_actions": []} if ended else {})}
        return text, float(reward), bool(terminated), bool(truncated and not terminated), info

    def close(self) -> None:
        close = getattr(self.env, "close", None)
        if callable(close):
            close()

    def _info(self, info: dict[str, Any]) -> dict[str, Any]:
        legal_actions = self._moves(self.env)
        return dict(info) if legal_actions is None else {**info, "legal_actions": list(legal_actions)}


_HOW = {
    True: how_to_answer("what the rules put into \\boxed{}, without the \\boxed{}"),
    False: how_to_answer("your final answer"),
}


def _terminal() -> str:
    return import_suite("gem.utils.constants").TERMINAL_STATE
