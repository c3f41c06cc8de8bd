# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Why does a player not explore? Three failure modes of [LLMs are Greedy Agents](https://huggingface.co/papers/2504.16078)
measured: greediness, frequency bias, and the gap between knowing and doing.
"""

from .diagnose import diagnose
from .frequency_bias import frequency_bias
from .greediness import greediness
from .knowing_doing import knowing_doing
from .players import AgentPlayer, ModelPlayer, TextPlayer


__all__ = ["AgentPlayer", "ModelPlayer", "TextPlayer", "diagnose", "frequency_bias", "greediness", "knowing_doing"]
