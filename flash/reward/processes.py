"""A reward function in processes of its own, which are killed when they take too long."""

import asyncio
from pathlib import Path
from typing import Any

from flash.errors import NodeLost, ProcessFailure, RewardFailure, first_error
from flash.reward.host import RewardHost
from flash.system.process import Child, Declared, Process, StartProcess
from flash.types import Transcript

_STARTS = 3  # in place of a killed one
_START_TIMEOUT_S = 120.0  # for the interpreter, and what the function's module imports


class RewardProcesses:
    """A scorer that calls `module:function` in one of its processes.

    The function takes a Transcript and may block, leak, or hang: past the deadline, or when the
    episode is given up, its process is killed with all that it started, and another one takes its
    place. What it prints is in `log_dir/reward_<n>.log`.

    Entering starts all processes, each by `start`; ValueError if they can't import the function,
    NodeLost if there is no place for them.
    """

    def __init__(
        self,
        function: str,
        *,
        processes: int = 2,
        log_dir: Path,
        start: StartProcess = Child.start,
    ) -> None:
        self._function = function
        self._processes = processes
        self._log_dir = log_dir
        self._start_process = start
        # Bound: the processes.
        self._free: asyncio.Queue[Process] = asyncio.Queue(processes)
        self._tasks = asyncio.TaskGroup()
        self._restarts: set[asyncio.Task[None]] = set()
        self._numbers: dict[Process, int] = {}

    async def __aenter__(self) -> "RewardProcesses":
        await self._tasks.__aenter__()
        try:
            with first_error():
                async with asyncio.TaskGroup() as starts:
                    for number in range(self._processes):
                        starts.create_task(self._start(number), name=f"start reward {number}")
        except BaseException as error:
            await self.__aexit__()
            if not isinstance(error, Exception) or isinstance(error, NodeLost):  # or cancelled
                raise
            raise ValueError(f"reward.run={self._function!r}: {error}") from error
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

    async def __call__(self, transcript: Transcript, *, timeout_s: float) -> Any:
        child = await self._free.get()
        try:
            answer = await child.call("score", transcript, timeout_s=timeout_s)
        except ProcessFailure as failure:
            if not child.alive:
                self._replace(child)
                raise RewardFailure(f"its process was lost: {failure}") from failure
            self._free.put_nowait(child)
            raise RewardFailure(str(failure)) from failure
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
                    raise RewardFailure(f"{child.name} can't be started again: {error}") from error

    async def _start(self, number: int) -> None:
        child = await self._start_process(
            "flash.reward.host",
            name=f"reward {number}",
            log_path=self._log_dir / f"reward_{number}.log",
            answers=Declared(RewardHost),
        )
        self._numbers[child] = number
        try:
            await child.call("configure", self._function, timeout_s=_START_TIMEOUT_S)
        except BaseException:
            child.kill()
            raise
        self._free.put_nowait(child)
