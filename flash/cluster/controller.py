"""The controller's role on a cluster: a run that goes on wherever this role is started again."""

import asyncio
import signal
import tempfile
import uuid
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from flash.cluster.command import Command, Stream
from flash.cluster.place import Place, write_places
from flash.cluster.roles import (
    Plan,
    Whereabouts,
    controller_command,
    controller_settings,
    environment,
    working_directory,
    written,
)
from flash.explorer.address import Address
from flash.log.run_log import ID_FILE
from flash.system.durable import HeldError, locked
from flash.telemetry.folder import steps_done

_LINES_KEPT = 10_000  # until the driver has asked for them
_MOST_DEATHS = 3  # of its process, in a row, without a step between them
_STILL_HELD_S = 60.0  # the run's folder, by a controller that was cut off and is about to end
_PAUSE_S = 1.0


class ControllerRole:
    """Runs the controller's process; its methods are called from elsewhere in the cluster.

    Args:
        plan: of the run.
        place: where this role is.
        others: how the run finds the trainer's ranks of further nodes (`controller_command`).
    """

    def __init__(self, plan: Plan, place: Place, others: Sequence[str] = ()) -> None:
        self._plan = plan
        self._others = others
        self._places: dict[str, Place] = {}
        self._command = Command(self._hear)
        self._life = uuid.uuid4().hex  # a role that is started again begins its lines anew
        self._lines: deque[tuple[Stream, str]] = deque(maxlen=_LINES_KEPT)
        self._said = 0
        self._changed = asyncio.Event()
        self._run: asyncio.Task[int] | None = None
        self._stopping = False
        self._folder: Path | None = None
        self._whereabouts: Whereabouts | None = None
        self._address = place.address
        self._show(place)

    async def run(self) -> int:
        """The exit code of the run, when it has ended for good. Asked twice, it runs once."""
        if self._run is None:
            self._run = asyncio.create_task(self._keep_running(), name="controller")
            self._run.add_done_callback(lambda _: self._tell_change())
        return await asyncio.shield(self._run)

    async def stop(self) -> None:
        """The run ends after its step, with a checkpoint."""
        self._stopping = True
        self._command.terminate()

    async def output(self, life: str, seen: int) -> tuple[str, int, list[tuple[Stream, str]], bool]:
        """What was said since a caller had `seen` so many lines of that life, as soon as there is
        something: the life and lines seen now, the lines, and whether they are the last."""
        if life != self._life:
            seen = 0
        while self._said == seen and not self._is_over:
            await self._change()
        new = min(self._said - seen, len(self._lines))
        lines = list(self._lines)[len(self._lines) - new :]
        return self._life, self._said, lines, self._is_over

    async def whereabouts(self, known: Whereabouts | None, place: Place) -> Whereabouts | None:
        """Where the run is, as soon as that is not what is known; None when it is over.

        `place`: where the role is that asks.
        """
        self._show(place)
        while not self._is_over and self._whereabouts in (None, known):
            await self._change()
        return None if self._is_over else self._whereabouts

    async def register(self, place: Place) -> None:
        """Where another role is, which is told of if that is new."""
        self._show(place)

    @property
    def _is_over(self) -> bool:
        return self._run is not None and self._run.done()

    async def _keep_running(self) -> int:
        deaths, before = 0, -1
        while True:
            self._check_disk()
            self._find_folder()
            if self._folder is not None:
                await _until_free(self._folder)
                before = steps_done(self._folder)
            with tempfile.TemporaryDirectory(prefix="flash-cluster-") as made:
                settings = controller_settings(
                    self._plan, host=self._address, folder=self._resumed()
                )
                code = await self._command.run(
                    controller_command(
                        written(settings, Path(made) / "settings.yaml"), self._plan, self._others
                    ),
                    env=environment(self._plan, "controller"),
                    cwd=working_directory(self._plan),
                )
            if code != 128 + signal.SIGKILL or self._stopping:
                return code
            self._find_folder()
            went_on = self._folder is not None and steps_done(self._folder) > before
            deaths = 1 if went_on else deaths + 1
            if deaths == _MOST_DEATHS:
                self._hear("err", f"flash: the controller was killed {deaths} times without a step")
                return code
            self._hear("err", "the controller was killed: it goes on from its log")

    def _resumed(self) -> Path | None:
        """The run's folder, if something in it is to be gone on with."""
        folder = self._folder
        return folder if folder is not None and (folder / ID_FILE).exists() else None

    def _check_disk(self) -> None:
        """ValueError if this node does not have the disk that the run's folder is on."""
        if not Path(self._plan.marker).exists():
            raise ValueError(
                f"runs_dir={self._plan.settings['runs_dir']!r} is not shared with the node at "
                f"{self._address}, on which the controller was started: name a folder that all "
                f"nodes share"
            )

    def _find_folder(self) -> None:
        """The one that the run has told, once it has."""
        if self._folder is None and (told := _told_in(Path(self._plan.marker))):
            self._folder = Path(told)
            self._write_placement()

    def _hear(self, stream: Stream, line: str) -> None:
        """A line of the controller's; it says one after it has told where explorers come in."""
        self._lines.append((stream, line))
        self._said += 1
        self._find_folder()
        if self._folder is not None and (address := Address.read(self._folder)) is not None:
            self._whereabouts = Whereabouts(address, str(self._folder))
        self._tell_change()

    def _show(self, place: Place) -> None:
        if self._places.get(place.role) != place:
            self._places[place.role] = place
            self._lines.append(("out", str(place)))
            self._said += 1
            self._write_placement()
            self._tell_change()

    def _write_placement(self) -> None:
        if self._folder is not None:
            write_places(self._folder, self._places.values())

    async def _change(self) -> None:
        await self._changed.wait()

    def _tell_change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


def _told_in(marker: Path) -> str:
    try:
        return marker.read_text()
    except FileNotFoundError:  # the run is over for whoever has called for it
        return ""


async def _until_free(folder: Path) -> None:
    """A controller that was cut off with its node may need a moment to end."""
    with_patience = asyncio.get_running_loop().time() + _STILL_HELD_S
    while asyncio.get_running_loop().time() < with_patience:
        try:
            with locked(folder):
                return
        except HeldError:
            await asyncio.sleep(_PAUSE_S)
