# Licensed under the Apache License, Version 2.0 (see LICENSE).
r"""
The gap between knowing and doing: does a player that works out the right action play it? After [LLMs are Greedy
Agents](https://huggingface.co/papers/2504.16078), section 4.2 and appendix C.1.3.

The player is told to act by UCB and to write the values of all actions between `<ucb_values>` and `</ucb_values>`
first. They are recomputed from the history it read, its rewards as they were shown:

$$ \text{UCB}_t(a) = \hat{\mu}_a + \sqrt{2 \ln t / n_a}, \qquad \infty \text{ if untried} $$

- knowing: an action that is highest by what it wrote is highest indeed. Not the numbers are compared, only who leads;
  of equals any counts, untried actions all being equal. No block, or one without values, is wrong.
- doing: the action it plays is *optimal* (highest), *greedy* (highest among the tried ones, and not optimal) or
  *other*, as is a reply without an action.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..agents import UCBAgent
from ..contexts import last
from ..tables import interval
from ..types import Trajectory, Turn
from .greediness import best_of
from .histories import NotMeasurable, Transition, check_actions_stay, shown_reward
from .ucb_values import TAG, parse_ucb_values


TASK = (
    "Act by the UCB algorithm (upper confidence bound) this time. First write down how it works. Then work out the "
    "UCB value of every action that you can choose, roughly if need be, from what you have seen so far, and list all "
    f"of them between <{TAG}> and </{TAG}>: a line each in the form name: value, and inf for an action that was never "
    "tried. Choose by these values at last, and end with your choice in the form that was asked for. Your reply may "
    "be as long as this takes, whatever was said above about its length."
)

KNOWING = ("correct", "wrong")
DOING = ("optimal", "greedy", "other")


class WithUCBTask:
    """An environment whose instructions also ask for UCB values."""

    def __init__(self, env: Any, task: str = TASK):
        self.env, self.task = env, task

    @property
    def instructions(self) -> str:
        return f"{self.env.instructions}\n\n{self.task}"

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        if "instructions" in info:
            info = {**info, "instructions": f"{info['instructions']}\n\n{self.task}"}
        return observation, info

    def __getattr__(self, name: str) -> Any:
        if name == "env":
            raise AttributeError(name)
        return getattr(self.env, name)


@dataclass(frozen=True, slots=True)
class Judgement:
    """What one reply knew and did. `values` are the ones it wrote, None if no block could be read."""

    values: dict[str, float] | None
    correct: bool
    doing: str
    valid: bool


def judge(
    text: str,
    action: str | None,
    actions: Sequence[str],
    rewards: Sequence[float],
    legal_actions: Sequence[str],
    bonus: str = "ucb1",
) -> Judgement:
    """
    Compare one reply with the real UCB values.

    Args:
        text (`str`):
            The reply.
        action (`str`, *optional*):
            What it stated, None for an invalid one.
        actions, rewards (`Sequence`):
            The history that was read.
        legal_actions (`Sequence[str]`):
            What could be chosen.
        bonus (`str`, *optional*, defaults to `"ucb1"`):
            As for [`UCBAgent`].
    """
    agent = UCBAgent(bonus)
    agent.reset(legal_actions=list(legal_actions), seed=0)
    for played, reward in zip(actions, rewards, strict=True):
        agent.update(played, reward, {})
    scores = {name: agent.score(name) for name in legal_actions}
    optimal = best_of(scores)
    greedy = best_of({name: score for name, score in scores.items() if agent.pulls[name]})
    values = parse_ucb_values(text, legal_actions)
    doing = "optimal" if action in optimal else "greedy" if action in greedy else "other"
    return Judgement(values, bool(best_of(values or {}) & optimal), doing, action is not None)


def judge_episode(trajectory: Trajectory, window: int | None = None, bonus: str = "ucb1") -> list[Judgement]:
    """A judgement of each step; `window` is how many steps the player could look back on, None for all."""
    legal, judged = list(trajectory.reset_info["legal_actions"]), []
    actions: list[str] = []
    rewards: list[float] = []
    for turn, answer in zip(trajectory.turns, _answers(trajectory), strict=True):
        action = turn.parsed.action
        judged.append(judge(turn.text, action, last(actions, window), last(rewards, window), legal, bonus))
        if turn.executed is not None:
            step = Transition(turn.executed, turn.reward, answer, turn.info)
            actions.append(turn.executed)
            rewards.append(shown_reward(len(rewards), turn.observation, step))
    return judged


def _answers(trajectory: Trajectory) -> list[str]:
    following: list[Turn] = list(trajectory.turns[1:])
    return [*(turn.observation for turn in following), trajectory.final_observation]


def knowing_doing(
    player: Any,
    factory: Callable[[], Any],
    seeds: Sequence[int],
    *,
    max_new_tokens: int = 2048,
    temperature: float = 0.0,
    bonus: str = "ucb1",
    progress: bool = False,
    **limits: Any,
) -> tuple[dict[str, Any], list[Trajectory]]:
    """
    Let a player play by UCB, and compare what it knows with what it does.

    Args:
        player ([`ModelPlayer`] or [`TextPlayer`]):
            Who plays.
        factory (`Callable`):
            Makes the environment.
        seeds (`Sequence[int]`):
            One episode each.
        max_new_tokens (`int`, *optional*, defaults to `2048`):
            Token budget of one reply.
        temperature (`float`, *optional*, defaults to `0.0`):
            Sampling temperature, 0 for greedy decoding.
        bonus (`str`, *optional*, defaults to `"ucb1"`):
            The bonus of the real values, as for [`UCBAgent`].
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.
        **limits:
            `max_turns`, `env_timeout`, `env_reset_timeout`, as for [`~evaluation.play_model`].

    Returns:
        `tuple[dict, list[Trajectory]]`: as [`summarize_judgements`] says, and the episodes.

    Raises:
        `NotMeasurable`: for a player that writes no text, or an environment whose actions are unknown or change.
    """
    if not player.writes:
        raise NotMeasurable("a scripted player writes down no UCB values")
    check_actions_stay(factory, seeds[0])
    played = player.play(
        lambda: WithUCBTask(factory()),
        seeds,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        progress=progress,
        **limits,
    )
    window = None if player.context.appends else player.context.window
    judged = [judge_episode(trajectory, window, bonus) for trajectory in played if not trajectory.stop.is_fault]
    return summarize_judgements(judged), played


def summarize_judgements(episodes: Sequence[Sequence[Judgement]]) -> dict[str, Any]:
    """
    The figures of the protocol.

    Returns:
        `dict`: `joint`, knowing -> doing -> % of all steps; `conditional`, % of the steps of the same knowing (None
        without any); `joint_intervals`, mean over episodes and interval of each; `correct`, that of all correct ones;
        `n_steps`, and of these `missing_block` (no values could be read) and `invalid` (no action could).
    """
    episodes = [episode for episode in episodes if episode]
    if not episodes:
        raise NotMeasurable("no step was played")
    steps = [judgement for episode in episodes for judgement in episode]

    def shares(judgements: Sequence[Judgement], of: int) -> dict[str, dict[str, float]]:
        return {
            knowing: {
                doing: 100 * sum(j.correct is (knowing == "correct") and j.doing == doing for j in judgements) / of
                for doing in DOING
            }
            for knowing in KNOWING
        }

    joint = shares(steps, len(steps))
    by_episode = [shares(episode, len(episode)) for episode in episodes]
    conditional: Mapping[str, Any] = {
        knowing: {doing: 100 * value / total if (total := sum(row.values())) else None for doing, value in row.items()}
        for knowing, row in joint.items()
    }
    return {
        "joint": joint,
        "conditional": conditional,
        "joint_intervals": {
            knowing: {doing: asdict(interval([one[knowing][doing] for one in by_episode])) for doing in DOING}
            for knowing in KNOWING
        },
        "correct": asdict(interval([100 * np.mean([j.correct for j in episode]) for episode in episodes])),
        "n_steps": len(steps),
        "missing_block": sum(j.values is None for j in steps),
        "invalid": sum(not j.valid for j in steps),
    }
