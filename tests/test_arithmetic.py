# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The generator of word problems: right, spread out, the same every time."""

import re
from collections import Counter

import pytest

from trl_agents.arithmetic import arithmetic_problems
from trl_agents.data import load_questions


def run(program):
    names = {}
    exec(program, names)
    return names["solution"]


def numbers(text):
    return [int(found) for found in re.findall(r"\d+", text)]


EQUATION = re.compile(r"\b(\d+) ([-+*/]) (\d+) = (\d+)\b")
SETTINGS = [
    {},
    {"seed": 1, "min_steps": 1, "max_steps": 1},
    {"seed": 2, "distractors": 2},
    {"seed": 3, "operations": "+-", "min_steps": 4},
    {"seed": 4, "operations": "*/", "max_steps": 3},
    {"seed": 5, "max_value": 12, "distractors": 4},
    {"seed": -6, "max_value": 999, "min_steps": 6, "max_steps": 7},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_every_problem(settings):
    problems = arithmetic_problems(150, **settings)
    asked = {"min_steps": 2, "max_steps": 4, "max_value": 99, "operations": "+-*/", "distractors": 0, **settings}
    assert len(set(problems["question"])) == 150
    assert set(problems["n_steps"]) == set(range(asked["min_steps"], asked["max_steps"] + 1))
    for problem in problems:
        steps = EQUATION.findall(problem["rationale"])
        assert len(steps) == problem["n_steps"] == len(problem["rationale"].splitlines())
        values = [int(steps[0][0])]
        for left, operator, right, result in steps:
            assert int(left) == values[-1]  # each step goes on from the one before
            assert eval(f"{left} {operator} {right}") == int(result), problem
            assert operator in asked["operations"]
            assert int(left) <= asked["max_value"] and int(right) <= asked["max_value"]
            values.append(int(result))
        assert 0 <= min(values) and max(values) <= asked["max_value"]
        solution = run(problem["program"])
        assert str(solution()) == problem["answer"] == str(values[-1])
        assert solution.__doc__ == problem["question"]
        # Every stated number matters but the distractors': the program's constants are those of the question
        stated = Counter(numbers(problem["question"]))
        used = Counter(int(k) for k in re.findall(r"^    \w+ = (\d+)$", problem["program"], re.MULTILINE))
        assert used <= stated and (stated - used).total() == asked["distractors"]
        assert used.total() >= 2
        assert values[-1] not in stated
        assert not re.search(r"\b1 \w+s\b|[{}]|  ", problem["question"] + problem["rationale"])


def test_deterministic():
    first = arithmetic_problems(60, seed=3)
    assert arithmetic_problems(60, seed=3).to_list() == first.to_list()
    assert arithmetic_problems(20, seed=3).to_list() == first.to_list()[:20]


def test_seeds_are_disjoint():
    questions = [set(arithmetic_problems(300, seed=seed)["question"]) for seed in (-1, 0, 1, 2)]
    assert len(set.union(*questions)) == 4 * 300


def test_splits_are_disjoint():
    settings = {"max_value": 6, "min_steps": 1, "max_steps": 1, "operations": "+"}  # few questions
    splits = ("train", "validation", "test")
    questions = [set(load_questions("arithmetic", split, n=100, **settings)["question"]) for split in splits]
    assert len(set.union(*questions)) == 3 * 100
    assert set(arithmetic_problems(200, **settings)["question"]) & questions[2]  # there was something to hold apart


def test_nothing_to_guess():
    problems = list(arithmetic_problems(600))
    answers = [int(problem["answer"]) for problem in problems]
    assert Counter(answers).most_common(1)[0][1] < 0.1 * len(answers)
    assert len(set(answers)) > 60
    for guess in (max, min, sum, lambda stated: stated[-1], lambda stated: abs(stated[0] - stated[-1])):
        hits = [guess(numbers(problem["question"])) == int(problem["answer"]) for problem in problems]
        assert sum(hits) < 0.15 * len(hits)


def test_all_operations_and_positions():
    problems = list(arithmetic_problems(300))
    operators = Counter(step[1] for problem in problems for step in EQUATION.findall(problem["rationale"]))
    assert min(operators[operator] for operator in "+-*/") > 0.1 * operators.total()
    texts = " ".join(problem["question"] for problem in problems)
    for wording in (
        "Before that",
        "Find the number",
        "half",
        "twice",
        "in each",
        "equally",
        "coins each",
        "fewer",
    ):
        assert wording in texts


def test_short_and_of_few_words():
    problems = list(arithmetic_problems(500, distractors=1))
    texts = [f"{problem['question']} {problem['rationale']}" for problem in problems]
    assert max(len(text.split()) for text, row in zip(texts, problems, strict=True) if row["n_steps"] == 3) < 90
    assert len(set(re.findall("[a-z]+", " ".join(texts).lower()))) < 200


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"n": 0}, "`n`"),
        ({"min_steps": 0}, "min_steps=0"),
        ({"min_steps": 3, "max_steps": 2}, "max_steps=2"),
        ({"max_value": 3}, "`max_value`"),
        ({"distractors": 5}, "`distractors`"),
        ({"distractors": -1}, "`distractors`"),
        ({"operations": ""}, "`operations`"),
        ({"operations": "+%"}, "`operations`"),
        ({"split": "dev"}, "`split`"),
        ({"operations": "*", "min_steps": 7, "max_steps": 7}, "0 were found"),
    ],
)
def test_bad_settings(settings, match):
    with pytest.raises(ValueError, match=match):
        arithmetic_problems(**{"n": 5, **settings})


def test_too_many(monkeypatch):
    monkeypatch.setattr("trl_agents.arithmetic._GIVE_UP_AFTER", 30)
    settings = {"max_value": 4, "min_steps": 1, "max_steps": 1, "operations": "*"}
    with pytest.raises(ValueError, match=r"n=9000 problems are too many .* [1-9]\d* were found"):
        arithmetic_problems(9000, **settings)


@pytest.mark.parametrize("announced", [False, True])
def test_solutions_that_skip_steps(announced):
    """The same problems; of about as many as asked, only the last step is written down, and it is right."""
    whole = list(arithmetic_problems(300, seed=5, min_steps=2, max_steps=4))
    skipped = list(arithmetic_problems(300, seed=5, min_steps=2, max_steps=4, skipping=0.4, announced=announced))
    opening, comment = ("In the end, ", "    # the last step\n") if announced else ("", "")
    n_short = 0
    for row, short in zip(whole, skipped, strict=True):
        assert (row["question"], row["answer"]) == (short["question"], short["answer"])
        assert str(run(short["program"])()) == row["answer"]
        assert "#" not in row["program"] and not row["rationale"].startswith("In the end")
        if short["rationale"] != row["rationale"]:
            n_short += 1
            assert short["rationale"] == opening + row["rationale"].splitlines()[-1]
            assert comment in short["program"] and ("#" in short["program"]) == announced
            assert len(short["program"].replace(comment, "").splitlines()) < len(row["program"].splitlines())
    assert 90 < n_short < 150


def test_no_share():
    with pytest.raises(ValueError, match="`skipping`"):
        arithmetic_problems(3, skipping=1.5)
