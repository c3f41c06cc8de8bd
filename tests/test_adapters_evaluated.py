# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Answers that a suite's grader would run as Python."""

import pytest

from trl_agents.envs import make_env
from trl_agents.envs.adapters.evaluated import evaluates, harmless


@pytest.mark.parametrize(
    "answer",
    [
        *("(12 + 3) * 4 / 2 - 1", "-7", "2**10", "x**11/11 - 3*x**2 + C", "exp(-x**2)*sin(3*x) + C", "log(x + 1)/2"),
        *(
            "1 2 3 4",
            "",
            "ABCDE",
            "['A', 'B']",
            "[[1, 0], [0, 1]]",
            "(1, 2)",
            "it's 5!",
            "exp(8*x**2 - 10*x + 5) + C",
            "0.25",
            "3/4",
            "a! b",
        ),
        *("atan(x)", "sqrt(2)*x**(3/2)/3", "10**100", "x = 3", "_ Q _ _\n_ _ _ Q", "1.5e-3"),
    ],
)
def test_harmless(answer):
    assert harmless(answer)


@pytest.mark.parametrize(
    "answer",
    [
        *(
            "__import__('os').system('ls')",
            "().__class__",
            "open('x')",
            "[open('x')]",
            "exit()",
            "lambda: 0",
            "S['f()']",
        ),
        *("__import__('os').getcwd() != 1", "5! != __import__('os').getcwd()", "9**9**9**9 != 1"),
        *("f'{__import__(1)!r}'", "f'{9**9**9!r}'", "5! + f'{9**9**9!r}'"),
        *("9**9**9**9", "10**10**8", "((9**999)**999)**9", "factorial(10**7)", "10000000!", "(9**9)!", "1e99999999"),
        *(
            "'a'*10**9",
            "[0]*10**9",
            "'%1000000000d' % 5",
            "2**(10**8)",
            "1 << 10**9",
            "exp(exp(exp(exp(99))))",
            "exp(exp(exp(9**9 + 0*x)))",
            "9" * 9999,
        ),
        *(
            "[x for x in (1,)]",
            "f'{open}'",
            "(y := 5)",
            "a.b",
            "sqrt(evaluate=f())",
            "log(*[1])",
            "-" * 1999 + "1",
            "_x",
        ),
    ],
)
def test_harmful(answer):
    assert not harmless(answer)


def test_which_graders_evaluate():
    def compares(answer, entry):
        return answer == entry

    def runs(answer, entry):
        return eval(answer) == entry

    assert not evaluates(compares) and evaluates(runs) and evaluates(len)


HOSTILE = ["9**9**9**9", "10**10**8", "__import__('pathlib').Path('{here}/ran').touch()", "1e99999999", "99999999!"]


@pytest.mark.parametrize("name", ["reasoning_gym:countdown", "gem:rg:countdown", "reasoning_gym:spiral_matrix"])
def test_what_models_write_is_not_run(name, tmp_path):
    pytest.importorskip(name.split(":")[0], reason="the suite is not installed: pip install trl-agents[envs]")
    env = make_env(name)
    for answer in HOSTILE:
        env.reset(seed=1)
        assert env.step(answer.format(here=tmp_path))[1] < 0.1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    [
        *("countdown", "puzzle24", "simple_integration", "intermediate_integration", "polynomial_multiplication"),
        *("spiral_matrix", "binary_matrix", "string_insertion", "n_queens"),
    ],
)
def test_right_answers_stay_right(name):
    """All datasets whose graders evaluate."""
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed: pip install reasoning-gym")
    env = make_env(f"reasoning_gym:{name}")
    assert env._evaluates
    for seed in range(20):
        answer = env.reset(seed=seed)[1]["answer"]
        if answer is not None:  # puzzle24 has many
            assert env.step(answer)[1] == 1.0, answer
