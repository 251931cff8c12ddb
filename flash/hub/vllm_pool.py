"""A pool of vLLM servers."""

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from flash.hub.config import ADAPTER_RANKS
from flash.hub.pool import ProcessPool, check_parallel, visible_gpus
from flash.seeds import derived
from flash.system.machine import Gpu

logger = logging.getLogger(__name__)

_SERVER = "flash.worker.vllm_server"
_BLOCK_TOKENS = 32  # the least that attention on a CPU takes


class VllmPool(ProcessPool):
    """vLLM API servers, with what token-in-token-out rollout needs switched on.

    Args:
        model: directory or hub name.
        max_running: requests in one step of a server.
        max_tokens: the longest sequence.
        cache_tokens: room for keys and values in a server without GPU; on a GPU `gpu_memory` says.
        tensor_parallel: GPUs of a server.
        devices: the GPUs to use, in the order in which the servers take them; [] for a CPU.
        gpu_memory: the share of a GPU's memory that a server takes.
        sleeps: whether it can give that away; without a GPU it only pauses.
        threads: CPU threads of a server; 0 leaves it to torch.
        adapter_rank: of the adapters that servers are given; 0: they are given whole weights.
        arguments: further arguments of `vllm serve`, after ours.
    """

    _STAGES: ClassVar[Mapping[str, str]] = {
        "Initializing a V1 LLM engine": "vLLM starts its engine",
        "Starting to load model": "vLLM loads the model",
        "Loading model from scratch": "vLLM loads the model",  # the V2 model runner's
        "for vLLM's torch.compile": "vLLM compiles the model, or takes what it compiled before",
        "Capturing CUDA graphs": "vLLM captures CUDA graphs",
    }

    def __init__(
        self,
        model: str,
        *,
        size: int,
        max_running: int,
        max_tokens: int,
        cache_tokens: int,
        tensor_parallel: int,
        devices: Sequence[Gpu],
        gpu_memory: float,
        dtype: str,
        threads: int,
        seed: int,
        arguments: Sequence[str],
        log_dir: Path,
        start_timeout_s: float,
        sleeps: bool = False,
        adapter_rank: int = 0,
        say: Callable[[str], None] = logger.info,
    ) -> None:
        super().__init__(size=size, log_dir=log_dir, start_timeout_s=start_timeout_s, say=say)
        check_parallel(tensor_parallel, devices)
        self._model = model
        self._devices = list(devices)
        self._tensor_parallel = tensor_parallel
        self._threads = threads
        self._takes_adapters = adapter_rank > 0
        self._seed = seed
        options = {
            "dtype": dtype,
            "max-model-len": max_tokens,
            "max-num-seqs": max_running,
            "tensor-parallel-size": tensor_parallel,
            # Of the distribution that was sampled from: after the temperature.
            "logprobs-mode": "processed_logprobs",
            # Nothing is sampled but what a request says, whatever the model's files recommend.
            "generation-config": "vllm",
            "worker-extension-cls": "flash.worker.vllm_extension.WeightLoader",
            "middleware": "flash.worker.vllm_extension.RequireKey",
        }
        if self._devices:
            options["gpu-memory-utilization"] = gpu_memory
        else:
            options["num-gpu-blocks-override"] = -(-cache_tokens // _BLOCK_TOKENS)
            options["block-size"] = _BLOCK_TOKENS
        if adapter_rank:
            options["max-lora-rank"] = next(most for most in ADAPTER_RANKS if most >= adapter_rank)
        self._arguments = [
            *(f"--{name}={value}" for name, value in options.items()),
            "--enable-scale-out",
            "--disable-uvicorn-access-log",
            *([] if self._devices else ["--enforce-eager"]),
            *(["--enable-sleep-mode"] if sleeps and self._devices else []),
            *(["--enable-lora"] if adapter_rank else []),
            *arguments,
        ]

    def _command(self, number: int, host: str, port: int) -> Sequence[str]:
        return [
            sys.executable, "-m", "flash.worker.watched_server", _SERVER, f"--model={self._model}",
            f"--host={host}", f"--port={port}", f"--seed={derived(self._seed, f'worker {number}')}",
            *self._arguments,
        ]  # fmt: skip

    def _environment(self, number: int) -> Mapping[str, str]:
        environment = {
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_API_KEY": self._api_key,
            "VLLM_NO_USAGE_STATS": "1",
        }
        if self._takes_adapters:
            environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        if self._devices:
            environment |= visible_gpus(self._devices, number, self._tensor_parallel)
        else:
            environment["VLLM_CPU_KVCACHE_SPACE"] = "1"
            environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
            # The engine computes itself, as on one GPU. vLLM gives it a process for that on a CPU,
            # to bind its threads: seconds of imports for each server, and nothing is bound here.
            environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
            if self._threads:
                environment["OMP_NUM_THREADS"] = str(self._threads)
        return environment
