"""A run that explorers play, which come, go, die and are cut off; and whose controller dies too.

    ExploredSchedule(seed).run()      raises Violation if a promise was broken; gives the trace

As a LoggedSchedule, with a fleet in the place of agents in the controller's process, or beside
them. The last start's world becomes calm, and then nothing may be left over.
"""

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from flash.errors import FlashError
from flash.evaluation.play import play
from flash.explorer.brought import Brought
from flash.explorer.crew import FleetCrew
from flash.explorer.fleet import Fleet, Run
from flash.explorer.hub import FleetHub
from flash.explorer.messages import Files
from flash.hub.hub import InferenceHub
from flash.rollout.crew import AgentCrew
from tests.faults.explorers import World
from tests.faults.logged import LoggedSchedule, Start, TruthOfStart
from tests.faults.schedule import STALL_TIMEOUT_S, Schedule, heldout_tasks

CALM_WITHIN_S = 60.0
SETTLES_S = 30.0
ENDS_WITHIN_S = 8_000.0


class ExploredSchedule(LoggedSchedule):
    """See above."""

    fleet_class = Fleet
    brought: tuple[str, ...] = ()  # task sets that explorers bring, not all of them all

    def __init__(self, seed: int, **options: Any) -> None:
        super().__init__(seed, **options)
        self.loop_errors: list[str] = []
        self.controllers: list[ExploredStart] = []
        self.of_fleets: Counter[str] = Counter()
        drawn = Schedule(seed, **self.given)
        self.world = World(
            seed,
            say=self.say,
            truth=lambda key: TruthOfStart(self, key),
            note=self._note,
            options={
                "tell_s": drawn.tell_s, "turns": drawn.turns, "update_mode": drawn.update_mode,
                "deterministic": random.Random(seed).random() < 0.5, "brought": self.brought,
            },
        )  # fmt: skip

    async def _run(self) -> None:
        async with asyncio.timeout(ENDS_WITHIN_S):
            await super()._run()

    def _note(self, key: Any, version: int, weights: str) -> None:
        self.published[key, version] = weights

    async def _live_in(self, root: Path) -> None:
        others = asyncio.all_tasks()
        self.world.begin()
        try:
            await super()._live_in(root)
        finally:
            for start in self.controllers:
                await start.end_of_its_own()
            await self.world.end()
            self.ends["episodes"] += sum(len(start.records) for start in self.controllers)
            self.ends["batches"] += len(self.batches)
            self.ends.update({f"explorers: {what}": n for what, n in self.world.counts.items()})
            self.ends.update({f"fleets: {what}": n for what, n in self.of_fleets.items()})
        await asyncio.sleep(3 * self.world.lease_s)  # what was half open is closed by now
        assert not self.loop_errors, self.loop_errors
        left = asyncio.all_tasks() - others
        assert not left, f"invariant 6: {left}"

    def _new_start(self, number: int, folder: Path, **options: Any) -> Start:
        start = ExploredStart(self, number, folder, **options)
        self.controllers.append(start)
        return start


class ExploredSets(ExploredSchedule):
    """Each of several task sets, of which explorers bring all but one."""

    several = 1.0
    brought = ("b", "c")


class ExploredStart(Start):
    """A controller."""

    of_run: ExploredSchedule

    def _plan(self, rng: random.Random, last: bool) -> None:
        super()._plan(rng, last)
        self.world = self.of_run.world
        self.last = last
        self.has_workers = rng.random() < 0.2
        self.away_s = rng.choice([0.0, 1.0, 1.0, 2.0]) * rng.random() * self.world.lease_s
        self.most_s = rng.uniform(0, 600)
        self.fleet: Fleet | None = None
        if last:
            self.rates = {"checkpoint": 0.3, "evaluation": 0.3}

    async def live(self) -> Start | None:
        if self.number:
            await asyncio.sleep(self.away_s)
        return await super().live()

    async def end_of_its_own(self) -> None:
        """It was taken over, and has nothing to do in which it would notice that."""
        if self.end == "taken_over" and hasattr(self, "life"):
            self._die()
            await asyncio.wait([self.life])

    @contextlib.asynccontextmanager
    async def _new_hub(self, version: int = 0) -> AsyncIterator[FleetHub]:
        wires, loop = self.world.wires, asyncio.get_running_loop()
        if self.last:
            loop.call_later(self.rng.random() * CALM_WITHIN_S, self.world.calm)
        else:  # with explorers that die too often it would last for ever
            loop.call_later(self.most_s, self._die)
        async with contextlib.AsyncExitStack() as opened:
            local: InferenceHub | None = None
            if self.has_workers:
                local = await opened.enter_async_context(Schedule._new_hub(self, version))
            hub = FleetHub(local, version=version, offer=self._offer)
            model = self._path_of(version)
            run = Run(
                id="run", name="run", config={"samples": self.samples}, where="here",
                model=str(model), model_files=await self._offer(model), version=version,
            )  # fmt: skip
            self.fleet = fleet = self.of_run.fleet_class(
                run, lease_s=self.world.lease_s,
                due=self.past.restored.cut_off, start=self.past.start, known=self.past.known_of,
                after_commit=self.log.after_commit,
                version=lambda: hub.version, publish=lambda: hub.message,
                brought=Brought(self.of_run.brought, others=("a",), folder=self.folder),
            )  # fmt: skip
            hub.over(fleet)
            await opened.enter_async_context(fleet)
            wires.welcome = fleet.welcome
            try:
                yield hub
                if self.world.is_calm:
                    await self._check_nothing_is_left()
                await fleet.close("it is over", again=False)
            except Exception:
                await fleet.close("it has stopped", again=True)
                raise
            finally:
                self.of_run.of_fleets += fleet.counts
                await asyncio.sleep(self.rng.random())
                wires.end(fleet.welcome)

    async def _offer(self, path: Path, *, before: Files | None = None) -> Files:
        return Files(path=str(path), stamp="", key="")

    def _path_of(self, version: int) -> Path:
        return Path(f"/fake/{version}-{self.of_run.published[self.number, version]}")

    def _loop_options(self) -> dict[str, Any]:
        return super()._loop_options() | {"agent": None, "crew": self._crew()}

    def _crew(self, **options: Any) -> FleetCrew:
        here = self.hub.local
        if here is None:
            return FleetCrew(self.fleet, self.hub, **options)
        agents = AgentCrew(self._make_agent, here)
        return FleetCrew(
            self.fleet, self.hub, local=agents, room=lambda: here.room - agents.starting, **options
        )

    async def _evaluate(self, version: int) -> None:
        crew = self._crew(heldout=True, version=lambda: self.hub.version)
        with self.rollouts.paused():
            evaluation = await play(
                self.hub, self._make_agent, heldout_tasks(), concurrency=2,
                stall_timeout_s=STALL_TIMEOUT_S, crew=crew,
            )  # fmt: skip
        assert evaluation.versions == (version,), "evaluated with other weights"
        self.of_run.of_fleets["evaluations"] += 1

    # ── what must hold ───────────────────────────────────────────────────────────────────────

    async def _check_nothing_is_left(self) -> None:
        """No play that nobody plays; and explorers hold nothing that was not settled."""
        fleet = self.fleet
        assert not fleet.waiting, "an episode waits for nobody"
        await asyncio.sleep(SETTLES_S)
        for explorer in fleet.explorers.values():
            assert not explorer.plays, f"{explorer.name} plays for nobody"
        for process in self.world.here.values():
            assert process.player.empty, f"{process.name} holds {process.player.holds()}"
            assert not process.disk.kept, f"{process.name} keeps {process.disk.kept}"

    def _check_published(self, version: int) -> None:
        """Explorers need not have it yet."""

    def _check_life(self, lasts_s: float) -> None:
        """It may be cut off for long."""

    def _waits_for_the_slow(self) -> bool:
        """What explorers held may be old when they are back."""
        return False

    def _requests_lost(self) -> bool:
        return False

    def _workers_idle_in_vain(self) -> bool:
        return False

    @contextlib.asynccontextmanager
    async def _asked_beside(self) -> AsyncIterator[None]:
        yield

    @contextlib.asynccontextmanager
    async def _drained(self) -> AsyncIterator[None]:
        yield

    def _check_warranted(self, error: FlashError) -> None:
        own, self.rates = self.rates, self.rates | dict.fromkeys(self.world.planted, 1.0)
        try:
            super()._check_warranted(error)
        finally:
            self.rates = own

    def _is_faultless(self) -> bool:
        return not (self.rates or self.world.planted)

    def _check_tasks(self) -> None:
        """Explorers have theirs."""

    def _on_loop_error(self, loop: object, context: dict[str, Any]) -> None:
        self.of_run.loop_errors.append(f"{context['message']}: {context.get('exception')!r}")

    def _die(self, leave: Any = None) -> None:
        was_dead = self.dead
        super()._die(leave)
        if self.dead and not was_dead and self.fleet is not None:
            self.world.wires.end(self.fleet.welcome)
