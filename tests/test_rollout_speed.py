# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The benchmark of rollouts: it measures the same work in all systems, and ours is as fast as promised."""

import json
import sys
from pathlib import Path

import pytest


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent / "benchmarks")  # as when it is run as a command
    for name in ("rollout_speed", "rollout_systems"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import rollout_speed

    return rollout_speed


def run(benchmark, tmp_path, options):
    return benchmark.main(f"--hidden_size 64 --layers 1 --repeats 1 --output_dir {tmp_path} {options}".split())


def test_same_work_in_all_systems(benchmark, tmp_path, capsys):
    result = run(benchmark, tmp_path, "--turns 2 4 --episodes 3 --delays 0 10")
    for case, runs in result["measured"].items():
        (trl,), (lockstep,), (ours,), (floor,) = (runs[name] for name in ("trl", "lockstep", "ours", "floor"))
        assert trl.sampled == ours.sampled == floor.sampled == case.turns * case.episodes * case.tokens
        assert len(ours.rows) == case.episodes and ours.rows == trl.rows == lockstep.rows
        prompt_length = len(floor.rows[0]) - case.turns * case.tokens
        assert floor.rows[0][:prompt_length] == ours.rows[0][:prompt_length]  # the same first prompt
        lengths = [length for row in ours.rows for length in range(len(row))]
        assert len(ours.rows[0]) * ours.sampled / 2 < ours.attended < sum(lengths)
    written = json.loads((tmp_path / "rollout_speed.json").read_text())
    assert [(line["turns"], line["delay"]) for line in written["lines"]] == [(2, 0), (4, 0), (2, 0.01), (4, 0.01)]
    assert all(line["seconds"][name] > 0 for line in written["lines"] for name in ("trl", "ours", "floor"))
    assert all(line["ratios"]["ours/limit"] > 1 for line in written["lines"])
    assert written["lines"][3]["seconds_of_delay"].keys() == {"trl", "lockstep", "ours", "floor"}
    assert (tmp_path / "rollout_speed.png").read_bytes().startswith(b"\x89PNG")
    assert "trl/ours" in capsys.readouterr().out


def test_windows_and_lengths_that_vary(benchmark, tmp_path, capsys):
    result = run(benchmark, tmp_path, "--turns 3 --episodes 2 --contexts chat window --lengths varied")
    for case, runs in result["measured"].items():
        assert runs.keys() == {"lockstep", "ours", "floor"}  # TRL's loop knows neither
        assert [run[0].rows == runs["ours"][0].rows for run in runs.values()] == [True, True, False]
        assert len(set(case.lengths)) > 1 and len(case.lengths) == 2 * benchmark.VARIED_ROUNDS
        assert runs["ours"][0].sampled == sum(case.lengths) * case.tokens
    assert "1-3" in capsys.readouterr().out


def test_replies_that_vary(benchmark, tmp_path):
    options = "--turns 3 --episodes 4 --tokens 24 --contexts window --lengths ragged --systems lockstep ours"
    ((_, runs),) = run(benchmark, tmp_path, options)["measured"].items()
    (lockstep,), (ours,) = runs["lockstep"], runs["ours"]
    assert ours.rows == lockstep.rows  # whoever waits for whom
    lengths = [len(reply) for row in ours.rows for _, reply in row]
    assert min(lengths) == 18 and max(lengths) == 30 and abs(sum(lengths) / len(lengths) - 24) < 1.5


def test_a_place_that_is_refilled_saves_passes(benchmark, tmp_path):
    """So much can be won where a pass costs the same for all rows as for some."""
    options = "--turns 6 --tokens 24 --lengths varied ragged --systems lockstep ours"
    varied, ragged = (line["passes"] for line in run(benchmark, tmp_path, options)["lines"])
    assert varied["lockstep"] >= 1.4 * varied["ours"] and ragged["lockstep"] >= 1.6 * ragged["ours"]


def test_replies_that_go_on_after_their_action(benchmark, tmp_path):
    result = run(benchmark, tmp_path, "--turns 2 --episodes 2 --tokens 40 --after 20 --systems ours stop")
    ((ours,), (stop,)) = next(iter(result["measured"].values())).values()
    assert ours.sampled == 2 * 2 * 40 and 2 * 2 * 10 < stop.sampled < 2 * 2 * 20


def test_a_reply_too_short_for_the_call(benchmark, tmp_path):
    with pytest.raises(ValueError, match="--tokens 5 is too short"):
        run(benchmark, tmp_path, "--tokens 5")


@pytest.mark.long  # its ratios need a machine that does nothing else
@pytest.mark.slow
def test_what_is_promised(benchmark, tmp_path):
    result = benchmark.main(f"--turns 5 50 --output_dir {tmp_path / 'fixed'}".split())
    short, long = result["lines"]
    assert short["ratios"]["trl/ours"] >= 1.2 and long["ratios"]["trl/ours"] >= 8
    assert long["ratios"]["ours/floor"] <= 1.25
    assert result["growth"]["ours"] <= 1.25
    # With replies of one length 1.1 to 1.5: on a CPU a pass costs by its rows, so lockstep's idle ones cost little
    ragged = f"--turns 50 --tokens 40 --lengths ragged --systems lockstep ours --output_dir {tmp_path / 'ragged'}"
    assert benchmark.main(ragged.split())["lines"][0]["ratios"]["lockstep/ours"] >= 1.5
    slow = f"--turns 6 --delays 0 100 --systems ours --output_dir {tmp_path / 'slow'}"
    assert benchmark.main(slow.split())["lines"][1]["seconds_of_delay"]["ours"] < 0.8
