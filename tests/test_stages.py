# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Stages are run once, with the settings they are asked for, and whole or again."""

import json

import pytest

from trl_agents.checkpoints import last_checkpoint
from trl_agents.stages import STAMP, Stages


def test_a_stage_is_run_once(tmp_path):
    made = []
    for _ in range(2):
        stages = Stages(tmp_path, seed=3, data=("gsm8k", {"n": 2}))
        assert stages.run("warmup", made.append, epochs=2) == tmp_path / "warmup"
    assert made == [tmp_path / "warmup"]
    assert json.loads((tmp_path / "warmup" / STAMP).read_text()) == {
        "seed": 3,
        "data": ["gsm8k", {"n": 2}],
        "epochs": 2,
    }


def test_an_interrupted_stage_is_run_again(tmp_path):
    def breaks(folder):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Stages(tmp_path).run("warmup", breaks)
    made = []
    Stages(tmp_path).run("warmup", made.append)
    assert len(made) == 1


@pytest.mark.parametrize(
    ("common", "own", "told"),
    [({"seed": 4}, {"epochs": 2}, "seed 3, now 4"), ({"seed": 3}, {"epochs": 5}, "epochs 2, now 5")],
)
def test_other_settings_are_told(tmp_path, common, own, told):
    Stages(tmp_path, seed=3).run("warmup", lambda folder: None, epochs=2)
    with pytest.raises(ValueError, match=f"{told}.*delete the folder"):
        Stages(tmp_path, **common).run("warmup", lambda folder: None, **own)


def test_a_stage_begun_with_other_settings_is_not_gone_on_with(tmp_path):
    def breaks(folder):
        (folder / "checkpoint-4").mkdir()
        (folder / "checkpoint-4" / "trainer_state.json").write_text("{}")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Stages(tmp_path).run("ppo", breaks, beta=0.1)
    with pytest.raises(ValueError, match="was begun with other settings \\(beta 0.1, now 0.2\\)"):
        Stages(tmp_path).run("ppo", lambda folder: None, beta=0.2)
    found = []
    Stages(tmp_path).run("ppo", lambda folder: found.append(last_checkpoint(folder)), beta=0.1)
    assert found == [str(tmp_path / "ppo" / "checkpoint-4")]


def test_the_latest_checkpoint(tmp_path):
    assert last_checkpoint(tmp_path / "none") is None and last_checkpoint(tmp_path) is None
    for step in (9, 10, 11):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if step != 11:  # which was being written when the run was interrupted
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
