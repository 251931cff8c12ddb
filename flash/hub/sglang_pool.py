"""A pool of SGLang servers."""

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from flash.hub.pool import ProcessPool, check_parallel, visible_gpus
from flash.hub.sglang_worker import SglangWorker
from flash.seeds import derived
from flash.system.machine import Gpu

logger = logging.getLogger(__name__)


class SglangPool(ProcessPool):
    """SGLang servers, with what token-in-token-out rollout needs switched on.

    Args:
        model: directory or hub name.
        max_running: requests in one step of a server.
        max_tokens: the longest sequence.
        cache_tokens: room for keys and values in a server without GPU; on a GPU `gpu_memory` says.
        tensor_parallel: GPUs of a server.
        devices: the GPUs to use, in the order in which the servers take them; [] for a CPU.
        gpu_memory: the share of a GPU's memory that a server takes for weights, keys and values.
        sleeps: whether it can give that away; without a GPU it can't.
        threads: CPU threads of a server; 0 leaves it to torch.
        keeps_stale: whether a publish may keep keys and values: steps do not overlap then.
        routed_experts: whether they tell which experts tokens were routed to.
        arguments: further arguments of `sglang serve`, after ours.
    """

    _STAGES: ClassVar[Mapping[str, str]] = {
        "Loading safetensors checkpoint shards": "SGLang loads the model",
        "Multi-thread loading shards": "SGLang loads the model",
        "Capturing batches": "SGLang captures CUDA graphs",
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
        keeps_stale: bool = False,
        routed_experts: bool = False,
        say: Callable[[str], None] = logger.info,
    ) -> None:
        super().__init__(size=size, log_dir=log_dir, start_timeout_s=start_timeout_s, say=say)
        check_parallel(tensor_parallel, devices)
        self._model = model
        self._devices = list(devices)
        self._tensor_parallel = tensor_parallel
        self._threads = threads
        self._seed = seed
        options = {
            "dtype": dtype,
            "context-length": max_tokens,
            "max-running-requests": max_running,
            "tp-size": tensor_parallel,
            "mem-fraction-static": gpu_memory,
            # It would log its arguments, of which one is the key.
            "log-level": "warning",
        }
        if not self._devices:
            options["device"] = "cpu"
            options["attention-backend"] = "torch_native"
            options["max-total-tokens"] = cache_tokens
        self._arguments = [
            *(f"--{name}={value}" for name, value in options.items()),
            "--skip-tokenizer-init",
            "--incremental-streaming-output",
            *(["--enable-memory-saver"] if sleeps and self._devices else []),
            *(["--disable-overlap-schedule"] if keeps_stale else []),
            *(["--enable-return-routed-experts"] if routed_experts else []),
            *arguments,
        ]

    def _command(self, number: int, host: str, port: int) -> Sequence[str]:
        seed = derived(self._seed, f"worker {number}")
        return [
            sys.executable, "-m", "flash.worker.watched_server", "flash.worker.sglang_server",
            f"--model-path={self._model}", f"--host={host}", f"--port={port}",
            f"--random-seed={seed}", *self._arguments,
        ]  # fmt: skip

    def _environment(self, number: int) -> Mapping[str, str]:
        environment = {
            "SGLANG_API_KEY": self._api_key,
            # Logprobs are of the distribution that was sampled from: after the temperature.
            "SGLANG_RETURN_ORIGINAL_LOGPROB": "false",
        }
        if self._devices:
            environment |= visible_gpus(self._devices, number, self._tensor_parallel)
        elif self._threads:
            environment["OMP_NUM_THREADS"] = str(self._threads)
        return environment

    def _client(self, number: int, url: str) -> SglangWorker:
        return SglangWorker(url, api_key=self._api_key)
