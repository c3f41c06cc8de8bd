# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The accuracy reward: formulas through math_verify, its own process and its limits, and what needs neither."""

import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import warnings

import pytest

from trl_agents.rewards import accuracy as accuracy_module
from trl_agents.rewards import symbolic
from trl_agents.rewards.accuracy import accuracy_reward, get_accuracy_reward


THINK = "<think>\n2 + 2\n</think>\n<answer>\n4\n</answer>"
TRIGGER = "Therefore, the answer is: "


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
