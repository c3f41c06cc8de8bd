# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What a rollout says about itself: the `agents/*` metrics, as sums and counts that add up over processes."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

from ..types import InvalidReason, StopReason, Trajectory
from .faults import MAX_REWARD, Fault
from .progress import Clock


# Every process reports the same keys in the same order, whatever happened to its episodes.
EPISODE_METRICS = ("return", "regret", "coverage", "turns", "steps")
METRIC_NAMES = (
    *(f"agents/{name}_mean" for name in EPISODE_METRICS),
    "agents/return_square",
    "agents/invalid_share",
    *(f"agents/invalid_{reason.value}" for reason in InvalidReason),
    *(f"agents/stop_{reason.value}" for reason in StopReason),
    *(f"agents/fault_{fault.value}" for fault in Fault),
    "agents/retried_share",
    "agents/replaced_share",
    "agents/lost_share",
    "agents/forced_share",
    "agents/tokens_per_turn",
    "agents/env_seconds",
    "agents/env_wait_seconds",
    "agents/model_seconds",
    "agents/rollout_seconds",
)


def coverage(trajectory: Trajectory) -> float | None:
    """Share of the legal actions that were played at least once (section 4.2 of the paper); None if they change."""
    legal = trajectory.reset_info.get("legal_actions")
    if not legal or any(turn.info.get("legal_actions", legal) != legal for turn in trajectory.turns):
        return None
    return len({turn.executed for turn in trajectory.turns} & set(legal)) / len(legal)


def regret(trajectory: Trajectory) -> float | None:
    """Cumulative pseudo-regret: the sum of `info["regret"]`, None where the environment does not know it."""
    values = [turn.info["regret"] for turn in trajectory.turns if isinstance(turn.info.get("regret"), Real)]
    values = [value for value in values if abs(value) <= MAX_REWARD]  # nobody has checked them: nan, 10**400
    return sum(values) if values else None


def rollout_metrics(trajectories: Sequence[Trajectory], clock: Clock) -> list[tuple[float, float]]:
    """`(sum, count)` for each of [`METRIC_NAMES`]; a count of 0 means there was nothing to report."""
    healthy = [trajectory for trajectory in trajectories if not trajectory.stop.is_fault]
    turns = [turn for trajectory in healthy for turn in trajectory.turns]
    episode_values = {
        "return": [trajectory.return_ for trajectory in healthy],
        "regret": [value for trajectory in healthy if (value := regret(trajectory)) is not None],
        "coverage": [value for trajectory in healthy if (value := coverage(trajectory)) is not None],
        "turns": [len(trajectory.turns) for trajectory in healthy],
        "steps": [trajectory.steps for trajectory in healthy],
    }
    sums = {f"agents/{name}_mean": (sum(values), len(values)) for name, values in episode_values.items()}
    sums["agents/return_square"] = (sum(value**2 for value in episode_values["return"]), len(healthy))
    sums["agents/invalid_share"] = (sum(not turn.parsed.is_valid for turn in turns), len(turns))
    for reason in InvalidReason:
        count = sum(turn.parsed.reason is reason for turn in turns)
        sums[f"agents/invalid_{reason.value}"] = (count, len(turns))
    for stop in StopReason:
        sums[f"agents/stop_{stop.value}"] = (sum(t.stop is stop for t in trajectories), len(trajectories))
    faults = clock.faults
    for fault in Fault:
        sums[f"agents/fault_{fault.value}"] = (faults.kinds[fault], faults.calls)
    for name, number in (("retried", faults.retried), ("replaced", faults.replaced)):
        sums[f"agents/{name}_share"] = (number, len(trajectories))
    sums["agents/lost_share"] = (len(trajectories) - len(healthy), len(trajectories))
    sums["agents/forced_share"] = (sum(turn.forced for turn in turns), len(turns))
    sums["agents/tokens_per_turn"] = (sum(len(turn.action_ids) for turn in turns), len(turns))
    sums["agents/env_seconds"] = (clock.env, 1)
    sums["agents/env_wait_seconds"] = (clock.env_wait, 1)
    sums["agents/model_seconds"] = (clock.model, 1)
    sums["agents/rollout_seconds"] = (clock.wall, 1)
    return [(float(total), float(count)) for total, count in (sums[name] for name in METRIC_NAMES)]


def combine_metrics(sums: Sequence[Sequence[float]]) -> dict[str, float]:
    """Metrics by name from the summed `(sum, count)` pairs."""
    values = {name: total / count for name, (total, count) in zip(METRIC_NAMES, sums, strict=True) if count}
    square = values.pop("agents/return_square", None)
    if square is not None:
        values["agents/return_std"] = max(square - values["agents/return_mean"] ** 2, 0.0) ** 0.5
    return values
