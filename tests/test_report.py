# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What a recipe of stages ends with: figures that JSON holds, a picture, cards that show the latest result."""

import json
from types import SimpleNamespace

import pytest

from trl_agents.plots import plot_accuracy, plot_measures
from trl_agents.report import add_results, report_players, report_stages
from trl_agents.tables import Interval
from trl_agents.types import ParsedAction, StopReason, Trajectory, Turn


TABLE = {
    "greedy": {"warmup": Interval(0.5, 0.4, 0.6), "reft": Interval(0.75, 0.7, 0.8)},
    "vote@4": {"reft": Interval(0.8, 0.75, 0.85)},
}


@pytest.fixture
def folders(tmp_path):
    """A model with a card, and one without."""
    for name in ("carded", "bare"):
        (tmp_path / name).mkdir()
    (tmp_path / "carded" / "README.md").write_text("---\nlibrary_name: x\n---\n# Model\n\nTrained.\n")
    return [tmp_path / "carded", tmp_path / "bare"]


@pytest.mark.parametrize(("shares", "picture"), [(True, "accuracy.png"), (False, "measures.png")])
def test_table_picture_and_cards(tmp_path, folders, capsys, shares, picture):
    out = tmp_path / "out"
    report_stages(out, TABLE, "9 questions", folders=folders, shares=shares, more={"curves": {"kl": [0.5]}})
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["curves"] == {"kl": [0.5]}
    assert metrics["greedy"]["reft"] == {"mean": 0.75, "low": 0.7, "high": 0.8} and "warmup" not in metrics["vote@4"]
    assert (out / picture).read_bytes().startswith(b"\x89PNG") and (out / picture).stat().st_size > 10_000
    assert "| reft | 0.75 [0.70, 0.80] | 0.80 [0.75, 0.85] |" in capsys.readouterr().out
    card = (folders[0] / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: x\n---\n# Model\n\nTrained.\n\n## Results\n\n9 questions, mean [95%")
    assert "| reft | 0.75" in card and f"]({picture})" in card and (folders[0] / picture).exists()
    assert list(folders[1].iterdir()) == []


def test_only_the_latest_results_stay(folders):
    for text in ("first", "second"):
        add_results(folders[0], text)
    card = (folders[0] / "README.md").read_text()
    assert card.count("## Results") == 1 and "second" in card and "first" not in card and "Trained." in card


def test_another_process_writes_nothing(tmp_path, folders, monkeypatch, capsys):
    monkeypatch.setattr("trl_agents.report.PartialState", lambda: type("State", (), {"is_main_process": False}))
    report_stages(tmp_path / "out", TABLE, "9 questions", folders=folders)
    assert not (tmp_path / "out").exists() and capsys.readouterr().out == ""
    assert "Results" not in (folders[0] / "README.md").read_text()


class Trainer:
    """What a report asks of a trainer."""

    def __init__(self, folder, logged):
        self.args, self.state = SimpleNamespace(output_dir=str(folder)), SimpleNamespace(log_history=[logged])

    def is_world_process_zero(self):
        return True

    def create_model_card(self):
        self.card = self.card_results


@pytest.mark.parametrize(
    ("told", "picture", "other"),
    [({"regret": 0.5}, "regret.png", "returns.png"), ({}, "returns.png", "regret.png")],
)
def test_players_are_reported_whether_or_not_regret_is_told(tmp_path, monkeypatch, capsys, told, picture, other):
    """An environment of one's own tells none: the report died after the training, of `table["regret"]`."""
    turn = Turn("", (), (), "", ParsedAction("red"), "red", 1.0, info=told)
    episode = Trajectory(seed=0, turns=(turn,) * 3, stop=StopReason.TERMINATED, reset_info={"legal_actions": ["red"]})
    drawn = []
    monkeypatch.setattr("trl_agents.report.plot_learning_curve", lambda *_, references: drawn.append(references))
    trainer = Trainer(tmp_path, {"step": 1})
    report_players(trainer, {player: [episode] * 4 for player in ("random", "before", "after")}, "a game")
    assert (tmp_path / picture).stat().st_size > 10_000 and not (tmp_path / other).exists()
    assert f"]({picture})" in trainer.card and other not in trainer.card and "| after | 3.00" in trainer.card
    assert {name: value.mean for name, value in drawn[0].items()} == {"random": 1.5 if told else 3.0}
    said = capsys.readouterr().out
    assert "| after | 3.00" in said and f"Written to {tmp_path}: episodes_after.txt, episodes_before.txt" in said


@pytest.mark.parametrize(
    ("plot", "values", "ends"),
    [
        (plot_measures, [(0, 0, 0), (0, 0, 0)], (0, 1)),  # the axis went from -0.06 to 0.06
        (plot_accuracy, [(0, 0, 0), (0, 0, 0)], (0, 1)),
        (plot_measures, [(0.5, 0, 0.9), (0, 0, 0)], (0, None)),
        (plot_measures, [(-0.5, -0.6, 0.1), (0.2, 0.1, 0.3)], (None, None)),
    ],
)
def test_an_axis_begins_at_zero_where_nothing_is_below(tmp_path, monkeypatch, plot, values, ends):
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure.axes[0]))
    plot({"invalid_rate": {name: Interval(*value) for name, value in zip("ab", values, strict=True)}}, tmp_path / "x")
    bottom, top = drawn[0].get_ylim()
    assert bottom == ends[0] if ends[0] is not None else bottom < -0.6
    assert top == ends[1] if ends[1] is not None else max(value[2] for value in values) < top < 1.5
