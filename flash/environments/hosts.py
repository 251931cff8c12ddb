"""Environments in host processes, which can be killed when they hang."""

import asyncio
import itertools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flash.environments import boundary
from flash.environments.host import EnvHost
from flash.errors import EnvFailure, ProcessFailure
from flash.system.process import Child, Declared, Process, StartProcess
from flash.types import AsyncEnv, Observation, Task

logger = logging.getLogger(__name__)

_START_TIMEOUT_S = 60.0


class EnvHosts:
    """A pool of processes, each holding many environments and driving one call at a time.

    Args:
        name, options: the environment, as the registry knows it, and its constructor's options.
        hosts: how many processes.
        call_timeout_s: a host that works on one call for longer is hung: it is killed and
            replaced, and what it held fails with EnvFailure. Waiting behind others doesn't count.
        log_dir: where `env_host_<n>.log` goes.
        start: starts each.
    """

    def __init__(
        self,
        name: str,
        options: Mapping[str, Any],
        *,
        hosts: int,
        call_timeout_s: float,
        log_dir: Path,
        start: StartProcess = Child.start,
    ) -> None:
        if hosts < 1:
            raise ValueError(f"hosts={hosts} must be at least 1")
        self._hosts = [
            _Host(index, name, options, call_timeout_s, log_dir, start) for index in range(hosts)
        ]
        self._tasks = asyncio.TaskGroup()
        self._running: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "EnvHosts":
        await self._tasks.__aenter__()
        self._running = [
            self._tasks.create_task(host.run(), name=f"environment host {host.index}")
            for host in self._hosts
        ]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for task in self._running:
            task.cancel()
        await self._tasks.__aexit__(None, None, None)

    def __len__(self) -> int:
        return len(self._hosts)

    async def open(self) -> AsyncEnv:
        """A new environment, on the host that holds the fewest; not on one that is being started,
        which may wait for a node, if another is there."""
        host = min(self._hosts, key=lambda host: (host.starting, host.open_envs))
        return await host.open()

    @property
    def busy_s(self) -> float:
        """Seconds that hosts have spent working, summed over hosts."""
        return sum(host.busy_s for host in self._hosts)

    @property
    def replaced(self) -> int:
        """Hosts that hung or died, and were replaced."""
        return sum(host.replaced for host in self._hosts)

    @property
    def pids(self) -> list[int]:
        """Process ids of the hosts that run now on this machine."""
        return [host.child.pid for host in self._hosts if isinstance(host.child, Child)]


@dataclass(slots=True, eq=False)
class _Call:
    method: str
    args: tuple[Any, ...]
    generation: int | None  # of the process that holds the environment; None: any
    answer: asyncio.Future[Any]


class _Host:
    """One host process and the queue of calls to it; a new process when the old one is lost."""

    def __init__(
        self,
        index: int,
        name: str,
        options: Mapping[str, Any],
        call_timeout_s: float,
        log_dir: Path,
        start: StartProcess,
    ) -> None:
        self.index = index
        self.child: Process | None = None
        self.starting = False
        self.open_envs = 0
        self.busy_s = 0.0
        self.replaced = 0
        self._close_failed = False
        self._generation = 0
        self._name = name
        self._options = dict(options)
        self._call_timeout_s = call_timeout_s
        self._log_path = log_dir / f"env_host_{index}.log"
        self._start_process = start
        self._env_ids = itertools.count()
        # Bound: each agent that holds an environment here has one call under way, and a close.
        self._calls: asyncio.Queue[_Call] = asyncio.Queue()

    async def open(self) -> "_HostedEnv":
        env_id = next(self._env_ids)
        self.open_envs += 1
        try:
            generation, deterministic = await self.call("open", env_id)
        except BaseException:
            self.open_envs -= 1
            raise
        return _HostedEnv(self, env_id, generation, deterministic=deterministic)

    async def call(self, method: str, *args: Any, generation: int | None = None) -> Any:
        """Queue a call; raises EnvFailure if the environment raised or its process is lost."""
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls.put_nowait(_Call(method, args, generation, answer))
        return await answer

    def close(self, env_id: int, generation: int) -> None:
        self.open_envs -= 1
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls.put_nowait(_Call("close", (env_id,), generation, answer))

    async def run(self) -> None:
        try:
            while True:
                call = await self._calls.get()
                # An agent that was aborted does not wait for its answer any more.
                if not call.answer.done():
                    await self._work_on(call)
        finally:
            if self.child is not None:
                self.child.kill()
                await self.child.stop()

    async def _work_on(self, call: _Call) -> None:
        clock = asyncio.get_running_loop().time
        began = clock()
        try:
            if call.generation is not None and call.generation != self._generation:
                raise EnvFailure(f"environment host {self.index} was lost, and replaced")
            if self.child is None:
                self.child = await self._start()
            answer = await self.child.call(call.method, *call.args, timeout_s=self._call_timeout_s)
            failure = None
        except EnvFailure as error:
            failure = error
        except TimeoutError as error:
            failure = EnvFailure(
                f"environment host {self.index} hung: {call.method} took longer than "
                f"{self._call_timeout_s:g} s"
            )
            failure.__cause__ = error
            await self._lose(failure)
        except ProcessFailure as error:
            failure = EnvFailure(str(error))
            failure.__cause__ = error
            if self.child is None or not self.child.alive:
                await self._lose(failure)
        finally:
            self.busy_s += clock() - began
        if call.answer.done():
            return
        if failure is not None:
            if call.method != "close":
                call.answer.set_exception(failure)
            elif self.child is not None and not self._close_failed:  # most likely it always does
                self._close_failed = True
                logger.warning("%s; its episodes count all the same", failure)
        else:
            opened = call.method == "open"
            call.answer.set_result((self._generation, answer) if opened else answer)

    async def _start(self) -> Process:
        self.starting = True
        try:
            child = await self._start_process(
                "flash.environments.host",
                name=f"environment host {self.index}",
                log_path=self._log_path,
                answers=Declared(EnvHost),
            )
        finally:
            self.starting = False
        try:
            await child.call("configure", self._name, self._options, timeout_s=_START_TIMEOUT_S)
        except BaseException:
            child.kill()
            await child.stop()
            raise
        return child

    async def _lose(self, cause: EnvFailure) -> None:
        """Everything the process held is lost; the next call starts another."""
        logger.warning("%s; it is replaced", cause)
        self._generation += 1
        self.replaced += 1
        if self.child is not None:
            self.child.kill()
            await self.child.stop()
            self.child = None


class _HostedEnv:
    def __init__(self, host: _Host, env_id: int, generation: int, *, deterministic: bool) -> None:
        self.deterministic = deterministic
        self._host = host
        self._env_id = env_id
        self._generation = generation

    async def reset(self, task: Task) -> Observation:
        return boundary.check_again("reset", await self._call("reset", task))

    async def step(self, action: str) -> Observation:
        return boundary.check_again("step", await self._call("step", action))

    async def call(self, tool: str, arguments: Mapping[str, Any]) -> str | Observation:
        answer = await self._call("call", tool, dict(arguments))
        if isinstance(answer, Observation):
            return boundary.check_again(f"tool {tool!r}", answer)
        return boundary.check_result(tool, answer)

    def close(self) -> None:
        self._host.close(self._env_id, self._generation)

    async def _call(self, method: str, *arguments: Any) -> Any:
        return await self._host.call(method, self._env_id, *arguments, generation=self._generation)
