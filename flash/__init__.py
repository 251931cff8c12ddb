"""Asynchronous RL post-training of LLMs: rollout and training at once, staleness bounded per token.

A whole run, top to bottom: flash/train.py. To embed the rollout in a script: `RolloutLoop`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flash.environments.hosts import EnvHosts
    from flash.environments.inline import InlineEnvs
    from flash.errors import FlashError
    from flash.hub.hub import InferenceHub
    from flash.rollout.loop import RolloutLoop
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

# Where a name is, once it is asked for: every child process imports this package, few need all.
_PLACES = {
    "environments.hosts": ("EnvHosts",),
    "environments.inline": ("InlineEnvs",),
    "errors": ("FlashError",),
    "hub.hub": ("InferenceHub",),
    "rollout.loop": ("RolloutLoop",),
    "types": ("Batch", "GenerateRequest", "Sample", "SamplingParams", "Task", "Weights"),
}

if not TYPE_CHECKING:  # a type checker would take any name for one of ours

    def __getattr__(name: str) -> Any:
        import importlib  # noqa: PLC0415  (only who asks needs it)

        for module, names in _PLACES.items():
            if name in names:
                return getattr(importlib.import_module(f"flash.{module}"), name)
        raise AttributeError(f"module 'flash' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
