# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What the model card says of an agent."""

from __future__ import annotations

from ..actions import ActionParser
from .agent_grpo_config import AgentGRPOConfig


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
GROUP_SETTINGS = ("advantage_estimator", "scale_rewards")
CRITIC_SETTINGS = ("advantage_level", "gae_lambda", "value_coef", "value_clip", "num_iterations", "kl_in")


def card_section(env: str, parser: ActionParser, args: AgentGRPOConfig, results: str) -> str:
    """
    Markdown on the agent: its settings, ten lines that let it play, and what it achieved.

    Args:
        env (`str`):
            Id or name of the environment.
        parser ([`ActionParser`]):
            What takes its actions out of text.
        args ([`AgentGRPOConfig`]):
            How it was trained.
        results (`str`):
            Markdown; empty for none.
    """
    env_kwargs = args.env_kwargs or {}
    model = args.hub_model_id or args.output_dir
    name = f'"{env}"' if "/" in env else env  # an id, or the class that was given
    call = f"play_model(model, tokenizer, {name}, held_out_seeds(8), env_kwargs={env_kwargs!r}"
    call += f", max_new_tokens={args.max_completion_length}"
    if args.eval_temperature is not None:
        call += f", temperature={args.eval_temperature}"
    if args.context == "window":
        call += f', context="window", window={args.window}'
    if args.exploration:
        call += f", exploration={args.exploration!r}"
    if args.chat_template_kwargs:
        call += f", chat_template_kwargs={args.chat_template_kwargs!r}"
    parser_import = ""
    if parser != ActionParser():
        parser_import = f"from {_home(type(parser))} import {type(parser).__name__}\n"
        call += f", parser={parser!r}"
    load = f'from_pretrained("{model}"' + (", trust_remote_code=True)" if args.trust_remote_code else ")")
    code = f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer
{parser_import}from trl_agents.evaluation import held_out_seeds, play_model

model = AutoModelForCausalLM.{load}
tokenizer = AutoTokenizer.{load}
for episode in {call}):
    print(episode, end="\\n\\n")
"""
    names = CARD_SETTINGS + (CRITIC_SETTINGS if args.has_critic else GROUP_SETTINGS)
    settings = [
        ("environment", f"`{env}` {_cell(env_kwargs)}"),
        ("actions", f"`{_cell(parser)}`"),
        *((name, f"`{getattr(args, name)}`") for name in names),
    ]
    table = "\n".join(["| setting | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in settings)])
    achieved = f"\n## Results\n\n{results}\n" if results else ""
    return f"\n## The agent\n\n{table}\n\nLet it play:\n\n```python\n{code}```\n{achieved}"


def _home(class_: type) -> str:
    return "trl_agents" if class_ is ActionParser else class_.__module__


def _cell(value: object) -> str:
    """A value in a table of Markdown, where a bare `|` would begin the next column."""
    return repr(value).replace("|", "\\|")
