# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
A scripted player's episodes as the conversations a model would have had: its actions put into words, and the messages
of a chat or of a window around them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from datasets import Dataset

from .actions import ActionParser
from .agents import Agent, play_episode
from .contexts import Briefing, last, opening_message, transition_line, window_message
from .envs.make import make_env
from .types import Trajectory


def plain_rationale(observation: str, action: str) -> str:
    """
    A thought as short as the paper's instruction asks for: what the last action gave, if the observation says so, and
    whether to go on with it. It only puts into words what the player does, but gives training words to decide by.

    What failed: "red gave 1: stay. ACTION=red" (the small model wrote the word and the action independently of each
    other), a colon between reward and word, and the same two words after either reward (RLFT raised "keep" after every
    reward alike and, in one run of two, stayed there). With words of their own for each reward, the warm-up itself
    teaches the model to tell rewards apart.
    """
    last = re.search(r"Action=(\S.*?) Reward=(-?\d\S*)", observation)
    if last is None:
        return f"try {action}."
    words = ("keep", "explore") if float(last[2]) > 0 else ("retry", "switch")
    return f"{last[1]} gave {last[2]} {words[0] if action == last[1] else words[1]} {action}."


def board_rationale(observation: str, action: str) -> str:
    """
    The board as it stands, copied from the observation: what a move depends on, close to where it is decided and at
    the same distance every time. It tells nothing of the action.
    """
    states = re.findall(r"State=(\S+)", observation)
    return f"Board {states[-1]}." if states else f"try {action}."


def play_transcripts(
    env: Any,
    agent: Agent,
    seeds: Sequence[int],
    *,
    parser: ActionParser | None = None,
    rationale: Callable[[str, str], str] | None = plain_rationale,
    context: str = "chat",
    window: int | None = None,
    max_turns: int | None = None,
) -> Dataset:
    """
    Let a scripted player play, and write its episodes down as the conversations a model would have had.

    Args:
        env (`str` or `Callable`):
            Environment id, class or factory.
        agent ([`Agent`]):
            The player.
        seeds (`Sequence[int]`):
            One episode each.
        parser ([`ActionParser`], *optional*):
            Its `format` writes the action down.
        rationale (`Callable[[str, str], str]`, *optional*):
            Given the observation and the chosen action, the thought written before it. None: the action alone.
        context (`str`, *optional*, defaults to `"chat"`):
            `"chat"`: one conversation an episode; `"window"`: one exchange a turn.
        window (`int`, *optional*):
            With `"window"`, the number of transitions kept.
        max_turns (`int`, *optional*):
            Most turns of an episode. Without it, one that goes on for 10,000 is an error.

    Returns:
        `Dataset` with a column `messages` in the conversational format that TRL's trainers read.
    """
    parser = parser or ActionParser()
    if context not in ("chat", "window"):
        raise ValueError(f'context={context!r} is unknown: choose "chat" or "window".')
    conversations = []
    with closing(make_env(env)) as env:
        briefing = Briefing.of(env)
        for seed in seeds:
            played = play_episode(env, agent, seed=seed, max_turns=max_turns)
            trajectory = put_into_words(played, parser, rationale)
            if context == "chat":
                conversations.append(chat_messages(trajectory, briefing))
            else:
                conversations.extend(window_messages(trajectory, briefing, window))
    return Dataset.from_dict({"messages": conversations})


def put_into_words(
    trajectory: Trajectory,
    parser: ActionParser | None = None,
    rationale: Callable[[str, str], str] | None = plain_rationale,
) -> Trajectory:
    """
    A scripted player's episode as a model would have written it: the `text` of each turn is a thought and the action.

    Args:
        trajectory ([`Trajectory`]):
            What [`play_episode`] played.
        parser, rationale (*optional*):
            As for [`play_transcripts`].
    """
    parser, turns = parser or ActionParser(), []
    for turn in trajectory.turns:
        stated = parser.format(turn.executed)
        text = f"{rationale(turn.observation, turn.executed)} {stated}" if rationale else stated
        turns.append(replace(turn, text=text))
    return replace(trajectory, turns=tuple(turns))


def chat_messages(trajectory: Trajectory, briefing: Briefing) -> list[dict[str, str]]:
    """An episode as one growing conversation. It ends with what the environment answered to the last reply."""
    messages = []
    for number, turn in enumerate(trajectory.turns):
        content = turn.observation if number else opening_message(briefing, turn.observation)
        messages += [{"role": "user", "content": content}, {"role": "assistant", "content": turn.text}]
    # The last observation too: what follows an action is worth learning to read, even when no reply follows
    return [*messages, {"role": "user", "content": trajectory.final_observation}]


def window_messages(
    trajectory: Trajectory, briefing: Briefing, window: int | None = None
) -> list[list[dict[str, str]]]:
    """
    An episode as one conversation a turn: what is read, looking back on the last `window` transitions (all for None),
    the reply, and what the environment answered.
    """
    conversations, lines, opened = [], [], trajectory.turns[0].observation
    for turn, following in zip(trajectory.turns, [*trajectory.turns[1:], None], strict=True):
        observed = trajectory.final_observation if following is None else following.observation
        conversations.append(
            [
                {"role": "user", "content": window_message(briefing, last(lines, window), opened)},
                {"role": "assistant", "content": turn.text},
                {"role": "user", "content": observed},  # never seen when it plays, and worth learning from
            ]
        )
        if following is not None:
            lines.append(transition_line(len(lines), turn.observation, turn.executed, turn.reward, turn.info))
            opened = observed.removeprefix(lines[-1]).strip("\n")
    return conversations
