"""What every part of a run does now: a file in its folder, rewritten often, and `flash status`.

role       what plays, trains or keeps books; `where` it is, `doing` what it is at
rate       since the last line: steps, episodes or tokens, as `of` says
waits for  what it has not got
"""

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Self

import msgspec
from rich.console import Console
from rich.table import Table

from flash.cluster.place import read_places
from flash.errors import first_error
from flash.explorer.fleet import Fleet
from flash.explorer.hub import FleetHub
from flash.explorer.messages import UNREADABLE
from flash.explorer.seat import Explorer
from flash.hub.hub import InferenceHub
from flash.hub.reports import WorkerStats
from flash.log.log import Log
from flash.rollout.loop import RolloutLoop
from flash.system import machine
from flash.types import TrainerState

STATUS_FILE = "status.json"
_EVERY_S = 2.0
_OLD_S = 4 * _EVERY_S
_WIDEST = 1000


class Role(msgspec.Struct, frozen=True, kw_only=True):
    """One part of a run. `rate` is of `of` a second, nan where nothing is known."""

    role: str
    where: str = ""
    doing: str = ""
    version: int | None = None
    rate: float | None = None
    of: str = ""
    waits_for: str = ""


class OfSet(msgspec.Struct, frozen=True, kw_only=True):
    """A task set, as `Status` has it of the run; `brought_by` explorers, if it is brought."""

    running: int
    ready: int
    ages: dict[str, int]
    brought_by: list[str] | None = None


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """A run at one moment, `at` so many seconds since 1970. `ages`: how many of its episodes under
    way have an oldest token of that many versions ago."""

    run: str
    at: float
    ended: bool = False
    step: int
    steps: int
    version: int
    running: int
    ready: int
    capacity: int
    ages: dict[str, int]
    roles: list[Role]
    task_sets: dict[str, OfSet] = {}

    @classmethod
    def read(cls, run: Path) -> Self:
        """What the run told last. ValueError if it told nothing."""
        path = run / STATUS_FILE
        try:
            return msgspec.json.decode(path.read_bytes(), type=cls)
        except (OSError, *UNREADABLE) as error:
            raise ValueError(
                f"{path} can't be read ({error}): give the folder of a run, runs/NAME"
            ) from error


class StatusFile:
    """Writes how the run stands, while its block runs."""

    def __init__(
        self,
        run: Path,
        *,
        hub: InferenceHub | FleetHub,
        rollouts: RolloutLoop,
        trainer: Callable[[], TrainerState],
        log: Log,
        fleet: Fleet | None,
        step: Callable[[], int],
        steps: int,
        waits_for: Callable[[], str],
    ) -> None:
        self._run = run
        self._hub = hub
        self._rollouts = rollouts
        self._trainer = trainer
        self._log = log
        self._fleet = fleet
        self._step = step
        self._steps = steps
        self._waits_for = waits_for
        self._clock = asyncio.get_running_loop().time
        self._counts: dict[str, tuple[float, float]] = {}  # when, and how many

    @contextlib.asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        with first_error():
            async with asyncio.TaskGroup() as tasks:
                writing = tasks.create_task(self._keep(), name="status")
                try:
                    yield
                finally:
                    writing.cancel()
        await self._write(self.now(ended=True))

    async def _keep(self) -> None:
        while True:
            await self._write(self.now())
            await asyncio.sleep(_EVERY_S)

    async def _write(self, status: Status) -> None:
        def write() -> None:
            partial = self._run / f".{STATUS_FILE}.partial"
            partial.write_bytes(msgspec.json.format(msgspec.json.encode(status)))
            partial.replace(self._run / STATUS_FILE)

        with contextlib.suppress(OSError):  # whoever can't write more than this will say so
            await asyncio.to_thread(write)

    def now(self, *, ended: bool = False) -> Status:
        """How it stands."""
        ledger, ages = self._rollouts.ledger, self._rollouts.ages()
        return Status(
            run=self._run.name,
            at=time.time(),
            ended=ended,
            step=self._step(),
            steps=self._steps,
            version=self._hub.version,
            running=ledger.running,
            ready=ledger.ready,
            capacity=self._rollouts.capacity,
            ages=_by_age(sum(ages.values(), Counter())),
            roles=[] if ended else self._roles(),
            task_sets={name: self._of_set(name, ages[name]) for name in ages if name},
        )

    def _of_set(self, name: str, ages: Mapping[int, int]) -> OfSet:
        ledger, brought_by = self._rollouts.ledger, None
        if self._fleet is not None and name in self._fleet.brought:
            explorers = self._fleet.explorers.values()
            brought_by = [explorer.name for explorer in explorers if name in explorer.brings]
        return OfSet(
            running=ledger.running_of[name],
            ready=ledger.ready_of[name],
            ages=_by_age(ages),
            brought_by=brought_by,
        )

    def _roles(self) -> list[Role]:
        return [self._of_controller(), self._of_trainer(), *self._of_players()]

    def _of_controller(self) -> Role:
        admission = self._rollouts.admission_state()
        waits = [admission.log, self._waits_for()]
        if not admission.fresh:
            waits.append(f"version {admission.next_version} to be published")
        trained = self._rollouts.ledger.count("trained")
        return Role(
            role="controller",
            where=machine.where(),
            doing=f"log {self._log.lag_s:.1f} s behind",
            version=self._hub.version,
            rate=self._rate("trained", trained),
            of="trained episodes",
            waits_for="; ".join(filter(None, waits)),
        )

    def _of_trainer(self) -> Role:
        state = self._trainer()
        for_s = self._clock() - state.since
        doing = f"{state.doing} for {for_s:.0f} s" if state.doing else ""
        waits = state.waits_for
        if not waits and not state.doing and not state.dead:
            waits = f"a batch, for {for_s:.0f} s"
        return Role(
            role="trainer",
            where=machine.where(),
            doing=state.dead or doing,
            version=self._step(),
            rate=self._rate("steps", self._step()),
            of="steps",
            waits_for=waits,
        )

    def _of_players(self) -> list[Role]:
        local = self._hub.local if isinstance(self._hub, FleetHub) else self._hub
        roles = [] if local is None else [_of_worker(worker) for worker in local.stats().workers]
        if self._fleet is not None:
            roles += [self._of_explorer(explorer) for explorer in self._fleet.explorers.values()]
        return roles

    def _of_explorer(self, explorer: Explorer) -> Role:
        heard_s = self._clock() - explorer.heard_at
        waits = ""
        if explorer.link is None:
            waits = f"its connection; not heard of for {heard_s:.0f} s"
        elif explorer.version < 0:
            waits = explorer.state.doing
        elif explorer.version < self._hub.version:
            waits = f"version {self._hub.version}"
        elif not explorer.leaving and not explorer.plays:
            waits = "episodes"
        workers = explorer.state.stats.workers if explorer.state.stats is not None else ()
        leaving = "leaves; " if explorer.leaving else ""
        return Role(
            role=f"{'evaluator' if explorer.evaluates else 'explorer'} {explorer.name}",
            where=explorer.where,
            doing=f"{leaving}{len(explorer.plays)} episodes, {len(workers)} workers",
            version=explorer.version if explorer.version >= 0 else None,
            rate=self._rate(f"explorer {explorer.name}", explorer.played),
            of="episodes",
            waits_for=waits,
        )

    def _rate(self, name: str, count: float) -> float | None:
        now = self._clock()
        before = self._counts.get(name)
        self._counts[name] = now, count
        if before is None or now - before[0] <= 0:
            return None
        return (count - before[1]) / (now - before[0])


def _by_age(ages: Mapping[int, int]) -> dict[str, int]:
    return {str(age): count for age, count in sorted(ages.items())}


def _of_worker(worker: WorkerStats) -> Role:
    waits = "" if worker.healthy else "its restart"
    doing = "new weights" if worker.updating else f"{worker.running} requests"
    if worker.asleep:
        doing = f"sleeps in the trainer's turn, with {doing}"
    return Role(
        role=f"worker {worker.name}",
        where=machine.where(),
        doing=doing,
        version=worker.version,
        waits_for=waits,
    )


def show(run: Path, *, as_json: bool) -> None:
    """Prints how a run stands. ValueError if it tells nothing."""
    status, places = Status.read(run), read_places(run)
    if as_json:
        print(msgspec.json.encode(status).decode())
        return
    old_s = time.time() - status.at
    ended = "it has ended" if status.ended else ""
    silent = f"not heard of for {old_s:.0f} s" if old_s > _OLD_S and not status.ended else ""
    print(
        f"{status.run}: step {status.step} of {status.steps}, version {status.version}"
        + "".join(f"; {note}" for note in (ended, silent) if note)
    )
    print(
        f"episodes: {status.running} run, {status.ready} are ready, of {status.capacity} at most; "
        f"oldest tokens: {_told(status.ages)}"
    )
    for name, of_set in status.task_sets.items():
        by = of_set.brought_by
        brought = "" if by is None else f"; brought by {', '.join(by) or 'nobody'}"
        print(
            f"task set {name}: {of_set.running} run, {of_set.ready} are ready; oldest tokens: "
            f"{_told(of_set.ages)}{brought}"
        )
    table = Table(box=None, pad_edge=False)
    for column in ("role", "where", "version", "rate", "doing", "waits for"):
        table.add_column(column, overflow="fold")
    for role in status.roles:
        rate = "" if role.rate is None else f"{role.rate:.2f} {role.of}/s"
        version = "" if role.version is None else str(role.version)
        table.add_row(role.role, role.where, version, rate, role.doing, role.waits_for)
    # For others than people a role is a line; and no name is markup.
    width = None if Console().is_terminal else _WIDEST
    Console(highlight=False, markup=False, width=width).print(table)
    for place in places:
        print(place)


def _told(ages: Mapping[str, int]) -> str:
    return ", ".join(f"{count} of age {age}" for age, count in ages.items()) or "none"
