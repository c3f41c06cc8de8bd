# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""TextArena's games as ours: one of the players is the agent, an opponent plays the others."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from .luck import episode_luck, own_luck
from .suites import NotMade, check_lists_moves, how_to_answer, import_suite, joined, unknown_id


# "Available Moves: '[0]', '[1]'", as many games write it beside the board.
_LISTED = re.compile(r"\b(?:available|valid|legal) (?:moves|actions)\b[^:\n]{0,20}:(.*)", re.IGNORECASE)
_IN_BRACKETS = re.compile(r"\[([^\[\]\n]+)\]")
_MOST_PLAYERS = 15
_MOST_MOVES = 1000  # of the others between two of the agent's


def _hanoi(game: Any) -> list[str]:
    towers = game.state.game_state["towers"]
    pairs = [(source, target) for source in towers for target in towers if source != target and towers[source]]
    return [f"{a} {b}" for a, b in pairs if not towers[b] or towers[a][-1] < towers[b][-1]]


# What may stand in the brackets, for games that do not list it: by the name of the game's class.
MOVES: dict[str, Callable[[Any], list[str]]] = {
    "NimEnv": lambda game: [
        f"{pile} {number}" for pile, size in enumerate(game.state.game_state["piles"]) for number in range(1, size + 1)
    ],
    "GuessTheNumberEnv": lambda game: [
        str(number)
        for number in range(game.min_number, game.max_number + 1)
        if number not in getattr(game, "guessed_numbers", ())
    ],
    "ConnectFourEnv": lambda game: [
        f"col {column}" for column, mark in enumerate(game.state.game_state["board"][0]) if mark == "."
    ],
    "FrozenLakeEnv": lambda game: ["up", "down", "left", "right"],
    "Game2048Env": lambda game: ["Up", "Down", "Left", "Right"],
    "TowerOfHanoiEnv": _hanoi,
}


class TextArenaGame:
    """
    A game of TextArena's: `"textarena:Nim-v0"`. A step is the agent's move and those of all others until it is the
    agent's turn again. The reward comes when the game ends: in a game of two 1, 0 or -1, alone between 0 and 1.

    The rules, as TextArena words them for the agent's player, are the instructions; later messages are the
    observations. Where a game lists the moves or they are known ([`MOVES`]), they are the legal actions: what stands
    in the rules' square brackets, without the brackets. In the other games any text may be played, and TextArena
    judges it; a reply without an action ends the episode (or `invalid_action="retry"`).

    Args:
        game (`str`):
            TextArena's id.
        opponent (`str` or `Callable`, *optional*, defaults to `"random"`):
            Who plays the other players: `"random"` (in games whose legal actions are known); a player
            `(observation, legal_actions, rng) -> action` as [`TicTacToe`] takes it, given all that it has seen but for
            the rules; or a `textarena.Agent` or any other function of one argument, given all with the rules.
        seat (`int` or `str`, *optional*, defaults to `0`):
            The number of the player that the agent is; `"random"` lets the seed decide in every game.
        num_players (`int`, *optional*):
            How many play. Defaults to the fewest that the game takes.
        legal_actions (`Callable`, *optional*):
            `legal_actions(game) -> list[str]`, given TextArena's environment, for games whose moves are not known.
        how_to_answer (`str`, *optional*):
            The last paragraph of the instructions.
        **kwargs:
            Arguments of [`textarena.make`].
    """

    def __init__(
        self,
        game: str,
        *,
        opponent: Literal["random"] | Callable[..., str] = "random",
        seat: int | Literal["random"] = 0,
        num_players: int | None = None,
        legal_actions: Callable[[Any], list[str] | None] | None = None,
        how_to_answer: str | None = None,
        **kwargs: Any,
    ):
        self._textarena = import_suite("textarena")
        registry = import_suite("textarena.envs.registration").ENV_REGISTRY
        if game not in registry:
            raise unknown_id("TextArena", game, registry)
        if opponent != "random" and not callable(opponent):
            raise ValueError(
                f"opponent={opponent!r} is unknown. Use 'random', a player `(observation, legal_actions, rng) -> "
                "action`, or a function of the observation alone."
            )
        check_lists_moves(legal_actions)
        self._form = _HOW if how_to_answer is None else how_to_answer
        self.opponent, self.seat, self._legal = opponent, seat, legal_actions
        self._opponent_reads_all = opponent != "random" and _n_arguments(opponent) == 1
        self._name, self._kwargs = game, kwargs
        brackets = self._textarena.wrappers.ActionFormattingWrapper
        played = registry.get(game.removesuffix("-raw"), registry[game])
        # A game's raw form lacks what puts moves into brackets, and moves are told and listed without them
        self._wrapper = brackets if game.endswith("-raw") and brackets in (played.default_wrappers or ()) else None
        self.num_players = num_players or self._fewest_players()
        if seat != "random" and seat not in range(self.num_players):
            raise ValueError(f"seat={seat!r}: {game} has the players 0 to {self.num_players - 1}; or use 'random'.")
        self._begin(0)
        for player in range(self.num_players):
            self._read(player)
        if (
            opponent == "random"
            and not any(map(self._legal_actions, range(self.num_players)))
            and self.num_players > 1
        ):
            raise ValueError(
                f"The legal actions of {game} are not known, so there is no random opponent. Pass opponent=, a "
                "function that answers an observation, or legal_actions=, a function that lists the moves."
            )
        self.close()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        observation = self._begin(seed)
        if self._over:
            raise RuntimeError(f"In {self._name} the game was over before the agent's first move: {self._end()[1]}")
        return observation, {**self._info(), "instructions": self.instructions}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if self._over:
            raise ValueError("No game is on. Call reset() before the first step() and after a game has ended.")
        self._move(action)
        self._let_others_play()
        observation, info, reward = self._read(self.player), self._info(), 0.0
        if self._over:
            reward, reason = self._end()
            if reason not in observation:
                observation = "\n".join(part for part in (observation, reason) if part)
            info["rewards"] = {**(self.game.state.rewards or {}), self.player: reward}
            if self.num_players > 1:
                info["outcome"] = "win" if reward > 0 else "loss" if reward < 0 else "draw"
        return observation, reward, self._over, False, info

    def close(self) -> None:
        self._over = True

    def describe(self, observation: str) -> str:
        """What an opponent is given, as it reads it: the text itself."""
        return observation

    def _begin(self, seed: int | None) -> str:
        """A game up to the agent's first move; what the agent observes then."""
        self._luck, self._moves = episode_luck(seed), 0
        self._start(self.num_players, self._luck)
        self.player = self._luck % self.num_players if self.seat == "random" else self.seat
        self._rules: dict[int, str] = {}
        self._seen: dict[int, list[str]] = {player: [] for player in range(self.num_players)}
        self._listed: dict[int, list[str] | None] = {}
        self._over = False
        self._let_others_play()
        observation = self._read(self.player)
        self.instructions = joined(self._rules[self.player], self._form)
        return observation

    def _start(self, num_players: int, luck: int) -> None:
        """A game of its own for each episode: some games carry things on from one to the next."""
        with own_luck(luck, 0):
            try:
                self.env = self._textarena.make(self._name, **self._kwargs)
                self.env = self._wrapper(self.env) if self._wrapper else self.env
            except (ImportError, SyntaxError, OSError, LookupError) as error:
                # A newer Python, other packages, files, word lists
                raise NotMade("TextArena", self._name, error) from error
            self.game = self.env
            while isinstance(self.game, self._textarena.Wrapper):
                self.game = self.game.env
            try:
                self.env.reset(num_players=num_players, seed=luck)
            except AssertionError as error:
                raise ValueError(f"num_players={num_players!r}: {self._name} says: {error}") from error
        if (number := self.game.state.num_players) != num_players:
            raise ValueError(f"num_players={num_players!r}: {self._name} is a game of {number}.")

    def _fewest_players(self) -> int:
        problem = None
        for number in range(1, _MOST_PLAYERS + 1):
            try:
                self._start(number, 0)
                # Games of many start with one as well, and then wait for ever for somebody else
                if number > 1 or isinstance(self.game.state, self._textarena.SinglePlayerState):
                    return number
            except (NotMade, TypeError):
                raise
            except Exception as error:  # each game has its own way to say that so few or so many cannot play
                problem = error
        raise ValueError(
            f"{self._name} does not start with any number of players from 1 to {_MOST_PLAYERS}. It says: {problem}"
        )

    def _move(self, action: str) -> None:
        self._moves += 1
        with own_luck(self._luck, self._moves):
            done, _ = self.env.step(action=action)
        self._over = bool(done)

    def _end(self) -> tuple[float, str]:
        """The agent's reward, and why the game is over."""
        state = self.game.state
        reward = (state.rewards or {}).get(self.player, 0.0)
        reason = (state.game_info.get(self.player) or {}).get("reason") or ""
        if isinstance(reward, str):  # some games give an invalid move's reward and reason in each other's place
            reward, reason = str(reason).removeprefix("Invalid Move: "), reward
        return float(reward), str(reason)

    def _let_others_play(self) -> None:
        for _ in range(_MOST_MOVES):
            player = self.game.state.current_player_id
            if self._over or player == self.player:
                return
            self._read(player)
            self._move(self._answer(player))  # the opponent thinks outside of the lock
        raise RuntimeError(
            f"In {self._name} the other players made {_MOST_MOVES} moves, and it is not the agent's turn."
        )

    def _answer(self, player: int) -> str:
        seen, legal_actions = "\n".join(self._seen[player]), self._legal_actions(player)
        if self._opponent_reads_all:
            return self.opponent(joined(self._rules[player], seen))
        rng = np.random.default_rng([self._luck, self._moves])
        if self.opponent != "random":
            return self.opponent(seen, list(legal_actions or []), rng)
        if not legal_actions:
            raise ValueError(f"No move is known for player {player}: pass opponent= or legal_actions=.")
        return legal_actions[rng.integers(len(legal_actions))]

    def _read(self, player: int) -> str:
        """What `player` has been told since it last read: the rules apart, of several boards the last."""
        messages, self.game.state.observations[player] = self.game.state.observations[player], []
        kinds = self._textarena.ObservationType
        boards = [number for number, (_, _, kind) in enumerate(messages) if kind == kinds.GAME_BOARD]
        messages = [(sender, str(text), kind) for sender, text, kind in messages]
        lines = []
        for number, (sender, text, kind) in enumerate(messages):
            if kind == kinds.PROMPT:
                self._rules[player] = joined(self._rules.get(player), text)
            elif kind == kinds.GAME_BOARD and number != boards[-1]:
                continue  # out of date
            elif kind == kinds.PLAYER_ACTION and sender in (player, self._textarena.GAME_ID):
                continue  # the player's own words
            else:
                named = sender != self._textarena.GAME_ID
                lines.append(f"[Player {sender}] {text.strip()}" if named else text.strip())
        if listed := _LISTED.findall("\n".join(lines)):
            self._listed[player] = list(dict.fromkeys(move.strip() for move in _IN_BRACKETS.findall(listed[-1])))
        self._seen[player] += lines
        self._rules.setdefault(player, "")
        return "\n".join(lines)

    def _legal_actions(self, player: int) -> list[str] | None:
        known = self._legal or MOVES.get(type(self.game).__name__)
        return known(self.game) if known else self._listed.get(player) or None

    def _info(self) -> dict[str, Any]:
        info: dict[str, Any] = {"player": self.player}
        if self._over:
            return {**info, "legal_actions": []}
        legal_actions = self._legal_actions(self.player)
        return info if legal_actions is None else {**info, "legal_actions": list(legal_actions)}


_HOW = how_to_answer("what the rules put into [ ], without the brackets")


def _n_arguments(function: Callable[..., Any]) -> int:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return 3
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(p.kind in kinds and p.default is inspect.Parameter.empty for p in parameters)
