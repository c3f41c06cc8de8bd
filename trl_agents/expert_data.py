# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
An expert's episodes as datasets for supervised fine-tuning: behaviour cloning, where the reply is the action alone,
and thought cloning, where the expert says first why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .actions import ActionParser
from .agents import Agent, play_episode
from .contexts import Briefing
from .envs.make import make_env
from .episodes import LoggedEpisode, training_rows
from .experts import EXPERTS, Expert, make_expert
from .transcripts import chat_messages, window_messages
from .types import Trajectory


FORMS = ("thought", "behaviour")
CHUNK = 64  # episodes whose rows are made at a time


def expert_episodes(
    env: str | Callable[..., Any],
    expert: str | Agent = "ucb",
    form: str = "thought",
    *,
    seeds: Sequence[int],
    env_kwargs: Mapping[str, Any] | None = None,
    parser: ActionParser | None = None,
    max_turns: int | None = None,
    progress: bool = False,
) -> Iterator[Trajectory]:
    """
    Let an expert play, and write its turns down as a model would have written them.

    Args:
        env, expert, form, seeds, env_kwargs, parser, max_turns, progress:
            As for [`expert_dataset`].

    Returns:
        `Iterator[Trajectory]`: one episode a seed, as it is played. With [`~episodes.log_episodes`] and
        [`~episodes.write_episodes`] they become a file for expert iteration.
    """
    if form not in FORMS:
        raise ValueError(f"form={form!r} is unknown: use one of {', '.join(map(repr, FORMS))}.")
    parser = parser or ActionParser()
    made = make_env(env, **(env_kwargs or {}))
    expert = make_expert(expert, made) if isinstance(expert, str) else expert
    if form == "thought" and not isinstance(expert, Expert):
        raise ValueError(
            f"{type(expert).__name__} has no thoughts to clone. Use form='behaviour', or one of the experts "
            f"{', '.join(map(repr, EXPERTS))}, or a subclass of Expert."
        )
    return _play(made, _Thinking(expert) if form == "thought" else expert, seeds, parser, max_turns, progress)


def agreement(trajectory: Trajectory, expert: Agent) -> float | None:
    """
    The share of an episode's steps at which the expert, had it got there the same way, would have played what the
    player chose; an action that was played in place of an invalid reply agrees with nobody's. None for an episode
    without a step. Of an expert that chooses at random, it is how often its draw is met.
    """
    info, same = trajectory.reset_info, []
    expert.reset(legal_actions=info["legal_actions"], seed=trajectory.seed)
    for turn in trajectory.turns:
        if turn.executed is not None:  # else it was asked again
            same.append(expert.act(turn.observation, info) == turn.parsed.action)
            expert.update(turn.executed, turn.reward, turn.info)
            info = turn.info
    return sum(same) / len(same) if same else None


class _Thinking(Agent):
    """Plays as an expert does, and keeps its thoughts of the episode."""

    def __init__(self, expert: Expert):
        self.expert = expert

    def reset(self, *, legal_actions: list[str], seed: int) -> None:
        self.expert.reset(legal_actions=legal_actions, seed=seed)
        self.thoughts: list[str] = []

    def act(self, observation: str, info: Mapping[str, Any]) -> str:
        action = self.expert.act(observation, info)
        self.thoughts.append(self.expert.explain(observation, info, action))
        return action

    def update(self, action: str, reward: float, info: Mapping[str, Any]) -> None:
        self.expert.update(action, reward, info)


def _play(env, player, seeds, parser, max_turns, progress) -> Iterator[Trajectory]:
    try:
        for seed in tqdm(seeds, desc="Expert", unit="ep", leave=False, disable=not progress):
            trajectory = play_episode(env, player, seed=seed, max_turns=max_turns)
            thoughts = getattr(player, "thoughts", None) or [None] * len(trajectory.turns)
            turns = []
            for turn, thought in zip(trajectory.turns, thoughts, strict=True):
                stated = parser.format(turn.executed)
                turns.append(replace(turn, text=stated if thought is None else f"{thought}\n{stated}"))
            yield replace(trajectory, turns=tuple(turns))
    finally:
        env.close()


def expert_dataset(
    env: str | Callable[..., Any],
    expert: str | Agent = "ucb",
    form: str = "thought",
    *,
    seeds: Sequence[int],
    env_kwargs: Mapping[str, Any] | None = None,
    parser: ActionParser | None = None,
    context: str = "chat",
    window: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    max_turns: int | None = None,
    cache_dir: str | None = None,
    progress: bool = False,
) -> Dataset:
    """
    An expert's episodes as a dataset for TRL's `SFTTrainer`. The same arguments give the same rows.

    | `context` | `tokenizer` | a row is | columns | loss on |
    |---|---|---|---|---|
    | `"window"` | | a turn | `prompt`, `completion`, `seed`, `step`, `action` | the reply, by TRL's default |
    | `"chat"` | | an episode | `messages`, `seed` | replies, with `SFTConfig(assistant_only_loss=True)` |
    | either | given | a turn, or an episode | `input_ids`, `labels` | replies, whatever the chat template |

    In a chat, `messages` alone do not say which tokens are replies. TRL finds them if the chat template marks them
    with `{% generation %}`, and brings such templates for some families of models; for others it refuses. With
    `tokenizer` the rows are tokens, made as a rollout makes them ([`~episodes.training_rows`]), and the labels of all
    else are -100. In either case pass `SFTConfig(max_length=None)`, or episodes are cut at TRL's 1,024 tokens.

    Args:
        env (`str` or `Callable`):
            Environment id, class or factory. For `form="behaviour"`, pass `env_kwargs={"reasoning": False}` to an
            environment of this package, so that its instructions ask for the action alone.
        expert (`str` or [`Agent`], *optional*, defaults to `"ucb"`):
            Who plays: a name for [`~experts.make_expert`], or a player such as `UCBExpert(bonus="ucb1")`.
        form (`str`, *optional*, defaults to `"thought"`):
            `"thought"`: the reply is the expert's thought, and the action in the last line. `"behaviour"`: the action
            alone.
        seeds (`Sequence[int]`):
            One episode each; see [`~seeds.expert_seeds`].
        env_kwargs (`Mapping`, *optional*):
            Arguments of the environment.
        parser ([`ActionParser`], *optional*):
            Its `format` writes the action down.
        context, window (*optional*):
            What is read each turn, as in [`AgentGRPOConfig`].
        tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*):
            Of the model to train, for rows of tokens.
        chat_template_kwargs (`Mapping`, *optional*):
            With `tokenizer`, passed on to its chat template.
        max_turns (`int`, *optional*):
            Most turns of an episode. Without it, one that goes on for 10,000 is an error.
        cache_dir (`str`, *optional*):
            Folder to write the rows to as they are made, for more than the memory holds; one that is there already is
            read, so use a new one where anything has changed. By default they are kept in memory.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.
    """
    if context not in ("chat", "window"):
        raise ValueError(f'context={context!r} is unknown: choose "chat" or "window".')
    if window is not None and (context != "window" or window < 0):
        raise ValueError(f'window={window!r} with context={context!r}: it is a number from 0, for context="window".')
    if not len(seeds):
        raise ValueError("seeds is empty, so there is no episode to learn from: give at least one.")
    made = make_env(env, **(env_kwargs or {}))
    expert = make_expert(expert, made) if isinstance(expert, str) else expert
    briefing = Briefing.of(made)
    made.close()
    reading = {"context": context, "window": window}
    playing = {"env_kwargs": env_kwargs, "parser": parser, "max_turns": max_turns, "progress": progress}

    def rows() -> Iterator[dict[str, Any]]:
        chunk = []
        for trajectory in expert_episodes(env, expert, form, seeds=seeds, **playing):
            if form == "thought" and expert.looks_back and window is not None and len(trajectory.turns) > window + 1:
                raise ValueError(
                    f"window={window} hides steps that the thoughts of {type(expert).__name__} count, so the numbers "
                    "could not be learnt. Use window=None, which keeps all steps, or form='behaviour'."
                )
            own = replace(briefing, instructions=trajectory.reset_info.get("instructions", trajectory.instructions))
            if tokenizer is None:
                yield from _chat_row(trajectory, own) if context == "chat" else _window_rows(trajectory, own, window)
                continue
            chunk.append(LoggedEpisode(trajectory.return_, trajectory, own))
            if len(chunk) == CHUNK:
                yield from training_rows(chunk, tokenizer, chat_template_kwargs=chat_template_kwargs, **reading)
                chunk = []
        if chunk:
            yield from training_rows(chunk, tokenizer, chat_template_kwargs=chat_template_kwargs, **reading)

    return Dataset.from_list(list(rows())) if cache_dir is None else Dataset.from_generator(rows, cache_dir=cache_dir)


def _chat_row(trajectory: Trajectory, briefing: Briefing) -> Iterator[dict[str, Any]]:
    # Without what the environment says to the last reply: nothing follows it
    yield {"messages": chat_messages(trajectory, briefing)[:-1], "seed": trajectory.seed}


def _window_rows(trajectory: Trajectory, briefing: Briefing, window: int | None) -> Iterator[dict[str, Any]]:
    for step, (prompt, reply, _) in enumerate(window_messages(trajectory, briefing, window)):
        action = trajectory.turns[step].executed
        yield {"prompt": [prompt], "completion": [reply], "seed": trajectory.seed, "step": step, "action": action}
