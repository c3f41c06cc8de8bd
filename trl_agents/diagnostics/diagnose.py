# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""All parts of a diagnosis into one folder; what is finished is not measured again."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from ..actions import ActionParser
from ..envs.make import make_env
from ..evaluation import held_out_seeds, play_agents
from ..exploration import Exploration, make_exploration
from ..rollout.probe import Probe
from ..types import Trajectory
from .folder import Folder
from .frequency_bias import frequency_bias
from .greediness import greediness
from .histories import NotMeasurable, legal_actions_of
from .knowing_doing import knowing_doing
from .players import make_player


PARTS = ("greediness", "frequency_bias", "knowing_doing")


def diagnose(
    player: Any,
    env: str | Callable[..., Any],
    output_dir: str | Path,
    *,
    name: str | None = None,
    parts: Sequence[str] = PARTS,
    n_instances: int = 64,
    horizon: int | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
    references: Sequence[str] | None = None,
    parser: ActionParser | None = None,
    context: str = "window",
    window: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    exploration: str | Sequence[str] | Exploration | None = None,
    max_new_tokens: int = 256,
    max_new_tokens_ucb: int = 2048,
    temperature: float = 0.0,
    max_turns: int | None = None,
    env_timeout: float | None = 120.0,
    env_reset_timeout: float | None = None,
    n_slots: int = 32,
    n_targets: int = 5,
    n_histories: int = 5,
    n_repetitions: int = 100,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """
    Measure how a player fails where it should explore: greediness, frequency bias, and the gap between knowing and
    doing, after [LLMs are Greedy Agents](https://huggingface.co/papers/2504.16078).

    The folder gets `diagnostics.json`, `episodes.jsonl` and a picture a part, each as soon as the part is finished.
    The same call goes on where it was interrupted. A part that means nothing for this environment or player is left
    out with a warning, and `skipped` says why.

    Args:
        player:
            Path or Hub id of a model, a pair `(model, tokenizer)`, the name of a scripted player (`"ucb"`), an
            [`Agent`], or a function from what is read to a reply.
        env (`str` or `Callable`):
            Environment id, class or factory. All parts need `info["legal_actions"]`, frequency bias and the gap those
            that stay the same.
        output_dir (`str` or `Path`):
            The folder.
        name (`str`, *optional*):
            What the player is called in tables. Defaults to what it was named by.
        parts (`Sequence[str]`, *optional*):
            Of `"greediness"`, `"frequency_bias"`, `"knowing_doing"`, those to measure. Defaults to all.
        n_instances (`int`, *optional*, defaults to `64`):
            Episodes of greediness and of the gap, from held-out seeds.
        horizon (`int`, *optional*):
            Steps of an episode, for environments with an argument of that name.
        env_kwargs (`Mapping`, *optional*):
            The environment's other arguments.
        references (`Sequence[str]`, *optional*):
            Scripted players that play the same seeds. Defaults to `"random"` and `"ucb"`, and `"linucb"` where the
            environment tells features.
        parser ([`ActionParser`], *optional*):
            Takes actions out of replies. Defaults to `ACTION=X`.
        context, window, chat_template_kwargs (*optional*):
            What a model reads each turn, as in [`AgentGRPOConfig`]. Give those it was trained with. The default is the
            paper's form, which keeps no thoughts.
        exploration (`str`, `Sequence[str]` or [`Exploration`], *optional*):
            Mechanisms at work in the episodes of greediness, as for [`make_exploration`]. The other parts measure the
            model itself.
        max_new_tokens (`int`, *optional*, defaults to `256`):
            Token budget of one reply.
        max_new_tokens_ucb (`int`, *optional*, defaults to `2048`):
            The same where values are to be written down.
        temperature (`float`, *optional*, defaults to `0.0`):
            Sampling temperature of the episodes; the paper's is 0, greedy decoding.
        max_turns (`int`, *optional*):
            Most turns of an episode, for environments that do not end by themselves.
        env_timeout, env_reset_timeout (*optional*):
            As for [`~evaluation.play_model`].
        n_slots (`int`, *optional*, defaults to `32`):
            Episodes side by side.
        n_targets, n_histories, n_repetitions (`int`, *optional*, default to `5`, `5` and `100`):
            Frequency bias: actions that are repeated, histories of each, and most repetitions.
        seed (`int`, *optional*, defaults to `0`):
            Seeds the sampling and the random histories. The episodes' seeds are always the same.
        progress (`bool`, *optional*, defaults to `True`):
            Whether to show progress bars.

    Returns:
        `dict`: what `diagnostics.json` holds: `player`, `env`, `settings`, `parts`, `invalid_rate` (for each part: of
        replies; of frequency bias the probability that is on no action) and `skipped`.

    Example:

    ```python
    >>> from trl_agents.diagnostics import diagnose

    >>> result = diagnose("outputs/grpo_bandit_tiny", "trl_agents/Bandit-v0", "outputs/diagnosis", context="chat")
    >>> result["parts"]["greediness"]["measures"]["coverage"]
    ```
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise ValueError(f"parts={unknown!r}: there is no such part. Use some of {', '.join(PARTS)}.")
    counts = {"n_instances": n_instances, "n_targets": n_targets, "n_histories": n_histories}
    limit = {} if max_turns is None else {"max_turns": max_turns}
    for argument, value in {**counts, **limit}.items():
        if value < 1:
            raise ValueError(f"{argument}={value!r}: give 1 or more.")
    exploration = make_exploration(exploration)
    exploration.check_context(context)
    env_kwargs = {**(env_kwargs or {}), **({} if horizon is None else {"horizon": horizon}), **exploration.env_kwargs}
    factory = functools.partial(make_env, env, **env_kwargs)
    waiting = {"env_timeout": env_timeout, "env_reset_timeout": env_reset_timeout}
    with closing(Probe(factory, env_timeout, env_reset_timeout, resets=False)) as probe:
        probe.begin(0)  # a mistake shows before a model is loaded
    env_id = env if isinstance(env, str) else getattr(env, "__qualname__", type(env).__name__)
    player = make_player(
        player,
        name,
        factory=factory,
        parser=parser,
        context=context,
        window=window,
        chat_template_kwargs=dict(chat_template_kwargs or {}),
        n_slots=n_slots,
        seed=seed,
    )
    if exploration and not player.writes:
        raise ValueError(f"exploration={exploration.names}: {player.name} writes no replies; leave it out.")
    folder = Folder(
        Path(output_dir),
        player.name,
        {"id": env_id, "kwargs": env_kwargs},
        {
            **player.identity,
            "n_instances": n_instances,
            "references": None if references is None else list(references),
            "parser": repr(parser or ActionParser()),
            "context": context,
            "window": window,
            "chat_template_kwargs": dict(chat_template_kwargs or {}),
            **({"exploration": exploration.names} if exploration else {}),
            "max_new_tokens": max_new_tokens,
            "max_new_tokens_ucb": max_new_tokens_ucb,
            "temperature": temperature,
            **limit,
            "n_targets": n_targets,
            "n_histories": n_histories,
            "n_repetitions": n_repetitions,
            "seed": seed,
        },
    )
    seeds = held_out_seeds(n_instances)
    playing = {"temperature": temperature, "progress": progress, "max_turns": max_turns, **waiting}

    def greediness_part() -> tuple:
        with closing(Probe(factory, env_timeout, env_reset_timeout)) as probe:
            first = probe.begin(seeds[0]).info
        legal_actions_of(first)
        beside = references
        if beside is None:
            beside = ("random", "ucb", *(["linucb"] if "features" in first else []))
        own = player.play(factory, seeds, exploration=exploration, max_new_tokens=max_new_tokens, **playing)
        _check_played(own)
        names = [name for name in beside if name != player.name]
        others = play_agents(factory, names, seeds, max_turns=max_turns, progress=progress)
        return greediness({player.name: own, **others}), own, player.name

    def frequency_bias_part() -> tuple:
        starts = held_out_seeds(n_targets * n_histories)
        measured, invalid = frequency_bias(
            player, factory, starts, n_targets=n_targets, n_repetitions=n_repetitions, seed=seed, progress=progress
        )
        return measured, invalid

    def knowing_doing_part() -> tuple:
        measured, own = knowing_doing(player, factory, seeds, max_new_tokens=max_new_tokens_ucb, **playing)
        return measured, own, f"{player.name}, told to act by UCB"

    measure = {
        "greediness": greediness_part,
        "frequency_bias": frequency_bias_part,
        "knowing_doing": knowing_doing_part,
    }
    for part in PARTS:
        if part in parts and part not in folder.result["parts"]:
            try:
                folder.save(part, *measure[part]())
            except NotMeasurable as reason:
                warnings.warn(f"{part} is left out: {reason}.", stacklevel=2)
                folder.skip(part, str(reason))
    return folder.result


def _check_played(trajectories: Sequence[Trajectory]) -> None:
    faults = [trajectory.error for trajectory in trajectories if trajectory.stop.is_fault]
    if len(faults) == len(trajectories):
        raise ValueError(f"The environment failed in every episode; the first time: {faults[0]}")
