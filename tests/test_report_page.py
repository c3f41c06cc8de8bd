# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The report of diagnoses: which figures it shows, that each of them may be missing, and the page in a browser."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys

import pytest
from browser import Browser, needs_chromium

from trl_agents.charts import line_chart, stacked_bars
from trl_agents.diagnostics.report import write_report


STEPS, REPETITIONS = 20, 30


def interval(mean, spread=0.05):
    return {"mean": mean, "low": mean - spread, "high": mean + spread}


def curve(values, spread=0.02):
    return {"mean": values, "low": [v - spread for v in values], "high": [v + spread for v in values]}


def make_diagnosis(player="model", coverage=0.61, frequent=0.73):
    grows = [coverage * (1 - math.exp(-step / 4)) for step in range(1, STEPS + 1)]
    measures = {
        "coverage": {player: interval(coverage), "random": interval(0.97)},
        "chosen_coverage": {player: interval(coverage - 0.1)},
        "suffix_failure": {player: interval(0.33)},
        "regret": {player: interval(31.25)},
    }
    windows = {name: {"frequent": frequent, "greedy": 0.9 - frequent, "other": 0.1} for name in ("0-10", "45-55")}
    bias = {name: {category: interval(share) for category, share in row.items()} for name, row in windows.items()}
    joint = {"correct": {"optimal": 21.6, "greedy": 58.1, "other": 10.6}, "wrong": {"optimal": 0.6, "greedy": 9.1}}
    return {
        "player": player,
        "env": {"id": "trl_agents/Bandit-v0", "kwargs": {"n_arms": 10}},
        "settings": {"n_instances": 64, "context": "window", "window": None},
        "parts": {
            "greediness": {
                "measures": measures,
                "coverage_by_step": {player: curve(grows), "random": curve([0.97] * STEPS)},
                "n_episodes": 64,
            },
            "frequency_bias": {
                "repetitions": list(range(REPETITIONS)),
                "entropy": curve([2 * math.exp(-step / 20) for step in range(REPETITIONS)]),
                "max_entropy": math.log(10),
                "correlation": -0.67,
                "windows": windows,
                "window_intervals": bias,
                "forward_passes": 1250,
                "naive_forward_passes": 25250,
                "seconds": 12.3,
            },
            "knowing_doing": {
                "joint": joint,
                "joint_intervals": {
                    knowing: {doing: interval(value, 5) for doing, value in row.items()}
                    for knowing, row in joint.items()
                },
                "correct": interval(90.3, 2),
                "conditional": {"correct": {"optimal": 23.9, "greedy": 64.3, "other": 11.7}},
                "n_steps": 3200,
                "missing_block": 17,
            },
        },
        "invalid_rate": {
            "greediness": interval(0.02, 0.01),
            "frequency_bias": interval(0.3),
            "knowing_doing": interval(0.12, 0.01),
        },
        "skipped": {},
    }


def plain(path):
    """The text of a page: no markup, no styles."""
    markup = re.sub(r"<style>.*?</style>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", markup).split())


def folder_of(path, diagnosis):
    path.mkdir(parents=True)
    (path / "diagnostics.json").write_text(json.dumps(diagnosis))
    return path


def test_report_shows_the_figures(tmp_path):
    path = write_report([folder_of(tmp_path / "run", make_diagnosis())])
    text = plain(path)
    assert path == tmp_path / "run" / "report.html"
    for figure in (
        *("0.61 [0.56, 0.66]", "0.97 [0.92, 1.02]", "31.25 [31.20, 31.30]"),
        *("Invalid replies: 2.0% [1.0%, 3.0%]", "Probability on no answer: 30.0%", "12.0% [11.0%, 13.0%]"),
        *(
            "73.0% [68.0%, 78.0%]",
            "58.1 [53.1, 63.1]",
            "-0.67",
            "1,250 (25,250)",
            "73%",
            "58.1",
            "64.3",
            "90.3",
            "3,200 steps, 17 without readable values",
        ),
        *("n_instances 64", "context window", "trl_agents/Bandit-v0 (n_arms=10)"),
    ):
        assert figure in text, figure


def test_what_a_reader_wants_to_know_first_comes_first(tmp_path):
    before, after = make_diagnosis("warmup", 0.41, 0.8), make_diagnosis("rlft", 0.85, 0.2)
    del after["parts"]["knowing_doing"]
    text = plain(write_report([before, after], tmp_path / "r.html"))
    in_short = text[text.index("In short") : text.index("Greediness")]
    for figures in (
        "actions tried by the end 41% [36%, 46%] 85% [80%, 90%]",
        "... by its own choice 31% [26%, 36%] 75% [70%, 80%]",
        "second halves without the best action 33% [28%, 38%]",
        "repeats the frequent action, 45-55 repetitions 80% [75%, 85%] 20% [15%, 25%]",
        "knows the right action by UCB, % of steps 90 [88, 92]",
        "... and plays the greedy one, % of these 64",
        "invalid replies 2% [1%, 3%] 2% [1%, 3%]",
    ):
        assert figures in in_short, figures


def test_a_reference_is_not_taken_for_the_diagnosis_of_its_name(tmp_path):
    model, ucb = make_diagnosis("model", 0.41), make_diagnosis("ucb", 0.99)
    model["parts"]["greediness"]["measures"]["coverage"]["ucb"] = interval(0.7)
    model["parts"]["greediness"]["measures"]["regret"]["ucb"] = interval(6.6)
    ucb["parts"]["greediness"]["measures"]["regret"]["ucb"] = interval(15.26)
    for own in ([model, ucb], [ucb, model]):
        text = plain(write_report(own, tmp_path / "r.html"))
        assert "15.26 [" in text and "6.60 [" not in text and "0.99 [" in text and "0.70 [" not in text


def test_different_environments_are_told_and_share_no_reference(tmp_path):
    five, ten = make_diagnosis("model", 0.41), make_diagnosis("model", 0.85)
    five["env"]["kwargs"], five["parts"]["frequency_bias"]["max_entropy"] = {"n_arms": 5}, math.log(5)
    text = plain(write_report([five, ten], tmp_path / "r.html"))
    assert "in different environments" in text and "0.97 [" not in text  # the random player's coverage
    assert "all actions alike (1.61)" in text and "all actions alike (2.30)" in text
    assert "in different environments" not in plain(write_report([ten, ten], tmp_path / "r.html"))


def test_report_of_two_has_both_and_links_to_their_episodes(tmp_path):
    before = folder_of(tmp_path / "a" / "before", make_diagnosis("outputs/run/warmup", 0.41, 0.8))
    after = folder_of(tmp_path / "after", make_diagnosis("outputs/run", 0.85, 0.2))
    (before / "episodes.html").write_text("")
    odd = folder_of(tmp_path / "50% #1", make_diagnosis())
    (odd / "episodes.html").write_text("")
    assert 'href="50%25%20%231/episodes.html"' in write_report([odd], tmp_path / "odd.html").read_text()
    path = write_report([before, after])
    text, markup = plain(path), path.read_text()
    assert "Diagnosis of run/warmup and run" in text  # without the folder they share
    three = plain(write_report([make_diagnosis(name) for name in "abc"], tmp_path / "three.html"))
    assert "Diagnosis of a, b and c" in three
    assert "0.41 [0.36, 0.46] 0.85 [0.80, 0.90] 0.97 [0.92, 1.02]" in text  # before, after, the reference once
    assert "80%" in text and "20%" in text
    assert 'href="../a/before/episodes.html"' in markup and markup.count("read the episodes") == 1


def test_players_of_one_name_are_told_apart_by_their_folders(tmp_path):
    folders = [folder_of(tmp_path / name, make_diagnosis("model", value)) for name, value in (("x", 0.2), ("y", 0.3))]
    text = plain(write_report(folders))
    assert "model (x)" in text and "model (y)" in text and "0.20 [0.15, 0.25] 0.30 [0.25, 0.35]" in text
    assert "model 1" in plain(write_report([make_diagnosis(), make_diagnosis()], tmp_path / "both.html"))
    alike = [make_diagnosis(name) for name in ("model", "model", "model 2")]
    assert "model 1, model 2 2 and model 2 3" in plain(write_report(alike, tmp_path / "alike.html"))


def removals(value, path=()):
    """The paths of all that can be missing in a diagnosis."""
    for key, inner in value.items():
        if (path and path != ("env", "kwargs")) or key in ("env", "settings", "invalid_rate", "skipped"):
            yield (*path, key)
        if isinstance(inner, dict):
            yield from removals(inner, (*path, key))


@pytest.mark.parametrize("path", list(removals(make_diagnosis())), ids=".".join)
def test_everything_is_optional(tmp_path, path):
    """Each key in turn is missing or null, beside a diagnosis that has it."""
    for value in ("missing", None):
        diagnosis = make_diagnosis()
        inner = diagnosis
        for key in path[:-1]:
            inner = inner[key]
        if value is None:
            inner[path[-1]] = None
        else:
            del inner[path[-1]]
        text = plain(write_report([diagnosis, make_diagnosis("other")], tmp_path / "report.html"))
        assert "Greediness" in text and "Settings" in text and " nan" not in text and "None" not in text


def test_what_was_skipped_says_why(tmp_path):
    diagnosis = make_diagnosis()
    del diagnosis["parts"]["frequency_bias"], diagnosis["parts"]["knowing_doing"]
    diagnosis["skipped"] = {"frequency_bias": "the legal actions <change>"}
    text = plain(write_report([diagnosis], tmp_path / "report.html"))
    assert "Left out: the legal actions &lt;change&gt;." in text and "Left out: it was not measured." in text


def test_settings_that_nobody_has_are_left_out(tmp_path):
    one, other = make_diagnosis("a"), make_diagnosis("b")
    for diagnosis in (one, other):
        diagnosis["settings"] |= {"references": None, "n_places": 0, "exploration": []}
    text = plain(write_report([one, other], tmp_path / "r.html"))
    assert text.endswith("Settings a b n_instances 64 64 context window window n_places 0 0 exploration [] []")
    other["settings"]["window"] = 3
    assert "window 3" in plain(write_report([one, other], tmp_path / "r.html"))


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "There is no"), ("{", "is no JSON"), ("{}", "is no diagnosis"), ("[]", "is no diagnosis")],
)
def test_what_is_no_diagnosis_is_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "diagnostics.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        write_report([tmp_path])


def test_report_needs_no_torch_of_its_own():
    code = "import sys, trl_agents.charts, trl_agents.page, trl_agents.viewer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_line_chart_puts_values_where_they_belong():
    chart = line_chart({"<a>": {"mean": [0.0, None, 1.0]}}, [0, 1, 2], x_label="x", y_label="y", y_max=1.0)
    line = re.search(r'class="line c0" d="M([^"]+)"', chart)[1]
    assert line == "46.0 238.0 L448.0 12.0"  # from the lower left corner to the upper right one; the gap is bridged
    assert "<a>" not in chart and "&lt;a&gt;" in chart


def test_one_step_is_a_point():
    chart = line_chart({"a": {"mean": [0.5]}}, [1], x_label="x", y_label="y", y_max=1.0)
    assert chart.count('class="line dot c0"') == 1


def test_line_chart_needs_no_values():
    assert "<svg" in line_chart({}, [], x_label="x", y_label="y", y_max=0.0)
    assert "NaN" not in line_chart({"a": {"mean": [math.nan, 1.0]}}, [1, 2], x_label="x", y_label="y", y_max=1.0)


def test_stacked_bars_are_as_wide_as_their_shares():
    chart = stacked_bars({"0-10": {"a": 0.25, "b": 0.75}}, ("a", "b", "c"))
    widths = [float(width) for width in re.findall(r'class="bar c\d" x="[\d.]+" y="\d+" width="([\d.]+)"', chart)]
    assert widths == [96.0, 288.0, 0.0] and "25%" in chart and "75%" in chart


# -- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    started = Browser()
    yield started
    started.close()


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_is_whole_at_both_widths(browser, tmp_path, scheme):
    path = write_report([make_diagnosis("outputs/a_run/warmup"), make_diagnosis("outputs/a_run")], tmp_path / "r.html")
    for width in (1280, 390):
        browser.set_screen(width, scheme=scheme)
        browser.open(path)
        assert browser.run("document.documentElement.scrollWidth") == width
        # Drawn, not clipped, and the policy lets its styles through
        assert browser.run("[...document.querySelectorAll('svg.chart')].every((one) => one.clientWidth > 250)")
        assert browser.run("document.querySelectorAll('svg.chart').length") == 4
        assert browser.run(
            "[...document.querySelectorAll('.scroll')].every((one) => one.scrollWidth <= one.clientWidth)"
        )
        assert browser.errors == [] and len(browser.requests) == 1
    background = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(20, 23, 26)") == (scheme == "dark")


@needs_chromium
def test_names_break_between_folders_and_the_label_of_a_line_is_on_no_curve(browser, tmp_path):
    diagnosis = make_diagnosis("outputs/grpo_bandit_tiny")
    bias = diagnosis["parts"]["frequency_bias"]
    bias["max_entropy"], bias["entropy"] = math.log(5), curve([1.6] * REPETITIONS, 0.01)  # close below all it can be
    browser.set_screen(1280)
    browser.open(write_report([diagnosis, make_diagnosis("runs/a_rather_long_name_of_a_run")], tmp_path / "r.html"))
    heads = "[...document.querySelectorAll('thead th')].map((one) => one.innerText)"
    boxes = "[...document.querySelectorAll('thead th span')].map((one) => [one.innerText, one.getClientRects().length,"
    boxes += " one.offsetHeight < 30])"
    assert "outputs/grpo_bandit_tiny" in [name.replace("\n", "") for name in browser.run(heads)]
    assert ["grpo_bandit_tiny", 1, True] in browser.run(boxes)
    box = "((one) => {{ const box = one.getBoundingClientRect(); return [box.top, box.bottom]; }})({})"
    label = "[...document.querySelectorAll('svg text')].find((one) => one.textContent.includes('alike (1.61)'))"
    line = "[...document.querySelectorAll('#frequency_bias svg.chart .line')][0]"
    assert browser.run(box.format(label))[1] <= browser.run(box.format(line))[0]


@needs_chromium
def test_names_run_nothing(browser, tmp_path):
    evil = "<img src=x onerror=document.title='owned'></title><script>document.title='owned'</script>"
    diagnosis = make_diagnosis(evil)
    diagnosis["env"] = {"id": evil, "kwargs": {evil: evil}}
    diagnosis["settings"] = {evil: evil}
    diagnosis["skipped"] = {"greediness": evil}
    diagnosis["parts"]["greediness"]["measures"][evil] = {evil: interval(1.0)}
    diagnosis["parts"]["frequency_bias"]["windows"] = {evil: {"frequent": 1.0}}
    browser.open(write_report([diagnosis], tmp_path / "r.html"))
    assert browser.run("document.title") == f"Diagnosis of {evil}"
    assert browser.run("document.querySelectorAll('img, script').length") == 0
    assert browser.errors == [] and len(browser.requests) == 1
