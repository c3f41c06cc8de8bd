# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The benchmark of optimisation steps: all systems train the same tokens of the same rows."""

import json
import sys
from pathlib import Path

import pytest
import torch


TINY = "--hidden_size 64 --layers 1 --vocab_size 2048 --turns 3 --tokens 20 --repeats 1 --memory_episodes 2 4"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent / "benchmarks")  # as when it is run as a command
    for name in ("train_speed", "train_systems", "rollout_systems"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import train_speed

    return train_speed


def batches_of(system, work, monkeypatch):
    """What the trainer computes its loss of during a step."""
    batches, compute_loss = [], system.trainer.compute_loss

    def note(model, inputs, *args, **kwargs):
        batches.append(dict(inputs))
        return compute_loss(model, inputs, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(system.trainer, "compute_loss", note)
        seconds = system.step(work)
    return batches, seconds


def rows_of(batch):
    """Each row that trains something: its tokens, and which of them it trains."""
    if "labels" in batch:
        ids, kept, trained = batch["input_ids"], batch["attention_mask"], batch["labels"] != -100
    else:
        ids, kept = (torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], 1) for x in ("ids", "mask"))
        sampled = batch["completion_mask"] * batch["tool_mask"]
        trained = torch.cat([torch.zeros_like(batch["prompt_mask"]), sampled], 1).bool()
    return [
        (row[mask].tolist(), labels[mask].tolist())
        for row, mask, labels in zip(ids, kept.bool(), trained, strict=True)
        if labels.any()
    ]


def test_same_tokens_in_all_systems(benchmark, tmp_path, monkeypatch):
    bench = benchmark.Workbench(benchmark.make_parser().parse_args(TINY.split()), str(tmp_path))
    systems = {name: make(bench) for name, make in benchmark.SYSTEMS.items()}
    for context, varied in (("chat", False), ("window", True)):
        work = bench.work(benchmark.Case(3, 4, 20, context, varied), 2)
        turns = [turn for trajectory in work.trajectories for turn in trajectory.turns]
        assert len(turns) == (12 if not varied else sum(work.case.lengths[number // 2] for number in range(4)))
        found = {}
        for name, system in systems.items():
            batches, seconds = batches_of(system, work, monkeypatch)
            assert len(batches) == 2 and seconds["updating"] > 0
            assert (seconds["scoring"] > 0) == (name == "ppo") and (seconds["building"] > 0) == (name != "sft")
            found[name] = sorted(row for batch in batches for row in rows_of(batch))
        assert found["sft"] == found["grpo"] == found["ppo"]
        assert len(found["sft"]) == (4 if context == "chat" else len(turns))
        assert sum(sum(trained) for _, trained in found["sft"]) == sum(len(turn.action_ids) for turn in turns)
    assert len({len(ids) for ids, _ in found["sft"]}) > 1  # so that there is padding


def test_the_command(benchmark, tmp_path, capsys):
    benchmark.main(f"{TINY} --episodes 4 --batches 2 --as_on_gpu --output_dir {tmp_path}".split())
    written = json.loads((tmp_path / "train_speed.json").read_text())
    cases = ["chat, 3 turns", "chat, 1 to 3 turns", "window, 3 turns", "window, 1 to 3 turns"]
    assert [line["case"] for line in written["lines"]] == cases
    for line in written["lines"]:
        assert line["step_over_sft"]["sft"] == 1 and 0 < line["update_over_sft"]["ppo"] <= line["step_over_sft"]["ppo"]
        assert line["sampled_per_second"]["grpo"] == pytest.approx(line["sampled"] / line["seconds"]["grpo"])
    chat, window = written["lines"][0], written["lines"][2]
    assert chat["sampled"] == window["sampled"] and chat["tokens"] < window["tokens"]
    assert [(line["case"], line["episodes"]) for line in written["memory"]] == [
        (case, episodes) for case in (cases[0], cases[2]) for episodes in (2, 4)
    ]
    for few, many in zip(written["memory"][::2], written["memory"][1::2], strict=True):
        assert all(few["bytes"][name] < many["bytes"][name] for name in ("sft", "grpo", "ppo"))
    assert (tmp_path / "train_speed.png").read_bytes().startswith(b"\x89PNG")
    assert "step/SFT" in capsys.readouterr().out


def test_batches_that_tear_groups_apart(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(f"{TINY} --episodes 6 --batches 2".split())
    assert "multiples of 2" in capsys.readouterr().err


def test_a_vocabulary_too_small(benchmark, tmp_path):
    with pytest.raises(ValueError, match="--vocab_size 50 is too small"):
        benchmark.main(f"--vocab_size 50 --output_dir {tmp_path}".split())
