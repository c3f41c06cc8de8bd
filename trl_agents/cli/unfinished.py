# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What an evaluation that was interrupted leaves behind: the episodes of the players that were done."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..page import write_text
from ..types import InvalidReason, ParsedAction, StopReason, Trajectory, Turn
from ..viewer import storable
from .players import NamedPlayer


TOLD = ("legal_actions", "regret", "optimal", "transition", "outcome")  # what measures and pages read of `info`


class Unfinished:
    """
    A folder `_unfinished` beside the results, with a file for each player that is done. It is deleted when the
    evaluation is whole: a finished one is measured anew when it is asked for again, with a model trained on since.

    Args:
        folder (`Path`):
            The output folder.
        settings (`Mapping`):
            All that the episodes depend on, but for the player. What other settings left behind is not used.
        models (`Mapping`):
            By label, how a model plays.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], models: Mapping[str, Any]):
        self.path = folder / "_unfinished"
        self.settings, self.models = json.loads(json.dumps([settings, models], default=str))

    def done(self, player: NamedPlayer) -> list[Trajectory] | None:
        """The player's episodes, if they were played with the same settings by the same player."""
        try:
            found = json.loads(self._file(player).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(found, dict) or found.get("made_with") != self._made_with(player):
            return None
        return [_read(episode) for episode in found["episodes"]]

    def keep(self, player: NamedPlayer, trajectories: Sequence[Trajectory]) -> None:
        made = {"made_with": self._made_with(player), "episodes": [_stored(one) for one in trajectories]}
        write_text(self._file(player), json.dumps(made))

    def delete(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def _made_with(self, player: NamedPlayer) -> dict[str, Any]:
        folder = Path(player.source).expanduser()
        # A model that was trained on in the meantime has other files
        files = [] if player.is_scripted or not folder.is_dir() else sorted(p for p in folder.iterdir() if p.is_file())
        seen = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
        settings = {**self.settings, "plays": self.models.get(player.label)}
        return {"settings": settings, "label": player.label, "source": player.source, "files": seen}

    def _file(self, player: NamedPlayer) -> Path:
        return self.path / f"{hashlib.sha256(player.label.encode()).hexdigest()[:16]}.json"


def _told(info: Mapping[str, Any]) -> dict[str, Any]:
    return {name: info[name] for name in TOLD if name in info}


def _stored(trajectory: Trajectory) -> dict[str, Any]:
    turns = tuple(replace(turn, input_ids=(), logprobs=None, info=_told(turn.info)) for turn in trajectory.turns)
    return storable(asdict(replace(trajectory, turns=turns, final_ids=(), reset_info=_told(trajectory.reset_info))))


def _read(stored: Mapping[str, Any]) -> Trajectory:
    turns = []
    for turn in stored["turns"]:
        reason = turn["parsed"]["reason"]
        parsed = ParsedAction(**{**turn["parsed"], "reason": reason and InvalidReason(reason)})
        as_tuples = {name: tuple(turn[name]) for name in ("input_ids", "action_ids", "drafts")}
        turns.append(Turn(**{**turn, **as_tuples, "parsed": parsed}))
    return Trajectory(**{**stored, "turns": tuple(turns), "final_ids": (), "stop": StopReason(stored["stop"])})
