# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Numbers and letters found in answers, and the rewards that compare them: tables of cases."""

import math
import re
from decimal import Decimal

import pytest

from trl_agents.rewards.answers import find_answer, find_number, numbers_equal
from trl_agents.rewards.choice import choice_reward, find_choice, get_choice_reward
from trl_agents.rewards.numeric import get_numeric_reward, numeric_reward


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
