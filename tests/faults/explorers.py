"""Explorers that come, go, die and are cut off; each as `flash explore`, over faulty workers.

World ─► Process, by name ─► Connection ─► FakeWires ─► whichever controller there is
  kills, drains, joins,        its spool is its successor's
  parts, until it is calm
"""

import asyncio
import contextlib
import itertools
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

from flash.config.task_sets import PlayedWith
from flash.config.task_source import source_of_brought
from flash.errors import FlashError
from flash.explorer.connection import Connection, RunIsOver
from flash.explorer.link import Wire
from flash.explorer.messages import Files, Welcome
from flash.explorer.player import Player
from flash.explorer.playing import play
from flash.fakes import FakePool, FakeStyle, FakeWires
from flash.hub.hub import InferenceHub
from flash.rollout.crew import AgentCrew
from flash.stop import unless
from tests.explorer.fleets import Disk
from tests.faults.faulty import Faults, FaultyAgent, FaultyEnvs, FaultyWorker, Say
from tests.faults.schedule import EPISODE_TIMEOUT_S, RATES

WIRE_RATES = {"lose": 0.01, "double": 0.05, "mix": 0.01, "cut": 0.01, "stall": 0.003}
DEEDS = ("join", "kill", "vanish", "drain", "part", "part_all", "cut", "cut_all")
PLANTED = ("worker", "answer", "abort", "control", "env", "reward", "agent")
BRINGS = source_of_brought(PlayedWith())
MOST = 12
LEAVES_S = 120.0  # beside drain_s


class World:
    """The explorers of a run, through all the starts of its controller.

    Args:
        truth: for each hub of an explorer, by its key, where its tokens are told of.
        note: told which weights a hub, by its key, has at a version.
    """

    def __init__(
        self, seed: int, *, say: Say, truth: Any, note: Any, options: dict[str, Any]
    ) -> None:
        self.rng = rng = random.Random(f"explorers {seed}")
        self.seed = seed
        self.say = say
        self.truth = truth
        self.note = note
        self.options = options
        self.counts: Counter[str] = Counter()
        self.rates: dict[str, float] = {}
        share = rng.choice([0.0, 0.1, 0.3, 1.0])
        for kind, most in RATES.items():
            if kind.startswith(PLANTED) and rng.random() < share:
                self.rates[kind] = most * rng.random()
        self.planted = tuple(self.rates)
        share = rng.choice([0.0, 0.3, 1.0])
        wires = {
            kind: most * rng.random() for kind, most in WIRE_RATES.items() if rng.random() < share
        }
        self.deeds = [deed for deed in DEEDS if rng.random() < 0.6]
        self.pause_s = rng.choice([5.0, 20.0, 60.0])
        self.lease_s = rng.choice([5.0, 10.0, 30.0])
        self.wires = FakeWires(
            latency_s=(0.001, rng.choice([0.001, 0.1, 1.0])), rates=wires, seed=f"wires {seed}"
        )
        self.brought: tuple[str, ...] = options["brought"]
        self.is_calm = self._ended = False
        self.here: dict[str, Process] = {}
        self.errors: list[str] = []
        self._disks: dict[str, Disk] = {}
        self._names = itertools.count()
        self._numbers = itertools.count()
        self._old: list[Process] = []
        self._timers: list[asyncio.TimerHandle] = []

    def befall(self, *deeds: str, wires: Mapping[str, float] | None = None) -> None:
        """These alone, and often."""
        self.deeds, self.pause_s = list(deeds), 10.0
        self.rates.clear()
        self.planted = ()
        self.wires.rates = dict(wires or {})

    def begin(self) -> None:
        for _ in range(self.rng.choice([0, 1, 1, 2, 3, 6, MOST])):
            self.start()
        self._disturbing = asyncio.create_task(self._disturb(), name="world")

    def start(self, name: str = "") -> bool:
        """Whether there is room for one."""
        most = MOST if self.is_calm or not self.brought else MOST - 1  # one who brings all fits in
        if len(self.here) >= most or name in self.here:
            return False
        name = name or f"x{next(self._names)}"
        self._note("start", name)
        disk = self._disks[name] = self._disks.get(name, Disk())
        self.here[name] = Process(self, name, next(self._numbers), disk)
        return True

    def gone(self, process: "Process", error: BaseException | None) -> None:
        """It has ended by itself."""
        if self.here.get(process.name) is process:
            del self.here[process.name]
            self._old.append(process)
        self.say("left", process.name, type(error).__name__ if error else "")
        if isinstance(error, FlashError):
            self.counts["fail"] += 1
            self._later(1.0 if self.is_calm else self.rng.uniform(0, 60), self.start, process.name)
        elif error is not None:
            self.errors.append(f"{process.name}: {error!r}")

    def _later(self, seconds: float, deed: Any, *args: Any) -> None:
        self._timers.append(asyncio.get_running_loop().call_later(seconds, deed, *args))

    async def _disturb(self) -> None:
        while True:
            await asyncio.sleep(self.rng.uniform(0, self.pause_s))
            if not self.here:
                self.start()
            elif self.deeds:
                self._do(self.rng.choice(self.deeds))

    def _do(self, deed: str) -> None:
        """Something that befalls one of them or all, if there is any that it can befall."""
        process = self._some()
        match deed:
            case "join":
                dead = [name for name in self._disks if name not in self.here]
                name = self.rng.choice(dead) if dead and self.rng.random() < 0.5 else ""
                self.counts[deed] += self.start(name)
            case "part_all" if not self.wires.parted:
                self._note(deed)
                self.wires.parted = True
                self._later(self._parted_s(), self._heal)
            case "cut_all":
                self._note(deed)
                self.wires.cut()
            case _ if process is not None:
                self._note(deed, process.name)
                self._do_to(process, deed)

    def _do_to(self, process: "Process", deed: str) -> None:
        name = process.name
        match deed:
            case "kill":
                self._kill(process, self.wires.cut)
            case "vanish":
                self._kill(process, self.wires.vanish)
            case "drain":
                process.leave()
            case "cut":
                self.wires.cut(name)
            case "part":
                self.wires.parted_from.add(name)
                self._later(self._parted_s(), self.wires.parted_from.discard, name)

    def _note(self, *what: str) -> None:
        self.counts[what[0]] += 1
        self.say(*what)

    def _some(self) -> "Process | None":
        processes = [process for process in self.here.values() if not process.stop.is_set()]
        return self.rng.choice(processes) if processes else None

    def _kill(self, process: "Process", end: Callable[[str], None]) -> None:
        name = process.name
        del self.here[name]
        self._old.append(process)
        end(name)
        self._disks[name] = process.kill()
        if self.rng.random() < 0.7:
            again = self.rng.choice([0.0, 1.0, 20.0, 60.0]) * self.rng.random()
            self._later(again, self.start, name)

    def _heal(self) -> None:
        self.wires.parted = False

    def _parted_s(self) -> float:
        return self.lease_s * self.rng.choice([0.2, 1.0, 3.0]) * self.rng.random()

    # ── its end ──────────────────────────────────────────────────────────────────────────────

    def calm(self) -> None:
        """From now on nothing goes wrong, and all that is on a disk is handed in."""
        if self._ended:
            return
        self.say("calm")
        self.is_calm = True
        self._disturbing.cancel()
        self._heal()
        self.wires.parted_from.clear()
        self.wires.rates.clear()
        self.rates.clear()
        for name, disk in self._disks.items():
            if disk.kept:
                self.start(name)
        able = (not p.stop.is_set() and p.plays_all for p in self.here.values())
        if not any(able):
            self.start()

    async def end(self) -> None:
        """All are asked to leave, and do."""
        self._ended = True
        self._disturbing.cancel()
        for timer in self._timers:
            timer.cancel()
        for process in list(self.here.values()):
            process.leave()
        tasks = [process.task for process in [*self.here.values(), *self._old]]
        if tasks:
            _, left = await asyncio.wait(tasks, timeout=2 * LEAVES_S)
            assert not left, f"an explorer does not leave: {left}"
        assert not self.errors, self.errors


class Process:
    """One start of an explorer."""

    def __init__(self, world: World, name: str, number: int, disk: Disk) -> None:
        self.name = name
        self.world = world
        self.rng = random.Random(f"explorer {number} of {world.seed}")
        self.drain_s = self.rng.choice([0.0, 2.0, 20.0, 60.0])
        self.stop = asyncio.Event()
        self.disk = disk
        rng = random.Random(f"brings {number} of {world.seed}")
        self.brings = {
            of_set: BRINGS for of_set in world.brought if world.is_calm or rng.random() < 0.7
        }
        self.tasks_only = bool(self.brings) and not world.is_calm and rng.random() < 0.2
        self.plays_all = len(self.brings) == len(world.brought) and not self.tasks_only
        self._number = number
        self._killed = False
        self._hubs = itertools.count()
        self._agents = itertools.count()
        self.player = Player(disk)
        self.player.load()
        self.connection = Connection(
            name, self.player, connect=self._connect, have=self._have, say=lambda words: None,
            brings=self.brings, tasks_only=self.tasks_only,
        )  # fmt: skip
        self.task = asyncio.create_task(self._live(), name=f"explorer {name}")
        self.task.add_done_callback(self._done)

    @contextlib.asynccontextmanager
    async def _connect(self) -> AsyncIterator[Wire]:
        async with self.world.wires.connect(self.name) as wire:
            yield wire

    async def _have(self, files: Files) -> Path:
        await asyncio.sleep(self.rng.random())
        self._note(files.path)
        return Path(files.path)

    def _note(self, path: str) -> None:
        version, _, digest = Path(path).name.partition("-")
        self.world.note(self._key, int(version), digest)

    async def _live(self) -> None:
        with contextlib.suppress(RunIsOver):
            async with self.connection.kept():
                while (welcome := await unless(self.stop, self.connection.welcomed())) is not None:
                    await self._play_for(welcome)

    async def _play_for(self, welcome: Welcome) -> None:
        self._key = f"{self.name} {self._number} {next(self._hubs)}"
        options = self.world.options
        self._note(welcome.model)
        truth = self.world.truth(self._key)
        load_s = self.rng.choice([0.5, 0.5, 20.0])
        workers = [
            FaultyWorker(
                f"{self._key} w{i}", seed=self.rng.randrange(10**6), faults=self._faults(f"w{i}"),
                truth=truth, tell_s=options["tell_s"], load_s=(0.0, load_s),
                version=welcome.version,
            )
            for i in range(self.rng.choice([1, 1, 2]))
        ]  # fmt: skip
        source: Any = workers
        if self.rng.random() < 0.5:
            source = FakePool(workers, start_s=20.0)
            for worker in workers:
                worker.pool = source
        envs = FaultyEnvs(
            faults=self._faults("env"), seed=self.rng.randrange(10**6), turns=options["turns"],
            step_s=(0.0, 2.0), deterministic=options["deterministic"],
        )  # fmt: skip

        def agent() -> FaultyAgent:
            return FaultyAgent(
                faults=self._faults(f"agent {next(self._agents)}"), envs=envs, style=FakeStyle(),
                max_tokens=8, samples=welcome.config["samples"], step_timeout_s=20.0,
                episode_timeout_s=EPISODE_TIMEOUT_S, reward_timeout_s=10.0,
            )  # fmt: skip

        own = [] if self.tasks_only else ["", "a", *({"b", "c"} - {*self.world.brought})]
        of_sets = dict.fromkeys([*own, *self.brings], agent)  # of others nothing is given to it

        async with InferenceHub(
            source, max_running=self.rng.choice([1, 4, 16]), request_timeout_s=60.0,
            control_timeout_s=30.0, recovery_timeout_s=100.0, progress_timeout_s=25.0,
            update_mode=options["update_mode"], version=welcome.version,
        ) as hub:  # fmt: skip
            await play(
                self.player, self.connection, hub, AgentCrew(of_sets, hub),
                AgentCrew(of_sets, hub), stop=self.stop, drain_s=self.drain_s,
                say=lambda words: None,
            )  # fmt: skip
        assert envs.open_now == 0, "invariant 6: an environment is open"
        assert not any(worker.running for worker in workers), "invariant 6: one samples on"

    def _faults(self, of: str) -> Faults:
        faults = Faults(f"{of} of {self._key} of {self.world.seed}", {}, self.world.say)
        faults._rates = self.world.rates  # which end when the world is calm
        return faults

    def leave(self) -> None:
        self.stop.set()
        self._leaves_by = asyncio.get_running_loop().time() + self.drain_s + LEAVES_S
        self.world._later(self.drain_s + LEAVES_S, self._check_left)

    def _check_left(self) -> None:
        if not self.task.done():
            self.world.errors.append(f"{self.name} was asked to leave, and is here")

    def kill(self) -> Disk:
        """As kill -9: its disk stays as it is, and nothing more is said."""
        self._killed = True
        left, self.disk.kept = dict(self.disk.kept), {}
        disk = Disk()
        disk.kept = left
        self.task.cancel()
        return disk

    def _done(self, task: asyncio.Task[None]) -> None:
        if self._killed:
            return
        self.world.gone(self, None if task.cancelled() else _first(task.exception()))


def _first(error: BaseException | None) -> BaseException | None:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
