"""Processes that run a user's functions, which are killed when they take too long."""

import asyncio
from pathlib import Path
from typing import Any

from flash.errors import EpisodeFailure, ProcessFailure, first_error
from flash.system.process import Child, Declared, Process, StartProcess

_STARTS = 3  # in place of a killed one
_START_TIMEOUT_S = 120.0  # for the interpreter, and what the functions' modules import


class ProcessPool:
    """Calls, each in one of the processes, which does nothing else meanwhile.

    Past the deadline, or when a call is given up, its process is killed with all that it started,
    and another one takes its place. What it prints is in `log_dir/<role>_<n>.log`.

    Entering starts all processes, and raises what the first of them that can't be had raised.

    Args:
        module: what a process runs; it serves `handler`, whose `configure` is called first.
        configuration: the arguments of that.
        failure: what a call raises whose process is lost, or raised.
        start: starts each.
    """

    def __init__(
        self,
        module: str,
        handler: type,
        *configuration: Any,
        role: str,
        failure: type[EpisodeFailure],
        processes: int,
        log_dir: Path,
        start: StartProcess = Child.start,
    ) -> None:
        self._module = module
        self._handler = handler
        self._configuration = configuration
        self._role = role
        self._failure = failure
        self._processes = processes
        self._log_dir = log_dir
        self._start_process = start
        # Bound: the processes.
        self._free: asyncio.Queue[Process] = asyncio.Queue(processes)
        self._tasks = asyncio.TaskGroup()
        self._restarts: set[asyncio.Task[None]] = set()
        self._numbers: dict[Process, int] = {}

    async def __aenter__(self) -> "ProcessPool":
        await self._tasks.__aenter__()
        try:
            with first_error():
                async with asyncio.TaskGroup() as starts:
                    for number in range(self._processes):
                        name = f"start {self._role} {number}"
                        starts.create_task(self._start(number), name=name)
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for task in self._restarts:
            task.cancel()
        for child in self._numbers:
            child.kill()
        for child in list(self._numbers):
            await child.stop()
        with first_error():
            await self._tasks.__aexit__(None, None, None)

    async def call(self, method: str, *args: Any, timeout_s: float) -> Any:
        """TimeoutError past the deadline, which does not count the wait for a free process."""
        child = await self._free.get()
        try:
            answer = await child.call(method, *args, timeout_s=timeout_s)
        except ProcessFailure as failure:
            if not child.alive:
                self._replace(child)
                raise self._failure(f"its process was lost: {failure}") from failure
            self._free.put_nowait(child)
            raise self._failure(str(failure)) from failure
        except BaseException:  # too late, or cancelled: it may go on for ever
            self._replace(child)
            raise
        self._free.put_nowait(child)
        return answer

    def _replace(self, child: Process) -> None:
        restart = self._tasks.create_task(self._restart(child), name=f"restart {child.name}")
        self._restarts.add(restart)
        restart.add_done_callback(self._restarts.discard)

    async def _restart(self, child: Process) -> None:
        child.kill()
        await child.stop()
        number = self._numbers.pop(child)
        for attempt in range(_STARTS):
            try:
                await self._start(number)
                return
            except (ProcessFailure, TimeoutError) as error:
                if attempt == _STARTS - 1:
                    raise self._failure(f"{child.name} can't be started again: {error}") from error

    async def _start(self, number: int) -> None:
        child = await self._start_process(
            self._module,
            name=f"{self._role} {number}",
            log_path=self._log_dir / f"{self._role}_{number}.log",
            answers=Declared(self._handler),
        )
        self._numbers[child] = number
        try:
            await child.call("configure", *self._configuration, timeout_s=_START_TIMEOUT_S)
        except BaseException:
            child.kill()
            raise
        self._free.put_nowait(child)
