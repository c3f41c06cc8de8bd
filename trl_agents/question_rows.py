# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Rows of GSM8K, SVAMP, MathQA and ReFT's own files as `question`, `rationale` and `answer`, all text; and how their
answers spell a number.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any


# -- numbers ----------------------------------------------------------------------------------------------------------

# Thousands in threes, or as in India ("1,00,000")
_NUMBER = r"(?:(?:[0-9]{1,3}(?:,[0-9]{2,3})*,[0-9]{3}|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
_PLAIN_NUMBER = re.compile(rf"[-+]?{_NUMBER}(?:[eE][-+]?[0-9]{{1,3}})?")

# What may stand around the number of an option. Words that scale it ("dozen", "lakh", "thousand") or turn its sign
# ("loss") are left out on purpose, and so are clock times ("pm").
UNITS = {
    "length, area, volume": "mm cm m km meter meters metre metres kilometer kilometers kilometre kilometres "
    "inch inches foot feet ft yard yards mile miles sq square cu cubic cc l ml liter liters litre "
    "litres gallon gallons",
    "weight": "mg g gm gms kg kgs gram grams kilogram kilograms ton tons tonne tonnes pound pounds lb lbs "
    "ounce ounces",
    "time": "s sec secs second seconds min mins minute minutes h hr hrs hour hours day days week weeks month months "
    "year years yr yrs",
    "speed": "kmph kmh kmhr mph mps",
    "money": "rs re rupee rupees paise dollar dollars cent cents euro euros $ € £ ₹",
    "share, angle": "% percent degree degrees °",
    "counts": "man men woman women boy boys girl girls child children person persons people student students worker "
    "workers times marks runs units pieces coins",
}
_UNIT = "|".join(sorted(map(re.escape, " ".join(UNITS.values()).split()), key=len, reverse=True))
# Spaces have one place each: two that may take the same ones double the time with every unit of a row
_UNIT = rf"(?:{_UNIT})(?:[23²³]|\s*\^\s*[23])?(?![a-z0-9])(?:\s*\.)?"
_OPTION_NUMBER = re.compile(
    r"(?P<sign>[-+−–]?)\s*(?:(?:rs|re)\b\s*\.?|(?:us\s*)?[$€£₹])?\s*(?P<inner_sign>[-+−–]?)\s*"
    rf"(?:(?:(?P<whole>[0-9]{{1,9}})\s+)?(?P<top>[0-9]{{1,9}})\s*/\s*(?P<bottom>[0-9]{{1,9}})|(?P<number>{_NUMBER}))"
    rf"\s*(?:{_UNIT}(?:\s*(?:(?:/|per\b)\s*)?{_UNIT})*)?"
)


def number_text(value: str | int | float) -> str | None:
    """
    A number as every answer spells it: no commas, no exponent, no zeros behind ("1,600.50" -> "1600.5", 72.0 -> "72").

    Returns:
        `str`, or `None` for what is no finite number.
    """
    text = str(value).strip()
    if isinstance(value, bool) or not _PLAIN_NUMBER.fullmatch(text):
        return None
    text = format(Decimal(text.replace(",", "")), "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def option_number(option: str) -> str | None:
    """
    The number that an option of MathQA stands for: "rs . 1,600" -> "1600", "2 1 / 2 km / hr" -> "2.5".

    Currencies and the words of `UNITS` are dropped without converting anything, so "25 %" is "25". A fraction that
    does not end as a decimal is rounded to six places.

    Returns:
        `str`, or `None` for what is no single number: "none of these", ratios, ranges, powers, unknown words.
    """
    found = _OPTION_NUMBER.fullmatch(option.strip().lower())
    if not found or (found["sign"] and found["inner_sign"]):
        return None
    minus = "-" if (found["sign"] or found["inner_sign"]) in ("-", "−", "–") else ""
    if found["number"]:
        return number_text(minus + found["number"])
    if int(found["bottom"]) == 0:
        return None
    value = int(found["whole"] or 0) + Fraction(int(found["top"]), int(found["bottom"]))
    decimal = Decimal(value.numerator) / Decimal(value.denominator)
    return number_text(minus + format(decimal if Fraction(decimal) == value else round(decimal, 6), "f"))


# -- rows of the datasets ---------------------------------------------------------------------------------------------

_CALCULATOR_MARK = re.compile(r"<<[^<>\n]*>>")
_OPTION = re.compile(r"([a-e])\s*\)\s*(.*?)(?=\s*,\s*[a-e]\s*\)|$)")
_STATED_LETTER = re.compile(
    r"(?<![\s,;.])[\s,;.]*+(?:\b(?:so|hence|thus|therefore)\b[\s,]*+)?"
    r"(?:\bthe\s+)?(?:\bcorrect\s+)?\b(?:answer|ans|option)\b"
    r"(?:[\s:.=-]|\b(?:is|option)\b)*\(?\s*\b[a-e]\s*\)?[\s.]*$",
    re.IGNORECASE,
)
_STATED_ANSWER = re.compile(r"\s*Therefore, the answer is:?[ \t]*<?[^\n<>]*>?\.?\s*$")


def from_gsm8k(row: Mapping[str, Any]) -> dict[str, str]:
    """
    A row of GSM8K (https://huggingface.co/datasets/openai/gsm8k): columns `question`, `answer`.

    The rationale is the answer without the calculator's marks ("<<48/2=24>>") and without its last line ("#### 72").

    Raises:
        `ValueError`: if there is no such line.
    """
    rationale, mark, final = _field(row, "answer").rpartition("####")
    answer = number_text(final)
    if not mark or answer is None:
        raise ValueError("`answer` has no last line `#### <number>`")
    rationale = _CALCULATOR_MARK.sub("", rationale).strip()
    return {"question": _field(row, "question"), "rationale": rationale, "answer": answer}


def from_svamp(row: Mapping[str, Any]) -> dict[str, str]:
    """
    A row of SVAMP, of the Hub (https://huggingface.co/datasets/ChilleD/SVAMP) or of the original JSON with its floats:
    columns `Body`, `Question`, `Equation`, `Answer`. Without a body, `question_concat` is the question.

    The rationale is the equation: "( 4.0 - 3.0 )" becomes "4 - 3 = 1".

    Raises:
        `ValueError`: if the answer is no number.
    """
    answer = number_text(_field(row, "Answer"))
    if answer is None:
        raise ValueError("`Answer` is no number")
    if row.get("Body") and row.get("Question"):
        question = _join_question(_field(row, "Body"), _field(row, "Question"))
    else:
        question = _field(row, "question_concat" if row.get("question_concat") else "Question")
    equation = str(row.get("Equation") or "").strip()
    return {"question": question, "rationale": _readable_equation(equation, answer), "answer": answer}


def from_math_qa(row: Mapping[str, Any], numeric: bool = False) -> dict[str, str] | None:
    """
    A row of MathQA (https://huggingface.co/datasets/allenai/math_qa): columns `Problem`, `Rationale`, `options`,
    `correct`.

    Args:
        row (`Mapping`):
            The row.
        numeric (`bool`, *optional*, defaults to `False`):
            Leave the options out of the question and make the right one's number the answer ([`option_number`]),
            instead of its letter. It keeps a model from guessing one letter of five.

    Returns:
        `dict`, or `None` with `numeric` if the right option is no plain number.

    Raises:
        `ValueError`: if the right option is not among the options.
    """
    stem, options, letter = _field(row, "Problem"), _field(row, "options"), _field(row, "correct").lower()
    if options.startswith("["):  # some rows hold a list as text
        try:
            options = " , ".join(ast.literal_eval(options))
        except (SyntaxError, TypeError, MemoryError, RecursionError) as error:
            raise ValueError("`options` is no list of texts") from error
    texts = dict(_OPTION.findall(options))
    if letter not in texts:
        raise ValueError("`correct` is not among `options`")
    answer = option_number(texts[letter]) if numeric else letter
    if answer is None:
        return None
    rationale = _STATED_LETTER.sub("", str(row.get("Rationale") or "").strip().strip('"').strip())
    return {"question": stem if numeric else f"{stem}\n{options}", "rationale": rationale, "answer": answer}


def from_reft(row: Mapping[str, Any]) -> dict[str, str]:
    """
    A row of ReFT's own files (https://github.com/lqtrung1998/mwp_ReFT): columns `question`, `answer_value` and, in
    training files, `answer_cot`, which is a rationale or a program.

    A rationale that ends in "Therefore, the answer is ..." loses that sentence, which [`~data.prompt_completion`] says
    again.
    """
    rationale, program = str(row.get("answer_cot") or "").strip(), ""
    if rationale.startswith("def solution"):
        rationale, program = "", rationale
    converted = {"rationale": _STATED_ANSWER.sub("", rationale), "program": program}
    return from_common({"question": row.get("question"), "answer": row.get("answer_value"), **converted})


def from_common(row: Mapping[str, Any]) -> dict[str, str]:
    """A row that has `question` and `answer` already, and perhaps `rationale` and `program`."""
    answer = _field(row, "answer")
    number = number_text(answer)
    converted = {
        "question": _field(row, "question"),
        "rationale": str(row.get("rationale") or "").strip(),
        "answer": number if number is not None else answer.lower() if re.fullmatch("[A-Ea-e]", answer) else answer,
    }
    return {**converted, "program": str(row["program"])} if row.get("program") else converted


def _field(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if value is None or value != value or not str(value).strip():  # NaN differs from itself
        raise ValueError(f"`{name}` is missing")
    return str(value).strip()


def _join_question(body: str, question: str) -> str:
    if body[-1] in ".,;:?!":
        return f"{body} {question}"
    # What has no period may also be half a sentence, which the question ends
    if re.match(r"(?:if|when)\b", re.split(r"[.?!]\s+", body)[-1], re.IGNORECASE):
        return f"{body}, {question[0].lower()}{question[1:]}"
    return f"{body}. {question}"


def _readable_equation(equation: str, answer: str) -> str:
    if not equation:
        return ""
    equation = re.sub(r"[0-9.]+", lambda found: number_text(found[0]) or found[0], equation)
    equation = re.sub(r"\(\s+", "(", re.sub(r"\s+\)", ")", equation))
    # The outer pair says nothing, unless it is two: "(1 + 2) * (3 + 4)"
    if re.fullmatch(r"\((?:[^()]|\([^()]*\))*\)", equation):
        equation = equation[1:-1]
    return f"{equation} = {answer}"
