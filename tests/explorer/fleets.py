"""A controller's side and explorers under virtual time, over connections that go wrong."""

import asyncio
import contextlib
from functools import partial
from pathlib import Path

from flash.agents.environment_agent import EnvironmentAgent
from flash.explorer.connection import Connection, RunIsOver
from flash.explorer.crew import FleetCrew
from flash.explorer.fleet import Fleet, Run
from flash.explorer.hub import FleetHub
from flash.explorer.messages import Files
from flash.explorer.player import Player
from flash.explorer.playing import play
from flash.fakes import FakeEnvs, FakeStyle, FakeWires, FakeWorker
from flash.hub.hub import InferenceHub
from flash.rollout.crew import AgentCrew
from flash.rollout.loop import RolloutLoop
from flash.types import Task


async def offer(path: Path) -> Files:
    return Files(path=str(path), stamp="", key="")


async def have(files: Files) -> Path:
    return Path(files.path)


def run(**changes) -> Run:
    told = {
        "id": "run", "name": "run", "config": {}, "where": "here", "model": "model",
        "model_files": None, "version": 0,
    }  # fmt: skip
    return Run(**(told | changes))


class Controller:
    """A loop over a fleet, reached by `wires`; `crash` and `open` make it another process."""

    def __init__(self, wires: FakeWires, **options) -> None:
        self.wires = wires
        self.busy = False
        self.options = {
            "tasks": (Task(seed) for seed in range(10**6)),
            "batch_size": 8, "group_size": 4, "alpha": 1,
        } | options  # fmt: skip

    @contextlib.asynccontextmanager
    async def running(
        self, *, lease_s: float = 30.0, due=(), local=None, version: int = 0, model_files=None
    ):
        hub = FleetHub(local, version=version, offer=offer, is_idle=lambda: not self.busy)
        log = self.options.get("log")
        after = {} if log is None else {"after_commit": log.after_commit}
        self.fleet = Fleet(
            run(model_files=model_files), lease_s=lease_s, due=due, version=lambda: hub.version,
            publish=lambda: hub.message, score=hub.score, **after,
        )  # fmt: skip
        hub.over(self.fleet)
        async with self.fleet:
            crew = FleetCrew(self.fleet, hub)
            self.wires.welcome = self.fleet.welcome
            async with RolloutLoop(hub, crew=crew, **self.options) as loop:
                yield loop
            await self.fleet.close("over", again=False)
            self.wires.welcome = None


class Disk:
    """A spool that outlives its explorer."""

    def __init__(self) -> None:
        self.kept = {}

    def load(self):
        return list(self.kept.values())

    def add(self, spooled):
        self.kept[spooled.controller, spooled.episode] = spooled

    def remove(self, controller, episode):
        self.kept.pop((controller, episode), None)


class Explorer:
    """As `flash explore`, with a hub over fake workers."""

    def __init__(
        self, wires: FakeWires, name: str = "x", *, envs=None, workers=2, **options
    ) -> None:
        self.name = name
        self.drain_s = options.pop("drain_s", 60.0)
        self.task_sets = options.pop("task_sets", {})  # by name: the longest response
        self.stop = asyncio.Event()
        self.said: list[str] = []
        self.disk = options.pop("disk", Disk())
        self.options = options
        self.player = Player(self.disk)
        self.player.load()
        self.connection = Connection(
            name,
            self.player,
            connect=wires.connect,
            have=options.pop("have", have),
            say=self.said.append,
        )
        self.envs = envs or FakeEnvs(seed=sum(name.encode()))
        self.pool = [
            FakeWorker(f"{name} {n}", seed=n, tokens=(1, 8), **options.pop("worker", {}))
            for n in range(workers)
        ]
        self.task: asyncio.Task | None = None

    def start(self) -> "Explorer":
        self.task = asyncio.create_task(self._run(), name=f"explorer {self.name}")
        return self

    async def _run(self) -> None:
        with contextlib.suppress(RunIsOver):
            await self._play()

    async def _play(self) -> None:
        async with self.connection.kept():
            await self.connection.welcomed()
            async with InferenceHub(self.pool, max_running=4, **self.options) as self.hub:

                def agent(max_tokens=8):
                    return EnvironmentAgent(
                        envs=self.envs, style=FakeStyle(), max_tokens=max_tokens
                    )

                of_sets = {name: partial(agent, most) for name, most in self.task_sets.items()}
                await play(
                    self.player, self.connection, self.hub,
                    AgentCrew(of_sets or agent, self.hub), AgentCrew(of_sets or agent, self.hub),
                    stop=self.stop, drain_s=self.drain_s, say=self.said.append,
                )  # fmt: skip

    async def kill(self) -> None:
        """As kill -9: nothing more is said."""
        if self.connection._link is not None:
            self.connection._link._wire.cut()
        self.task.cancel()
        await asyncio.wait((self.task,))
