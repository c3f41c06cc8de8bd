# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Players and models, playing on the same seeds. What they achieved is told by [`tables`]."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .actions import ActionParser
from .agents import Agent, make_agent, play_episode
from .contexts import make_context
from .envs.make import make_env
from .exploration import Exploration, make_exploration
from .rollout.generation import Sampling, end_of_reply_ids, make_backend, positions_of
from .rollout.play import Player
from .rollout.probe import Probe
from .rollout.rules import Episode, Rules
from .rollout.workers import EnvPool
from .seeds import held_out_seeds as held_out_seeds  # belongs to evaluation, for those who only evaluate
from .types import Trajectory


def play_agents(
    env: str | Callable[..., Any],
    agents: Mapping[str, Agent] | Sequence[str],
    seeds: Sequence[int],
    *,
    env_kwargs: Mapping[str, Any] | None = None,
    max_turns: int | None = None,
    progress: bool = False,
) -> dict[str, list[Trajectory]]:
    """
    Let scripted players play the same episodes, in this process: what an environment raises is raised, and one that
    hangs is waited for.

    Args:
        env (`str` or `Callable`):
            Environment id, class or factory.
        agents (`Mapping[str, Agent]` or `Sequence[str]`):
            Players by the name to report them under, or names for [`make_agent`].
        seeds (`Sequence[int]`):
            One episode each.
        env_kwargs (`Mapping`, *optional*):
            Arguments of the environment.
        max_turns (`int`, *optional*):
            Most turns of an episode. Without it, one that goes on for 10,000 is an error.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.

    Returns:
        `dict[str, list[Trajectory]]`: each player's episodes, in the order of the seeds.
    """
    made = make_env(env, **(env_kwargs or {}))
    try:
        if not isinstance(agents, Mapping):
            agents = {name: make_agent(name, made) for name in agents}
        with tqdm(total=len(agents) * len(seeds), desc="Players", unit="ep", leave=False, disable=not progress) as bar:
            played = {}
            for name, agent in agents.items():
                played[name] = []
                for seed in seeds:
                    played[name].append(play_episode(made, agent, seed=seed, max_turns=max_turns))
                    bar.update()
    finally:
        made.close()
    return played


def play_opponents(
    play: Callable[[Callable[[], Any]], Sequence[Trajectory]],
    env: str | Callable[..., Any],
    opponents: Sequence[str],
    *,
    env_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, list[Trajectory]]:
    """
    Let somebody play against each opponent in both seats, in an environment with the arguments `opponent` and `seat`.

    Instructions name the seat. With `seat="random"` among `env_kwargs` the games are of random seats, so that a model
    that was trained so reads the words it knows; otherwise each game is played twice, once in either seat.

    Args:
        play (`Callable`):
            Given the factory of an environment, plays games in it: `lambda env: trainer.play(seeds, env=env)`. A
            limit on their turns is its matter too.
        env (`str` or `Callable`):
            Environment id, class or factory.
        opponents (`Sequence[str]`):
            Opponents as the environment calls them.
        env_kwargs (`Mapping`, *optional*):
            The other arguments of the environment.

    Returns:
        `dict[str, list[Trajectory]]`: the games against each opponent.
    """
    seats = ("random",) if (env_kwargs or {}).get("seat") == "random" else ("first", "second")
    played: dict[str, list[Trajectory]] = {opponent: [] for opponent in opponents}
    for opponent, games in played.items():
        for seat in seats:
            kwargs = {**(env_kwargs or {}), "opponent": opponent, "seat": seat}
            games += play(functools.partial(make_env, env, **kwargs))
    return played


def play_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    env: str | Callable[..., Any],
    seeds: Sequence[int],
    *,
    env_kwargs: Mapping[str, Any] | None = None,
    parser: ActionParser | None = None,
    context: str = "chat",
    window: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    exploration: str | Sequence[str] | Exploration | None = None,
    max_new_tokens: int = 256,
    action_stop: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    min_p: float | None = None,
    max_turns: int | None = None,
    max_episode_length: int | None = None,
    invalid_action: str = "random",
    max_retries: int = 2,
    env_timeout: float | None = 120.0,
    env_reset_timeout: float | None = None,
    env_processes: bool = False,
    n_slots: int = 32,
    seed: int = 0,
    progress: bool = False,
) -> list[Trajectory]:
    """
    Let a language model play one episode from each seed.

    An episode whose environment raises, hangs or returns something else than it should is begun again, and replaced by
    another from its seed, as in training. One that is lost all the same is in the list with a `stop` that
    [`is_fault`][StopReason], and tables leave it out.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Causal language model.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Its tokenizer.
        env (`str` or `Callable`):
            Environment id, class or factory.
        seeds (`Sequence[int]`):
            One episode each.
        env_kwargs (`Mapping`, *optional*):
            Arguments of the environment.
        parser ([`ActionParser`], *optional*):
            Takes actions out of replies. Defaults to `ACTION=X`.
        context, window, chat_template_kwargs (*optional*):
            What the model reads each turn, as in [`AgentGRPOConfig`].
        exploration (`str`, `Sequence[str]` or [`Exploration`], *optional*):
            Mechanisms that make it explore, as for [`make_exploration`].
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Token budget of one reply.
        action_stop (`bool`, *optional*, defaults to `False`):
            Whether a reply is over as soon as it states a legal action.
        temperature (`float`, *optional*, defaults to `1.0`):
            Sampling temperature, 0 for greedy decoding.
        top_p, top_k, min_p (*optional*):
            Truncations of the distribution, as in [`~transformers.GenerationConfig`]; off by default.
        max_turns (`int`, *optional*):
            Most turns of an episode. Without it, one that goes on for 10,000 is an error.
        max_episode_length (`int`, *optional*):
            Most tokens that a prompt and its reply may have together. Defaults to the model's number of positions.
        invalid_action (`str`, *optional*, defaults to `"random"`):
            What a reply without a legal action leads to: `"random"` plays a random legal action, `"retry"` asks again,
            `"end"` ends the episode.
        max_retries (`int`, *optional*, defaults to `2`):
            With `invalid_action="retry"`, how often a step is asked again before the episode ends.
        env_timeout, env_reset_timeout (`float`, *optional*, default to `120.0` and `env_timeout`):
            Seconds an environment may take for a `step`, and for a `reset`, being made included. None waits for ever.
        env_processes (`bool`, *optional*, defaults to `False`):
            Whether each environment gets a process of its own, as in [`AgentGRPOConfig`].
        n_slots (`int`, *optional*, defaults to `32`):
            Episodes side by side.
        seed (`int`, *optional*, defaults to `0`):
            Seeds the sampling.
        progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.

    Returns:
        `list[Trajectory]`, in the order of the seeds.
    """
    exploration = make_exploration(exploration)
    exploration.check_context(context)
    factory = functools.partial(make_env, env, **{**(env_kwargs or {}), **exploration.env_kwargs})
    limits = {"timeout": env_timeout, "reset_timeout": env_reset_timeout, "processes": env_processes}
    with closing(Probe(factory, **limits, resets=False)) as probe:
        briefing = probe.begin(0).briefing
    eos_token_ids = end_of_reply_ids(model, tokenizer)
    n_slots = max(min(n_slots, len(seeds)), 1)
    sampling = Sampling(tuple(eos_token_ids), temperature, top_p, top_k, min_p)
    backend = make_backend(model, tokenizer, n_slots, sampling)
    rules = Rules(
        max_new_tokens=max_new_tokens,
        max_length=min((n for n in (positions_of(model), max_episode_length) if n is not None), default=None),
        max_turns=max_turns,
        invalid_action=invalid_action,
        max_retries=max_retries,
        action_stop=action_stop,
    )
    pool = EnvPool(factory, n_slots, **limits)
    training = model.training
    model.eval()
    try:
        reader = make_context(context, tokenizer, eos_token_ids, chat_template_kwargs, window)
        player = Player(pool, backend, reader, parser or ActionParser(), briefing, rules, exploration)
        episodes = [Episode(number, (seed,)) for number in seeds]
        return player.play(episodes, progress=progress, description="Model")[0]
    finally:
        model.train(training)
        pool.close()
