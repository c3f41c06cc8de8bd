# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""A diagnosis on disk: what is finished is whole, and what other settings measured is not mixed in."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..tables import MEASURES, interval
from ..types import Trajectory
from ..viewer import episode_record, read_records, write_records
from .plots import plot_coverage, plot_frequency_bias, plot_knowing_doing


RESULT, EPISODES = "diagnostics.json", "episodes.jsonl"
PICTURES = {
    "greediness": ("coverage.png", plot_coverage),
    "frequency_bias": ("frequency_bias.png", plot_frequency_bias),
    "knowing_doing": ("knowing_doing.png", plot_knowing_doing),
}


class Folder:
    """
    The folder of a diagnosis. Every file is whole or not there, and `diagnostics.json` tells only of what is.

    Args:
        path (`Path`):
            The folder; it is made.
        player (`str`):
            What the player is called.
        env (`Mapping`):
            `id` and `kwargs` of the environment.
        settings (`Mapping`):
            All else that the figures depend on.

    Raises:
        `ValueError`: if the folder holds a diagnosis with other settings.
    """

    def __init__(self, path: Path, player: str, env: Mapping[str, Any], settings: Mapping[str, Any]):
        self.path = path
        asked = _plain({"player": player, "env": env, "settings": settings})
        self.result: dict[str, Any] = {**asked, "parts": {}, "invalid_rate": {}, "skipped": {}}
        path.mkdir(parents=True, exist_ok=True)
        if not (path / RESULT).exists():
            return
        try:
            found = json.loads((path / RESULT).read_text(encoding="utf-8"))
            before = {key: found[key] for key in asked}
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path / RESULT} is no diagnosis ({error}): use another output_dir.") from error
        if before != asked:
            raise ValueError(
                f"{str(path)!r} holds a diagnosis with other settings ({_differences(before, asked)}): use another "
                "output_dir, or delete the folder."
            )
        self.result = {**self.result, **found}

    def save(
        self,
        part: str,
        measured: Mapping[str, Any],
        played: Sequence[Trajectory] | Mapping[str, float],
        who: str = "",
    ) -> None:
        """Write a part down: its picture, its episodes (or the rate of what was invalid, without any), its figures."""
        if isinstance(played, Mapping):
            invalid = played
        else:
            self._add_episodes(part, played, who)
            rates = [MEASURES["invalid_rate"](t) for t in played if t.turns and not t.stop.is_fault]
            invalid = asdict(interval(rates))
        self.result["parts"][part] = _plain(measured)
        self.result["invalid_rate"][part] = _plain(invalid)
        self.result["skipped"].pop(part, None)
        picture, draw = PICTURES[part]
        draw(self.result["parts"][part], self.path / picture, self._title())
        self._write()

    def skip(self, part: str, reason: str) -> None:
        self.result["skipped"][part] = reason
        self._write()

    def _add_episodes(self, part: str, played: Sequence[Trajectory], who: str) -> None:
        file, env = self.path / EPISODES, self.result["env"]
        others = [row for row in read_records(file) if row.get("part") != part] if file.exists() else []
        own = [
            episode_record(trajectory, player=who, env_id=env["id"], env_kwargs=env["kwargs"], part=part)
            for trajectory in played
        ]
        write_records(file, [*others, *own])

    def _title(self) -> str:
        kwargs = ", ".join(f"{key}={value}" for key, value in self.result["env"]["kwargs"].items())
        return f"{self.result['player']}: {self.result['env']['id']}{kwargs and f' ({kwargs})'}"

    def _write(self) -> None:
        unfinished = self.path / f"{RESULT}.{os.getpid()}.part"
        unfinished.write_text(json.dumps(self.result, indent=2, ensure_ascii=False), encoding="utf-8")
        unfinished.replace(self.path / RESULT)


def _plain(value: Any) -> Any:
    """What JSON holds of a value: NaN and infinities become null, what it does not know becomes text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [_plain(one) for one in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int, bool)) else str(value)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> str:
    told = []
    for key in sorted({*before, *now}):
        was, is_ = before.get(key), now.get(key)
        if isinstance(was, dict) and isinstance(is_, dict) and was != is_:
            told.append(_differences(was, is_, f"{prefix}{key}."))
        elif was != is_:
            told.append(f"{prefix}{key} was {was!r}, now {is_!r}")
    return ", ".join(told)
