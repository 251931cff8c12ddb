"""An explorer's role on a cluster: it plays for the run wherever the controller is by now."""

import asyncio
from collections.abc import Awaitable
from pathlib import Path
from typing import Protocol

from flash.cluster.command import Command, Stream
from flash.cluster.place import Place
from flash.cluster.roles import (
    HostsAsked,
    Plan,
    Whereabouts,
    environment,
    explorer_command,
    folder_of_node,
    working_directory,
)

_MOST_FAILURES = 5  # one after the other
_LONG_S = 300.0  # what has played for so long has not failed at once
_LEAVES_S = 30.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0


class Controller(Protocol):
    """What an explorer asks the controller's role."""

    def whereabouts(
        self, known: Whereabouts | None, place: Place
    ) -> Awaitable[Whereabouts | None]: ...


class ExplorerRole:
    """Runs `flash explore`; its methods are called from elsewhere in the cluster."""

    def __init__(
        self, plan: Plan, place: Place, controller: Controller, hosts: HostsAsked | None = None
    ) -> None:
        """`hosts`: what it has on other nodes."""
        self._plan = plan
        self._hosts = hosts.variables if hosts is not None else {}
        self._place = place
        self._controller = controller
        self._command = Command(self._say)
        self._run: asyncio.Task[str] | None = None

    async def place(self) -> Place:
        return self._place

    async def run(self) -> str:
        """Plays until the run is over; why it gave up, if it did. Asked twice, it plays once."""
        if self._run is None:
            self._run = asyncio.create_task(self._play(), name=self._place.role)
        return await asyncio.shield(self._run)

    async def _play(self) -> str:
        at = await self._controller.whereabouts(None, self._place)
        if at is None:
            return ""
        folder = self._folder(at)
        following = asyncio.create_task(self._follow(at, folder), name="where the controller is")
        playing = asyncio.create_task(self._keep_playing(folder), name="play")
        try:
            await asyncio.wait((following, playing), return_when=asyncio.FIRST_COMPLETED)
            if playing.done():
                return playing.result()
            self._command.terminate()  # the run is over
            await asyncio.wait((playing,), timeout=_LEAVES_S)
            return ""
        finally:
            for task in (following, playing):
                task.cancel()
            await asyncio.wait((following, playing))

    async def _follow(self, at: Whereabouts | None, folder: Path) -> None:
        """Has the explorer's own folder say where the controller is, until the run is over."""
        while at is not None:
            at.address.write(folder)
            at = await self._controller.whereabouts(at, self._place)

    async def _keep_playing(self, folder: Path) -> str:
        clock = asyncio.get_running_loop().time
        failures, pause_s = 0, _FIRST_PAUSE_S
        while True:
            began = clock()
            code = await self._command.run(
                explorer_command(self._plan, self._place, folder),
                env=environment(self._plan, "explorer") | self._hosts,
                cwd=working_directory(self._plan),
            )
            if code == 0:
                return ""
            if clock() - began > _LONG_S:
                failures, pause_s = 0, _FIRST_PAUSE_S
            failures += 1
            if code == 2 or failures == _MOST_FAILURES:
                return f"{self._place.role} gave up: exit code {code}, {failures} times in a row"
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _folder(self, at: Whereabouts) -> Path:
        """For its logs, and for what it finished alone: where the run's next explorer of this name
        finds it, on any node that shares the run's disk, else on this one."""
        if Path(self._plan.marker).exists():
            parent = Path(at.folder) / "explorers"
        else:
            parent = folder_of_node("explorers", at.folder)
        folder = parent / self._place.role
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _say(self, stream: Stream, line: str) -> None:
        print(line, flush=True)  # Ray has the driver print it, with the actor's name
