# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""`trl-agents play`: a person at the terminal plays an episode, or watches a player."""

from __future__ import annotations

import argparse
import random
import warnings
from typing import Any

from ..actions import ActionParser
from ..types import InvalidReason, ParsedAction, StopReason, Trajectory, Turn
from ..viewer import episode_record, write_records
from .model_arguments import add_model_arguments, settle
from .named import add_env_kwargs, close_to, make_named_env, not_negative, writable_file
from .players import name_player, play_named, shows_progress


HELP = "play an environment yourself, or watch a player"
DESCRIPTION = (
    "Play one episode of an environment at the terminal. You read what a model would read, and answer with an\n"
    "action. With --player, a scripted player or a model plays, and you read the episode."
)
EXAMPLES = """\
examples:
  trl-agents play trl_agents/Bandit-v0
  trl-agents play trl_agents/TicTacToe-v0 --env_kwargs '{"opponent": "optimal", "board": "grid"}' --seed 3
  trl-agents play trl_agents/Bandit-v0 --player ucb --seed 3
  trl-agents play my_module:MyEnvironment
  trl-agents play trl_agents/Bandit-v0 --player outputs/grpo_bandit_tiny

While playing, `?` shows the instructions again and `quit` (or Ctrl-D, or Ctrl-C) leaves.
"""
LEAVING = ("quit", "exit", "q")  # in any case; a legal action of that name comes first


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("env", metavar="ENV", help="an id such as trl_agents/Bandit-v0, or MODULE:CLASS")
    parser.add_argument("--player", help="who plays in your place: a scripted player, a model's folder or Hub id")
    parser.add_argument(
        "--seed", type=not_negative, help="of the episode: the same seed, the same luck (default: any)"
    )
    add_env_kwargs(parser)
    parser.add_argument("--save", metavar="FILE", help="write the episode there (.jsonl), for `trl-agents view`")
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if args.seed is None:
        args.seed = random.SystemRandom().randrange(1_000_000)
    if args.save:  # an episode that a person has played is not to be lost
        writable_file(args.save)
    player = name_player(args.player) if args.player else None
    how = settle(args, [] if player is None else [player])
    env = make_named_env(how.env_id, how.env_kwargs)
    try:
        if player is not None:
            trajectory, whole = play_named(player, how, args, [args.seed], shows_progress(args))[0], True
            print(f"{trajectory.instructions}\n\n{trajectory}\n")
        else:
            trajectory, whole = play_yourself(env, args.seed, how.max_turns)
    finally:
        env.close()
    name = args.player or "you"
    if trajectory.stop.is_fault:
        warnings.warn(f"The environment failed: {trajectory.error}", stacklevel=2)
    print(_summary(trajectory, whole, args.seed))
    if args.save:
        record = episode_record(trajectory, player=name, env_id=how.env_id, env_kwargs=how.env_kwargs)
        print(f"Saved to {write_records(args.save, [record])}")
    return 0


def play_yourself(env: Any, seed: int, max_turns: int | None = None) -> tuple[Trajectory, bool]:
    """
    Let the person at the terminal play an episode, of at most `max_turns`.

    Returns:
        The [`Trajectory`], and whether the episode was played to its end.
    """
    observation, info = env.reset(seed=seed)
    reset_info, turns = info, []
    instructions = info.get("instructions", env.instructions)
    print(f"{instructions}\n\n(?: read this again. quit: leave.)")
    stop = None
    while stop is None:
        print(f"\n{observation}" if observation else "")
        written, action = _ask(info.get("legal_actions"), instructions)
        if action is None:
            break
        played, read = action, observation
        observation, reward, terminated, truncated, info = env.step(action)
        turns.append(Turn(read, (), (), written, ParsedAction(action), played, float(reward), info=info))
        stop = StopReason.TERMINATED if terminated else StopReason.TRUNCATED if truncated else None
        if stop is None and len(turns) == max_turns:
            stop = StopReason.MAX_TURNS
    if stop is not None and observation:
        print(f"\n{observation}")
    # An episode that was left has no end of the environment's own: we limited its turns
    ended = stop or StopReason.MAX_TURNS
    trajectory = Trajectory(seed, tuple(turns), ended, instructions, observation, reset_info=reset_info)
    return trajectory, stop is not None


def _ask(legal_actions: list[str] | None, instructions: str) -> tuple[str, str | None]:
    """What the person wrote, and the action that it is; None to leave."""
    if legal_actions:
        print(f"Legal actions: {', '.join(legal_actions)}")
    while True:
        try:
            written = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return "", None
        action = read_action(written, legal_actions)
        if action is not None:
            return written, action
        if written.lower() in LEAVING:
            return written, None
        if written == "?":
            print(instructions)
        elif written:
            print(f"{written!r} is no legal action.{close_to(written, legal_actions or ())}", end=" ")
            print(
                f"Write one of: {', '.join(legal_actions or ())}" if legal_actions else "Write ACTION=X, or X alone."
            )


def read_action(written: str, legal_actions: list[str] | None) -> str | None:
    """The action that a person wrote: alone, in any case, or as a model would state it (`ACTION=X`)."""
    if legal_actions is None:
        if written.lower() in ("", "?", *LEAVING):
            return None
        stated = ActionParser().parse(written)
        return stated.action if stated.is_valid else written
    if written in legal_actions:
        return written
    folded = [action for action in legal_actions if action.casefold() == written.casefold()]
    if len(folded) == 1:
        return folded[0]
    stated = ActionParser().parse(written, legal_actions)
    return stated.action if stated.reason is not InvalidReason.NO_MATCH else None


def _summary(trajectory: Trajectory, whole: bool, seed: int) -> str:
    regrets = [turn.info["regret"] for turn in trajectory.turns if "regret" in turn.info]
    steps = f"{trajectory.steps} step{'' if trajectory.steps == 1 else 's'}"
    when = f"in {steps}" if whole else f"so far, left after {steps}"
    regret = f", regret {sum(regrets):.2f} (the best action at every step: 0)" if regrets else ""
    outcome = trajectory.turns[-1].info.get("outcome") if trajectory.turns else None
    return f"Return {trajectory.return_:.2f} {when}{regret}{f', {outcome}' if outcome else ''}. Seed {seed}."
