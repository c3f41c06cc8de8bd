# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Environments that fail, made from the standard library alone: processes of their own import this file."""

import collections
import os
import random
import subprocess
import sys
import threading
import time


class Nonce:
    """Wants back what it said last, and says something else each time. Answers after a random delay."""

    instructions = "Say it."
    history_header = question = ""
    delay = 0.004

    def reset(self, *, seed=None, options=None):
        self.rng = random.Random(seed)
        self.left = 2 + seed % 4
        return self._say()

    def _say(self):
        time.sleep(self.rng.random() * self.delay)
        self.word = f"w{self.rng.randrange(10**6):06d}"
        return f"say {self.word}", {"legal_actions": [self.word, "never"]}

    def step(self, action):
        reward = 1.0 if action == self.word else -1.0
        self.left -= 1
        observation, info = self._say()
        return observation, reward, self.left == 0, False, info

    def close(self):
        pass


class Moody(Nonce):
    """
    Crashes in 5% of its steps and hangs in 2%, by the seed and by how often that was begun before, not by which thread
    comes first: what befalls an episode is the same in each run. A subclass counts for itself with a `begun` of its
    own.
    """

    delay = 0.0
    hang = 0.5
    salt = "moods"
    begun, guard = collections.Counter(), threading.Lock()

    def reset(self, *, seed=None, options=None):
        with self.guard:
            self.begun[seed] += 1
            self.moods = random.Random(f"{self.salt} {seed} {self.begun[seed]}")
        return super().reset(seed=seed)

    def step(self, action):
        mood = self.moods.random()
        if mood < 0.05:
            raise RuntimeError("bad mood")
        if mood < 0.07:
            time.sleep(self.hang)
            return "say w000000", 100.0, True, False, {"legal_actions": ["w000000"]}
        return super().step(action)


class MoodyAlone(Moody):
    """Moody in a process of its own, where the count would begin anew, and always with the same crash."""

    def __init__(self):
        self.salt = os.getpid()


class Doomed(Nonce):
    """
    Has a helper, a process that never ends by itself and whose number is noted in `folder`. Then its seed says what
    befalls it: 13 hangs for good in its first step, 14 takes its process down, 15 hangs when it is closed.
    """

    def __init__(self, folder):
        sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
        self.helper = subprocess.Popen(sleep, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with open(os.path.join(folder, str(self.helper.pid)), "w") as file:
            file.write(str(os.getpid()))

    def reset(self, *, seed=None, options=None):
        self.seed = seed
        return super().reset(seed=seed)

    def step(self, action):
        if self.seed == 13:
            time.sleep(600)
        if self.seed == 14:
            os._exit(7)
        return super().step(action)

    def close(self):
        if getattr(self, "seed", 0) == 15:
            time.sleep(600)
        self.helper.kill()
        self.helper.wait()


class Stuck(Nonce):
    """Its first `reset` never ends."""

    def reset(self, *, seed=None, options=None):
        time.sleep(3600)


class Deadly(Nonce):
    """Its first `reset` takes its process down."""

    def reset(self, *, seed=None, options=None):
        os._exit(7)


class Picky(Exception):
    """Cannot be made anew from its arguments."""

    def __init__(self, what, why):
        super().__init__(f"no {what}, {why}")


class Broken(Nonce):
    """Raises in its first `reset`."""

    def reset(self, *, seed=None, options=None):
        raise Picky("luck", "again")


class Misspelt(Nonce):
    def reset(self, *, seed=None, options=None):
        return {}["legal_action"]


class Fatal(Nonce):
    """Its second `step` takes its process down."""

    def step(self, action):
        if getattr(self, "stepped", False):
            os._exit(7)
        self.stepped = True
        return "say never", 0.0, False, False, {"legal_actions": [self.word, "never"]}
