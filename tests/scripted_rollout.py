# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The rollout loop with a backend that answers from a script: what the tests of playing share."""

import functools

from trl_agents.actions import ActionParser
from trl_agents.contexts import Briefing, ChatContext
from trl_agents.envs.bandit import Bandit
from trl_agents.envs.tictactoe import TicTacToe
from trl_agents.rollout.generation import Reply
from trl_agents.rollout.play import Episode, Player, Rules
from trl_agents.rollout.workers import EnvPool
from trl_agents.tiny import tiny_tokenizer


@functools.cache
def tokenizer():
    return tiny_tokenizer([Bandit().instructions, TicTacToe().instructions, "ACTION=blue ACTION=green"], 400)


def ids_of(text):
    return tuple(tokenizer().encode(text, add_special_tokens=False))


def text_of(ids):
    return tokenizer().decode(ids, skip_special_tokens=False)


class Scripted:
    """
    Answers by a function from the whole prompt's text to the text of a reply.

    A reply is closed by the end-of-turn token unless it ends in "...". What it has answered is in `asked`.
    """

    def __init__(self, answer):
        self.answer, self.pending, self.asked = answer, {}, []

    @property
    def busy(self):
        return bool(self.pending)

    def submit(self, slot, prompt_ids, max_new_tokens, rng):
        assert slot not in self.pending
        self.pending[slot] = (list(prompt_ids), max_new_tokens)

    def step(self):
        pending, self.pending = self.pending, {}
        return [(slot, self.reply(slot, *asked)) for slot, asked in pending.items()]

    def reply(self, slot, prompt_ids, budget):
        prompt = text_of(prompt_ids)
        self.asked.append((slot, prompt, budget))
        text = self.answer(prompt)
        ids = ids_of(text) if text.endswith("...") else (*ids_of(text), tokenizer().eos_token_id)
        return Reply(ids[:budget], cut_off=len(ids) > budget or text.endswith("..."))

    def drain(self):
        self.drained = not self.pending


def one_by_one(*texts):
    """Answers for one episode at a time."""
    script = iter(texts)
    return lambda prompt: next(script)


def play(
    factory,
    answer,
    episodes,
    n_slots=1,
    context=ChatContext,
    parser=None,
    pool=None,
    timeout=None,
    exploration=None,
    patience=0.02,
    **rules,
):
    backend = Scripted(answer) if callable(answer) else answer
    own = pool is None
    pool = pool or EnvPool(factory, n_slots, timeout)
    try:
        briefing = Briefing.of(factory()) if own else Briefing("Play.")
        reader = context(tokenizer()) if isinstance(context, type) else context
        parser = parser or ActionParser()
        player = Player(pool, backend, reader, parser, briefing, Rules(**rules), exploration, patience)
        return player.play(episodes)[0]
    finally:
        if own:
            pool.close()


def seeds(n):
    return [Episode(seed, (seed,)) for seed in range(n)]


bandit = functools.partial(Bandit, n_arms=2, horizon=3, distribution="bernoulli", means=[0.5, 0.5])


class Steps:
    """Ends after as many steps as its seed says; the rest is for subclasses to break."""

    instructions = "Play."

    def reset(self, *, seed=None, options=None):
        self.left = seed
        return f"{seed} to go", {"legal_actions": ["go", "stop"]}

    def step(self, action):
        self.left -= 1
        return f"{self.left} to go", 1.0, self.left <= 0, False, {"legal_actions": ["go", "stop"]}

    def close(self):
        pass


def go(prompt):
    return "ACTION=go"
