# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The loop: environment -> text -> tokens -> action -> environment, many episodes side by side."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from ..actions import ActionParser
from ..contexts import Briefing, rename_actions
from ..exploration import Exploration, name_back, vote
from ..types import ENDLESS, ParsedAction, StopReason, Trajectory, Turn
from .faults import Fault
from .generation import Backend, Reply
from .places import End, Live, Places
from .progress import Bar, Clock, open_bar
from .rules import Episode, Rules
from .workers import EnvPool, EnvReply


# With `action_stop`, an action is looked for in so many tokens at the end of what was written so far
STATEMENT_TOKENS = 64


class Player:
    """
    Plays episodes with one backend, one context and one kind of environment.

    An episode whose environment failed is begun again, once, from its seed in a fresh environment, with the same luck:
    a fault that does not repeat itself leaves no trace. Failing that another episode, from the same seed with luck of
    its own, takes the place in the same way, and then one more; only what is left then is a fault to learn nothing
    from. So a place stays what it was for groups and processes: one of its seed's episodes.

    Args:
        pool ([`EnvPool`]):
            The environments; its number of slots is the number of episodes side by side.
        backend ([`Backend`]):
            Generates replies.
        context ([`ChatContext`] or [`WindowContext`]):
            Builds what the model reads.
        parser ([`ActionParser`]):
            Takes actions out of replies.
        briefing ([`Briefing`]):
            The environment's standing texts. An environment whose instructions change from episode to episode puts
            them into `info["instructions"]` at `reset`.
        rules ([`Rules`]):
            Budgets, and what an invalid action leads to.
        exploration ([`Exploration`], *optional*):
            Mechanisms that make the player explore. The pool's environments must have its `env_kwargs`.
        patience (`float`, *optional*, defaults to `0.02`):
            How many seconds after its question an environment is waited for while other episodes could decode. Fast
            ones answer within it, so that episodes decode together; one that mostly takes longer is not waited for.
    """

    def __init__(
        self,
        pool: EnvPool,
        backend: Backend,
        context: Any,
        parser: ActionParser,
        briefing: Briefing,
        rules: Rules,
        exploration: Exploration | None = None,
        patience: float = 0.02,
    ):
        self.pool, self.backend, self.context, self.parser = pool, backend, context, parser
        self.briefing, self.rules, self.patience = briefing, rules, patience
        self.exploration = exploration or Exploration()
        self.exploration.check_context("chat" if context.appends else "window")
        budgets = [budget for budget in (rules.max_new_tokens, self.exploration.max_new_tokens) if budget]
        self.max_new_tokens = min(budgets)
        if rules.action_stop and "is_over" not in inspect.signature(backend.submit).parameters:
            raise ValueError(
                f"action_stop=True ends replies token by token, which {type(backend).__name__} cannot. Leave it out, "
                "or generate with a transformers model whose layers are all attention, and without vLLM."
            )
        self.step_seconds: deque[float] = deque(maxlen=32)

    def play(
        self,
        episodes: Sequence[Episode],
        progress: bool | Callable[[int, str], Bar] = False,
        description: str = "Episodes",
    ) -> tuple[list[Trajectory], Clock]:
        """
        Play all `episodes`; the trajectories come in their order. A place is refilled as soon as it is free.
        `progress` is what [`~rollout.progress.open_bar`] takes.
        """
        clock = Clock()
        started = time.perf_counter()
        with open_bar(progress, len(episodes), description) as bar, ExitStack() as on_leaving:
            # If this is interrupted or fails, the pool's next rollout must not receive answers meant for this one
            on_leaving.callback(self.pool.give_up)
            places = Places(self.pool, episodes, self._trajectory, clock, bar)
            while places.fill():
                idle = not self.backend.busy
                waited = time.perf_counter()
                env_replies = self.pool.collect(self._patience(), block=idle)
                clock.env_wait += (time.perf_counter() - waited) * idle
                for env_reply in env_replies:
                    clock.env += env_reply.seconds
                    clock.faults.calls += 1
                    live = places.live[env_reply.slot]
                    places.end(live, self._on_environment(live, env_reply))
                if self.backend.busy:
                    decoding = time.perf_counter()
                    replies = self.backend.step()
                    clock.model += time.perf_counter() - decoding
                    for slot, reply in replies:
                        live = places.live[slot]
                        places.end(live, self._on_reply(live, reply))
            self.backend.drain()
        clock.wall = time.perf_counter() - started
        return places.finished, clock

    def _patience(self) -> float:
        """Waiting for a slow environment each time anew would cost more than to decode without its episode."""
        is_slow = bool(self.step_seconds) and statistics.median(self.step_seconds) > self.patience
        return 0.0 if is_slow else self.patience

    def _on_environment(self, live: Live, reply: EnvReply) -> End | None:
        """The environment answered: the episode is over, or a question is open."""
        live.env_seconds += reply.seconds
        if live.pending is not None:
            self.step_seconds.append(reply.seconds)
        if reply.fault is not None:
            return End(reply.fault, reply.error)
        live.observation, live.info = reply.observation, reply.info
        if live.pending is None:
            live.reset_info = reply.info
            briefing = self.briefing
            if "instructions" in reply.info:
                briefing = dataclasses.replace(briefing, instructions=reply.info["instructions"])
            live.reader = self.context.begin(briefing, reply.observation, reply.info)
            return self._begin_turn(live)
        turn = Turn(**live.pending, reward=reply.reward, info=reply.info)
        live.turns.append(turn)
        live.pending, live.retries = None, 0
        if reply.terminated:
            return End(StopReason.TERMINATED)
        note = self.exploration.note(live.past)
        live.observation = "\n".join(part for part in (reply.observation, note) if part)
        live.reader.observe(turn.action_ids, turn.executed, turn.reward, reply.observation, reply.info, note)
        if reply.truncated or self._out_of_turns(live):
            return End(StopReason.TRUNCATED if reply.truncated else StopReason.MAX_TURNS)
        return self._begin_turn(live)

    def _begin_turn(self, live: Live) -> End | None:
        """A question is open: name the actions, and answer it without the model where a mechanism says so."""
        listed, now = (info.get("legal_actions") for info in (live.reset_info, live.info))
        if self.exploration.needs_actions and listed and not now:
            return End(Fault.MALFORMED, "info['legal_actions'] is gone, which was there when the episode began")
        self.exploration.check_actions(listed, now)
        live.names = self.exploration.relabel(live.past, live.chance)
        if live.names:
            self._rename(live)
        forced = self.exploration.force(live.past, live.chance)
        room = None if self.rules.max_length is None else self.rules.max_length - len(live.reader.prompt_ids)
        reply = None if forced is None or (room or 1) < 1 else self._forced(live, *forced, room)
        if reply is None:
            return self._submit(live)
        return self._on_final(live, reply, forced=True)

    def _rename(self, live: Live) -> None:
        if not set(live.names) == set(live.names.values()) == set(live.info["legal_actions"]):
            raise ValueError(f"{live.names} does not call each legal action by another's name, or its own.")
        live.reader.rename(live.names)
        played = [turn.executed for turn in live.turns if turn.executed is not None]
        if played and rename_actions(live.reader.lines[-1], {played[-1]: ""}) == live.reader.lines[-1]:
            raise ValueError(
                f"Renaming finds no `Action={played[-1]}` in the history's {live.reader.lines[-1]!r}: let the "
                "environment word its info['transition'] so, or leave context_randomization out."
            )

    def _forced(self, live: Live, action: str, thought: str, room: int | None) -> Reply | None:
        """What is written in the model's place: with the thought where the budget allows it; None without room."""
        shown = (live.names or {}).get(action, action)
        try:
            stated = self.parser.format(shown)
        except ValueError as error:
            raise ValueError(
                f"An exploration mechanism plays {action!r}, which no reply can state: {error}"
            ) from error
        fits, thought = False, thought.replace("{action}", shown)
        for text, limit in ((f"{thought} {stated}", self._budget(live)), (stated, room)):
            ids = self.context.reply_ids(text)
            reply = Reply(tuple(ids), cut_off=False)
            fits |= limit is None or len(ids) <= limit
            if (limit is None or len(ids) <= limit) and self._parse(live, reply)[1].action == action:
                return reply
        if fits:
            raise ValueError(
                f"An exploration mechanism writes {stated!r} to play {action!r}, and the action parser does not read "
                "that action out of it: use patterns that find an action wherever it is stated."
            )
        return None

    def _submit(self, live: Live) -> End | None:
        """Ask the model, if there is room for a reply."""
        budget = self._budget(live)
        if budget < 1:
            if live.turns:
                return End(StopReason.CONTEXT_FULL)
            return End(Fault.MALFORMED, self._too_long(live))
        options = {"is_over": functools.partial(self._is_over, live)} if self.rules.action_stop else {}
        self.backend.submit(live.slot, live.reader.prompt_ids, budget, live.rng, **options)
        return None

    def _is_over(self, live: Live, ids: list[int]) -> bool:
        """Whether a reply has stated its action. The end is looked at first, which is quick, and then all of it."""
        legal_actions = live.info.get("legal_actions")
        if not self.parser.is_complete(self.context.decode(ids[-STATEMENT_TOKENS:]), legal_actions):
            return False
        return len(ids) <= STATEMENT_TOKENS or self.parser.is_complete(self.context.decode(ids), legal_actions)

    def _too_long(self, live: Live) -> str:
        """Why an episode has no room for a reply. Where no episode has any, that is no fault of the environment's."""
        length, limit = len(live.reader.prompt_ids), self.rules.max_length
        if (alone := len(self.context.begin(self.briefing, "", {}).prompt_ids)) >= limit:
            raise ValueError(
                f"The instructions alone take {alone} tokens, and an episode may have {limit}. Raise "
                "max_episode_length, use a model with more positions, or shorter instructions."
            )
        return (
            f"the first question takes {length} tokens with the instructions, and an episode may have {limit}: raise "
            "max_episode_length, or use a model with more positions"
        )

    def _budget(self, live: Live) -> int:
        if self.rules.max_length is None:
            return self.max_new_tokens
        return min(self.max_new_tokens, self.rules.max_length - len(live.reader.prompt_ids))

    def _out_of_turns(self, live: Live) -> bool:
        if self.rules.max_turns is None and len(live.turns) >= ENDLESS:  # in a window no context gets full
            raise ValueError(
                f"The episode of seed {live.episode.seed} is still going on after {ENDLESS:,} turns, and its "
                "environment may never end it: limit it with max_turns."
            )
        return self.rules.max_turns is not None and len(live.turns) >= self.rules.max_turns

    def _on_reply(self, live: Live, reply: Reply) -> End | None:
        """The model answered: ask once more where replies vote or are corrected, else play it."""
        live.drafts.append(reply)
        if self.exploration.correction and len(live.drafts) == 1:
            read = live.reader.prompt_ids, live.reader.input_ids
            live.reader.reconsider(reply.ids, self.exploration.correction)
            if self._budget(live) >= 1:
                return self._submit(live)
            live.reader.prompt_ids, live.reader.input_ids = read  # no room for another: the first reply counts
        if len(live.drafts) < self.exploration.n_samples:
            return self._submit(live)
        if self.exploration.n_samples > 1:
            # The last of the drafts is the one that counts
            live.drafts.append(live.drafts.pop(vote([self._parse(live, draft)[1] for draft in live.drafts])))
        return self._on_final(live, live.drafts.pop())

    def _parse(self, live: Live, reply: Reply) -> tuple[str, ParsedAction]:
        text = self.context.decode(reply.ids)
        parsed = self.parser.parse(text, live.info.get("legal_actions"), cut_off=reply.cut_off)
        return text, name_back(parsed, live.names) if live.names else parsed

    def _on_final(self, live: Live, reply: Reply, forced: bool = False) -> End | None:
        """A reply that counts: play its action, or another in its place, or ask again."""
        text, parsed = self._parse(live, reply)
        legal_actions = live.info.get("legal_actions")
        live.tell(parsed)
        if reply.cut_off and not parsed.is_valid and live.turns and self._budget(live) < self.max_new_tokens:
            return End(StopReason.CONTEXT_FULL)  # the room ran out, which is no fault of the reply
        turn = {
            "observation": rename_actions(live.observation, live.names or {}),
            "input_ids": tuple(live.reader.input_ids),
            "action_ids": reply.ids,
            "text": text,
            "parsed": parsed,
            "penalty": 0.0 if parsed.is_valid else self.rules.invalid_action_penalty,
            "bonus": self.exploration.bonus(live.past, parsed.action) if parsed.is_valid and not forced else 0.0,
            "appends": self.context.appends,
            "logprobs": reply.logprobs,
            "cut_off": reply.cut_off,
            "forced": forced,
            "drafts": tuple(self.context.decode(draft.ids) for draft in live.drafts),
        }
        live.drafts = []
        action, ends = parsed.action, self.rules.invalid_action == "end"
        if action is None and self.rules.invalid_action == "random":
            if legal_actions:
                action = legal_actions[live.rng.integers(len(legal_actions))]
            elif live.reset_info.get("legal_actions"):
                problem = "the environment's `info` lists no 'legal_actions' any more, to choose a random one of."
                return End(Fault.MALFORMED, problem)
            else:
                ends = True  # any text may be an action here: nothing can be played in its place
        if action is not None:
            live.pending = {**turn, "executed": action}
            self.pool.step(live.slot, action)
            return None
        live.turns.append(Turn(**turn, executed=None))
        live.retries += 1
        if ends or live.retries > self.rules.max_retries:
            return End(StopReason.INVALID_ACTION)
        live.observation = self._ask_again(legal_actions)
        live.reader.ask(reply.ids, live.observation)
        if self._out_of_turns(live):
            return End(StopReason.MAX_TURNS)
        return self._submit(live)

    def _ask_again(self, legal_actions: list[str] | None) -> str:
        if not legal_actions:
            return "No action could be read from your answer. State it once more."
        try:
            form = f" Answer in the form {self.parser.format(legal_actions[0])}"
        except ValueError:  # no pattern can produce it
            form = ""
        return f"That is no legal action. Legal actions: {', '.join(legal_actions)}.{form}"

    def _final_ids(self, live: Live, stop: StopReason) -> tuple[int, ...]:
        """What the next turn would have read: a critic's bootstrap is the value of that state."""
        if stop.is_fault or stop.is_terminal or stop is StopReason.CONTEXT_FULL:
            return ()  # an episode whose `reset` failed has no reader
        if self.rules.max_length is not None and len(live.reader.prompt_ids) > self.rules.max_length:
            return ()
        return tuple(live.reader.input_ids)

    def _trajectory(self, live: Live, stop: StopReason, error: str | None) -> Trajectory:
        return Trajectory(
            seed=live.episode.seed,
            turns=tuple(live.turns),
            stop=stop,
            instructions=live.reset_info.get("instructions", self.briefing.instructions),
            final_observation=live.observation,
            final_ids=self._final_ids(live, stop),
            reset_info=live.reset_info,
            env_seconds=live.env_seconds,
            error=error,
        )
