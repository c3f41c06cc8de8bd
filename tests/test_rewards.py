# Licensed under the Apache License, Version 2.0 (see LICENSE).
import math
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_agents.rewards import accuracy as accuracy_module
from trl_agents.rewards import symbolic
from trl_agents.rewards.accuracy import accuracy_reward, get_accuracy_reward
from trl_agents.rewards.answers import find_answer, find_number, numbers_equal
from trl_agents.rewards.choice import choice_reward, find_choice, get_choice_reward
from trl_agents.rewards.completions import completion_texts
from trl_agents.rewards.format import (
    get_tag_count_reward,
    get_think_answer_format_reward,
    get_trigger_format_reward,
    tag_count_reward,
    think_answer_format_reward,
    trigger_format_reward,
)
from trl_agents.rewards.numeric import get_numeric_reward, numeric_reward
from trl_agents.rewards.programs import program_reward


TRIGGER = "Therefore, the answer is: "

NUMBERS = [  # answer, read after a trigger, as the whole text
    ("10", 10, 10),
    ("10.", 10, 10),
    ("1e1", 10, 10),
    ("ten", None, None),
    ("", None, None),
    ("1_0", None, None),
    ("1,234", 1234, 1234),
    ("1,234,567.5", 1234567.5, 1234567.5),
    ("1{,}234", 1234, 1234),
    ("1,23", None, None),
    ("1.234,56", None, None),
    ("1 234", None, None),
    ("$10", 10, 10),
    ("£10", 10, 10),
    ("€10", 10, 10),
    ("-$10", -10, -10),
    ("$-10", -10, -10),
    ("10 dollars", 10, 10),
    ("$10$", 10, 10),
    ("25%", 25, 25),
    ("25 percent", 25, 25),
    ("3/4", 0.75, 0.75),
    ("2 1/2", 2.5, 2.5),
    (r"-\frac{3}{4}", -0.75, -0.75),
    (r"\frac34", 0.75, 0.75),
    ("3/0", None, None),
    ("3/4/2020", None, None),
    ("nan", None, None),
    ("inf", None, None),
    ("1e999", None, None),
    ("−10", -10, -10),
    ("＋１０", 10, 10),
    ("- 10", None, None),
    ("١٠", 10, 10),
    ("10²", None, None),
    ("½", None, None),
    ("10万", None, None),
    ("10 apples", 10, None),
    ("10. It is right.", 10, None),
    ("10km", 10, None),
    ("10 or 12", None, None),
    ("10, 12", None, None),
    ("10-12", None, None),
    ("10:30", None, None),
    ("5 + 5", None, None),
    ("10^2", None, None),
    ("5x", None, None),
    (r"2\sqrt{3}", None, None),
    ("2 million", None, None),
    ("0x10", None, None),
    ("x = 10", None, None),
    ("about 10", None, None),
    ("**10**", 10, 10),
    ("<10>", 10, 10),
    (r"\(10\)", 10, 10),
    ('"10"', 10, 10),
    ("It is 10", None, None),
]


class TestFindNumber:
    @pytest.mark.parametrize(("answer", "stated", "alone"), NUMBERS, ids=[row[0] for row in NUMBERS])
    def test_table(self, answer, stated, alone):
        assert find_number(answer) == alone
        reply = "2 + 8 = 99.\n" + TRIGGER + answer
        for text in (reply, f"<think>7</think><answer>{answer}</answer>", rf"So \boxed{{{answer}}}."):
            assert find_number(text) == stated, text

    def test_docstring_is_the_table(self):
        rows = [line.split("|")[1] for line in find_number.__doc__.splitlines() if line.strip().startswith("| `")]
        documented = {answer for row in rows for answer in re.findall(r"`([^`]+)`", row)} - {"last_number"}
        tested = {answer for answer, _, _ in NUMBERS}
        assert documented <= tested, documented - tested
        assert tested - documented <= {"", "It is 10"}

    @pytest.mark.parametrize(
        ("text", "number"),
        [
            (f"{TRIGGER}10\nNo. {TRIGGER}12", 12),
            (f"{TRIGGER}10. {TRIGGER}", None),  # no way back
            ("THEREFORE,  THE  ANSWER  IS 10", 10),
            ("**The answer is:**\n\n10", 10),
            ("My final answer is 10.", 10),
            ("5 * 2 = <<5*2=10>>10\n#### 10", 10),
            (r"The answer is $\boxed{10}$.", 10),
            (r"\boxed{\text{10}}", 10),
            (r"\boxed{10", None),
            ("<answer>10", None),
            ("<answer>\n10\n</answer>", 10),
            ("<ANSWER>The answer is 10</ANSWER>", 10),
            ("<think>The answer is 10.</think> The answer is 12.", 12),
            ("<think>The answer is 10.</think>", None),
            ("<think>The answer is 10", None),
            ("so the answer is 10</think>12", 12),  # a prefilled <think>
            ("##### 10", None),
            ("Breathe answer is 10", None),
        ],
    )
    def test_triggers(self, text, number):
        assert find_number(text) == number

    def test_options(self):
        assert find_number("Answer: 10", trigger="Answer:") == 10
        assert find_number("The answer is 10", trigger="Answer:") is None
        assert find_number("Result 3, answer 10", trigger=["result", "answer"]) == 10
        assert find_number("<answer>10</answer>", trigger="<answer>") == 10
        assert find_number("10", require_trigger=True) is None
        assert find_number("The answer is 10", require_trigger=True) == 10

    @pytest.mark.parametrize(
        ("text", "number"),
        [
            ("He has 5 + 5 = 10 apples.", 10),
            ("from 3 to -4", -4),
            ("it costs $1,234.50.", 1234.5),
            ("The answer is ten, not 10", None),  # a trigger still decides
            ("1/1/1/1", None),
            ("v1.2.3", None),
            ("none", None),
        ],
    )
    def test_last_number(self, text, number):
        assert find_number(text, last_number=True) == number

    @pytest.mark.parametrize("trigger", ["", " ", [], [""], 3, [3]])
    def test_bad_trigger(self, trigger):
        for make in (get_numeric_reward, get_choice_reward):
            with pytest.raises(ValueError, match="`trigger` is a text"):
                make(trigger=trigger)


def test_find_answer():
    assert find_answer("nothing") is None
    assert find_answer("The answer is") == ""
    assert find_answer(r"\boxed{\frac{1}{2}} and") == r"\frac{1}{2}"
    assert find_answer("<answer> a\nb </answer>") == "a\nb"
    assert find_answer("The answer is: Paris, France.\nYes.") == "Paris, France."


@pytest.mark.parametrize(
    ("a", "b", "equal"),
    [
        (10, 10.01, True),
        (1, 1.01, True),  # 1.01 - 1 > 0.01 in floats
        (10, 10.02, False),
        (1 / 3, 0.33, True),
        (-10, 10, False),
        (1e9, 1e9 + 1, False),
        (1e15, 1e15 + 0.25, True),
        (math.nan, math.nan, False),
        (math.inf, math.inf, False),
        (1e308, -1e308, False),
    ],
)
def test_numbers_equal(a, b, equal):
    assert numbers_equal(a, b) is numbers_equal(b, a) is equal


class TestNumericReward:
    @pytest.mark.parametrize(
        ("text", "answer", "reward"),
        [
            ("10", "10", 1.0),
            (TRIGGER + "1,234", "1,234", 1.0),
            (TRIGGER + "870", "870.0", 1.0),
            (TRIGGER + "72", "He has 72.\n#### 72", 1.0),
            (TRIGGER + "10", 10, 1.0),
            (TRIGGER + "11", 10, 0.1),
            (TRIGGER + "1e300", 10, 0.1),
            (TRIGGER + "nan", "10", 0.0),
            ("I do not know", "10", 0.0),
            ("", "10", 0.0),
            ("10", "no number", None),
            ("10", "nan", None),
            ("10", math.inf, None),
            ("10", 10**400, None),
            ("10", None, None),
            ("1", True, None),
            ("10", Decimal("10"), 1.0),
            ("10", Decimal("sNaN"), None),
            ("10", [10], None),
            ("10", "１٠", 1.0),
        ],
    )
    def test_table(self, text, answer, reward):
        assert numeric_reward([text], answer=[answer]) == [reward]

    def test_variants(self):
        texts, answer = ["11", "10", "no", "10.5", "It is 10"], ["10"] * 5
        assert get_numeric_reward(partial=0)(texts, answer) == [0, 1, 0, 0, 0]
        assert get_numeric_reward(partial=0.5)(texts, answer) == [0.5, 1, 0, 0.5, 0]
        assert get_numeric_reward(tolerance=1)(texts, answer) == [1, 1, 0, 1, 0]
        assert get_numeric_reward(require_trigger=True)(texts, answer) == [0, 0, 0, 0, 0]
        assert get_numeric_reward(last_number=True)(texts, answer) == [0.1, 1, 0, 0.1, 1]

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"partial": 1.0}, "`partial` must lie"),
            ({"partial": -0.1}, "`partial` must lie"),
            ({"partial": math.nan}, "`partial` must lie"),
            ({"tolerance": -1}, "`tolerance` must be"),
            ({"tolerance": math.inf}, "`tolerance` must be"),
            ({"require_trigger": True, "last_number": True}, "choose one"),
        ],
    )
    def test_wrong_settings(self, settings, message):
        with pytest.raises(ValueError, match=message):
            get_numeric_reward(**settings)


CHOICES = [  # answer, read after a trigger, as the whole text
    ("c", "C", "C"),
    ("C", "C", "C"),
    ("c )", "C", "C"),
    ("(c)", "C", "C"),
    ("c.", "C", "C"),
    ("**C**", "C", "C"),
    (r"\text{C}", "C", "C"),
    ("Ｃ", "C", "C"),
    ("option c", "C", "C"),
    ("choice (C)", "C", "C"),
    ("C) 120 km", "C", None),
    ("C: 120", "C", None),
    ("C, because ...", "C", None),
    ("C. As for A, ...", "C", None),
    ("C, C", "C", None),
    ("Because", None, None),
    ("cat", None, None),
    ("C3", None, None),
    ("a dog", None, None),
    ("I think so", None, None),
    ("C because ...", None, None),
    ("A-level", None, None),
    ("I'm sure", None, None),
    ("C or D", None, None),
    ("C, D", None, None),
    ("(C) and (D)", None, None),
    ("A B C D", None, None),
    ("ſ", None, None),
    ("", None, None),
    ("3", None, None),
    ("I take C", None, None),
]


class TestChoice:
    @pytest.mark.parametrize(("answer", "stated", "alone"), CHOICES, ids=[row[0] for row in CHOICES])
    def test_table(self, answer, stated, alone):
        assert find_choice(answer) == alone
        for text in (TRIGGER + answer, f"<answer>{answer}</answer>", rf"\boxed{{{answer}}}"):
            assert find_choice(text) == stated, text

    def test_last_trigger(self):
        assert find_choice("The answer is C. No, the answer is D.") == "D"
        assert find_choice("Answer: C", trigger="Answer:") == "C"

    @pytest.mark.parametrize("gold", ["c", "C", "(C)", "c )", "c ) 120"])
    def test_reward(self, gold):
        assert choice_reward([TRIGGER + "c", TRIGGER + "d", "C or D", "zzz"], answer=[gold] * 4) == [1, 0, 0, 0]

    @pytest.mark.parametrize("gold", ["", "Paris", 2, 2.5, None, math.nan, ["c"], pytest.param(10**5000, id="huge")])
    def test_gold_without_a_letter_is_skipped(self, gold):
        assert choice_reward(["c"], answer=[gold]) == [None]


THINK = "<think>\n2 + 2\n</think>\n<answer>\n4\n</answer>"


class TestFormat:
    @pytest.mark.parametrize(
        ("text", "reward", "prefilled"),
        [
            (THINK, 1, 0),
            (f"\n {THINK}\n", 1, 0),
            ("<think>a</think><answer>4</answer>", 1, 0),
            ("a</think><answer>4</answer>", 0, 1),
            (THINK + "\nmore", 0, 0),  # open-r1's expression lets this pass
            (THINK + " more", 0, 0),
            ("more " + THINK, 0, 0),
            ("<think>a</think> so <answer>4</answer>", 0, 0),
            ("<think>a</think><answer> </answer>", 0, 0),
            ("<think> </think><answer>4</answer>", 0, 0),
            ("<answer>4</answer><think>a</think>", 0, 0),
            ("<think>a<answer>4</think></answer>", 0, 0),
            (THINK + THINK, 0, 0),
            ("<think>a<think>b</think><answer>4</answer>", 0, 0),
            ("<THINK>a</THINK><ANSWER>4</ANSWER>", 0, 0),
            ("<think>a</think><answer>4", 0, 0),
            ("", 0, 0),
        ],
    )
    def test_think_answer(self, text, reward, prefilled):
        assert think_answer_format_reward([text]) == [reward]
        assert get_think_answer_format_reward(prefilled=True)([text]) == [prefilled]

    @pytest.mark.parametrize(
        ("text", "reward", "prefilled"),
        [
            (THINK, 1, 0.75),
            (THINK + THINK, 0, 0),
            ("", 0, 0.25),
            ("a</think><answer>4</answer>", 0.75, 1),
            ("<answer></answer></answer>", 0.25, 0.5),
            ("</answer><think>", 0.5, 0.25),
        ],
    )
    def test_tag_count(self, text, reward, prefilled):
        assert tag_count_reward([text]) == [reward]
        assert get_tag_count_reward(prefilled=True)([text]) == [prefilled]

    @pytest.mark.parametrize(
        ("text", "reward"),
        [
            (f"2 + 2\n{TRIGGER}4", 1),
            (f"{TRIGGER}\n4\n", 1),
            (TRIGGER + "four apples.", 1),
            (TRIGGER, 0),
            (TRIGGER + "...", 0),
            (TRIGGER + "4\nIndeed", 0),
            (TRIGGER + "3\n" + TRIGGER + "4", 0),
            ("therefore, the answer is: 4", 0),
            ("4", 0),
        ],
    )
    def test_trigger(self, text, reward):
        assert trigger_format_reward([text]) == [reward]

    def test_other_trigger(self):
        reward = get_trigger_format_reward("#### ")
        assert reward(["so\n#### 4", TRIGGER + "4"]) == [1, 0]
        assert reward.__name__ == "trigger_format_reward_trigger"
        with pytest.raises(ValueError, match="`trigger` is a text"):
            get_trigger_format_reward("")


SAME_EITHER_WAY = [  # what math_verify and the comparison of numbers agree on
    ("<answer>0.5</answer>", "1/2", 1),
    (r"\boxed{\frac{1}{2}}", "1/2", 1),
    ("10", "10", 1),
    ("The answer is 10. So we are done", "10", 1),
    ("<answer>10 apples</answer>", "10", 1),
    ("<answer>$10</answer>", 10, 1),
    ("The answer is 1,234", 1234, 1),
    (r"<think>\boxed{9}</think> \boxed{72}", "9 * 8 = 72\n#### 72", 1),
    ("<answer>0.33</answer>", "1/3", 0),
    ("<answer>12</answer>", "10", 0),
    ("I do not know.", "1/2", 0),
    ("", "1/2", 0),
    ("10", "", None),
    ("10", math.nan, None),
    ("10", None, None),
]


def in_a_thread(call):
    results = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    thread.join()
    return results[0]


class TestAccuracy:
    @pytest.mark.parametrize(
        ("text", "answer", "reward"),
        [
            *SAME_EITHER_WAY,
            ("<think>x</think><answer>Paris.</answer>", " paris", 1),
            (r"\boxed{\text{New  York}}", "New York", 1),
            ("(C)", "c", 1),
            ("<answer>1+x</answer>", "x+1", 0),
        ],
    )
    def test_numbers_and_strings(self, text, answer, reward):
        assert get_accuracy_reward(verify="number")([text], [answer]) == [reward]

    @pytest.mark.parametrize(
        ("text", "answer", "reward"),
        [
            *SAME_EITHER_WAY,
            ("<answer>1+x</answer>", "$x+1$", 1),
            ("<answer>2^{3}</answer>", "8", 1),
            ("<answer>2^{3}</answer>", "2", 0),
            (r"<answer>Thus $x=\frac13$</answer>", r"\frac{1}{3}", 1),
            ("<answer>Paris</answer>", "Paris", None),
            ("<answer>" + "{" * 20_000 + "</answer>", "5", 0),
            ("<answer>" + "9^" * 10_000 + "9</answer>", "5", 0),
        ],
    )
    def test_math_verify(self, text, answer, reward):
        pytest.importorskip("math_verify")
        verify = get_accuracy_reward(verify="math_verify")
        assert verify([text], [answer]) == [reward]
        if "^" not in text:
            # TRL's async workers call rewards off the main thread
            assert in_a_thread(lambda: verify([text], [answer])) == [reward]

    def test_a_formula_that_never_ends_in_a_thread(self, monkeypatch):
        """Run there, it would keep the interpreter's lock, and with it the whole process, for hours."""
        pytest.importorskip("math_verify")
        monkeypatch.setattr(symbolic, "PARSING_TIMEOUT", 2)
        monkeypatch.setattr(symbolic, "VERIFY_TIMEOUT", 2)
        texts = [r"\boxed{9^{9^9}}", r"\boxed{100000000!}", r"\boxed{5}"]
        assert in_a_thread(lambda: get_accuracy_reward("math_verify")(texts, ["5"] * 3)) == [0, 0, 1]

    def test_the_process_for_threads_is_replaced(self, monkeypatch):
        pytest.importorskip("math_verify")
        verify = get_accuracy_reward(verify="math_verify")
        texts = [r"\boxed{\frac{1}{2}}", r"\boxed{3}"]
        assert in_a_thread(lambda: verify(texts, ["0.5"] * 2)) == [1, 0]
        symbolic._HELPER.process.kill()
        symbolic._HELPER.process.wait()
        assert in_a_thread(lambda: verify(texts, ["0.5"] * 2)) == [1, 0]
        monkeypatch.setattr(symbolic, "PARSING_TIMEOUT", 0)
        monkeypatch.setattr(symbolic, "VERIFY_TIMEOUT", 0)
        monkeypatch.setattr(symbolic, "GRACE_SECONDS", 0.5)
        os.kill(symbolic._HELPER.process.pid, signal.SIGSTOP)  # it is late
        assert in_a_thread(lambda: verify(texts[:1], ["0.5"])) == [0]
        monkeypatch.undo()
        assert in_a_thread(lambda: verify(texts, ["0.5"] * 2)) == [1, 0]

    def test_the_process_for_threads_after_a_fork_and_at_the_end(self):
        pytest.importorskip("math_verify")
        script = """
        import os, threading
        from trl_agents.rewards import get_accuracy_reward
        from trl_agents.rewards.symbolic import _HELPER
        verify, found = get_accuracy_reward("math_verify"), []
        def ask():
            thread = threading.Thread(target=lambda: found.extend(verify(["5"], ["5"])))
            thread.start()
            thread.join()
        ask()
        with _HELPER.lock:
            child = os.fork()
            if child == 0:
                ask()
                _HELPER.end()
                os._exit(0 if found == [1, 1] else 1)
            assert os.waitpid(child, 0)[1] == 0
        ask()
        assert found == [1, 1]
        print(_HELPER.process.pid)
        """
        command = [sys.executable, "-W", "error::ResourceWarning", "-c", textwrap.dedent(script)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
        with pytest.raises(ProcessLookupError):
            os.kill(int(done.stdout), 0)

    def test_without_math_verify(self, monkeypatch):
        monkeypatch.setattr(accuracy_module, "has_math_verify", lambda: False)
        accuracy_module._math_verify_or_warning.cache_clear()
        try:
            with pytest.warns(UserWarning, match="math_verify is not installed"):
                assert accuracy_reward(["<answer>10</answer>"], ["10"]) == [1]
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # once is enough, and not at all for whoever chose
                assert accuracy_reward(["<answer>10</answer>"], ["10"]) == [1]
                assert get_accuracy_reward("number")(["<answer>10</answer>"], ["10"]) == [1]
            with pytest.raises(ValueError, match="pip install trl-agents"):
                get_accuracy_reward(verify="math_verify")
        finally:
            accuracy_module._math_verify_or_warning.cache_clear()

    def test_unknown_verifier(self):
        with pytest.raises(ValueError, match="`verify` is one of"):
            get_accuracy_reward(verify="maths")


# -- every reward -----------------------------------------------------------------------------------------------------

number_accuracy = get_accuracy_reward(verify="number")
SCORES = [  # reward, the scores it may give
    (numeric_reward, {0, 0.1, 1}),
    (get_numeric_reward(partial=0.25, last_number=True), {0, 0.25, 1}),
    (choice_reward, {0, 1}),
    (number_accuracy, {0, 1}),
    (think_answer_format_reward, {0, 1}),
    (get_think_answer_format_reward(prefilled=True), {0, 1}),
    (tag_count_reward, {0, 0.25, 0.5, 0.75, 1}),
    (trigger_format_reward, {0, 1}),
]
REWARDS = [reward for reward, _ in SCORES]
WITH_ANSWER = REWARDS[:4]
of_reward = pytest.mark.parametrize("reward", REWARDS, ids=lambda reward: reward.__name__)
TEXTS = [
    "10",
    THINK,
    TRIGGER + "10",
    TRIGGER + "11",
    "The answer is (c)",
    "",
    "c",
    "no idea",
    "a</think><answer>10</answer>",
]
GOLDS = ["10", "4", "10", "10", "c", "7", "C", "none", "10"]

PIECES = ["1", "23", ",", ".", "-", "/", "e", "$", "%", " ", "\n", "{", "}", "(", "\\frac", "\\boxed{", "#### ", "c)"]
PIECES += ["<think>", "</think>", "<answer>", "</answer>", TRIGGER, "or", "×", "²", "１", "\ud800", "\x00", "\\text{"]
hostile = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)
texts = st.text() | hostile
golds = st.text() | hostile | st.integers() | st.floats() | st.decimals() | st.none() | st.sampled_from(["10", "c"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(texts, golds), max_size=4))
def test_any_text(rows):
    completions, answer = [text for text, _ in rows], [gold for _, gold in rows]
    for reward, scores in SCORES:
        rewards = reward(completions, answer=answer)
        assert len(rewards) == len(rows)
        allowed = scores | ({None} if reward in WITH_ANSWER else set())
        assert set(rewards) <= allowed, reward.__name__
        assert all(type(score) in (float, type(None)) for score in rewards)


REPEATED = [
    *PIECES,
    "1,",
    "1 ",
    "1/",
    "1,111",
    "the ",
    "the answer is ",
    "option ",
    "\\frac{",
    "C, ",
    "a",
    "\\,",
    "{}",
]


@pytest.mark.parametrize("piece", REPEATED)
def test_time_is_bounded(piece):
    long = (piece * 20_000)[:20_000]
    for text in (long, TRIGGER + long, "\\boxed{" + long, "1 " + long + "}"):
        for reward in REWARDS:
            start = time.process_time()
            assert len(reward([text], answer=["10"])) == 1
            assert time.process_time() - start < 0.5, reward.__name__


@of_reward
def test_conversational_equals_plain(reward):
    plain = reward(TEXTS, answer=GOLDS)
    assert len(set(plain)) > 1
    assert reward([[{"role": "assistant", "content": text}] for text in TEXTS], answer=GOLDS) == plain
    parts = [[{"role": "assistant", "content": [{"type": "text", "text": text}]}] for text in TEXTS]
    assert reward(parts, answer=GOLDS) == plain
    tools = [{"role": "assistant", "content": None, "tool_calls": []}, {"role": "tool", "content": "99"}]
    assert reward([[*tools, {"role": "assistant", "content": text}] for text in TEXTS], answer=GOLDS) == plain


def test_completion_texts():
    parts = [{"type": "image"}, {"type": "text", "text": "a"}, "b", {"type": "text", "text": None}]
    odd = [None, [], [{}], [{"content": None}], [{"content": parts}], {"content": "c"}, ["d"]]
    assert completion_texts(odd) == ["", "", "", "", "ab", "c", "d"]


@of_reward
def test_order(reward):
    rows = list(zip(TEXTS, GOLDS, reward(TEXTS, answer=GOLDS), strict=True))
    random.Random(0).shuffle(rows)
    completions, answer, expected = map(list, zip(*rows, strict=True))
    assert reward(completions, answer=answer) == expected


@of_reward
def test_what_trl_needs(reward):
    copy = pickle.loads(pickle.dumps(reward))
    assert copy.__name__ == reward.__name__ and re.fullmatch(r"[\w.-]+", copy.__name__)
    columns = {"prompts": TEXTS, "completion_ids": [[1]] * len(TEXTS), "trainer_state": None, "log_metric": print}
    logged = {}
    rewards = reward(completions=TEXTS, answer=GOLDS, log_extra=logged.__setitem__, other=GOLDS, **columns)
    assert rewards == copy(TEXTS, answer=GOLDS)
    assert [len(column) for column in logged.values()] == [len(TEXTS)] * (reward in WITH_ANSWER)
    assert reward([], answer=[]) == []


@of_reward
def test_wrong_use(reward):
    for completions in ("10", [10], None):
        with pytest.raises(ValueError, match="ompletion"):
            reward(completions, answer=["10"])
    if reward in WITH_ANSWER:
        with pytest.raises(ValueError, match="2 completions and 3 answers"):
            reward(["10"] * 2, answer=["10"] * 3)
        with pytest.raises(ValueError, match="rename_column"):
            reward(["10"])
        with pytest.raises(ValueError, match=r"pass \['10'\]"):
            reward(["10"], answer="10")


def test_names():
    assert get_numeric_reward().__name__ == numeric_reward.__name__ == "numeric_reward"
    names = {
        get_numeric_reward(partial=0).__name__: "numeric_reward_partial_0",
        get_numeric_reward(tolerance=1e-6, require_trigger=True).__name__: (
            "numeric_reward_tolerance_1e-06_require_trigger"
        ),
        get_choice_reward(trigger="Answer:").__name__: "choice_reward_trigger_answer",
        get_tag_count_reward(prefilled=True).__name__: "tag_count_reward_prefilled",
        number_accuracy.__name__: "accuracy_reward_verify_number",
    }
    assert list(names) == list(names.values())


class TestRewardHacks:
    def test_one_letter_scores_chance(self):
        rng = random.Random(0)
        answer = [rng.choice("abcde") for _ in range(1000)]
        for letter in "abcde":
            rewards = choice_reward([TRIGGER + letter] * 1000, answer=answer)
            assert sum(rewards) == answer.count(letter)

    @pytest.mark.parametrize("text", [" ".join("abcde"), "a, b, c, d, e", "(a) or (b) or (c)", "because", "42"])
    def test_hedging_scores_nothing(self, text):
        assert choice_reward([TRIGGER + text] * 5, answer=list("abcde")) == [0] * 5

    def test_any_number_stays_below_a_correct_one(self):
        answer = list(range(1, 101))
        assert max(numeric_reward([TRIGGER + "0"] * 100, answer=answer)) == 0.1
        many = TRIGGER + " ".join(map(str, answer))
        assert set(numeric_reward([many] * 100, answer=answer)) == {0}


def test_lazy_names():
    from trl_agents import rewards

    assert rewards.numeric_reward is numeric_reward
    assert {"ProgramRunner", "program_reward", "get_program_reward"} <= set(dir(rewards))
    with pytest.raises(AttributeError):
        rewards.no_such_name  # noqa: B018


@pytest.mark.parametrize("algorithm", ["GRPO", "RLOO", "AgentGRPO"])
def test_in_trl_s_own_trainer(algorithm, tmp_path):
    """And TRL's soft length penalty in ours."""
    import trl
    from datasets import Dataset
    from trl.rewards import get_soft_overlong_punishment

    import trl_agents
    from trl_agents.tiny import tiny_model, tiny_tokenizer

    tokenizer = tiny_tokenizer([THINK, TRIGGER + "10", "What is 2 + 2?"])
    rewards = [
        numeric_reward,
        get_numeric_reward(partial=0.0),
        choice_reward,
        think_answer_format_reward,
        tag_count_reward,
        trigger_format_reward,
        accuracy_reward,
        program_reward,
        get_soft_overlong_punishment(max_completion_len=8, soft_punish_cache=4),
    ]
    library = trl_agents if algorithm.startswith("Agent") else trl
    args = getattr(library, f"{algorithm}Config")(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=8,
        logging_steps=1,
        log_completions=True,  # the columns that rewards log must fit the table
        save_strategy="no",
        beta=0.0,  # a reference model would be loaded by the name that this model lacks
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = getattr(library, f"{algorithm}Trainer")(
        tiny_model(tokenizer, hidden_size=32),
        reward_funcs=list(rewards),
        args=args,
        train_dataset=Dataset.from_dict({"prompt": ["What is 2 + 2?"] * 4, "answer": ["4", "c", "1,234", "10"]}),
        processing_class=tokenizer,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # math_verify may be missing here
        trainer.train()
    logged = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    means = {reward.__name__: logged[f"rewards/{reward.__name__}/mean"] for reward in rewards}
    penalty = means.pop("soft_overlong_punishment_reward")
    assert -1 <= penalty <= 0 and all(mean is None or 0 <= mean <= 1 for mean in means.values())  # None: no gold
