"""The checkpoints of a run: which one to go on from, and what is in it.

runs/<name>/checkpoints/step_<version>/
├── trainer.json, …   the trainer's part (flash/trainer/checkpoint.py)
└── spare             if it may go when newer ones are there

All else that a resume needs is in the log, also what was trained since. A checkpoint is written
under another name while training goes on, and renamed, so what has its name was whole once. Damage
that came later is found when it is read, and the one before it is taken.
"""

import asyncio
import contextlib
import logging
import re
import shutil
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

from flash.errors import TrainerFailure, first_error, in_a_line
from flash.rollout.observer import Observer
from flash.system.durable import sync
from flash.trainer.checkpoint import checkpoint_version

logger = logging.getLogger(__name__)

_SPARE_FILE = "spare"  # empty
_NEW = ".new"  # at the end of the name of one that is being made
_SPARES = 2  # so that one is left if the newest is damaged
_RESCUE_TIMEOUT_S = 300.0


class SavingTrainer(Protocol):
    """What a checkpoint needs of the Trainer."""

    @property
    def version(self) -> int: ...

    @property
    def can_save(self) -> bool: ...

    async def save_checkpoint(self, directory: Path) -> None: ...

    async def begin_checkpoint(self, directory: Path) -> None: ...

    async def written(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A whole one."""

    path: Path
    version: int


def newest_checkpoint(run: Path) -> Checkpoint | None:
    """The newest whole checkpoint of a run's folder; None if there is none at all.

    Those that are damaged are named in the log. ValueError if all are.
    """
    damaged = []
    for path in sorted(_paths(run), key=_version_of, reverse=True):
        try:
            found = _read(path)
        except ValueError as error:
            damaged.append(str(error))
            continue
        for what in damaged:
            logger.warning("%s; here that is %s", what, path)
        return found
    if damaged:
        raise ValueError(
            f"no checkpoint under {run / 'checkpoints'} is whole: start anew under another name "
            f"({'; '.join(damaged)})"
        )
    return None


def checkpoint_to_go_on_from(run: Path) -> Checkpoint | None:
    """The newest whole one; None if there is none, for the log has what was trained since the
    first model. If all are damaged that is said."""
    try:
        return newest_checkpoint(run)
    except ValueError as error:
        logger.warning("%s; or all that the log has is trained again, from the start", error)
        return None


def whole_versions(run: Path) -> list[int]:
    """The versions of its whole checkpoints."""
    versions = []
    for path in _paths(run):
        with contextlib.suppress(ValueError):
            versions.append(_read(path).version)
    return sorted(versions)


class Checkpoints:
    """Makes those of one run.

    >>> checkpoints = Checkpoints(run, newest=None, every_s=600, observer=observer)
    >>> async with checkpoints.writing():
    ...     await checkpoints.begin(trainer, spare=True)  # written while training goes on
    ...     await checkpoints.save(trainer, spare=False)  # whole when it returns

    Args:
        newest: the one that the run goes on from.
        every_s: seconds between spare ones; 0: there are none.
        observer: is told of each that is whole.

    One is written at a time: another that is begun waits for it. One that can't be written, or over
    which a rank dies, is given up, and that is said in the log; the one before it stays. An
    error that ends the block gives it up, too.
    """

    def __init__(
        self, run: Path, *, newest: Checkpoint | None, every_s: float, observer: Observer
    ) -> None:
        self._run = run
        self._observer = observer
        self._newest_version = newest.version if newest else None
        self._every_s = every_s
        self._begun_at = asyncio.get_running_loop().time()
        self._writing: asyncio.Task[None] | None = None
        for left in (run / "checkpoints").glob(f"*{_NEW}*"):
            shutil.rmtree(left)  # of a run that was killed meanwhile

    @contextlib.asynccontextmanager
    async def writing(self) -> AsyncIterator[Self]:
        """In the block they are written while training goes on; after it none is, any more."""
        with first_error():
            async with asyncio.TaskGroup() as self._tasks:
                yield self

    def spare_is_due(self) -> bool:
        """Not while one is being written."""
        elapsed_s = asyncio.get_running_loop().time() - self._begun_at
        return 0 < self._every_s <= elapsed_s and (self._writing is None or self._writing.done())

    async def begin(self, trainer: SavingTrainer, *, spare: bool) -> None:
        """The checkpoint of the trainer's present version, if need be: when it returns the trainer
        may go on."""
        await self.written()
        if trainer.version == self._newest_version:
            return
        version, making = trainer.version, self._making(trainer.version)
        await trainer.begin_checkpoint(making)
        self._begun_at = asyncio.get_running_loop().time()
        self._writing = self._tasks.create_task(
            self._finish_writing(trainer, making, version, spare), name=f"write {making.name}"
        )

    async def written(self) -> None:
        """Waits until none is being written."""
        if self._writing is not None:
            await asyncio.wait((self._writing,))

    async def save(self, trainer: SavingTrainer, *, spare: bool) -> Path:
        """The checkpoint of the trainer's present version, made if need be; raises what it ends
        with."""
        await self.written()
        if trainer.version != self._newest_version:
            making = self._making(trainer.version)
            await trainer.save_checkpoint(making)
            self._begun_at = asyncio.get_running_loop().time()
            await self._whole(making, trainer.version, spare)
        return self._path(trainer.version)

    async def _finish_writing(
        self, trainer: SavingTrainer, making: Path, version: int, spare: bool
    ) -> None:
        try:
            await trainer.written()
            await self._whole(making, version, spare)
        except (TrainerFailure, OSError) as failure:
            logger.warning(
                "the checkpoint of step %d is given up, and the run goes on: %s",
                version,
                in_a_line(failure),
            )
            await asyncio.to_thread(shutil.rmtree, making, ignore_errors=True)

    async def _whole(self, making: Path, version: int, spare: bool) -> None:
        path = self._path(version)
        await asyncio.to_thread(self._name, making, path, spare)
        self._newest_version = version
        self._observer.saved(path)

    def _name(self, making: Path, path: Path, spare: bool) -> None:
        if spare:
            (making / _SPARE_FILE).touch()
        sync(making)
        shutil.rmtree(path, ignore_errors=True)  # a damaged one, which a resume passed over
        making.rename(path)
        sync(path.parent)
        for old in _old_spares(self._run):
            shutil.rmtree(old)

    def _path(self, version: int) -> Path:
        return self._run / "checkpoints" / f"step_{version:06d}"

    def _making(self, version: int) -> Path:
        path = self._path(version)
        return path.with_name(path.name + _NEW)


class Rescue:
    """Saves a run that fails, as long as its trainer lives; the error stays what it was.

    Around all that can fail but the trainer.
    """

    def __init__(self, checkpoints: Checkpoints, trainer: SavingTrainer) -> None:
        self._checkpoints = checkpoints
        self._trainer = trainer
        self._steps_done: Callable[[], int] = lambda: 0

    def watch(self, steps_done: Callable[[], int]) -> None:
        """From now on there is something to save, if the last step of the trainer is all done.

        If not, a resume does the rest of that step, from the checkpoint before and the log.
        """
        self._steps_done = steps_done

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, Exception):
            return
        version = self._trainer.version
        try:
            async with asyncio.timeout(_RESCUE_TIMEOUT_S):
                await self._checkpoints.written()
                if not version or version != self._steps_done() or not self._trainer.can_save:
                    return
                path = await self._checkpoints.save(self._trainer, spare=True)
        except Exception as failure:  # whatever it is, the run ends for the first error
            logger.warning(
                "no checkpoint could be made: %s; --resume goes on from the log",
                in_a_line(failure),
            )
        else:
            error.add_note(f"all {version} steps are in {path}: --resume goes on from there")


def _paths(run: Path) -> list[Path]:
    found = (run / "checkpoints").glob("step_*")
    return [path for path in found if re.fullmatch(r"step_\d+", path.name)]


def _version_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _read(path: Path) -> Checkpoint:
    """ValueError if it is not whole."""
    version = checkpoint_version(path)
    if version != _version_of(path):
        raise ValueError(
            f"the checkpoint {path} is damaged (it is of version {version}): take another one"
        )
    return Checkpoint(path, version)


def _old_spares(run: Path) -> list[Path]:
    """Those that may go."""
    spares = [path for path in _paths(run) if (path / _SPARE_FILE).exists()]
    return sorted(spares, key=_version_of)[:-_SPARES]
