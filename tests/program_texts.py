# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Programs that the tests of program answers share."""

import textwrap


def solution(body: str) -> str:
    return "def solution():\n" + textwrap.indent(textwrap.dedent(body).strip("\n"), "    ")


FINE = solution("return 6 * 7")
ENDLESS = solution("while True:\n    pass")
