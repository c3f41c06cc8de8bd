# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
The report of one diagnosis, or of several side by side: one HTML file made of their `diagnostics.json`.

Every part is optional, and so is every figure in it: what is missing is left out, and what was skipped says why.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..charts import line_chart, stacked_bars
from ..page import describe_env, html_page, write_text
from . import cells


TITLES = {
    "greediness": "Greediness",
    "frequency_bias": "Frequency bias",
    "knowing_doing": "Knowing and doing",
}

READING = {
    "greediness": (
        "A greedy player stops trying actions early and stays with the best of those it knows. Read the curve: one "
        "that flattens below 1 means that the other actions are never tried, however long the episode. Beside it, "
        "suffix failure is the share of episodes whose second half never plays the best action; a low regret with "
        "a high suffix failure was luck."
    ),
    "frequency_bias": (
        "One action of a random history is repeated again and again, and the player is asked what it does next. A "
        "frequency bias shows as the share “frequent”, which grows with the repetitions: the action is chosen because "
        "it was seen often, although another paid more. Entropy that falls towards 0 means an ever surer player. "
        "Answers are scored without a reasoning before them: a model that always reasons first has most of its "
        "probability on no answer, and the shares are of the rest."
    ),
    "knowing_doing": (
        "The player is told to act by UCB and to write the values first. “Correct” means that what it wrote leads to "
        "the same action as the values computed anew; “optimal” that it played this action. Much in “correct, greedy” "
        "is the gap: it knows what to explore, and exploits all the same. Cells are percent of all steps."
    ),
}

# What the measures are, in the words of a table. Others are shown by their names.
MEASURES = {
    "coverage": "coverage at the end (actions tried)",
    "chosen_coverage": "coverage by its own choice, without invalid replies",
    "min_fraction": "rarest action's share × number of actions",
    "greedy_fraction": "steps at which the best so far was played",
    "suffix_failure": "suffix failure",
    "optimal_share": "steps at which the best action was played",
    "invalid_rate": "invalid replies",
    "shortened": "episodes cut short",
}


def write_report(diagnoses: Sequence[str | Path | Mapping[str, Any]], path: str | Path | None = None) -> Path:
    """
    Write the report.

    Args:
        diagnoses (`Sequence`):
            Folders with a `diagnostics.json`, such files, or what [`diagnose`] returned. Of several, the first is the
            one from before.
        path (`str` or `Path`, *optional*):
            File to write. Defaults to `report.html` in the folder of the last one.

    Returns:
        `Path` of the file.
    """
    if not diagnoses:
        raise ValueError("diagnoses=[]: give the folder of at least one diagnosis.")
    folders = [None if isinstance(one, Mapping) else _folder(one) for one in diagnoses]
    if path is None and folders[-1] is None:
        raise ValueError("path=None needs a folder to write to: give a path, or the folder of the diagnosis.")
    path = Path(path) if path is not None else folders[-1] / "report.html"
    read = [one if isinstance(one, Mapping) else read_diagnosis(one) for one in diagnoses]
    named = dict(zip(_labels(read, folders), read, strict=True))
    links = {
        label: quote(Path(os.path.relpath(folder / "episodes.html", path.parent)).as_posix())
        for label, folder in zip(named, folders, strict=True)
        if folder is not None and (folder / "episodes.html").exists()
    }
    *before, latest = named
    title = f"Diagnosis of {' and '.join([', '.join(before), latest] if before else [latest])}"
    styles = ["page.css", "charts.css", "report.css"]
    return write_text(path, html_page(title, _body(title, named, links), styles=styles))


def _folder(path: str | Path) -> Path:
    path = Path(path)
    return path if path.is_dir() else path.parent


def read_diagnosis(path: str | Path) -> dict[str, Any]:
    """What a folder's `diagnostics.json` holds; a `ValueError` says why it holds none."""
    path = Path(path)
    path = path / "diagnostics.json" if path.is_dir() else path
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"There is no {path}: give the folder of a diagnosis.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON ({error}).") from None
    if not isinstance(found, dict) or not isinstance(found.get("parts"), dict):
        raise ValueError(f"{path} is no diagnosis: it has no `parts`.")
    return found


def _labels(read: Sequence[Mapping[str, Any]], folders: Sequence[Path | None]) -> list[str]:
    """
    What each is called: its player, without the folders that all share, and with that of its diagnosis where players
    have one name.
    """
    players = [str(one.get("player", "player")) for one in read]
    shared = os.path.commonprefix([player.split("/")[:-1] for player in players]) if len(read) > 1 else []
    players = [player.removeprefix("".join(f"{name}/" for name in shared)) for player in players]
    labels = [
        f"{player} ({folder.name})" if players.count(player) > 1 and folder is not None else player
        for player, folder in zip(players, folders, strict=True)
    ]
    while len(set(labels)) < len(labels):  # again, if a number makes a name that another has
        labels = [f"{one} {number}" if labels.count(one) > 1 else one for number, one in enumerate(labels, start=1)]
    return labels


def _body(title: str, named: Mapping[str, Mapping[str, Any]], links: Mapping[str, str]) -> str:
    head = [f"<h1>{escape(title)}</h1>"]
    for label, one in named.items():
        env = one.get("env") or {}
        played = describe_env(cells.setting(env.get("id")), env.get("kwargs") or {})
        link = f' · <a href="{escape(links[label])}">read the episodes</a>' if label in links else ""
        head.append(f'<p><strong>{escape(label)}</strong> <span class="muted">in {escape(played)}</span>{link}</p>')
    head.append('<p class="muted">Brackets are 95% intervals over episodes (frequency bias: over histories).</p>')
    if not _in_one_env(named):
        head.append(
            '<p class="warn">These were measured in different environments: compare with care. The scripted players '
            "beside each are left out; its own report has them.</p>"
        )
    draw: dict[str, Callable[[dict[str, Any]], str]] = {
        "greediness": lambda parts: _greediness(parts, named),
        "frequency_bias": _frequency_bias,
        "knowing_doing": _knowing_doing,
    }
    sections = [_section(part, named, draw[part]) for part in TITLES]
    return f"<main><header>{''.join(head)}</header>{_in_short(named)}{''.join(sections)}{_settings(named)}</main>"


def _in_one_env(named: Mapping[str, Mapping[str, Any]]) -> bool:
    first, *others = (one.get("env") for one in named.values())
    return all(other == first for other in others)


def _in_short(named: Mapping[str, Mapping[str, Any]]) -> str:
    """What a reader wants to know first, a row a question."""
    answers = [_answers(one) for one in named.values()]
    rows = {
        question: row
        for question in dict.fromkeys(question for one in answers for question in one)
        if any(row := [one.get(question, "") for one in answers])
    }
    return f'<section id="in-short"><h2>In short</h2>{cells.table(["", *named], rows)}</section>' if rows else ""


def _answers(one: Mapping[str, Any]) -> dict[str, str]:
    player, parts, gap = str(one.get("player")), one["parts"], cells.inner(one["parts"], "knowing_doing")

    def measured(name: str) -> Any:
        return cells.inner(cells.inner(cells.inner(parts, "greediness"), "measures"), name).get(player)

    windows = cells.pairs(cells.inner(parts, "frequency_bias").get("window_intervals"))
    return {
        "actions tried by the end": cells.interval(measured("coverage"), "{:.0%}"),
        "... by its own choice": cells.interval(measured("chosen_coverage"), "{:.0%}"),
        "second halves without the best action": cells.interval(measured("suffix_failure"), "{:.0%}"),
        **{
            f"repeats the frequent action, {window} repetitions": cells.interval(
                cells.inner(row, "frequent"), "{:.0%}"
            )
            for window, row in windows[:1] + windows[1:][-1:]
        },
        "knows the right action by UCB, % of steps": cells.interval(gap.get("correct"), "{:.0f}"),
        "... and plays the greedy one, % of these": cells.plain(
            cells.inner(cells.inner(gap, "conditional"), "correct").get("greedy"), "{:.0f}"
        ),
        "invalid replies": cells.interval(cells.inner(one.get("invalid_rate"), "greediness"), "{:.0%}"),
    }


def _section(part: str, named: Mapping[str, Mapping[str, Any]], draw: Callable[[dict[str, Any]], str]) -> str:
    measured = {label: one["parts"][part] for label, one in named.items() if isinstance(one["parts"].get(part), dict)}
    skipped = {label: reason for label, one in named.items() if (reason := (one.get("skipped") or {}).get(part))}
    if not measured and not skipped:
        skipped = {"": "it was not measured"}
    notes = [
        f'<p class="skipped"><strong>Left out{escape(f" for {label}" if label and len(named) > 1 else "")}:</strong> '
        f"{escape(str(reason))}.</p>"
        for label, reason in skipped.items()
    ]
    shown = f"{draw(measured)}{_invalid(part, named, measured)}" if measured else ""
    return f'<section id="{part}"><h2>{TITLES[part]}</h2><p>{READING[part]}</p>{"".join(notes)}{shown}</section>'


def _invalid(part: str, named: Mapping[str, Mapping[str, Any]], measured: Mapping[str, Any]) -> str:
    """Always beside the figures: a random action in place of an invalid one explores too."""
    rates = []
    for label in measured:
        rate = (named[label].get("invalid_rate") or {}).get(part)
        mean = rate.get("mean") if isinstance(rate, Mapping) else None
        said = cells.interval(rate, "{:.1%}") if cells.is_number(mean) else "not known"
        style = ' class="warn"' if cells.is_number(mean) and mean > 0.05 else ""
        rates.append(f"<span{style}>{escape(label) + ': ' if len(named) > 1 else ''}{said}</span>")
    of = "Probability on no answer" if part == "frequency_bias" else "Invalid replies"
    why = (
        ""
        if part == "frequency_bias"
        else " A random action is played in place of an invalid one, which explores too."
    )
    return f'<p class="invalid"><strong>{of}:</strong> {"; ".join(rates)}.<span class="muted">{why}</span></p>'


# -- the parts --------------------------------------------------------------------------------------------------------


def _greediness(parts: dict[str, Any], named: Mapping[str, Mapping[str, Any]]) -> str:
    """
    Own players first, then the scripted references: once, and only where all played the same environment. Of a
    reference that has a diagnosis of its own, that one tells.
    """
    curves: dict[str, Any] = {}
    table: dict[str, dict[str, Any]] = {}
    shared = _in_one_env(named)
    for label, part in parts.items():
        own = str(named[label].get("player"))

        def called(player: str, label: str = label, own: str = own) -> str | None:
            if player == own:
                return label
            return player if shared and player not in parts else None

        for player, curve in cells.pairs(part.get("coverage_by_step")):
            if name := called(player):
                curves.setdefault(name, curve)
        for measure, row in cells.pairs(part.get("measures")):
            for player, value in cells.pairs(row):
                if name := called(player):
                    table.setdefault(measure, {}).setdefault(name, value)
    order = [*parts, *(name for row in [curves, *table.values()] for name in row if name not in parts)]
    order = list(dict.fromkeys(order))
    curves = {
        name: curves[name] for name in order if isinstance(curves.get(name), Mapping) and curves[name].get("mean")
    }
    shown = ""
    if curves:
        steps = range(1, 1 + max(len(curve["mean"]) for curve in curves.values()))
        shown = line_chart(curves, steps, x_label="step", y_label="share of actions tried", y_max=1.0)
    rows = {
        MEASURES.get(measure, measure.replace("_", " ")): [cells.interval(row.get(name)) for name in order]
        for measure, row in table.items()
    }
    counts = [
        f"{label}: {part['n_episodes']}" if len(parts) > 1 else str(part["n_episodes"])
        for label, part in parts.items()
        if part.get("n_episodes")
    ]
    episodes = f'<p class="muted">Episodes: {escape(", ".join(counts))}.</p>' if counts else ""
    return shown + cells.table(["", *order], rows) + episodes


def _frequency_bias(parts: dict[str, Any]) -> str:
    curves, lines, x = {}, {}, []
    for label, part in parts.items():
        entropy = part.get("entropy")
        if isinstance(entropy, Mapping) and entropy.get("mean"):
            curves[label] = entropy
            x = max(x, part.get("repetitions") or list(range(len(entropy["mean"]))), key=len)
        if cells.is_number(part.get("max_entropy")):
            lines[f"all actions alike ({part['max_entropy']:.2f})"] = part["max_entropy"]
    shown = ""
    if curves:
        top = [
            value
            for curve in curves.values()
            for value in [*curve["mean"], *(curve.get("high") or [])]
            if cells.is_number(value)
        ]
        height = max([1.1 * line for line in lines.values()] + [1.05 * value for value in top], default=1.0)
        labels = {"x_label": "repetitions of the last step", "y_label": "entropy, nats"}
        shown = f"<h3>Entropy of the next action</h3>{line_chart(curves, x, **labels, y_max=height, lines=lines)}"
    sides = []
    for label, part in parts.items():
        if bars := {window: cells.shares(row) for window, row in cells.pairs(part.get("windows"))}:
            title = cells.of("Choices by number of repetitions", label, parts)
            sides.append(f"<div><h3>{title}</h3>{stacked_bars(bars, ('frequent', 'greedy', 'other'))}</div>")
    shown += f'<div class="sides">{"".join(sides)}</div>'
    windows = list(
        dict.fromkeys(window for part in parts.values() for window, _ in cells.pairs(part.get("window_intervals")))
    )
    frequent = {
        f"frequent, {window} repetitions": [
            cells.interval(cells.inner(cells.inner(part.get("window_intervals"), window), "frequent"), "{:.1%}")
            for part in parts.values()
        ]
        for window in windows
    }
    rows = frequent | {
        "correlation of repetitions and entropy": [cells.plain(part.get("correlation")) for part in parts.values()],
        "forward passes (one by one)": [
            cells.pair(part.get("forward_passes"), part.get("naive_forward_passes")) for part in parts.values()
        ],
        "tokens (one by one)": [cells.pair(part.get("tokens"), part.get("naive_tokens")) for part in parts.values()],
        "seconds": [cells.plain(part.get("seconds"), "{:,.1f}") for part in parts.values()],
    }
    return shown + cells.table(["", *parts], {name: row for name, row in rows.items() if any(row)})


def _knowing_doing(parts: dict[str, Any]) -> str:
    sides = []
    for label, part in parts.items():
        joint, conditional = (
            {name: row for name, row in cells.pairs(part.get(of)) if row} for of in ("joint", "conditional")
        )
        doings = list(dict.fromkeys(doing for row in joint.values() for doing in row)) or [
            "optimal",
            "greedy",
            "other",
        ]
        rows = {}
        for knowing in ("correct", "wrong"):
            row = joint.get(knowing) or {}
            intervals = (part.get("joint_intervals") or {}).get(knowing) or {}
            figures = [
                cells.interval(intervals.get(doing), "{:.1f}")
                if doing in intervals
                else cells.plain(row.get(doing), "{:.1f}")
                for doing in doings
            ]
            total = [value for value in row.values() if cells.is_number(value)]
            rows[f"{knowing}"] = [*figures, f"{sum(total):.1f}" if total else ""]
            if knowing == "correct" and conditional.get(knowing):
                own = [cells.plain(conditional[knowing].get(doing), "{:.1f}") for doing in doings]
                rows |= {"of the correct ones": [*own, "100.0"]} if any(own) else {}
        counts = [f"{part['n_steps']:,} steps" if part.get("n_steps") is not None else ""]
        counts.append(
            f"{part['missing_block']:,} without readable values" if part.get("missing_block") is not None else ""
        )
        told = ", ".join(filter(None, counts))
        sides.append(
            f"<div><h3>{cells.of('Values written by action played, % of steps', label, parts)}</h3>"
            f'{cells.table(["", *doings, "all"], rows, kind="matrix")}<p class="muted">{told}.</p></div>'
        )
    return f'<div class="sides">{"".join(sides)}</div>'


def _settings(named: Mapping[str, Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for one in named.values() for name in one.get("settings") or {}))
    rows = {
        name: [escape(cells.setting((one.get("settings") or {}).get(name))) for one in named.values()]
        for name in names
    }
    rows = {name: row for name, row in rows.items() if any(row)}  # None says of nothing how it was
    table = cells.table(["", *named], rows, kind="stacks words") if rows else "<p>None are told.</p>"
    return f'<section id="settings"><h2>Settings</h2>{table}</section>'
