# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What the model card says of an agent, and the files it shows: the learning curve and some episodes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..actions import ActionParser
from ..agent_config import AgentConfig
from ..cards import correct_card
from ..contexts import Briefing
from ..episodes import LoggedEpisode, write_episodes
from ..plots import plot_learning_curve
from ..types import Trajectory
from .agent_grpo_config import AgentGRPOConfig


if TYPE_CHECKING:
    from .agent_grpo_trainer import AgentGRPOTrainer


# What a reader of the model card wants to know of how the agent was trained.
CARD_SETTINGS = (
    "context",
    "exploration",
    "max_completion_length",
    "discount",
    "num_generations",
    "reward_normalization",
    "invalid_action",
    "invalid_action_penalty",
    "beta",
    "learning_rate",
    "temperature",
)
ALWAYS_TOLD = ("env_kwargs", "max_new_tokens")  # in the card's code; other arguments where they are not the usual
GROUP_SETTINGS = ("advantage_estimator", "scale_rewards")
# What the card tells of the training where nobody has told it of results, and what a picture is made of.
PROGRESS = ("return_mean", "regret_mean", "coverage_mean", "invalid_share")
CURVE_FILE = "learning_curve.png"
SAMPLES_FILE = "sample_episodes"  # .txt to read, .jsonl to learn from
N_SAMPLES = 4
CRITIC_SETTINGS = ("advantage_level", "gae_lambda", "value_coef", "value_clip", "num_iterations", "kl_in")


def complete_card(trainer: AgentGRPOTrainer) -> None:
    """
    Add to TRL's card, which is in the output folder, what it cannot know: the agent, its results, where its paths
    lead. Beside it go the learning curve, unless `card_results` show another, and some of the latest episodes.
    """
    folder, results = Path(trainer.args.output_dir), trainer.card_results
    if not results:
        history = trainer.state.log_history
        results = progress_table(history)
        what = "regret" if any("agents/regret_mean" in log for log in history) else "return"
        if results:
            plot_learning_curve(history, folder / CURVE_FILE, f"agents/{what}_mean", f"{what} per episode")
            results += f"\n\n![Learning curve]({CURVE_FILE})"
    write_samples(folder, trainer.latest, trainer.briefing, trainer.env_id, trainer.env_kwargs)
    if (folder / f"{SAMPLES_FILE}.txt").exists():
        results += f"\n\nSome episodes: [to read]({SAMPLES_FILE}.txt), [to learn from]({SAMPLES_FILE}.jsonl)."
    model = trainer.hub_model_id or trainer.args.hub_model_id or trainer.args.output_dir
    section = card_section(trainer.env_name, trainer.agent_config, trainer.args, model)
    correct_card(folder, model, section + base_note(trainer.model))
    if results.strip():
        with (folder / "README.md").open("a", encoding="utf-8") as card:
            card.write(f"\n## Results\n\n{results.strip()}\n")


def progress_table(log_history: Sequence[Mapping[str, Any]]) -> str:
    """First and last value of what was logged of the episodes, as Markdown; empty if nothing was."""
    rows = []
    for prefix, what in (("", "training"), ("eval_", "evaluation")):
        for name in PROGRESS:
            values = [log[f"{prefix}agents/{name}"] for log in log_history if f"{prefix}agents/{name}" in log]
            if values:
                rows.append(f"| {what} episodes: `agents/{name}` | {values[0]:.3f} | {values[-1]:.3f} |")
    return "\n".join(["| | first logged | last logged |", "|---|---|---|", *rows]) if rows else ""


def write_samples(
    folder: Path, played: Sequence[Trajectory], briefing: Briefing, env_id: str | None, env_kwargs: Mapping[str, Any]
) -> None:
    """A few of the episodes that were `played` last, from different seeds, to read and in the form of `episodes`."""
    of_seed = {trajectory.seed: trajectory for trajectory in reversed(played) if not trajectory.stop.is_fault}
    samples = [of_seed[seed] for seed in sorted(of_seed)[:N_SAMPLES]]
    if not samples:
        return
    texts = [f"Episode {number}, seed {sample.seed}\n{sample}\n" for number, sample in enumerate(samples)]
    (folder / f"{SAMPLES_FILE}.txt").write_text("\n".join(texts), encoding="utf-8")
    kwargs = json.loads(json.dumps(dict(env_kwargs), default=repr))  # an environment of one's own may take anything
    logged = [
        LoggedEpisode(
            sample.return_,
            sample,
            Briefing(sample.instructions, briefing.history_header, briefing.question),
            env_id,
            kwargs,
        )
        for sample in samples
    ]
    write_episodes(folder / f"{SAMPLES_FILE}.jsonl", logged)


def base_note(model: Any) -> str:
    """What to know of an adapter whose base model lies in a folder, which nobody else has."""
    configs = getattr(model, "peft_config", None) or {}
    bases = {config.base_model_name_or_path for config in configs.values()}
    folders = [base for base in bases if base and Path(base).is_dir()]
    if not folders:
        return ""
    return (
        f"\n> This is an adapter, and its base model is a folder of the computer that trained it, `{folders[0]}`. To "
        "load it elsewhere takes that model too: push it, and put its name into `adapter_config.json`.\n"
    )


def card_section(env: str, agent: AgentConfig, args: AgentGRPOConfig, model: str) -> str:
    """
    Markdown on the agent: its settings, and ten lines that let it play.

    Args:
        env (`str`):
            Name of the environment, for one without an id.
        agent ([`AgentConfig`]):
            How it plays.
        args ([`AgentGRPOConfig`]):
            How it was trained.
        model (`str`):
            Where the agent is loaded from: a repository or a folder.
    """
    env, parser = agent.env_id or env, agent.action_parser
    name = f'"{env}"' if agent.env_id else env  # an id, or the class that was given
    arguments, usual = agent.arguments(), AgentConfig().arguments()
    told = {key: value for key, value in arguments.items() if key in ALWAYS_TOLD or value != usual[key]}
    call = ", ".join(
        ["model", "tokenizer", name, "held_out_seeds(8)", *(f"{key}={value!r}" for key, value in told.items())]
    )
    parser_import = f"from {_home(type(parser))} import {type(parser).__name__}\n" if "parser" in told else ""
    load = f'from_pretrained("{model}"' + (", trust_remote_code=True)" if args.trust_remote_code else ")")
    code = f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer
{parser_import}from trl_agents.evaluation import held_out_seeds, play_model

model = AutoModelForCausalLM.{load}
tokenizer = AutoTokenizer.{load}
for episode in play_model({call}):
    print(episode, end="\\n\\n")
"""
    names = CARD_SETTINGS + (CRITIC_SETTINGS if args.has_critic else GROUP_SETTINGS)
    settings = [
        ("environment", f"`{env}` {_cell(args.env_kwargs or {})}"),
        ("actions", f"`{_cell(parser)}`"),
        *((name, f"`{getattr(args, name)}`") for name in names),
    ]
    table = "\n".join(["| setting | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in settings)])
    return f"## The agent\n\n{table}\n\nLet it play:\n\n```python\n{code}```\n"


def _home(class_: type) -> str:
    return "trl_agents" if class_ is ActionParser else class_.__module__


def _cell(value: object) -> str:
    """A value in a table of Markdown, where a bare `|` would begin the next column."""
    return repr(value).replace("|", "\\|")
