# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The `agents/*` metrics, worked by hand."""

import math
from dataclasses import replace

import pytest

from trl_agents.rollout.faults import Fault, FaultCounts
from trl_agents.rollout.metrics import METRIC_NAMES, combine_metrics, coverage, regret, rollout_metrics
from trl_agents.rollout.progress import Clock
from trl_agents.types import InvalidReason, ParsedAction, StopReason, Trajectory, Turn


LEGAL = ["red", "green", "blue", "pink"]


def turn(executed, reward=0.0, n_tokens=1, invalid=None, **info):
    parsed = ParsedAction(executed) if invalid is None else ParsedAction(None, invalid)
    penalty = 0.0 if invalid is None else -5.0
    return Turn("", (1,), (7,) * n_tokens, "", parsed, executed, reward, penalty, info=info)


def episode(*turns, stop=StopReason.TERMINATED, legal=LEGAL):
    return Trajectory(seed=0, turns=turns, stop=stop, reset_info={"legal_actions": legal} if legal else {})


TRAJECTORIES = [
    # Return 2, regret .75, coverage 2/4
    episode(
        turn("red", 1.0, 3, regret=0.5, legal_actions=LEGAL),
        turn("blue", 0.0, 2, regret=0.25, legal_actions=LEGAL),
        replace(turn("red", 1.0, 1, regret=0.0, legal_actions=LEGAL), forced=True),
    ),
    # Return -1, no regret known, coverage 1/4; asked again once
    episode(
        turn(None, 0.0, 4, InvalidReason.NO_MATCH),
        turn("pink", -1.0, 2, InvalidReason.ILLEGAL),
        stop=StopReason.MAX_TURNS,
    ),
    # Return 5, its legal actions change, so no coverage; regret 1
    episode(
        turn("red", 5.0, 6, InvalidReason.CUT_OFF, regret=1.0, legal_actions=["blue"]), stop=StopReason.CONTEXT_FULL
    ),
    # Faults count as such and as nothing else
    episode(turn("red", 1000.0, 1000, regret=1000.0), stop=StopReason.ENV_ERROR),
    episode(turn("red", 1000.0, 1000, InvalidReason.ILLEGAL), stop=StopReason.ENV_TIMEOUT),
]
FAULTS = FaultCounts(calls=20, retried=3, replaced=2)
NONE = FaultCounts()
FAULTS.kinds.update({Fault.CRASH: 5, Fault.TIMEOUT: 4})
CLOCK = Clock(wall=9.0, model=4.0, env=6.0, env_wait=3.0, faults=FAULTS)


def test_numbers_by_hand():
    metrics = combine_metrics(rollout_metrics(TRAJECTORIES, CLOCK))
    assert metrics == pytest.approx(
        {
            "agents/return_mean": (2 - 1 + 5) / 3,
            "agents/return_std": math.sqrt(((2 - 2) ** 2 + (-1 - 2) ** 2 + (5 - 2) ** 2) / 3),
            "agents/regret_mean": (0.75 + 1.0) / 2,
            "agents/coverage_mean": (2 / 4 + 1 / 4) / 2,
            "agents/turns_mean": (3 + 2 + 1) / 3,
            "agents/steps_mean": (3 + 1 + 1) / 3,
            "agents/invalid_share": 3 / 6,
            "agents/invalid_no_match": 1 / 6,
            "agents/invalid_illegal": 1 / 6,
            "agents/invalid_cut_off": 1 / 6,
            "agents/stop_terminated": 1 / 5,
            "agents/stop_truncated": 0.0,
            "agents/stop_max_turns": 1 / 5,
            "agents/stop_context_full": 1 / 5,
            "agents/stop_invalid_action": 0.0,
            "agents/stop_env_error": 1 / 5,
            "agents/stop_env_timeout": 1 / 5,
            "agents/fault_make": 0.0,
            "agents/fault_crash": 5 / 20,
            "agents/fault_malformed": 0.0,
            "agents/fault_timeout": 4 / 20,
            "agents/retried_share": 3 / 5,
            "agents/replaced_share": 2 / 5,
            "agents/lost_share": 2 / 5,
            "agents/forced_share": 1 / 6,
            "agents/tokens_per_turn": (3 + 2 + 1 + 4 + 2 + 6) / 6,
            "agents/env_seconds": 6.0,
            "agents/env_wait_seconds": 3.0,
            "agents/model_seconds": 4.0,
            "agents/rollout_seconds": 9.0,
        }
    )


@pytest.mark.parametrize("cut", [0, 1, 2, 4, 5])
def test_processes_add_up(cut):
    """Sums over two processes give the metrics of one, also where one of them has nothing to report."""
    parts = [
        rollout_metrics(TRAJECTORIES[:cut], CLOCK),
        rollout_metrics(TRAJECTORIES[cut:], replace(CLOCK, faults=NONE)),
    ]
    assert [len(part) for part in parts] == [len(METRIC_NAMES)] * 2
    summed = [[a + b for a, b in zip(*pairs, strict=True)] for pairs in zip(*parts, strict=True)]
    assert combine_metrics(summed) == pytest.approx(combine_metrics(rollout_metrics(TRAJECTORIES, CLOCK)))


def test_nothing_healthy():
    metrics = combine_metrics(rollout_metrics(TRAJECTORIES[3:], CLOCK))
    assert metrics["agents/stop_env_error"] == 0.5
    assert not any(name.startswith(("agents/return", "agents/invalid", "agents/tokens")) for name in metrics)
    assert combine_metrics(rollout_metrics([], Clock())) == {
        f"agents/{name}_seconds": 0.0 for name in ("env", "env_wait", "model", "rollout")
    }


def test_equal_returns_deviate_by_nothing():
    """Rounding could make the variance a negative number."""
    metrics = combine_metrics(rollout_metrics([episode(turn("red", 0.1))] * 7, Clock()))
    assert metrics["agents/return_std"] == pytest.approx(0.0, abs=1e-7)


def test_every_reason_has_a_name():
    assert len(set(METRIC_NAMES)) == len(METRIC_NAMES)
    for reason in InvalidReason:
        assert f"agents/invalid_{reason.value}" in METRIC_NAMES
    for stop in StopReason:
        assert f"agents/stop_{stop.value}" in METRIC_NAMES


class TestCoverage:
    def test_actions_count_once(self):
        assert coverage(episode(turn("red"), turn("red"), turn("blue"))) == 0.5

    def test_what_is_not_legal_does_not_count(self):
        assert coverage(episode(turn("mauve"), turn(None))) == 0.0

    def test_unknown(self):
        assert coverage(episode(turn("red"), legal=None)) is None
        assert coverage(episode(turn("red", legal_actions=[]))) is None  # the board is full


class TestRegret:
    def test_it_is_a_sum(self):
        assert regret(episode(turn("red", regret=0.5), turn(None), turn("blue", regret=0))) == 0.5

    def test_unknown(self):
        assert regret(episode(turn("red"))) is None
        assert regret(episode(turn("red", regret=None))) is None
        assert regret(episode()) is None
