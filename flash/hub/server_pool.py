"""A pool of an engine's own servers, vLLM's or SGLang's, each on GPUs of its own or on the CPU."""

import abc
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from flash.hub.gpus import check_parallel, visible_gpus
from flash.hub.pool import ProcessPool
from flash.seeds import derived
from flash.system.machine import Gpu

logger = logging.getLogger(__name__)


class ServerPool(ProcessPool):
    """Servers with what token-in-token-out rollout needs switched on.

    Args:
        model: directory or hub name.
        max_running: requests in one step of a server.
        max_tokens: the longest sequence.
        cache_tokens: room for keys and values in a server without GPU; on a GPU `gpu_memory` says.
        tensor_parallel: GPUs of a server.
        devices: the GPUs to use, in the order in which the servers take them; [] for a CPU.
        gpu_memory: the share of a GPU's memory that a server takes, as its engine counts it.
        sleeps: whether it can give that away; without a GPU it can't.
        threads: CPU threads of a server; 0 leaves it to torch.
        arguments: further arguments of its command, after ours.
    """

    # The module that is run, and what it calls its model and its seed.
    _SERVER: ClassVar[str]
    _MODEL: ClassVar[str]
    _SEED: ClassVar[str]

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
        say: Callable[[str], None] = logger.info,
    ) -> None:
        super().__init__(size=size, log_dir=log_dir, start_timeout_s=start_timeout_s, say=say)
        check_parallel(tensor_parallel, devices)
        self._model = model
        self._max_running = max_running
        self._max_tokens = max_tokens
        self._cache_tokens = cache_tokens
        self._tensor_parallel = tensor_parallel
        self._devices = list(devices)
        self._gpu_memory = gpu_memory
        self._dtype = dtype
        self._threads = threads
        self._seed = seed
        self._arguments = arguments
        self._gives_memory = sleeps and bool(devices)

    @abc.abstractmethod
    def _options(self) -> Mapping[str, object]:
        """Of the command line, by their names; None is the value of one that has none."""

    @abc.abstractmethod
    def _variables(self) -> Mapping[str, str]:
        """Of the environment, beside those of GPUs and threads."""

    def _command(self, number: int, host: str, port: int) -> Sequence[str]:
        options = {
            self._MODEL: self._model,
            "host": host,
            "port": port,
            self._SEED: derived(self._seed, f"worker {number}"),
            **self._options(),
        }
        return [
            sys.executable, "-m", "flash.worker.watched_server", self._SERVER,
            *(f"--{name}" if value is None else f"--{name}={value}"
              for name, value in options.items()),
            *self._arguments,
        ]  # fmt: skip

    def _environment(self, number: int) -> Mapping[str, str]:
        if self._devices:
            place = visible_gpus(self._devices, number, self._tensor_parallel)
        else:
            place = {"OMP_NUM_THREADS": str(self._threads)} if self._threads else {}
        return {**self._variables(), **place}
