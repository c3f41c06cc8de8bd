# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The benchmark of rollouts: it measures the same work in all systems, and ours is as fast as promised."""

import json
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent / "benchmarks")  # as when it is run as a command
    monkeypatch.delitem(sys.modules, "rollout_speed", raising=False)
    import rollout_speed

    return rollout_speed


def test_same_work_in_all_systems(benchmark, tmp_path, capsys):
    result = benchmark.main(
        f"--turns 2 4 --episodes 3 --hidden_size 64 --layers 1 --repeats 1 --output_dir {tmp_path}".split()
    )
    for case, runs in result["measured"].items():
        (trl,), (ours,), (floor,) = (runs[name] for name in ("trl", "ours", "floor"))
        assert trl.sampled == ours.sampled == floor.sampled == case.turns * case.episodes * case.tokens
        assert len(ours.rows) == case.episodes and ours.rows == trl.rows
        prompt_length = len(floor.rows[0]) - case.turns * case.tokens
        assert floor.rows[0][:prompt_length] == ours.rows[0][:prompt_length]  # the same first prompt
    written = json.loads((tmp_path / "rollout_speed.json").read_text())
    assert [line["turns"] for line in written["lines"]] == [2, 4]
    assert all(line["seconds"][name] > 0 for line in written["lines"] for name in ("trl", "ours", "floor"))
    assert (tmp_path / "rollout_speed.png").read_bytes().startswith(b"\x89PNG")
    assert "trl/ours" in capsys.readouterr().out


def test_a_reply_too_short_for_the_call(benchmark, tmp_path):
    with pytest.raises(ValueError, match="--tokens 5 is too short"):
        benchmark.main(f"--tokens 5 --hidden_size 64 --layers 1 --output_dir {tmp_path}".split())


@pytest.mark.long  # its ratios need a machine that does nothing else
@pytest.mark.slow
def test_four_times_trl_and_flat(benchmark, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two that have to share a core would measure the sharing
    try:
        result = benchmark.main(f"--turns 5 40 --output_dir {tmp_path}".split())
    finally:
        torch.set_num_threads(threads)
    assert result["lines"][-1]["trl_over_ours"] >= 4
    assert result["growth"]["ours"] <= 1.4
