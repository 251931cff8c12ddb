"""A pool of embedded workers, each a process on a free loopback port."""

import asyncio
import contextlib
import os
import secrets
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from flash.errors import InferenceFailure
from flash.hub.http_worker import HttpWorker
from flash.hub.worker import Worker
from flash.process import PARENT_PID_VARIABLE, log_tail

_STOP_GRACE_S = 5.0


class EmbeddedPool:
    """Starts `python -m flash.worker` processes side by side, and ends them.

    Args:
        model: directory or hub name.
        size: how many workers.
        start_timeout_s: for all of them to have loaded the model.
        log_dir: where `worker_<n>.log` goes.
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
    ) -> None:
        self._model = model
        self._size = size
        self._options = {
            "max-running": max_running,
            "cache-tokens": cache_tokens,
            "threads": threads,
            "dtype": dtype,
            "version": version,
        }
        self._seed = seed
        self._log_dir = log_dir
        self._start_timeout_s = start_timeout_s
        self._processes: list[asyncio.subprocess.Process] = []
        self._watches: list[asyncio.Task[None]] = []
        self._stopping = False

    async def start(self, on_exit: Callable[[Worker, str], None]) -> list[Worker]:
        """Raises InferenceFailure with the end of the log of a worker that does not get ready."""
        # Nobody else on this machine may ask the workers anything.
        self._api_key = secrets.token_urlsafe(16)
        self._log_dir.mkdir(parents=True, exist_ok=True)
        try:
            async with asyncio.TaskGroup() as tasks:
                starts = [tasks.create_task(self._start_one(n)) for n in range(self._size)]
        except BaseExceptionGroup as errors:
            await self.stop()
            raise errors.exceptions[0] from None
        except asyncio.CancelledError:
            await self.stop()
            raise
        workers: list[Worker] = []
        for number, start in enumerate(starts):
            process, worker = start.result()
            workers.append(worker)
            self._watches.append(
                asyncio.create_task(
                    self._watch(number, process, worker, on_exit), name=f"watch worker {number}"
                )
            )
        return workers

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL to those that take longer than a few seconds."""
        self._stopping = True
        for process in self._processes:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STOP_GRACE_S):
                for process in self._processes:
                    await process.wait()
        for process in self._processes:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        for watch in self._watches:
            await watch

    async def _start_one(self, number: int) -> tuple[asyncio.subprocess.Process, HttpWorker]:
        log = self._log_path(number)
        options = {**self._options, "seed": self._seed + number}
        with log.open("ab") as stderr:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "flash.worker",
                f"--model={self._model}",
                *(f"--{name}={value}" for name, value in options.items()),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=stderr,
                env={
                    **os.environ,
                    "FLASH_WORKER_API_KEY": self._api_key,
                    PARENT_PID_VARIABLE: str(os.getpid()),
                },
                start_new_session=True,
            )
        self._processes.append(process)
        assert process.stdout is not None
        try:
            async with asyncio.timeout(self._start_timeout_s):
                async for line in process.stdout:
                    word, _, url = line.decode().strip().partition(" ")
                    if word == "ready":
                        return process, HttpWorker(url, api_key=self._api_key)
                await process.wait()
        except TimeoutError:
            raise InferenceFailure(
                f"worker {number} was not ready after engine.start_timeout_s="
                f"{self._start_timeout_s:g} s. The end of {log}:\n{log_tail(log)}"
            ) from None
        raise InferenceFailure(
            f"worker {number} ended at its start with exit code {process.returncode}. "
            f"The end of {log}:\n{log_tail(log)}"
        )

    async def _watch(
        self,
        number: int,
        process: asyncio.subprocess.Process,
        worker: Worker,
        on_exit: Callable[[Worker, str], None],
    ) -> None:
        code = await process.wait()
        if not self._stopping:
            log = self._log_path(number)
            on_exit(
                worker,
                f"worker {number} (pid {process.pid}) ended with exit code {code}. "
                f"The end of {log}:\n{log_tail(log)}",
            )

    def _log_path(self, number: int) -> Path:
        return self._log_dir / f"worker_{number}.log"
