# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Tic-tac-toe as text: the game of "LLMs are Greedy Agents" (https://huggingface.co/papers/2504.16078) and of LMAct.

A board is nine digits, row by row, seen by the player to move: "0" empty, "1" its own marks, "2" the other player's.
Every function here and every opponent reads a board in that form, so one player can sit on either side.

What differs from the sources:
- The optimal opponent is exact minimax, where the paper has MCTS without stating its budget.
- In the drawn board the agent is always x, also when it moves second; in LMAct, x is whoever moves first.
- LMAct starts from recorded openings; here every game starts from the empty board.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.spaces import Text

from .spaces import Labels


Opponent = Callable[[str, list[str], np.random.Generator], str]

_EMPTY = "0" * 9
_DIGIT_NAMES = tuple("012345678")
_GRID_NAMES = tuple(row + column for row in "abc" for column in "123")
_LINES = ((0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6))


def _has_line(board: str, mark: str) -> bool:
    return any(board[i] == board[j] == board[k] == mark for i, j, k in _LINES)


def _is_over(board: str) -> bool:
    return "0" not in board or _has_line(board, "1") or _has_line(board, "2")


def _place(board: str, square: int, mark: str) -> str:
    return board[:square] + mark + board[square + 1 :]


def _sign(value: int) -> int:
    return (value > 0) - (value < 0)


def _check_board(board: Any) -> None:
    if not isinstance(board, str) or len(board) != 9 or not set(board) <= set("012"):
        raise ValueError(f"{board!r} is not a board. Give nine of the digits 0 (empty), 1 and 2, such as '102010002'.")


def swap_sides(board: str) -> str:
    """The same board as the other player sees it."""
    return board.translate(str.maketrans("12", "21"))


def render_board(state: str) -> str:
    r"""
    Draw a board as LMAct does.

    Args:
        state (`str`):
            Board as nine digits or in the one-line form of the drawn board: `info["board"]` or `info["state"]`.

    Example:

    ```python
    >>> print(render_board("102010002"))
    x |   | o
    ----------
      | x |
    ----------
      |   | o
    ```
    """
    board = state.translate(str.maketrans(".xo", "012", "/")) if isinstance(state, str) else state
    _check_board(board)
    cells = board.translate(str.maketrans("012", " xo"))
    return ("\n" + "-" * 10 + "\n").join(" | ".join(cells[row : row + 3]) for row in (0, 3, 6))


@cache  # filled as games ask for it, so that importing costs nothing
def _solve(board: str) -> tuple[int, ...]:
    """Values of the empty squares in order; empty when the game is over."""
    if _is_over(board):
        return ()
    values = []
    for square in (i for i, mark in enumerate(board) if mark == "0"):
        after = _place(board, square, "1")
        if _is_over(after):
            values.append(9 if _has_line(after, "1") else 0)
        else:
            value = -max(_solve(swap_sides(after)))
            values.append(value - _sign(value))  # one move further away
    return tuple(values)


def minimax_values(board: str, legal_actions: Sequence[str] | None = None) -> dict[str, int]:
    """
    Value of every move of the player "1", who is to move, when both sides play perfectly from then on.

        value = 10 - n  if "1" wins,    0  for a draw,    -(10 - n)  if "1" loses

    where `n` counts the moves of both players until the end, this one included: a faster win and a slower loss are
    worth more. The sign alone is the value of the game.

    Args:
        board (`str`):
            Board as nine digits, seen by the player to move (`info["board"]`).
        legal_actions (`list[str]`, *optional*):
            Names of the empty squares in order (`info["legal_actions"]`). Defaults to their digits.

    Returns:
        `dict[str, int]`: Values by action, in the order of the squares. Empty when the game is over.
    """
    _check_board(board)
    if _is_over(board):
        return {}
    if board.count("2") - board.count("1") not in (0, 1):
        raise ValueError(f"On the board {board!r} it is not the move of 1. Use `swap_sides` for the other player.")
    if legal_actions is None:
        legal_actions = [name for name, mark in zip(_DIGIT_NAMES, board, strict=True) if mark == "0"]
    if len(legal_actions) != board.count("0"):
        raise ValueError(
            f"`legal_actions` is {legal_actions}, but the board {board!r} has {board.count('0')} empty squares. Name "
            "every empty square once, in order."
        )
    return dict(zip(legal_actions, _solve(board), strict=True))


def optimal_actions(board: str, legal_actions: Sequence[str] | None = None, fastest: bool = False) -> list[str]:
    """
    Moves that keep the value of the game, in the order of the squares. Empty when the game is over.

    Args:
        board (`str`):
            Board as nine digits, seen by the player to move (`info["board"]`).
        legal_actions (`list[str]`, *optional*):
            Names of the empty squares in order (`info["legal_actions"]`). Defaults to their digits.
        fastest (`bool`, *optional*, defaults to `False`):
            Whether to keep only the fastest wins and the slowest losses. LMAct's expert plays the first of these.
    """
    values = minimax_values(board, legal_actions)
    if not fastest:
        values = {action: _sign(value) for action, value in values.items()}
    best = max(values.values(), default=0)
    return [action for action, value in values.items() if value == best]


def random_opponent(board: str, legal_actions: list[str], rng: np.random.Generator) -> str:
    """Any empty square."""
    return legal_actions[rng.integers(len(legal_actions))]


def optimal_opponent(board: str, legal_actions: list[str], rng: np.random.Generator) -> str:
    """Any of the moves that keep the value of the game, so that no single game can be learnt by heart."""
    return random_opponent(board, optimal_actions(board, legal_actions), rng)


def noisy_opponent(board: str, legal_actions: list[str], rng: np.random.Generator) -> str:
    """Random half of the time, optimal otherwise."""
    play = random_opponent if rng.random() < 0.5 else optimal_opponent
    return play(board, legal_actions, rng)


BUILT_IN_OPPONENTS: dict[str, Opponent] = {
    "random": random_opponent,
    "noisy": noisy_opponent,
    "optimal": optimal_opponent,
}


class TicTacToe(gymnasium.Env[str, str]):
    r"""
    Tic-tac-toe against an opponent that is part of the environment: a step is the agent's move and the opponent's
    answer. The reward is 1, 0 or -1 for a win, a draw or a loss when the game ends, and 0 before.

    The first line of a step's observation is that step, completed; the rest is the next step, still open:

    ```text
    Step=0 State=000000000 Action=4 Reward=0
    Legal actions: 1,2,3,5,6,7,8
    Step=1 State=200010000
    ```

    `info` holds `legal_actions`, `board` (nine digits, the agent is "1"), `state` (the board as the text writes it in
    one line), `seat` (`"first"` or `"second"`), after a step `transition` (the completed line), and at the end of the
    game `outcome` (`"win"`, `"draw"` or `"loss"`).

    Mean returns of scripted players when they move first / second. The seat moves a return about as far as the
    opponent does: never report one without the other.

    | player  | against random | against noisy | against optimal |
    |---------|----------------|---------------|-----------------|
    | random  | +0.30 / -0.30  | -0.22 / -0.66 | -0.78 / -0.97   |
    | optimal | +0.97 / +0.78  | +0.73 / +0.47 | 0 / 0           |

    Args:
        opponent (`str`, callable or list, *optional*, defaults to `"random"`):
            `"random"`, `"noisy"` (half of its moves random, the others optimal), `"optimal"`, or any player
            `opponent(board, legal_actions, rng) -> action`: `board` is nine digits as the opponent sees them ("1" is
            the opponent itself); `legal_actions` and the answer are spelled as for the agent. [`TicTacToe.describe`]
            writes such a board as the agent would read it, so that a policy can play against itself. A list of these:
            the seed draws one for each game.
        seat (`str`, *optional*, defaults to `"first"`):
            Whether the agent moves `"first"` or `"second"`; `"random"` lets the seed decide in every game.
        show_legal_actions (`bool`, *optional*, defaults to `True`):
            Whether the observations list the legal actions.
        board (`str`, *optional*, defaults to `"digits"`):
            `"digits"`: the paper's nine digits, actions `0` to `8`. `"grid"`: LMAct's drawing, actions `a1` to `c3`.
        reasoning (`bool`, *optional*, defaults to `True`):
            Whether the instructions ask for a short chain of thought before the action.
    """

    metadata = {"render_modes": []}

    history_header = "So far you have tried/seen:"
    question = "What do you predict next?"

    def __init__(
        self,
        *,
        opponent: str | Opponent | Sequence[str | Opponent] = "random",
        seat: Literal["first", "second", "random"] = "first",
        show_legal_actions: bool = True,
        board: Literal["digits", "grid"] = "digits",
        reasoning: bool = True,
    ):
        opponents = list(opponent) if isinstance(opponent, (list, tuple)) else [opponent]
        if not opponents or not all(
            callable(one) or isinstance(one, str) and one in BUILT_IN_OPPONENTS for one in opponents
        ):
            raise ValueError(
                f"opponent={opponent!r} is unknown. Use one of {', '.join(map(repr, BUILT_IN_OPPONENTS))}, a callable "
                "`(board, legal_actions, rng) -> action`, or a list of these."
            )
        if seat not in ("first", "second", "random"):
            raise ValueError(f"seat={seat!r} is unknown. Use one of 'first', 'second', 'random'.")
        if board not in ("digits", "grid"):
            raise ValueError(f"board={board!r} is unknown. Use one of 'digits', 'grid'.")
        self.opponent = opponent
        self.seat = seat
        self.show_legal_actions = show_legal_actions
        self.board = board
        self.reasoning = reasoning
        self.instructions = self._write_instructions()
        self._names = _DIGIT_NAMES if board == "digits" else _GRID_NAMES
        self.action_space = Labels(self._names)
        self.observation_space = Text(512, charset=string.printable)

        self._opponents = [one if callable(one) else BUILT_IN_OPPONENTS[one] for one in opponents]
        self._player = self._opponents[0]
        self._position: str | None = None  # nine digits, the agent is "1"; None: no game is on
        self._seat_now = seat
        self._luck = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        """
        Starts a game; in the second seat, with the opponent's move on the board.

        Args:
            seed (`int`, *optional*):
                Fixes the opponent's luck, and the seat if that is random. Without it, each reset gives another game.
            options (`dict`, *optional*):
                Unused; part of Gymnasium's signature.

        Returns:
            `tuple[str, dict]`:
                The open step and `info`.
        """
        super().reset(seed=seed)
        self._position = None
        # Both are drawn whatever the seat is, so that a seed means the same luck in every seat.
        self._luck = int(self.np_random.integers(2**32))
        coin = ("first", "second")[self.np_random.integers(2)]
        self._seat_now = coin if self.seat == "random" else self.seat
        self._player = self._opponents[self.np_random.integers(len(self._opponents))]
        self._position = _EMPTY if self._seat_now == "first" else self._answer(_EMPTY)
        return self.describe(self._position), self._info(self._position)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """
        Puts the agent's mark on a square, and then the opponent's.

        Args:
            action (`str`):
                One of `info["legal_actions"]`, spelled the same.

        Returns:
            `tuple[str, float, bool, bool, dict]`:
                The completed step and the next one or the result, the reward, whether the game is over, `False`, and
                `info`.
        """
        if self._position is None:
            raise ResetNeeded("No game is on. Call reset() before the first step() and after a game has ended.")
        before = self._position
        legal_actions = self._legal_actions(before)
        if action not in legal_actions:
            raise ValueError(
                f"Action {action!r} is not legal here. The legal actions are: {', '.join(legal_actions)}."
            )

        self._position = None  # an opponent that raises leaves no game behind
        position = _place(before, self._names.index(action), "1")
        if not _is_over(position):
            position = self._answer(position)
        reward = float(_has_line(position, "1") - _has_line(position, "2"))
        transition = f"Step={before.count('1')} State={self._one_line(before)} Action={action} Reward={reward:.0f}"
        info = {**self._info(position), "transition": transition}
        if _is_over(position):
            info["legal_actions"] = []
            info["outcome"] = {1.0: "win", 0.0: "draw", -1.0: "loss"}[reward]
            end = f"Result={info['outcome']} State={self._one_line(position)}"
            return f"{transition}\n{end}", reward, True, False, info
        self._position = position
        return f"{transition}\n{self.describe(position)}", reward, False, False, info

    def close(self) -> None:
        self._position = None

    def describe(self, board: str) -> str:
        """
        The open step as the player to move reads it: what `reset` returns and what follows the first line of `step`.

        Args:
            board (`str`):
                Board as nine digits, "1" is the player to move: the agent's, or the one that an opponent is given.
        """
        _check_board(board)
        text = f"Step={board.count('1')} State={self._one_line(board)}"
        if self.board == "grid":
            text += f"\n{render_board(board)}"
        if self.show_legal_actions:
            # Before the state, so that the state stands at one distance from the reply however long the list is
            text = f"Legal actions: {','.join(self._legal_actions(board))}\n{text}"
        return text

    def _answer(self, position: str) -> str:
        """The position after the opponent's move."""
        seen = swap_sides(position)
        legal_actions = self._legal_actions(position)
        # A generator of its own for every move number: what one move drew never shifts the luck of the next, so
        # players on one seed meet the same luck although their games differ.
        rng = np.random.default_rng([self._luck, position.count("2")])
        answer = self._player(seen, list(legal_actions), rng)
        if answer not in legal_actions:
            raise ValueError(
                f"The opponent {self._player!r} answered {answer!r} on the board {seen!r}. It must answer one of: "
                f"{', '.join(legal_actions)}."
            )
        return _place(position, self._names.index(answer), "2")

    def _legal_actions(self, position: str) -> list[str]:
        return [name for name, mark in zip(self._names, position, strict=True) if mark == "0"]

    def _one_line(self, position: str) -> str:
        if self.board == "digits":
            return position
        letters = position.translate(str.maketrans("012", ".xo"))
        return "/".join((letters[:3], letters[3:6], letters[6:]))

    def _info(self, position: str) -> dict[str, Any]:
        return {
            "legal_actions": self._legal_actions(position),
            "state": self._one_line(position),
            "board": position,
            "seat": self._seat_now,
        }

    def _write_instructions(self) -> str:
        turns = {
            "first": "You move first.",
            "second": "Your opponent moves first.",
            "random": "Either you or your opponent moves first.",
        }[self.seat]
        if self.board == "digits":
            form = (
                "The board has nine positions, numbered row by row:\n012\n345\n678\n"
                "A state is nine digits in this order: 0 is an empty position, 1 is your mark, 2 is your opponent's "
                f"mark. You play as 1. {turns} For example, the state 102010002 is this board:\n102\n010\n002"
            )
            names = "the number of an empty position, from 0 to 8"
        else:
            form = (
                "The board has the rows a, b, c from top to bottom and the columns 1, 2, 3 from left to right: b1 is "
                f"the left square of the middle row. You play as x, your opponent plays as o. {turns} For example, "
                f"the state x.o/.x./..o is this board:\n{render_board('102010002')}"
            )
            names = "the name of an empty square, from a1 to c3"
        if self.show_legal_actions:
            names += ", one of the legal actions that are listed"
        answer = (
            f"Think step by step, then give your final answer in the form ACTION=X, where X is {names}.\n"
            "IMPORTANT: Keep your thinking SHORT, and always end with ACTION=X."
            if self.reasoning
            else f"Give only your final answer, in the form ACTION=X, where X is {names}."
        )
        return (
            f"You are playing tic-tac-toe against an opponent.\n{form}\n"
            "In every step you put your mark on an empty place, then your opponent does the same. Whoever first has "
            "three marks in a row, a column or a diagonal wins. You get reward 1 for a win, 0 for a draw and -1 for a "
            f"loss. Your goal is to win and, where you cannot win, to draw.\n\n{answer}"
        )
