# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""How many tokens an episode has: one is played at random, and its texts are measured."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..contexts import Briefing, last, opening_message, transition_line, window_message
from ..envs.make import make_env


CHARACTERS = 4  # of English in a token, the usual rule of thumb
FRAME = 8  # tokens that a chat template puts round a message
MOST_TURNS = 1000


@dataclass(frozen=True)
class Episode:
    """
    An episode in tokens.

    Args:
        reply (`int`):
            Tokens of a reply.
        reads (`tuple[int, ...]`):
            At each turn, what is read and was not in the cache yet.
        contexts (`tuple[int, ...]`):
            At each turn, what is in the cache before the reply.
        rows (`tuple[int, ...]`):
            Lengths of the rows that are trained on.
    """

    reply: int
    reads: tuple[int, ...]
    contexts: tuple[int, ...]
    rows: tuple[int, ...]

    @property
    def n_turns(self) -> int:
        return len(self.reads)


@dataclass(frozen=True)
class Reading:
    """
    What a model reads in an episode, whatever the length of its replies.

    Args:
        context (`str`):
            `"chat"`: each turn adds to what was read. `"window"`: each turn has a prompt of its own.
        turns (`tuple[int, ...]`):
            Tokens that a turn adds, or its whole prompt.
        kept (`int`, *optional*, defaults to `0`):
            In a window, tokens at the beginning that all prompts share: the cache keeps them.
    """

    context: str
    turns: tuple[int, ...]
    kept: int = 0

    def episode(self, reply: int, limit: int | None = None) -> Episode:
        """With replies of `reply` tokens, and `limit` tokens at most in a row: a chat that outgrows it ends."""
        reads: list[int] = []
        contexts: list[int] = []
        limit = limit or 2**31
        if self.context == "window":
            prompts = [min(prompt, max(limit - reply, 1)) for prompt in self.turns]
            reads = [prompt - (min(self.kept, prompt - 1) if number else 0) for number, prompt in enumerate(prompts)]
            return Episode(reply, tuple(reads), tuple(prompts), tuple(min(p + reply, limit) for p in prompts))
        length = 0
        for read in self.turns:
            if length + read >= limit:
                break
            reads.append(read)
            contexts.append(length + read)
            length = min(length + read + reply, limit)
        if not reads:  # not even the first prompt fits: the row is cut
            return Episode(reply, (limit - 1,), (limit - 1,), (limit,))
        return Episode(reply, tuple(reads), tuple(contexts), (length,))


def measure_reading(
    env: str,
    env_kwargs: Mapping[str, Any],
    context: str,
    window: int | None = None,
    max_turns: int | None = None,
    n_episodes: int = 4,
) -> Reading:
    """
    Play a few episodes with random actions and measure what a model would have read in the longest.

    Args:
        env (`str`):
            Environment id.
        env_kwargs (`Mapping[str, Any]`):
            Its arguments.
        context, window:
            As in [`AgentGRPOConfig`].
        max_turns (`int`, *optional*):
            Most turns.
        n_episodes (`int`, *optional*, defaults to `4`):
            How many.

    Raises:
        `ValueError`: if the environment lists no actions to play at random, and `max_turns` does not tell how many
            turns an episode has instead. (All of them are then as long as the last one that could be read.)
    """
    played = [_play(env, env_kwargs, context, window, max_turns, seed) for seed in range(n_episodes)]
    return max(played, key=lambda reading: (len(reading.turns), sum(reading.turns)))


def _play(
    env: str, env_kwargs: Mapping[str, Any], context: str, window: int | None, max_turns: int | None, seed: int
) -> Reading:
    made, luck, most = make_env(env, **env_kwargs), random.Random(seed), max_turns or MOST_TURNS
    try:
        briefing = Briefing.of(made)
        observation, info = made.reset(seed=seed)
        texts, lines = [opening_message(briefing, observation)], []
        prompts = [window_message(briefing, lines, observation)]
        for step in range(min(most, MOST_TURNS)):
            legal = info.get("legal_actions")
            if not legal:
                if max_turns is None:
                    raise ValueError(
                        f"{env!r} lists no actions (info['legal_actions']), so that its episodes cannot be measured "
                        "by playing at random: say how many turns they have, by --turns."
                    )
                texts += texts[-1:] * (most - len(texts))
                prompts += prompts[-1:] * (most - len(prompts))
                break
            action, before = luck.choice(list(legal)), observation
            observation, reward, terminated, truncated, info = made.step(action)
            if terminated or truncated:
                break
            lines.append(transition_line(step, before, action, reward, info))
            texts.append(observation)
            opened = observation.removeprefix(lines[-1]).strip("\n")
            prompts.append(window_message(briefing, list(last(lines, window)), opened))
    finally:
        made.close()
    if context == "window":
        kept = count_tokens(briefing.instructions)
        return Reading("window", tuple(count_tokens(text) + FRAME for text in prompts[:most]), kept)
    return Reading("chat", tuple(count_tokens(text) + FRAME for text in texts[:most]))


def count_tokens(text: str) -> int:
    """About how many tokens a text has."""
    return -(-len(text) // CHARACTERS)
