# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
The parser under attack: any text is an action or a reason why not, in a time that its length bounds.

`test_actions.py` says what is read from which text. Here it is only asked that nothing raises, hangs or is made up.
"""

import random
import time
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trl_agents.actions import ActionParser
from trl_agents.types import InvalidReason


LEGAL = [
    ["red", "green", "green apple", "mint green"],
    [str(number) for number in range(12)],
    ["e\u0301clair", "stra\u00dfe", "d'Artagnan's", "C++", "__init__", "[0 1]", "(", "\u202egreen"],
    [f"movie_{number}_(19{number:02d})" for number in range(100)],
    None,
]
# What models write, what breaks parsers, and what looks like one of our marks
PIECES = [
    *(
        "ACTION",
        "ACTION=",
        "action :",
        "**Action:**",
        "Action\n",
        "Reaction: ",
        "ACTION\u0301=",
        "\uff21CTION\uff1d",
        "ACT",
    ),
    *("red", "green", " apple", "mint  green", "1", "10", "movie_7_(1907)", "stra\u00dfe", "C++", "C"),
    *"=:()[]{}<>\"'`*_~.,;!?+-/&@\\|^$\n\r\t\v\f \x00\x1b\x7f\x85",
    *("\u0301", "\u0316\u0327", "\u200b", "\u200d", "\u202e", "\u2067", "\ufeff", "\u2028", "\u00a0", "\u3000"),
    *(
        "\ud800",
        "\udfff",
        "\ud83c\udf89",
        "\U0001f389",
        "\u0130",
        "\u0131",
        "\ufdfa",
        "\u1100\u1161",
        "\uff1d",
        "\u201c",
    ),
    *("</s>", "<|im_end|>", "<|", "|>", "((((((", "))))))", "****", "____", "\n\n\n", "ACTION=ACTION=ACTION="),
]
PARSERS = [
    ActionParser(),
    ActionParser(r"ACTION=(.+)"),
    ActionParser([r"(?i)final answer:\s*(?P<action>[^\n]+)", r"\[(\w+)\]", r"(?s)ACTION(.*)"]),
    ActionParser(r"(?=(\w+))", timeout=0.2),
]


def check(parser, text, legal_actions, cut_off=False):
    parsed = parser.parse(text, legal_actions, cut_off=cut_off)
    if parsed.action is None:
        assert (parsed.reason is InvalidReason.CUT_OFF) == cut_off
    else:
        assert parsed.reason is None
        assert parsed.action in legal_actions if legal_actions is not None else parsed.action.strip()
    assert parsed.matched is None or parsed.matched in text
    return parsed


def soup(rng):
    """A text of up to some hundred characters, mostly of pieces that mean something to the parser."""
    kind = rng.random()
    if kind < 0.1:
        return "".join(chr(rng.randrange(0x110000)) for _ in range(rng.randrange(40)))
    if kind < 0.3:  # a few of them many times
        return "".join(rng.choice(PIECES) * rng.randrange(1, 30) for _ in range(rng.randrange(1, 5)))
    return "".join(rng.choices(PIECES, k=rng.randrange(25)))


@pytest.mark.parametrize("number", [30_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_soup(number):
    rng, slowest, valid = random.Random(number), 0.0, 0
    started = time.process_time()
    for index in range(number):
        text, legal_actions = soup(rng), LEGAL[index % len(LEGAL)]
        began = time.process_time()
        parsed = check(PARSERS[index % len(PARSERS)], text, legal_actions, cut_off=index % 7 == 0)
        slowest = max(slowest, time.process_time() - began)
        valid += parsed.action is not None
    assert slowest < 0.3  # a collection of garbage among it
    assert (time.process_time() - started) / number < 1e-3
    assert 0.05 < valid / number < 0.95  # or nothing was tried


TEXTS = st.one_of(
    st.text(st.characters(codec=None, categories=None), max_size=60),  # surrogates too
    st.lists(st.sampled_from(PIECES), max_size=30).map("".join),
    st.builds(lambda piece, times, end: piece * times + end, st.sampled_from(PIECES), st.integers(1, 500), st.text()),
)


@settings(max_examples=2000, deadline=None)
@given(TEXTS, st.sampled_from(LEGAL), st.sampled_from(PARSERS), st.booleans())
@example("ACTION=" + "\u0301" * 500, LEGAL[2], PARSERS[0], True)
@example("\ud800ACTION=\udfff", None, PARSERS[0], False)
def test_any_text(text, legal_actions, parser, cut_off):
    first = check(parser, text, legal_actions, cut_off)
    assert parser.parse(text, legal_actions, cut_off=cut_off) == first  # nothing is remembered
    if parser.is_complete(text, legal_actions):
        assert check(parser, text, legal_actions).is_valid


@settings(max_examples=500, deadline=None)
@given(TEXTS, st.sampled_from([names for names in LEGAL if names]), st.data())
def test_a_last_word_counts_whatever_came_before(text, legal_actions, data):
    """On a line of its own the paper's form is always read."""
    action = data.draw(st.sampled_from([name for name in legal_actions if name not in ("(", "\u202egreen")]))
    assert check(PARSERS[0], f"{text}\nACTION={action}", legal_actions).action == action


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=8), TEXTS)
def test_any_names(legal_actions, text):
    parsed = check(PARSERS[0], f"{text}ACTION={legal_actions[0]}", legal_actions)
    if parsed.action is not None:  # nobody is given another's name
        spelled = unicodedata.normalize("NFC", " ".join(parsed.action.split())).casefold()
        assert spelled[:1] and parsed.matched


# -- bounded time -----------------------------------------------------------------------------------------------------

LONG = 200_000
RUNS = {  # text -> its form, of which `LONG` characters are made
    "wrappers": "\"'`*_~=:",
    "nested brackets": "([{<",
    "closing brackets": ")]}>",
    "combining marks": "e\u0301\u0316\u0327",
    "marks alone": "\u0301",
    "marks out of order": "\u0301\u0316",
    "surrogates": "\ud800",
    "surrogates the wrong way round": "\udfff\ud800",
    "NULs": "\x00",
    "right to left": "\u202e\u2067",
    "joiners": "\u200d\u200b\ufeff",
    "syllables": "\u1100\u1161\u11a8",
    "ligatures": "\ufdfa",
    "long folds": "\u00df\u0130",
    "line ends": "\r\n\x0b\x0c\x85\u2028",
    "wide heads": "\uff21\uff23\uff34\uff29\uff2f\uff2e\uff1d",
    "heads": "ACTION=",
    "heads with marks": "ACTION\u0301=",
    "half heads": "ACTIO",
    "capital letters": "A",
    "heads in bold": "**ACTION**: ",
    "heads on lines": "ACTION=**  \n",
    "signs": "ACTION" + "`" * 8,
    "tags": "<|x|></s>",
    "half tags": "<|</",
    "joined names": "red-",
    "names": "green apple ",
    "numbers": "1.",
}


@pytest.mark.parametrize("kind", RUNS)
def test_long_runs(kind):
    """Ten times the text takes about ten times as long; the timeout would hide that it does not."""
    parser = ActionParser(timeout=60)

    def seconds(length):
        run = (RUNS[kind] * (length // len(RUNS[kind]) + 1))[:length]
        best = 60.0
        for _ in range(2):
            began = time.process_time()
            for legal_actions in LEGAL[:3] + LEGAL[4:]:
                for text in (run, f"ACTION={run}", f"ACTION=red{run}", f"ACTION{run}=red", f"{run}\nACTION=red"):
                    check(parser, text, legal_actions, cut_off=True)
            best = min(best, time.process_time() - began)
        return best

    short, long = seconds(LONG // 10), seconds(LONG)
    assert long < 30 * short + 0.1
    assert long < 4.0  # 20 texts


BACKTRACKS = [  # a user's pattern, and what it goes astray in
    (r"(a+)+$", "a" * 60 + "!"),
    (r"(?:a|aa)+(b)", "a" * 100),
    (r"(.*)*ACTION=(.*)", "ACTION" * 2000),
    (r"(\w+\s?)*=", "word " * 2000),
    (r"((?:[^\"]|\\.)*)\"END", "\\" * 3000),
    (r"(?i)(?:action\s*)+[:=]+\s*(\S+)+!", "ACTION : " * 2000 + "x" * 60),
    (r"(x*)*(y*)*(z*)*END", "xyz" * 2000),
    (r"(?=(\w+)\1END)", "ab" * 5000),
]


@pytest.mark.parametrize(("pattern", "text"), BACKTRACKS)
def test_patterns_that_backtrack(pattern, text):
    parser = ActionParser(pattern, timeout=0.1)
    began = time.process_time()
    for legal_actions in (["a", "x"], None):
        check(parser, text, legal_actions)
        assert not parser.is_complete(text, legal_actions)
    assert time.process_time() - began < 1.0


def test_time_that_runs_out_in_between(monkeypatch):
    """The first look at a text is over in time, the next is not: the computer is busy."""
    looks = iter([(7, 10)] + [None] * 9)

    def find(self, text):
        if (span := next(looks)) is None:
            raise TimeoutError
        return span

    monkeypatch.setattr(ActionParser, "_find", find)
    for text in ("ACTION=red because", "ACTION=red"):
        ActionParser().is_complete(text, ["red"])


PATTERN_PIECES = ["(", ")", "(?:", "(?P<action>", "(?=", "(?!", "(?<=", "(?i)", "|", "*", "+", "*+", "+?", "{2,}", "^"]
PATTERN_PIECES += ["$", ".", r"\w", r"\s", r"\1", "[^a]", "[a-", "]", "a", "=", r"\b", r"\p{L}", "\ud800", "\x00"]


@settings(max_examples=1000, deadline=None)
@given(st.lists(st.sampled_from(PATTERN_PIECES), max_size=10).map("".join), TEXTS)
def test_any_pattern(pattern, text):
    """It is refused with a reason when the parser is made, or bears any text."""
    try:
        parser = ActionParser(pattern, timeout=0.05)
    except ValueError as error:
        assert "pattern" in str(error).lower()
        return
    began = time.process_time()
    check(parser, text + "a" * 50, ["a", "="])
    assert time.process_time() - began < 1.0
