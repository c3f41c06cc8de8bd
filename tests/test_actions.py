# Licensed under the Apache License, Version 2.0 (see LICENSE).
import copy
import pickle
import re
import time

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from trl_agents.actions import ActionParser
from trl_agents.types import InvalidReason


ARMS = ["red", "green", "blue", "green apple", "mint green"]
DIGITS = ["0", "1", "2", "10"]
MOVIES = ["star_wars_(1977)", "contact_(1997)", "liar_liar_(1997)"]
CLOTHES = [
    "Velvet Vogue Jacket",
    "d'Artagnan's",
    "d'Artagnan",
    '"Quoted" Dress',
    "[0 1]",
    "Go!",
    "C",
    "C++",
    "__init__",
]

READ = [  # text, legal actions, action
    # The paper's form and what models make of it
    ("ACTION=green", ARMS, "green"),
    ("ACTION = green", ARMS, "green"),
    ("ACTION: green", ARMS, "green"),
    ("Action=[green]", ARMS, "green"),
    ("action=GREEN", ARMS, "green"),
    ('ACTION="green".', ARMS, "green"),
    ("ACTION='green'", ARMS, "green"),
    ("ACTION=“green”", ARMS, "green"),
    ("ACTION=`green`", ARMS, "green"),
    ("ACTION=(green)", ARMS, "green"),
    ("ACTION={green}", ARMS, "green"),
    ("ACTION=<green>", ARMS, "green"),
    ("ACTION=>green", ARMS, "green"),
    ("ACTION==green", ARMS, "green"),
    ("ACTION=【green】", ARMS, "green"),
    ("ACTION：green。", ARMS, "green"),
    ("ACTION=green</s>", ARMS, "green"),
    ("ACTION=green<|im_end|>", ARMS, "green"),
    ("**ACTION=green**", ARMS, "green"),
    ("ACTION=**green**because", ARMS, "green"),
    ("**ACTION:** green", ARMS, "green"),
    ("**Action**: *green*", ARMS, "green"),
    ("**Action:**\n\ngreen", ARMS, "green"),
    ("**Action:**\n**green**", ARMS, "green"),
    ("__ACTION=green__", ARMS, "green"),
    ("ACTION=_green_", ARMS, "green"),
    ("ACTION=\ngreen", ARMS, "green"),
    ("ACTION= \t green \n", ARMS, "green"),
    ("ACTION=green\r\nDone.", ARMS, "green"),
    ('{"action": "green"}', ARMS, "green"),
    ('**"[ACTION=green]"**', ARMS, "green"),
    ("ACTION=green because it pays", ARMS, "green"),
    ("ACTION=green, because it pays", ARMS, "green"),
    ("ACTION=green... or so", ARMS, "green"),
    ("ACTION=green - the best", ARMS, "green"),
    ("ACTION=green--because", ARMS, "green"),
    ("ACTION=green!!!", ARMS, "green"),
    ("ACTION=green🎉", ARMS, "green"),
    (r"ACTION=green\nDone", ARMS, "green"),
    ("so I thinkACTION=green", ARMS, "green"),
    ("final_action: green", ARMS, "green"),
    ("My final ACTION=green", ARMS, "green"),
    # The last statement wins
    ("ACTION=red\nNo, ACTION=blue", ARMS, "blue"),
    ("ACTION=red or rather ACTION=blue.", ARMS, "blue"),
    ("ACTION=redACTION=blue", ARMS, "blue"),
    ("ACTION=mauve, then ACTION=blue", ARMS, "blue"),
    ("ACTION=X is the form. ACTION=blue", ARMS, "blue"),
    ("ACTION=ACTION=blue", ARMS, "blue"),
    ("ACTION=blue. The reaction: red flowers", ARMS, "blue"),
    ("ACTION=blue\nACTION=", ARMS, "blue"),
    ("ACTION=blue\nACTION=  \n", ARMS, "blue"),
    # Names with spaces, names within names
    ("ACTION=mint green", ARMS, "mint green"),
    ("ACTION=Mint   Green.", ARMS, "mint green"),
    ("ACTION=mint\u00a0green", ARMS, "mint green"),
    ("ACTION=green apple", ARMS, "green apple"),
    ("ACTION=green apple pie", ARMS, "green apple"),
    ("ACTION=green apples", ARMS, "green"),
    ("ACTION=1", DIGITS, "1"),
    ("ACTION=10", DIGITS, "10"),
    ("ACTION=1.", DIGITS, "1"),
    ("ACTION=1, as 10 is worse", DIGITS, "1"),
    ("ACTION=10 of 1", DIGITS, "10"),
    ("ACTION=-1", ["1", "-1"], "-1"),
    # Punctuation inside names
    ("ACTION=star_wars_(1977)", MOVIES, "star_wars_(1977)"),
    ("ACTION=Star_Wars_(1977).", MOVIES, "star_wars_(1977)"),
    ("ACTION=(star_wars_(1977))", MOVIES, "star_wars_(1977)"),
    ("ACTION=`contact_(1997)`", MOVIES, "contact_(1997)"),
    ('ACTION="velvet vogue jacket"', CLOTHES, "Velvet Vogue Jacket"),
    ("ACTION=d'Artagnan's", CLOTHES, "d'Artagnan's"),
    ("ACTION=d’Artagnan’s", CLOTHES, "d'Artagnan's"),
    ("ACTION='d'Artagnan'", CLOTHES, "d'Artagnan"),
    ('ACTION="Quoted" Dress', CLOTHES, '"Quoted" Dress'),
    ('ACTION=""Quoted" Dress"', CLOTHES, '"Quoted" Dress'),
    ("ACTION=[0 1]", CLOTHES, "[0 1]"),
    ("ACTION=go!", CLOTHES, "Go!"),
    ("ACTION=C", CLOTHES, "C"),
    ("ACTION=C++.", CLOTHES, "C++"),
    ("ACTION=__init__", CLOTHES, "__init__"),
    ("ACTION=<", ["<", ">", "."], "<"),
    ("ACTION=.", ["<", ">", "."], "."),
    ("ACTION=a=b: c", ["a=b: c"], "a=b: c"),
    # Case and Unicode
    ("ACTION=a", ["a", "A"], "a"),
    ("ACTION=(A)", ["a", "A"], "A"),
    ("ACTION=STRASSE", ["straße"], "straße"),
    ("ACTION=cafe\u0301", ["café"], "café"),
    ("ACTION=caf\u00e9", ["cafe\u0301"], "cafe\u0301"),
    ("ACTION=绿色。", ["绿色", "红色"], "绿色"),
    ("ACTION=top‑left", ["top-left"], "top-left"),
]

NOT_READ = [  # text, legal actions, reason
    ("", ARMS, InvalidReason.NO_MATCH),
    ("I take green.", ARMS, InvalidReason.NO_MATCH),
    ("green", ARMS, InvalidReason.NO_MATCH),
    ("ACTION green", ARMS, InvalidReason.NO_MATCH),
    ("ACTIONS: green", ARMS, InvalidReason.NO_MATCH),
    ("Reaction: green", ARMS, InvalidReason.NO_MATCH),
    ("ACTION=", ARMS, InvalidReason.NO_MATCH),
    ("ACTION= \n ", ARMS, InvalidReason.NO_MATCH),
    ("ACTION=...", ARMS, InvalidReason.ILLEGAL),
    ("ACTION=X", ARMS, InvalidReason.ILLEGAL),
    ("ACTION=mauve", ARMS, InvalidReason.ILLEGAL),
    ("ACTION=not green", ARMS, InvalidReason.ILLEGAL),
    ("ACTION=the green one", ARMS, InvalidReason.ILLEGAL),
    ("ACTION=green, no: ACTION=mauve", ARMS, InvalidReason.ILLEGAL),
    ("ACTION=gre", ARMS, InvalidReason.ILLEGAL),
    ("ACTION=mint", ARMS, InvalidReason.ILLEGAL),
    ("ACTION=greenish", ARMS, InvalidReason.ILLEGAL),
    ("ACTION=green-ish", ARMS, InvalidReason.ILLEGAL),
    ("ACTION=green_apple", ARMS, InvalidReason.ILLEGAL),
    ("ACTION=green's", ARMS, InvalidReason.ILLEGAL),
    ("ACTION=green/blue", ARMS, InvalidReason.ILLEGAL),
    ("ACTION=green\u0302", ARMS, InvalidReason.ILLEGAL),
    ("ACTION=100", DIGITS, InvalidReason.ILLEGAL),
    ("ACTION=1.5", DIGITS, InvalidReason.ILLEGAL),
    ("ACTION=1,000", DIGITS, InvalidReason.ILLEGAL),
    ("ACTION=-1", DIGITS, InvalidReason.ILLEGAL),
    ("ACTION=²", DIGITS, InvalidReason.ILLEGAL),
    ("ACTION=01", DIGITS, InvalidReason.ILLEGAL),
    ("ACTION=star_wars_", MOVIES, InvalidReason.ILLEGAL),
    ("ACTION=star wars (1977)", MOVIES, InvalidReason.ILLEGAL),
    ("ACTION=C+x", ["C"], InvalidReason.ILLEGAL),
    ("ACTION=C++", ["C"], InvalidReason.ILLEGAL),
    ("ACTION=GO", ["go", "Go"], InvalidReason.ILLEGAL),
    ("ACTION=" + "(" * 17 + "green", ARMS, InvalidReason.ILLEGAL),
    ("ACTION=green", [], InvalidReason.ILLEGAL),
    ("ACTION=green", [""], InvalidReason.ILLEGAL),
    ("ACTION=...", [""], InvalidReason.ILLEGAL),
]


@pytest.mark.parametrize(("text", "legal_actions", "action"), READ)
def test_reads(text, legal_actions, action):
    parsed = ActionParser().parse(text, legal_actions)
    assert (parsed.action, parsed.reason) == (action, None)
    assert parsed.matched and parsed.matched in text


@pytest.mark.parametrize(("text", "legal_actions", "reason"), NOT_READ)
def test_does_not_read(text, legal_actions, reason):
    parsed = ActionParser().parse(text, legal_actions)
    assert (parsed.action, parsed.reason) == (None, reason)
    assert (parsed.matched is None) == (reason is InvalidReason.NO_MATCH)
    assert ActionParser().parse(text, legal_actions, cut_off=True).reason is InvalidReason.CUT_OFF


@pytest.mark.parametrize(
    ("text", "legal_actions", "action"),
    [
        ("I think, therefore I", ARMS, None),
        ("ACTION=gre", ARMS, None),
        ("ACTION=green app", ARMS, None),  # not green
        ("ACTION=green appl.", ARMS, "green"),  # the sentence went on: no name was cut
        ("ACTION=green app\nThe", ARMS, "green"),
        ("ACTION=green", ARMS, "green"),
        ("ACTION=green because app", ARMS, "green"),
        ("ACTION=1", DIGITS, "1"),
        ("ACTION=blue\nSo ACTION=", ARMS, "blue"),
        ("ACTION=blue\nSo ACTION=gre", ARMS, None),
    ],
)
def test_a_reply_that_was_cut_off(text, legal_actions, action):
    parsed = ActionParser().parse(text, legal_actions, cut_off=True)
    assert parsed.action == action
    assert parsed.reason is (InvalidReason.CUT_OFF if action is None else None)


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ("ACTION=green", "green"),
        ("ACTION: Mint green \nDone", "Mint green"),
        ('ACTION="green".', "green"),
        ("**ACTION=[green]**", "green"),
        ("ACTION=green</s>", "green"),
        ("ACTION=green<|im_end|>", "green"),
        ("ACTION=star_wars_(1977).", "star_wars_(1977)"),
        ("ACTION=(a) or (b)", "(a) or (b)"),
        ("(ACTION=f(x))", "f(x)"),
        ("ACTION=[green", "green"),
        ("ACTION=d'Artagnan's", "d'Artagnan's"),
        ("ACTION=1.5", "1.5"),
        ("ACTION=?", "?"),
        ("ACTION=red. ACTION=blue", "blue"),
        ("ACTION=", None),
    ],
)
def test_without_legal_actions_the_capture_is_the_action(text, action):
    assert ActionParser().parse(text).action == action


def test_the_first_pattern_that_matches_decides():
    parser = ActionParser([r"ACTION=(\w+)", r"\b(red|blue)\b"])
    assert parser.parse("ACTION=red as blue is bad", ARMS).action == "red"
    assert parser.parse("red, no, blue it is", ARMS).action == "blue"
    assert parser.parse("ACTION=mauve as blue is bad", ARMS).reason is InvalidReason.ILLEGAL
    assert ActionParser(parser.patterns[::-1]).parse("ACTION=red as blue is bad", ARMS).action == "blue"


def test_a_greedy_group_does_not_hide_the_last_statement():
    parser = ActionParser(r"ACTION=(.+)")
    assert parser.parse("ACTION=red fails, ACTION=mauve too, so ACTION=blue.", ARMS).action == "blue"
    assert ActionParser(r"(?s)ACTION=(.+)").parse("ACTION=red\nACTION=blue\n", ARMS).action == "blue"
    # What lies within a word is no statement of its own.
    assert ActionParser(r"(\w+)").parse("red green", ARMS).action == "green"
    assert ActionParser(r"ACTION=\s*(\w+)").parse("ACTION= green", ARMS).action == "green"
    parser = ActionParser(r"ACTION=(?P<action>.+)|(?P<action>red|blue)")
    assert parser.parse("ACTION=red as blue is bad", ARMS).action == "red"


def test_the_group_sets_how_far_a_name_goes():
    assert ActionParser(r"ACTION=(\w+)").parse("ACTION=green apple", ARMS).action == "green"
    assert ActionParser(r"ACTION=(.+)").parse("ACTION=green apple", ARMS).action == "green apple"
    assert ActionParser(r"<act>(.*?)</act>").parse("<act> Mint green </act>", ARMS).action == "mint green"


def test_the_named_group_is_preferred_and_may_be_missing():
    parser = ActionParser(r"(go|take) (?:(?P<action>\w+)|(\d+;))")
    assert parser.parse("go red", ARMS).action == "red"
    assert ActionParser(r"(go|take) (\w+)").parse("go red", ARMS).matched == "go"
    assert ActionParser(r"go (?:up|(\w+))").parse("go up", ARMS).reason is InvalidReason.NO_MATCH


def test_patterns_are_used_as_written():
    assert ActionParser(r"MOVE (\w+)").parse("MOVE Red", ARMS).action == "red"
    assert ActionParser(r"MOVE (\w+)").parse("move Red", ARMS).action is None
    assert ActionParser(r"(?i)MOVE (\w+)").parse("move Red", ARMS).action == "red"
    assert ActionParser(r"\b([A-C])\b").parse("B is a better choice", ["A", "B"]).action == "B"


@pytest.mark.parametrize(
    "legal_actions", [ARMS, DIGITS, MOVIES, CLOTHES, ["a", "A"], [f"item {i}" for i in range(200)]]
)
def test_format_is_read_back(legal_actions):
    parser = ActionParser()
    parser.check_legal_actions(legal_actions)
    for action in legal_actions:
        assert parser.format(action) == f"ACTION={action}"
        assert parser.parse(parser.format(action), legal_actions).action == action


@pytest.mark.parametrize(
    ("pattern", "action", "text"),
    [
        (r"MOVE:\s*(\w+)", "up", "MOVE:up"),
        (r"(?i)(?:action|move)\s+[=:]+\s*(\d)", "3", "action =3"),
        (r"<action>(.*?)</action>", "mint green", "<action>mint green</action>"),
        (r"(?m)^go\b (?P<action>[a-z ]+)$", "mint green", "go mint green"),
        (r"\[(\d+)\]", "10", "[10]"),
        (r"(?<=act )(\w+)(?!x)", "up", "act up"),
        (r"(?<!no )go\s+?(\w+)", "up", "go up"),
        (r"(a|b)\.{2,3}(?P<action>\w+)", "up", "a..up"),
        (r'\{"move"\s*:\s*"([^"]+)"\}', "up", '{"move":"up"}'),
        (r"\\boxed\{([^{}]*)\}", "up", r"\boxed{up}"),
        (r"x(?:y|z=(\w+))?!", "up", "xz=up!"),
        (r"[^a](?i:go)(?>[-_])(\w+)", "up", " go-up"),
        (r"\b(up|down)\b", "down", "down"),
        (r"(?x) ACTION = (\w+)  # a comment", "up", "ACTION=up"),
    ],
)
def test_format_follows_the_pattern(pattern, action, text):
    assert ActionParser(pattern).format(action) == text
    ActionParser(pattern).check_legal_actions([action])


def test_format_takes_the_pattern_that_can_produce_the_action():
    parser = ActionParser([r"ARM=(\d+)", r"COLOUR=(\w+)"])
    assert [parser.format("7"), parser.format("red")] == ["ARM=7", "COLOUR=red"]


def test_a_template_is_used():
    parser = ActionParser(r"(?x) go \s (\w+)", template="I go {action}.")
    assert parser.format("red") == "I go red."
    with pytest.raises(ValueError, match="'red'.*`template=`"):
        ActionParser(r"(?x) go \s (\w+)").format("red")
    with pytest.raises(ValueError, match="'red'"):
        ActionParser(r"go (\w+)", template="take {action}").check_legal_actions(["red"])
    assert ActionParser(template="ACTION: {action}").format("{0} {action}") == "ACTION: {0} {action}"


@pytest.mark.parametrize(
    ("parser", "legal_actions", "culprit"),
    [
        (ActionParser(r"ACTION=(\d)"), ["1", "green"], "green"),
        (ActionParser(r"ACTION=(\d)"), ["1", "10"], "10"),
        (ActionParser(r"ACTION=(\w+)"), ["red", "mint green"], "mint green"),
        (ActionParser(r"ACTION=(red|blue)"), ["red", "green"], "green"),
        (ActionParser([r"ACTION=(red|blue)", r"A=(\d)"]), ["red", "3", "x"], "x"),
        (ActionParser(), ["red", ""], ""),
        (ActionParser(), ["red", "ACTION=red"], "ACTION=red"),
        (ActionParser(), ["mint green", "mint  green"], "mint green"),
    ],
)
def test_a_legal_action_that_no_pattern_can_produce(parser, legal_actions, culprit):
    with pytest.raises(ValueError, match="legal action") as error:
        parser.check_legal_actions(legal_actions)
    assert repr(culprit) in str(error.value)
    assert all(repr(pattern) in str(error.value) for pattern in parser.patterns)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"patterns": "ACTION=(\\w+"}, ["'ACTION=(\\\\w+'", "not a regular expression", "mend"]),
        ({"patterns": ["(a)", "[a"]}, ["'[a'", "not a regular expression"]),
        ({"patterns": "(?V0V1)(a)"}, ["'(?V0V1)(a)'", "not a regular expression"]),
        ({"patterns": r"ACTION=\w+"}, [r"'ACTION=\\w+'", "no group", "brackets"]),
        ({"patterns": r"ACTION=(?:\w+)"}, ["no group"]),
        ({"patterns": []}, ["[]", "at least one"]),
        ({"patterns": 5}, ["5", "a list"]),
        ({"patterns": b"(a)"}, ["b'(a)'", "a list"]),
        ({"patterns": {"(a)"}}, ["{'(a)'}", "a list"]),
        ({"patterns": [b"(a)"]}, ["b'(a)'", "a string"]),
        ({"patterns": [re.compile("(a)")]}, ["re.compile", "`.pattern`"]),
        ({"template": "ACTION="}, ["'ACTION='", "{action}"]),
        ({"template": "{action} {action}"}, ["once"]),
        ({"template": 5}, ["5", "{action}"]),
        ({"timeout": 0}, ["0", "positive"]),
        ({"timeout": float("inf")}, ["inf", "positive"]),
        ({"timeout": float("nan")}, ["nan", "positive"]),
        ({"timeout": "1"}, ["'1'", "positive"]),
        ({"timeout": True}, ["True", "positive"]),
    ],
)
def test_construction_errors_name_the_value_and_the_mend(arguments, words):
    with pytest.raises(ValueError) as error:
        ActionParser(**arguments)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_wrong_types_are_programming_errors():
    parser = ActionParser()
    for text in (None, b"ACTION=red", 3, ["ACTION=red"]):
        with pytest.raises(TypeError, match=type(text).__name__):
            parser.parse(text, ARMS)
    for legal_actions in ("red", [1, 2], 3, [["red"]]):
        with pytest.raises(ValueError, match="strings"):
            parser.parse("ACTION=red", legal_actions)
        with pytest.raises(ValueError, match="strings"):
            parser.check_legal_actions(legal_actions)


def test_value_semantics():
    parser = ActionParser([r"A=(\w+)", r"B=(\d+)"], template="A={action}", timeout=0.5)
    for twin in (pickle.loads(pickle.dumps(parser)), copy.deepcopy(parser), eval(repr(parser))):
        assert twin == parser and hash(twin) == hash(parser)
        assert twin.parse("A=red", ARMS).action == "red" and twin.format("red") == "A=red"
    assert ActionParser() == ActionParser() == eval(repr(ActionParser()))
    assert repr(ActionParser()) == "ActionParser()"
    assert ActionParser(r"A=(\w+)") == ActionParser([r"A=(\w+)"]) != ActionParser()
    assert ActionParser(timeout=0.5) != ActionParser() != ActionParser(template="ACTION: {action}")
    assert ActionParser() != "ActionParser()"


# Any text


PIECES = st.sampled_from(
    [
        "ACTION",
        "ACTION=",
        "action :",
        "=",
        ":",
        "green",
        "Green apple",
        "1",
        "10",
        "(",
        "[",
        "**",
        "_",
        "'",
        '"',
        "`",
        "\n",
    ]
    + [
        " ",
        ".",
        ",",
        "-",
        "+",
        "</s>",
        "<|x|>",
        "\u0301",
        "\u200b",
        "ı",
        "ß",
        "\ud800",
        "\x00",
        "🎉",
        "e",
        "\\n",
        "\r",
    ]
)
TEXTS = st.one_of(st.text(), st.text(st.characters()), st.lists(PIECES, max_size=20).map("".join))
NAMES = st.one_of(
    st.text(min_size=1, max_size=12),
    st.lists(st.sampled_from("ab1 _-.'\"()[]*+:=é"), min_size=1, max_size=8).map("".join),
)
USER_PARSERS = [
    ActionParser(pattern, timeout=0.2)
    for pattern in (
        r"ACTION=(.+)",
        r"(\w*)",
        r"(?s)(?:ACTION)?(.*)",
        r"(?=(.))",
        r"(?<=(\w))=",
        [r"(a+)+b", r"=(\S+)"],
    )
]


@settings(max_examples=300, deadline=None)
@given(
    text=TEXTS, legal_actions=st.none() | st.just(ARMS + DIGITS) | st.lists(NAMES, max_size=6), cut_off=st.booleans()
)
def test_any_text_gives_a_legal_action_or_a_reason(text, legal_actions, cut_off):
    for parser in (ActionParser(), *USER_PARSERS):
        parsed = parser.parse(text, legal_actions, cut_off=cut_off)
        assert (parsed.action is None) == (parsed.reason is not None)
        assert parsed.action is None or legal_actions is None or parsed.action in legal_actions
        assert parsed.action != ""
        if parsed.action is None:
            assert (parsed.reason is InvalidReason.CUT_OFF) == cut_off
            if not cut_off:
                assert (parsed.reason is InvalidReason.NO_MATCH) == (parsed.matched is None)


@settings(max_examples=300, deadline=None)
@given(junk=TEXTS, action=st.sampled_from(ARMS + DIGITS + MOVIES + CLOTHES), more=TEXTS)
@example(junk="ACTION=", action="green", more="")
@example(junk="ACTION:**\n", action="green", more="apple")
@example(junk="reACTION*", action="1", more="0")
def test_what_format_renders_is_found_behind_any_junk(junk, action, more):
    legal_actions = ARMS + DIGITS + MOVIES + CLOTHES
    parser = ActionParser()
    text = junk + parser.format(action)
    assert parser.parse(text, legal_actions).action == action
    assert parser.parse(text, legal_actions, cut_off=True).action == action
    assume("action" not in more.casefold())
    assert parser.parse(f"{text}\n{more}", legal_actions).action == action


@settings(max_examples=300, deadline=None)
@given(legal_actions=st.lists(NAMES, min_size=1, max_size=5, unique=True), junk=TEXTS)
def test_names_that_pass_the_check_are_always_read_back(legal_actions, junk):
    parser = ActionParser()
    for action in legal_actions:
        try:
            parser.check_legal_actions([action])
        except ValueError:
            continue
        try:
            parser.check_legal_actions(legal_actions)
        except ValueError:
            assume(False)
        assert parser.parse(junk + parser.format(action), legal_actions).action == action


@settings(max_examples=200, deadline=None)
@given(action=st.from_regex(r"[A-Za-z][A-Za-z0-9_' ()-]{0,20}[A-Za-z0-9)]", fullmatch=True))
def test_ordinary_names_pass_the_check(action):
    assume("action" not in action.casefold())
    ActionParser().check_legal_actions([action])


@settings(max_examples=300, deadline=None)
@given(
    pattern=st.lists(
        st.sampled_from(
            [
                "(",
                "(?:",
                "(?P<action>",
                ")",
                "|",
                "*",
                "+?",
                "{2}",
                "{",
                "[^a]",
                r"\s",
                r"\1",
                "a",
                "(?i)",
                "(?<!",
                "]",
            ]
        ),
        max_size=10,
    ).map("".join)
)
def test_any_pattern_is_used_or_refused(pattern):
    try:
        parser = ActionParser(pattern, timeout=0.2)
    except ValueError:
        return
    try:
        text = parser.format("green")
    except ValueError as error:
        assert repr(pattern) in str(error)
    else:
        assert parser.parse(text, ["green"]).action == "green"


# Bounded time. The bounds are many times what it takes, and far below what anything worse than linear would.


MILLION = 10**6
HOSTILE = {
    "heads": "ACTION=" * (MILLION // 7),
    "spaced heads": "ACTION = " * (MILLION // 9),
    "heads without a sign": "ACTION" * (MILLION // 6),
    "bold heads": "ACTION**" * (MILLION // 8),
    "bold heads on lines": "ACTION=**\n" * (MILLION // 10),
    "statements": "ACTION=red " * (MILLION // 11),
    "brackets": "ACTION=" + "(" * MILLION,
    "nested brackets": "ACTION=" + "(" * (MILLION // 2) + ")" * (MILLION // 2),
    "pairs": "ACTION=" + "()" * (MILLION // 2),
    "spaces": "ACTION=" + " " * MILLION,
    "spaces in a name": "ACTION=mint" + " " * MILLION + "green",
    "newlines": "ACTION=" + "\n" * MILLION,
    "one letter": "ACTION=" + "a" * MILLION,
    "no head": "A" * MILLION,
    "marks": "ACTION=" + "\u0301\u0316" * (MILLION // 2),
    "underscores": "ACTION=red" + "_" * MILLION,
    "tags": "ACTION=red" + "</s>" * (MILLION // 4),
    "open tags": "ACTION=red" + "<|" * (MILLION // 2),
    "dots": "ACTION=" + "." * MILLION,
    "zeros": "ACTION=" + "\x00" * MILLION,
}
HOSTILE_BUT_LEGAL = {"spaces in a name": "mint green"}
HOSTILE_BUT_LEGAL |= dict.fromkeys(["statements", "underscores", "tags", "open tags"], "red")


def seconds(function, *arguments, **options):
    start = time.process_time()
    result = function(*arguments, **options)
    return time.process_time() - start, result


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_million_hostile_characters(kind):
    # The timeout would hide a slow pattern: without it, too, the default must be linear.
    parser = ActionParser(timeout=60)
    taken, parsed = seconds(parser.parse, HOSTILE[kind], ARMS)
    assert taken < 3
    assert parsed.action == HOSTILE_BUT_LEGAL.get(kind)
    taken, parsed = seconds(parser.parse, HOSTILE[kind])
    assert taken < 3
    assert parsed.action != ""
    taken, parsed = seconds(parser.parse, HOSTILE[kind] + "\nACTION=blue", ARMS, cut_off=True)
    assert taken < 3
    assert parsed.action == "blue"


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (r"(a+)+b", "a" * MILLION),
        (r"((?:a|aa)+)$", "a" * 60 + "!"),
        (r"(x+x+)+y", "x" * MILLION),
        (r"(?=.*b)(a)", "a" * MILLION),
        (r"ACTION=(.+)", "ACTION=" * (MILLION // 7)),
    ],
)
def test_a_pattern_that_backtracks_without_end(pattern, text):
    parser = ActionParser([pattern, r"never (\w+)"], timeout=0.2)
    taken, parsed = seconds(parser.parse, text, ARMS)
    assert 0.1 < taken < 1  # it does run into the timeout
    assert parsed.reason is InvalidReason.NO_MATCH
    assert parser.parse(text, ARMS, cut_off=True).reason is InvalidReason.CUT_OFF


def test_all_patterns_share_the_timeout_and_none_answers_for_one_that_ran_out():
    parser = ActionParser([r"((?:a|aa)+)$"] * 20 + [r"(!)"], timeout=0.2)
    taken, parsed = seconds(parser.parse, "a" * 60 + "!", ["!"])
    assert taken < 1 and parsed.reason is InvalidReason.NO_MATCH
    assert ActionParser(r"(!)").parse("a" * 60 + "!", ["!"]).action == "!"


def test_ten_thousand_legal_actions():
    legal_actions = [f"item {i} of {'x' * (i % 50)}y" for i in range(10_000)]
    parser = ActionParser()
    taken, _ = seconds(parser.check_legal_actions, legal_actions)
    assert taken < 5
    parser.parse("", legal_actions)
    for text in ("ACTION=" + "(" * MILLION, "ACTION=" + "item 1" * (MILLION // 6)):
        taken, parsed = seconds(parser.parse, text, legal_actions, cut_off=True)
        assert taken < 2 and parsed.action is None
    taken, _ = seconds(lambda: [parser.parse(f"ACTION={name}", legal_actions) for name in legal_actions[:100]])
    assert taken < 2


def test_an_ordinary_reply_takes_microseconds():
    text = "I pressed green twice and red once; the action pays. " * 20 + "\nACTION=green"
    parser = ActionParser()
    taken, _ = seconds(lambda: [parser.parse(text, ARMS) for _ in range(1000)])
    assert taken < 1  # about 0.02
