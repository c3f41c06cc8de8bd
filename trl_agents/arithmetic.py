# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
A generator of arithmetic word problems with solutions in words and as programs: what stands in for GSM8K without a
network.
"""

from __future__ import annotations

import random
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple


if TYPE_CHECKING:
    from datasets import Dataset

_NAMES = ("Ana", "Ben", "Eva", "Ivy", "Leo", "Max", "Mia", "Sam", "Tom", "Zoe")
_CONTAINERS = (("box", "boxes"), ("bag", "bags"), ("jar", "jars"), ("basket", "baskets"))
_ORDER_WORDS = ("{}", "Then {}", "Later, {}", "After that, {}")


class _Theme(NamedTuple):
    things: tuple[str, ...]
    gains: tuple[tuple[str, str], ...]  # a verb, and the word for it in a variable's name
    losses: tuple[tuple[str, str], ...]


_COINS = _Theme(("coins",), (("earns", "earned"), ("finds", "found")), (("spends", "spent"), ("loses", "lost")))
_THEMES = (
    _Theme(
        ("shells", "stones", "feathers"),
        (("finds", "found"), ("collects", "collected")),
        (("loses", "lost"), ("drops", "dropped")),
    ),
    _Theme(
        ("apples", "plums", "carrots"),
        (("picks", "picked"), ("buys", "bought")),
        (("eats", "eaten"), ("cooks", "cooked")),
    ),
    _Theme(
        ("cookies", "muffins", "cakes"),
        (("bakes", "baked"), ("buys", "bought")),
        (("eats", "eaten"), ("burns", "burned")),
    ),
    _Theme(
        ("stamps", "cards", "marbles"),
        (("wins", "won"), ("buys", "bought")),
        (("loses", "lost"), ("trades away", "traded")),
    ),
    _Theme(
        ("pens", "books", "balls"),
        (("gets", "received"), ("buys", "bought")),
        (("lends out", "lent"), ("loses", "lost")),
    ),
)


class _Action(NamedTuple):
    operator: str
    sentence: str
    operand: str = ""  # its name in the program; none where the sentence says 2 in words
    place: str = "any"  # "start": the first step, `{x}` included; "event": `{owner}` acts, so order words go before it

    @property
    def new_owner(self) -> bool:
        return "{other}" in self.sentence

    @property
    def into_coins(self) -> bool:
        return "coins" in self.sentence


_ACTIONS = (
    _Action("+", "{owner} {gains} {k} more {things}.", "{things}_{gained}", "event"),
    _Action("+", "{owner} gets {k} more {things} from a friend.", "{things}_received", "event"),
    _Action("+", "{other} has {k} more {things} than {owner}.", "more_{things}"),
    _Action("-", "{owner} {loses} {k} of the {things}.", "{things}_{lost}", "event"),
    _Action("-", "{owner} gives {k} {things} to a friend.", "{things}_given", "event"),
    _Action("-", "{other} has {k} fewer {things} than {owner}.", "fewer_{things}"),
    _Action("*", "{owner} has {k} {boxes} with {x} {things} in each {box}.", "{boxes}", "start"),
    _Action("*", "{owner} has {x} {things} in each of {k} {boxes}.", "{boxes}", "start"),
    _Action("*", "{other} has {k} times as many {things} as {owner}.", "times"),
    _Action("*", "{owner} sells all the {things} for {k} coins each.", "price"),
    _Action("*", "{other} has twice as many {things} as {owner}."),
    _Action("*", "{owner} doubles the number of {things}."),
    _Action("/", "{owner} puts the {things} equally into {k} {boxes} and keeps only one {box}.", "{boxes}"),
    _Action("/", "{owner} shares all the {things} equally among {k} friends. {other} is one of them.", "friends"),
    _Action("/", "{other} has half as many {things} as {owner}."),
    _Action("/", "{owner} gives half of the {things} to a friend."),
)
_DISTRACTORS = (
    "{name} is {k} years old.",
    "{name} has {k} {things} at home.",
    "The walk home takes {k} minutes.",
    "There are {k} people nearby.",
)
_SPLITS = {"test": (0,), "validation": (1,), "train": tuple(range(2, 10))}
_GIVE_UP_AFTER = 3000  # draws in a row that brought nothing new


def arithmetic_problems(
    n: int,
    seed: int = 0,
    *,
    min_steps: int = 2,
    max_steps: int = 4,
    max_value: int = 99,
    distractors: int = 0,
    operations: str = "+-*/",
    skipping: float = 0.0,
    announced: bool = False,
    split: str | None = None,
) -> Dataset:
    """
    Make word problems of several steps, in few different words: what stands in for GSM8K without a network.

    Somebody has a number of things, and every step changes it or goes on to somebody else's. All numbers are whole,
    from 2 to `max_value`, those in between too. Every stated number counts, except a distractor's, there are at least
    two that do, and none of them is the answer, so nothing can be copied.

    The same arguments give the same problems, and a larger `n` only adds to them. Two seeds draw apart, and hardly
    ever the same question; questions that must differ for certain, as for a test, take another `split`.

    Args:
        n (`int`):
            Number of problems, no two with the same question.
        seed (`int`, *optional*, defaults to `0`):
            Seeds the stream of problems.
        min_steps (`int`, *optional*, defaults to `2`):
            Fewest operations.
        max_steps (`int`, *optional*, defaults to `4`):
            Most operations.
        max_value (`int`, *optional*, defaults to `99`):
            Largest number, at least 4.
        distractors (`int`, *optional*, defaults to `0`):
            Sentences with a number that does not matter, up to 4.
        operations (`str`, *optional*, defaults to `"+-*/"`):
            Operations to choose from. Divisions leave no remainder.
        skipping (`float`, *optional*, defaults to `0.0`):
            Share of the solutions, in words and as programs alike, that do all steps but the last in the head, as
            people's do: right, and hard to learn from. Questions and answers do not depend on it.
        announced (`bool`, *optional*, defaults to `False`):
            Whether solutions that skip steps say so at their start ("In the end, ...", "# the last step"). A small
            model that has learnt from both kinds unannounced takes the numbers of the one in the middle of the other.
        split (`str`, *optional*):
            "train" (8 of 10 questions by their hash), "validation" or "test" (1 of 10 each). Without it, any question.

    Returns:
        `Dataset` with the columns `question`, `rationale` (a line a step, "Ana has 12 + 5 = 17 shells."), `program`
        (`def solution():` with the question as its docstring), `answer` and `n_steps`.

    Raises:
        `ValueError`: for settings that make no sense, or if they allow for fewer than `n` problems.
    """
    from datasets import Dataset

    if n < 1:
        raise ValueError(f"`n` must be at least 1, got {n}.")
    if not 1 <= min_steps <= max_steps:
        raise ValueError(
            f"`min_steps` must lie between 1 and `max_steps`, got min_steps={min_steps} and max_steps={max_steps}."
        )
    if max_value < 4:
        raise ValueError(f"`max_value` must be at least 4, got {max_value}.")
    if not 0 <= distractors <= len(_DISTRACTORS):
        raise ValueError(f"`distractors` must lie between 0 and {len(_DISTRACTORS)}, got {distractors}.")
    if not operations or set(operations) - set("+-*/"):
        raise ValueError(f'`operations` must be some of "+-*/", got {operations!r}.')
    if not 0.0 <= skipping <= 1.0:
        raise ValueError(f"`skipping` is a share, from 0 to 1, got {skipping}.")
    if split is not None and split not in _SPLITS:
        raise ValueError(f"`split` must be one of {', '.join(_SPLITS)}, got {split!r}.")

    rng = random.Random(f"arithmetic {seed}")  # a text: of a number, `Random` would ignore the sign
    problems: dict[str, dict[str, Any]] = {}
    n_failed = 0
    while len(problems) < n:
        problem = _draw_problem(
            rng, rng.randint(min_steps, max_steps), max_value, distractors, operations, skipping, announced
        )
        fits = problem is not None and (split is None or _bucket(problem["question"]) in _SPLITS[split])
        if fits and problem["question"] not in problems:
            problems[problem["question"]] = problem
            n_failed = 0
            continue
        n_failed += 1
        if n_failed == _GIVE_UP_AFTER:
            raise ValueError(
                f"n={n} problems are too many for these settings, {len(problems)} were found: "
                f"max_value={max_value}, steps {min_steps} to {max_steps}, operations={operations!r}."
            )
    return Dataset.from_list(list(problems.values()))


def _bucket(question: str) -> int:
    return zlib.crc32(question.encode()) % 10


def _share(text: str) -> float:
    """As good as drawn from [0, 1)."""
    return zlib.crc32(text.encode()) / 2**32


def _draw_problem(
    rng: random.Random,
    n_steps: int,
    max_value: int,
    n_distractors: int,
    operations: str,
    skipping: float,
    announced: bool,
) -> dict[str, Any] | None:
    """One problem, or `None` if what was drawn leads nowhere."""
    theme = rng.choice(_THEMES)
    things = rng.choice(theme.things)
    other_things = rng.choice([other for them in _THEMES if them is not theme for other in them.things])
    owner, *others = rng.sample(_NAMES, len(_NAMES))
    value = rng.randint(2, max_value)
    values, stated = [value], [value]
    sentences, equations = [f"{owner} has {value} {things}."], []
    start_name = f"{owner.lower()}_{things}"
    starts, code = [], []  # of each step: the line that a program would start with there, the lines it adds

    for step in range(n_steps):
        action, k = _draw_action(rng, value, max_value, operations, step == 0, bool(others), theme is _COINS)
        if action is None:
            return None
        box, boxes = rng.choice(_CONTAINERS)
        gains, gained = rng.choice(theme.gains)
        loses, lost = rng.choice(theme.losses)
        words = {"owner": owner, "things": things, "k": k, "x": value, "box": box, "boxes": boxes}
        words |= {"gains": gains, "gained": gained, "loses": loses, "lost": lost, "other": others[0] if others else ""}
        sentence, operand = action.sentence.format(**words), action.operand.format(**words)
        if action.place == "start":
            sentences, start_name = [sentence], f"{things}_in_each"
        elif action.place == "event" and step == 0 and rng.random() < 0.3:
            sentences = [f"{sentence} Before that, {owner} had {value} {things}."]
        else:
            # "After that" behind "Before that" could mean either
            ordered = action.place == "event" and "Before that" not in sentences[-1]
            sentences.append((rng.choice(_ORDER_WORDS) if ordered else "{}").format(sentence))

        old_name = start_name if step == 0 else f"{owner.lower()}_{things}"
        owner = others.pop(0) if action.new_owner else owner
        if action.into_coins:
            theme, things = _COINS, "coins"
        result = {"+": value + k, "-": value - k, "*": value * k, "/": value // k}[action.operator]
        equations.append(f"{owner} has {value} {action.operator} {k} = {result} {things}.")
        operator = "//" if action.operator == "/" else action.operator  # exact, and stays whole
        computed = f"{owner.lower()}_{things} = {old_name} {operator} {operand or k}"
        code.append(([f"{operand} = {k}"] if operand else []) + [computed])
        starts.append(f"{old_name} = {value}")
        value = result
        values.append(value)
        stated += [k] if operand else []

    # Nothing to copy, nothing undone, nothing that one number tells
    if value in stated or len(set(values)) < len(values) or len(stated) < 2:
        return None
    choices = [number for number in range(2, max_value + 1) if number != value]
    for template in rng.sample(_DISTRACTORS, n_distractors):
        name = rng.choice([owner, *others])
        sentence = template.format(name=name, k=rng.choice(choices), things=other_things)
        sentences.insert(rng.randint(1, len(sentences)), sentence)
    question = _ask(rng, sentences, owner, things)
    # Drawn from the question, so that the problems stay the same
    first = n_steps - 1 if _share(f"skips {question}") < skipping else 0
    rationale = "\n".join(equations[first:])
    lines = [starts[first], *sum(code[first:], []), f"result = {owner.lower()}_{things}", "return result"]
    if first and announced:
        rationale, lines = f"In the end, {rationale}", ["# the last step", *lines]
    return {
        "question": question,
        "rationale": rationale,
        "program": program_opening(question) + "\n".join(f"    {line}" for line in lines),
        "answer": str(value),
        "n_steps": n_steps,
    }


def _draw_action(
    rng: random.Random, value: int, max_value: int, operations: str, first: bool, others_left: bool, has_coins: bool
) -> tuple[_Action | None, int]:
    """A step that can follow on `value`, and its operand. The operation is drawn first: all are equally likely."""
    operands = {
        "+": range(2, max_value - value + 1),
        "-": range(2, value - 1),
        "*": range(2, max_value // value + 1),
        "/": [k for k in range(2, value // 2 + 1) if value % k == 0],
    }
    possible = [operator for operator in dict.fromkeys(operations) if len(operands[operator])]
    if not possible:
        return None, 0
    operator = rng.choice(possible)
    actions = [
        action
        for action in _ACTIONS
        if action.operator == operator
        and (first or action.place != "start")
        and (others_left or not action.new_owner)
        and not (has_coins and action.into_coins)
        and (action.operand or 2 in operands[operator])
    ]
    action = rng.choice(actions)
    return action, rng.choice(operands[operator]) if action.operand else 2


def _ask(rng: random.Random, sentences: list[str], owner: str, things: str) -> str:
    if rng.random() < 0.2:
        return " ".join([f"Find the number of {things} that {owner} has in the end.", *sentences])
    asked = rng.choice(
        [
            f"How many {things} does {owner} have now?",
            f"How many {things} does {owner} have in the end?",
            f"In the end, how many {things} does {owner} have?",
        ]
    )
    return " ".join([*sentences, asked])


def program_opening(question: str) -> str:
    """The lines of a program that state the question, as ReFT's have them: `def solution():` and the docstring."""
    lines = [line for line in question.strip().splitlines() if line.strip()]
    text = "\n".join(lines).replace("\\", "\\\\").replace('"""', "'''")
    # A quote at the end would join the closing ones
    return f'def solution():\n    """{text}{" " if text.endswith(chr(34)) else ""}"""\n'
