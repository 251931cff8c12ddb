"""Where a run's policy is quickest: with which engine it samples, and whether on a GPU at all.

Both follow from what was measured (docs/performance.md, "On a GPU").
"""

import os
from collections.abc import Sequence
from typing import Literal, NamedTuple

from flash.config import SMALL, Config
from flash.hub.config import EngineConfig
from flash.system import machine
from flash.system.machine import Gpu, how_to_install

# On an H200 a policy of 0.9 million parameters takes 1.1 s a step on the embedded worker, which is
# ready after 7 s, and 2.6 s on vLLM, which is ready after 48. For models of 0.5 billion and more
# vLLM is the engine; of what lies between nothing was measured.
FEW_PARAMETERS = 100_000_000
# GPUs before have no bfloat16, in which alone attention is one call a layer and decoding a CUDA
# graph; without these a step of ALFWorld took an H200 13.3 s, and two CPU cores 2.7.
_QUICK_CAPABILITY = (8, 0)


class Choice(NamedTuple):
    """An engine for a pool of workers, and why it is that."""

    kind: Literal["embedded", "vllm", "sglang"]
    why: str


def choose_engine(
    engine: EngineConfig, *, devices: Sequence[Gpu], vllm: bool, parameters: int | None
) -> Choice:
    """What `engine.kind` means here.

    Args:
        devices: the GPUs for the workers.
        vllm: whether it is installed.
        parameters: of the model; None if that is not known.
    """
    if engine.kind in ("embedded", "vllm", "sglang"):
        return Choice(engine.kind, "as engine.kind says")
    if not vllm:
        return Choice("embedded", f"because vLLM is not installed ({how_to_install('vllm')})")
    if not devices:
        return Choice("embedded", "because vLLM has no GPU here")
    if parameters is None or parameters >= FEW_PARAMETERS or _asks_for_vllm(engine):
        return Choice("vllm", "because it is installed")
    return Choice(
        "embedded",
        f"because it samples a policy of {parameters / 1e6:.1f} million parameters sooner than "
        f"vLLM, which takes a minute to start (engine.kind=vllm takes it)",
    )


def _asks_for_vllm(engine: EngineConfig) -> bool:
    """Whether what is configured is only vLLM's, or slow on the embedded worker."""
    return bool(engine.vllm_args) or engine.tensor_parallel > 1 or engine.dtype == "float32"


def keep_to_quickest_device(config: Config) -> str:
    """Hides the GPUs from this process, and all that it starts, if the CPU is quicker for the
    run's policy; says so in a line then.

    That is a small policy beside GPUs that are older than what made it quick, unless the
    configuration says what only a GPU is for.
    """
    engine, trainer = config.engine, config.trainer
    chosen = (
        config.model != SMALL
        or config.cluster.kind != "none"
        or config.explorers.may_come
        or engine.kind in ("vllm", "sglang", "urls")
        or engine.urls
        or engine.devices
        or trainer.ranks > 1
        or "auto" not in (engine.dtype, trainer.dtype)
    )
    if chosen or not machine.gpus():
        return ""
    capability = machine.compute_capability()
    if capability is None or capability >= _QUICK_CAPABILITY:
        return ""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return (
        "device: the CPU, which is quicker for a small policy than a GPU of compute capability "
        f"{capability[0]}.{capability[1]} (engine.devices=0 takes the GPU)"
    )
