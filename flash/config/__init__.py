"""The configuration of a run: small frozen models, validated once, before any process starts.

source.py     a preset or YAML file, with the command line's changes
  mistakes.py     validated; each mistake a line with its remedy
    run.py            Config: its own fields, and its sections, in
      agent.py, engine.py, rollout.py, model.py  (and flash/reward, flash/trainer)
      together.py     what the sections must agree on
"""

from flash.config.agent import AgentConfig, EnvConfig
from flash.config.callables import try_environment
from flash.config.engine import EngineConfig
from flash.config.listing import fields, variants
from flash.config.mistakes import validated
from flash.config.model import SMALL, PolicyConfig, WarmStartConfig
from flash.config.rollout import AdaptiveAlphaConfig, EvalConfig, RolloutConfig
from flash.config.run import CheckpointConfig, Config
from flash.config.source import load, parse, presets

__all__ = [
    "SMALL",
    "AdaptiveAlphaConfig",
    "AgentConfig",
    "CheckpointConfig",
    "Config",
    "EngineConfig",
    "EnvConfig",
    "EvalConfig",
    "PolicyConfig",
    "RolloutConfig",
    "WarmStartConfig",
    "fields",
    "load",
    "parse",
    "presets",
    "try_environment",
    "validated",
    "variants",
]
