# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Who can be diagnosed: a causal language model, a scripted player, or any function from what is read to a reply.

They differ in how episodes are played and where a distribution over actions comes from; the measures know no
difference.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import itertools
import random
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..actions import ActionParser
from ..agents import AGENTS, Agent, RandomAgent, is_scripted, make_agent
from ..contexts import make_context
from ..envs.names import close_to
from ..evaluation import play_agents, play_model
from ..exploration import Exploration
from ..rollout.generation import BatchBackend, Reply, end_of_reply_ids, positions_of
from ..rollout.play import Player as Rollout
from ..rollout.probe import Probe
from ..rollout.rules import Episode, Rules
from ..rollout.workers import EnvPool
from ..types import Trajectory
from .histories import History
from .scoring import Cost, TreeScorer, action_probabilities


class ModelPlayer:
    """
    A causal language model.

    Its distribution over actions is that of the replies that state one and nothing else (`ACTION=blue`), right after
    the assistant's opening. A model that is used to reason first is asked without its reasoning.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal language model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        name (`str`):
            What it is called in tables.
        parser, context, window, chat_template_kwargs, n_slots, seed:
            As for [`~evaluation.play_model`].
    """

    writes = True  # whether its replies are text of its own

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        *,
        parser: ActionParser | None = None,
        context: str = "window",
        window: int | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        n_slots: int = 32,
        seed: int = 0,
    ):
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.parser = parser or ActionParser()
        self.reading = {"context": context, "window": window, "chat_template_kwargs": chat_template_kwargs}
        self.n_slots, self.seed = n_slots, seed
        eos_token_ids = end_of_reply_ids(model, tokenizer)
        self.context = make_context(context, tokenizer, eos_token_ids, chat_template_kwargs, window)
        self.scorer: TreeScorer | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What tells this model from another: some of each of its weights, so that a trained one counts as another."""
        digest = hashlib.sha256()
        for name, parameter in self.model.named_parameters():
            some = parameter.detach().reshape(-1)[:64]
            # Packed weights of a quantized model are integers
            values = some.float() if some.is_floating_point() else some
            digest.update(name.encode() + values.cpu().numpy().tobytes())
        return {"model": type(self.model).__name__, "weights": digest.hexdigest()[:16]}

    def play(
        self,
        factory: Callable[[], Any],
        seeds: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float,
        exploration: Exploration | None = None,
        progress: bool = False,
        **limits: Any,
    ) -> list[Trajectory]:
        """One episode from each of `seeds`. `limits`: of turns and waiting, as for [`play_model`]."""
        return play_model(
            self.model,
            self.tokenizer,
            factory,
            seeds,
            parser=self.parser,
            **self.reading,
            exploration=exploration,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            n_slots=self.n_slots,
            seed=self.seed,
            progress=progress,
            **limits,
        )

    def probabilities(self, history: History, n_repetitions: int) -> tuple[np.ndarray, np.ndarray]:
        """
        The distributions over the legal actions after 0, 1, ... `n_repetitions` repetitions of the last step,
        `(R, K)`, and what all replies that state an action had before they were made to sum to 1, `(R,)`. Fewer rows
        where the model has no positions for more.
        """
        if self.scorer is None:
            self.scorer = TreeScorer(self.model)
        continuations = [self._continuation(self.parser.format(action)) for action in history.legal_actions]
        positions = positions_of(self.model)
        room = None if positions is None else positions - max(map(len, continuations))
        prompts = read_all(self.context, self.parser, history.repeated(n_repetitions))[len(history.transitions) :]
        prompts = list(itertools.takewhile(lambda prompt: room is None or len(prompt) <= room, prompts))
        if not prompts:
            return np.zeros((0, len(continuations))), np.zeros(0)
        return action_probabilities(self.scorer.score(prompts, continuations), continuations)

    def _continuation(self, text: str) -> list[int]:
        """The ids of a reply where the prompt ends: not always those of the text by itself."""
        prompt = self.context.render([{"role": "user", "content": "?"}])
        ids, both = self.context.encode(prompt), self.context.encode(prompt + text)
        return both[len(ids) :] if both[: len(ids)] == ids else self.context.encode(text)

    @property
    def cost(self) -> Cost:
        """What [`probabilities`] took so far."""
        return self.scorer.cost if self.scorer else Cost()


class AgentPlayer:
    """
    A scripted player. Its distribution is known for a random one, and else counted: one choice where none is drawn by
    lot, the shares among 100 choices otherwise.
    """

    writes = False
    cost = Cost()
    DRAWS = 100

    def __init__(self, agent: Agent, name: str):
        self.agent, self.name = agent, name

    @property
    def identity(self) -> dict[str, Any]:
        made_with = (name for name in inspect.signature(type(self.agent)).parameters if hasattr(self.agent, name))
        return {"agent": type(self.agent).__name__, **{name: getattr(self.agent, name) for name in made_with}}

    def play(
        self,
        factory: Callable[[], Any],
        seeds: Sequence[int],
        *,
        max_turns: int | None = None,
        progress: bool = False,
        **_,
    ) -> list[Trajectory]:
        """One episode from each of `seeds`."""
        agents = {self.name: copy.deepcopy(self.agent)}  # what it remembers of an episode is none of its identity
        return play_agents(factory, agents, seeds, max_turns=max_turns, progress=progress)[self.name]

    def probabilities(self, history: History, n_repetitions: int) -> tuple[np.ndarray, np.ndarray]:
        """As for a model; nothing is left over."""
        legal = history.legal_actions
        agent = copy.deepcopy(self.agent)
        agent.reset(legal_actions=legal, seed=history.seed)
        rows, start = [], len(history.transitions)
        observation, info = history.observation, history.info
        for number, step in enumerate(history.repeated(n_repetitions).transitions, start=1):
            agent.act(observation, info)  # some remember their choice
            agent.update(step.action, step.reward, step.info)
            if isinstance(agent, RandomAgent):
                agent.last = step.action
            observation, info = step.observation, step.info
            if number >= start:
                rows.append(self._distribution(agent, legal, observation, info))
        return np.array(rows), np.ones(len(rows))

    def _distribution(self, agent: Agent, legal: list[str], observation: str, info: Any) -> np.ndarray:
        counts = np.zeros(len(legal))
        if isinstance(agent, RandomAgent):
            counts += (1 - agent.repeat) / len(legal)
            counts[legal.index(agent.last)] += agent.repeat
            return counts
        for draw in range(self.DRAWS):
            asked = copy.deepcopy(agent)
            asked.rng = random.Random(draw)
            before = asked.rng.getstate()
            counts[legal.index(asked.act(observation, info))] += 1
            if asked.rng.getstate() == before:  # no lot was drawn: it would choose the same again
                break
        return counts / counts.sum()


class TextPlayer:
    """
    Any function from what is read to a reply: a script that writes, or somebody else's model behind an interface.

    Its distribution is that of its one reply, all on the action it states; a reply without one has none.

    Args:
        write (`Callable[[str], str]`):
            Given all that is to be read at a turn as text, returns the reply.
        name (`str`):
            What it is called in tables.
        parser, context, window, n_slots, seed:
            As for [`ModelPlayer`].
    """

    writes = True
    cost = Cost()

    def __init__(
        self,
        write: Callable[[str], str],
        name: str,
        *,
        parser: ActionParser | None = None,
        context: str = "window",
        window: int | None = None,
        n_slots: int = 32,
        seed: int = 0,
    ):
        self.write, self.name, self.n_slots, self.seed = write, name, n_slots, seed
        self.parser = parser or ActionParser()
        self.context = make_context(context, _Characters(), window=window)
        self.identity = {"writer": getattr(write, "__qualname__", type(write).__name__)}

    def play(
        self,
        factory: Callable[[], Any],
        seeds: Sequence[int],
        *,
        exploration: Exploration | None = None,
        max_turns: int | None = None,
        env_timeout: float | None = 120.0,
        env_reset_timeout: float | None = None,
        progress: bool = False,
        **_,
    ) -> list[Trajectory]:
        """One episode from each of `seeds`."""
        with closing(Probe(factory, env_timeout, env_reset_timeout, resets=False)) as probe:
            briefing = probe.begin(0).briefing
        pool = EnvPool(factory, max(min(self.n_slots, len(seeds)), 1), env_timeout, env_reset_timeout)
        try:
            rollout = Rollout(
                pool,
                BatchBackend(self._answer),
                self.context,
                self.parser,
                briefing,
                Rules(max_turns=max_turns),
                exploration,
            )
            episodes = [Episode(number, (self.seed,)) for number in seeds]
            return rollout.play(episodes, progress=progress, description=self.name)[0]
        finally:
            pool.close()

    def _answer(self, prompts: list[list[int]], budgets: list[int]) -> list[Reply]:
        texts = [self.reply(prompt) for prompt in prompts]
        return [Reply((*self.context.encode(text), _Characters.eos_token_id), cut_off=False) for text in texts]

    def reply(self, prompt: list[int]) -> str:
        text = self.write(self.context.decode(tuple(prompt)))
        if not isinstance(text, str):
            raise ValueError(f"The player {self.name!r} returned {text!r} as a reply: it must return a text.")
        return text

    def probabilities(self, history: History, n_repetitions: int) -> tuple[np.ndarray, np.ndarray]:
        """As for a model, NaN where the reply states no action."""
        legal = history.legal_actions
        prompts = read_all(self.context, self.parser, history.repeated(n_repetitions))[len(history.transitions) :]
        rows = np.full((len(prompts), len(legal)), np.nan)
        for row, prompt in zip(rows, prompts, strict=True):
            action = self.parser.parse(self.reply(prompt), legal).action
            if action is not None:
                row[:] = np.array(legal) == action
        return rows, (~np.isnan(rows[:, 0])).astype(float)


class _Characters:
    """A tokenizer for players who read text: a token a character, a message a line."""

    eos_token_id = 0
    chat_template = "the messages themselves"

    def apply_chat_template(self, messages: list[dict[str, str]], **_) -> str:
        return "".join(message["content"] + "\n" for message in messages)

    def encode(self, text: str, **_) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: Sequence[int], **_) -> str:
        return "".join(chr(token) for token in ids if token != self.eos_token_id)


def read_all(context: Any, parser: ActionParser, history: History) -> list[list[int]]:
    """What is read at each turn of a history, the replies so far being bare statements: `len(transitions) + 1` ids."""
    reader = context.begin(history.briefing, history.observation, history.info)
    prompts = [list(reader.prompt_ids)]
    for step in history.transitions:
        ids = tuple(context.reply_ids(parser.format(step.action))) if context.appends else ()
        reader.observe(ids, step.action, step.reward, step.observation, step.info)
        prompts.append(list(reader.prompt_ids))
    return prompts


def make_player(
    player: Any, name: str | None = None, *, factory: Callable[[], Any] | None = None, **settings: Any
) -> ModelPlayer | AgentPlayer | TextPlayer:
    """
    From what a user names a player by to a player.

    Args:
        player:
            The name of a scripted player (`"ucb"`), the path or Hub id of a model, a pair of a model and its
            tokenizer, an [`Agent`], or a function from text to text.
        name (`str`, *optional*):
            What it is called in tables. Defaults to what it was named by.
        factory (`Callable`, *optional*):
            Makes what will be played: some scripted players want to know.
        **settings:
            As for [`ModelPlayer`].
    """
    if isinstance(player, (ModelPlayer, AgentPlayer, TextPlayer)):
        return player
    if isinstance(player, str) and is_scripted(player):
        env = factory() if factory else None
        agent = make_agent(player, env)
        if env is not None:
            env.close()
        return AgentPlayer(agent, name or player)
    if isinstance(player, str):
        return ModelPlayer(*load_model(player), name or player.rstrip("/"), **settings)
    if isinstance(player, Agent):
        return AgentPlayer(player, name or type(player).__name__)
    if isinstance(player, (tuple, list)) and len(player) == 2:
        path = getattr(player[0].config, "_name_or_path", "") if hasattr(player[0], "config") else ""
        return ModelPlayer(*player, name or path or "model", **settings)
    if callable(player) and not isinstance(player, torch.nn.Module):
        settings = {key: value for key, value in settings.items() if key != "chat_template_kwargs"}
        return TextPlayer(player, name or getattr(player, "__name__", type(player).__name__), **settings)
    raise ValueError(
        f"player={player!r} is no player. Pass the name of a scripted one ({', '.join(AGENTS)}), the path or Hub id "
        "of a model, a pair (model, tokenizer), an Agent, or a function from text to text."
    )


def load_model(
    path: str, device: str | None = None, dtype: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    A causal language model, with its adapters if it has any, and its tokenizer, on the GPU if there is one and
    `device` says nothing else. A `ValueError` tells in a line why there is none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())
        reason = reason if len(reason) <= 200 else f"{reason[:200]}..."
        where = "The folder" if Path(path).is_dir() else "No folder here, and the Hub gave no model:"
        raise ValueError(
            f"No model could be loaded from {path!r}. {where} ({type(error).__name__}: {reason})."
            f"{close_to(path, AGENTS)} Give a folder with a saved model and its tokenizer, an id on the Hub, or one "
            f"of the scripted players: {', '.join(AGENTS)}."
        ) from error
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval(), tokenizer
