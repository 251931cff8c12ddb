"""A pool of embedded workers."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from flash.hub.gpus import visible_gpus
from flash.hub.http_worker import HttpWorker
from flash.hub.pool import ProcessPool
from flash.seeds import derived
from flash.system.machine import Gpu


class EmbeddedPool(ProcessPool):
    """`python -m flash.worker` processes.

    Args:
        model: directory or hub name.
        version: the policy version of that model.
        routed_experts: whether they tell which experts tokens were routed to.
        devices: the GPUs to use, which the workers take in turn; [] leaves it to torch.
    """

    def __init__(
        self,
        model: str,
        *,
        size: int,
        max_running: int,
        cache_tokens: int,
        threads: int,
        dtype: str,
        version: int,
        seed: int,
        log_dir: Path,
        start_timeout_s: float,
        routed_experts: bool = False,
        devices: Sequence[Gpu] = (),
    ) -> None:
        super().__init__(size=size, log_dir=log_dir, start_timeout_s=start_timeout_s)
        self._devices = devices
        self._options = {
            "model": model,
            "max-running": max_running,
            "cache-tokens": cache_tokens,
            "threads": threads,
            "dtype": dtype,
            "version": version,
        }
        self._seed = seed
        self._switches = ["--routed-experts"] if routed_experts else []

    def _command(self, number: int, host: str, port: int) -> Sequence[str]:
        seed = derived(self._seed, f"worker {number}")
        options = {**self._options, "seed": seed, "host": host, "port": port}
        given = [f"--{name}={value}" for name, value in options.items()]
        return [sys.executable, "-m", "flash.worker", *given, *self._switches]

    def _client(self, number: int, url: str) -> HttpWorker:
        return HttpWorker(url, api_key=self._api_key, constrains=False)

    def _environment(self, number: int) -> Mapping[str, str]:
        return {"FLASH_WORKER_API_KEY": self._api_key, **visible_gpus(self._devices, number)}
