"""What this machine has, found out without importing torch."""

import importlib.util
import os
from pathlib import Path


def has_vllm() -> bool:
    """Whether some build of vLLM is installed."""
    return importlib.util.find_spec("vllm") is not None


def gpus() -> list[int]:
    """The numbers of the NVIDIA GPUs that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = (path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*"))
    present = sorted(int(name) for name in names if name.isdigit())
    if visible is None:
        return present
    wanted = [int(number) for number in visible.split(",") if number.strip().isdigit()]
    return [number for number in wanted if number in present]
