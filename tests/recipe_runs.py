# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Recipes as a user starts them, and as modules: what their tests share."""

import importlib.util
import subprocess
import sys
from pathlib import Path

from trl import DPOConfig, ModelConfig, SFTConfig, TrlParser

from trl_agents import AgentGRPOConfig, AgentPPOConfig


ROOT = Path(__file__).parent.parent
RECIPES = ROOT / "recipes"
CONFIGS = {  # the arguments of each script's trainer
    "grpo_bandit": AgentGRPOConfig,
    "contextual_bandit": AgentGRPOConfig,
    "exploration": AgentGRPOConfig,
    "expert_sft": AgentGRPOConfig,
    "ppo_tictactoe": AgentPPOConfig,
    "reft": AgentPPOConfig,
    "rlhf": AgentPPOConfig,
    "dpo": DPOConfig,
    "r1": AgentGRPOConfig,
    "expert_iteration": SFTConfig,
}


def recipe(name: str):
    """The script as a module."""
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run(script: str, *arguments, timeout: int = 300, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """The script in a process of its own."""
    command = [sys.executable, str(RECIPES / script), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout)


def parse(module, config: Path, *arguments):
    """What the script makes of a configuration and of arguments."""
    parser = TrlParser((module.ScriptArguments, CONFIGS[module.__name__], ModelConfig))
    # bf16 needs a GPU to be accepted on some machines; whether it is there is not what is tested
    return parser.parse_args_and_config(["--config", str(config), "--bf16", "false", *map(str, arguments)])
