# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Comparison of formulas by math_verify, with its timeouts. They rest on a signal, which only a main thread gets: in
another thread one `9^{9^9}` would stop the whole process, for hours and with the interpreter's lock held. So what is
asked there is answered by a process of its own, in its main thread.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

from .answers import find_answer, find_number, spoken_text
from .numeric import gold_number


# TRL's limits, in seconds
PARSING_TIMEOUT, VERIFY_TIMEOUT = 10, 5
# The process may parse three times and compare once; later than this, it is not believed any more
START_SECONDS, GRACE_SECONDS = 60.0, 5.0
# More than this is no answer, and would only keep the LaTeX parser busy until its timeout
MAX_ANSWER, _MAX_DEPTH, _TAIL = 500, 16, 4000
_MATH = re.compile(r"\$[^$]+\$|\\\(|\\\[")
_SENTENCE_END = re.compile(r"\.(?:\s|\Z)")


def has_math_verify() -> bool:
    return find_spec("math_verify") is not None


def compare_symbolically(text: str, gold: Any) -> float | None:
    """1 if `text` states the answer `gold`, else 0; None if `gold` cannot be read. In any thread."""
    if isinstance(gold, str):
        stated = find_answer(gold)
        gold_text = gold if stated is None else stated
    else:
        gold_text = "" if gold_number(gold) is None else f"{gold}"
    if threading.current_thread() is threading.main_thread():
        return _compare(text, gold_text, PARSING_TIMEOUT, VERIFY_TIMEOUT)
    if os.name != "posix":
        return _compare(text, gold_text, None, None)
    return _HELPER.compare(text, gold_text)


def _compare(text: str, gold_text: str, parsing_timeout: int | None, verify_timeout: int | None) -> float | None:
    library = _math_verify()
    expected = _parse(library, gold_text, parsing_timeout)
    if not expected:
        return None
    found = _parse_answer(library, text, parsing_timeout)
    if not found:
        return 0.0
    return float(bool(_guarded(library.verify, expected, found, timeout_seconds=verify_timeout)))


def _parse_answer(library: Any, text: str, timeout: int | None) -> list:
    stated = find_answer(text)
    if stated is None:
        reply = spoken_text(text)
        found = _parse(library, reply[-_TAIL:], timeout, latex_only=True)
        if found or find_number(text) is None:
            return found
        stated = reply.strip()
    if len(stated) > MAX_ANSWER:
        return []
    if _MATH.search(stated) and (found := _parse(library, stated, timeout, latex_only=True)):
        return found
    # As one formula: from plain text math_verify would take a number out of "2^{3}"
    return _parse(library, rf"\boxed{{{_SENTENCE_END.split(stated, maxsplit=1)[0]}}}", timeout, latex_only=True)


def _parse(library: Any, text: str, timeout: int | None, latex_only: bool = False) -> list:
    if _depth(text) > _MAX_DEPTH:
        return []
    options: dict[str, Any] = {"parsing_timeout": timeout}
    if latex_only:
        config = library.LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)
        options |= {"extraction_config": [config], "extraction_mode": "first_match"}
    return _guarded(library.parse, text, **options) or []


def _depth(text: str) -> int:
    depth = deepest = 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        deepest = max(deepest, depth)
    return deepest


def _guarded(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Runs math_verify, whose own timeout is no `Exception`. What it cannot do, it did not find."""
    try:
        return function(*args, **kwargs)
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException:
        return None


@lru_cache(maxsize=1)
def _math_verify() -> Any:
    import math_verify

    for name in ("parser", "grader"):  # a model's bad LaTeX is no news
        logging.getLogger(f"math_verify.{name}").setLevel(logging.CRITICAL)
    return math_verify


# -- the process for other threads ------------------------------------------------------------------------------------


class _Helper:
    """One process, started when first asked; threads take turns. One that does not answer is ended."""

    def __init__(self):
        self.lock = threading.Lock()
        self.process: subprocess.Popen | None = None
        self.channel: socket.socket | None = None

    def compare(self, text: str, gold_text: str) -> float | None:
        request = {"text": text, "gold": gold_text, "timeouts": [PARSING_TIMEOUT, VERIFY_TIMEOUT]}
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self.end()
                self._start()
            answer = self._ask(json.dumps(request).encode() + b"\n", 4 * PARSING_TIMEOUT + VERIFY_TIMEOUT)
            if answer is None:
                self.end()
                return 0.0
        return json.loads(answer)["reward"]

    def _start(self) -> None:
        self.channel, theirs = socket.socketpair()
        code = (
            "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
            f"from {__name__} import answer_requests; answer_requests()"
        )
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, json.dumps(sys.path)],
                stdin=theirs,
                stdout=theirs,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for us, and the end of our channel for it
            )
        finally:
            theirs.close()
        if self._ask(b"", START_SECONDS) is None:
            self.end()
            raise RuntimeError("The process that compares formulas outside of the main thread does not start.")

    def _ask(self, request: bytes, seconds: float) -> bytes | None:
        """A line of the process, or None if it is late or gone."""
        deadline, heard = time.monotonic() + seconds + GRACE_SECONDS, b""
        try:
            self.channel.settimeout(seconds + GRACE_SECONDS)
            self.channel.sendall(request)
            while not heard.endswith(b"\n"):
                self.channel.settimeout(max(deadline - time.monotonic(), 0.001))
                if not (chunk := self.channel.recv(4096)):
                    return None
                heard += chunk
        except OSError:  # a timeout is one
            return None
        return heard

    def end(self) -> None:
        if self.channel is not None:
            self.channel.close()
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.process = self.channel = None

    def forget(self) -> None:
        """In a forked process: the helper is the parent's, and its lock may be held by a thread that is not here."""
        if self.channel is not None:
            self.channel.close()
            self.process.returncode = 0  # not ours to wait for
        self.__init__()


_HELPER = _Helper()
atexit.register(_HELPER.end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_HELPER.forget)


def answer_requests() -> None:
    """What the process does: a line for each line, until the channel ends."""
    requests, replies = sys.stdin.buffer, os.dup(1)
    os.dup2(2, 1)  # whatever is printed is no reply
    _math_verify()
    os.write(replies, b"ready\n")
    while line := requests.readline():
        request = json.loads(line)
        reward = _compare(request["text"], request["gold"], *request["timeouts"])
        os.write(replies, json.dumps({"reward": reward}).encode() + b"\n")
