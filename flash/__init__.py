"""Asynchronous RL post-training of LLMs: rollout and training at once, staleness bounded per token.

A whole run, top to bottom: flash/train.py. To embed the rollout in a script: `RolloutLoop`.
"""

from flash.environments import EnvHosts, InlineEnvs
from flash.errors import FlashError
from flash.hub import InferenceHub
from flash.rollout import RolloutLoop
from flash.types import Batch, GenerateRequest, Sample, SamplingParams, Task, Weights

__all__ = [
    "Batch",
    "EnvHosts",
    "FlashError",
    "GenerateRequest",
    "InferenceHub",
    "InlineEnvs",
    "RolloutLoop",
    "Sample",
    "SamplingParams",
    "Task",
    "Weights",
]
