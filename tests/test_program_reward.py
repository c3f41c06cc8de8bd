# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Where the program is in a completion, and what it earns."""

from __future__ import annotations

import math
import sys
import textwrap

import pytest
from program_texts import ENDLESS, FINE, solution

from trl_agents.rewards import ProgramRunner, get_program_reward, program_reward
from trl_agents.rewards.programs import FAILURES, program_of


pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="programs run in forks")


@pytest.fixture(scope="module")
def patient():
    """For programs that must come to their end, on however busy a machine."""
    with ProgramRunner(n_workers=2, timeout=20.0) as runner:
        yield runner


# -- where the program is ---------------------------------------------------------------------------------------------

HEAD = 'def solution():\n    """How many?\na ) 1 , b ) 2"""\n'
PROMPT = "Question:\nHow many?\nAnswer reasoning:\n" + HEAD
BODY = "    x = 2\n\n    result = x\n    return result"


@pytest.mark.parametrize(
    ("completion", "prompt", "expected"),
    [
        (HEAD + BODY, None, HEAD + BODY),
        (BODY, PROMPT, HEAD + BODY),
        (BODY + "\n\nThe answer is 2.\n", PROMPT, HEAD + BODY),
        (BODY.lstrip(), PROMPT, HEAD + BODY),  # the first line lost its indentation
        (BODY.lstrip(), PROMPT + "    ", HEAD + BODY),
        ("\n" + BODY, PROMPT.rstrip(), HEAD + "\n" + BODY),
        (BODY + "\n```\nDone.", "```python\n" + PROMPT, HEAD + BODY),
        (HEAD + BODY, PROMPT, HEAD + BODY),  # begins anew
        (f"Sure:\n```python\n{HEAD}{BODY}\n```", PROMPT, HEAD + BODY),
        (f"Sure:\n```python\n{HEAD}{BODY}\n```\nand\n```\nx\n```", None, HEAD + BODY),
        (f"```py\n{HEAD}{BODY}", None, HEAD + BODY),  # never closed
        (f"  ```\n{textwrap.indent('def f():' + chr(10) + BODY, '  ')}\n  ```", None, "def f():\n" + BODY),
        (f"Here it is.\nimport math\nN = 5\n{HEAD}{BODY}\nThat is it.", None, f"import math\nN = 5\n{HEAD}{BODY}"),
        ("def f():\n    return 1\n# so\ndef solution():\n    return f()\nprint(solution())", None, "-1"),
        ("def solution():\n    return sum([\n1,\n2\n])", None, "def solution():\n    return sum(["),
        ("def solution():\n    return sum([\n        1\n])", None, "def solution():\n    return sum([\n        1\n])"),
        (HEAD.replace("\n", "\r\n") + BODY, None, HEAD + BODY),
        ("I do not know.", None, ""),
        ("", PROMPT, HEAD.rstrip()),
        (BODY, "Question:\nwhat is def solution?\n", ""),
        (BODY, "def solution():\n    return 1\n", ""),  # an example that is over
        (BODY, HEAD + BODY + "\n\nQuestion: more?\n" + HEAD, HEAD + BODY),
        ([{"role": "assistant", "content": HEAD + BODY}], [{"role": "user", "content": PROMPT}], HEAD + BODY),
        ([{"role": "assistant", "content": BODY}], [{"role": "assistant", "content": PROMPT}], HEAD + BODY),
        ([{"role": "assistant", "content": None}], None, ""),
    ],
)
def test_program_of(completion, prompt, expected):
    if expected == "-1":
        expected = completion.rpartition("\n")[0]
    program = program_of(completion, prompt)
    assert program.rstrip() == expected or (not expected and "def" not in program)


# -- the reward -------------------------------------------------------------------------------------------------------


def test_reward_values(patient):
    completions = [FINE, solution("return 41"), solution("return 42.009"), solution("return '42'")]
    completions += [solution("return 'forty-two'"), solution("return 1 / 0"), "I do not know.", ENDLESS[:-4]]
    reward = get_program_reward(runner=patient)
    assert reward(completions, ["42"] * 8) == [1.0, 0.1, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert reward([FINE] * 4, ["$42", 42, "#### 42", "unknown"]) == [1.0, 1.0, 1.0, None]
    assert get_program_reward(partial=0, runner=patient)(completions[:2], ["42"] * 2) == [1.0, 0.0]
    assert get_program_reward(runner=patient, entry="f")(["def f(): return 3"], [3]) == [1.0]


def test_reward_of_continued_and_conversational_completions():
    messages = [[{"role": "assistant", "content": f"Sure.\n```python\n{FINE}\n```"}]]
    prompts = [[{"role": "user", "content": "How many?"}]]
    assert program_reward(messages, ["42"], prompts=prompts, completion_ids=[[1]], trainer_state=None) == [1.0]
    assert program_reward([BODY], ["2"], prompts=[PROMPT]) == [1.0]
    assert program_reward([], []) == []


def test_reward_of_multiple_choice(patient):
    bodies = ["return 'c'", "return '\"C\"'", "return 'b'", "return 3", "return None", "return 'c )'"]
    reward = get_program_reward(runner=patient, multiple_choice=True)
    assert reward.__name__ == "program_reward_multiple_choice"
    assert reward([solution(body) for body in bodies], ["c"] * 6) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert reward([solution("return 'c'")] * 3, ["C", "(c)", "c ) 120"]) == [1.0] * 3
    # What is no letter is no answer, also where a program returns the same text
    odd = ["", " ", math.nan, None, 10**5000, ["c"], "nan"]
    programs = [solution(f"return {text!r}") for text in ("", "", "nan", "none", "1", "['c']", "nan")]
    assert reward(programs, odd) == [None] * 7


def test_reward_logs_failures(patient):
    metrics, columns = {}, {}
    completions = [FINE, solution("import os"), solution("return 1 / 0"), solution("return 'x'")]
    reward = get_program_reward(runner=patient)
    reward(completions, ["42"] * 4, log_metric=metrics.__setitem__, log_extra=columns.__setitem__)
    failed = {"forbidden", "error", "not_a_number"}
    names = [kind.replace(" ", "_") for kind in FAILURES]
    assert metrics == {f"agents/program_{name}_share": 0.25 * (name in failed) for name in names}
    reasons = ["42.0", "forbidden: import os", "error: ZeroDivisionError", "not a number"]
    assert columns == {"program_reward_read": reasons}


def test_reward_refuses_what_a_user_got_wrong(patient):
    for settings in ({"partial": 1.0}, {"partial": math.nan}, {"tolerance": -1}, {"entry": "a b"}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            get_program_reward(**settings)
    with pytest.raises(ValueError, match="no column `answer`"):
        program_reward([FINE])
