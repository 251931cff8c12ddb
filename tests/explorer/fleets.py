"""A controller's side and explorers under virtual time, over connections that go wrong."""

import asyncio
import contextlib
import math
from functools import partial
from pathlib import Path

import aiohttp

from flash.agents.environment_agent import EnvironmentAgent
from flash.explorer.connection import Connection, RunIsOver
from flash.explorer.crew import FleetCrew
from flash.explorer.file_server import FileServer
from flash.explorer.fleet import Fleet, Run
from flash.explorer.gate import Gate, joined
from flash.explorer.hub import FleetHub
from flash.explorer.messages import Files, Welcome
from flash.explorer.player import Player
from flash.explorer.playing import play
from flash.explorer.senders import Sending
from flash.fakes import FakeEnvs, FakeStyle, FakeWires, FakeWorker
from flash.hub.hub import InferenceHub
from flash.rollout.crew import AgentCrew
from flash.rollout.loop import RolloutLoop
from flash.stop import unless
from flash.types import Task


async def offer(folder: Path, *, before: Files | None = None) -> Files:
    return Files(path=str(folder), stamp="", key="")


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
        self, *, lease_s: float = 30.0, due=(), known=0, version: int = 0, local=None,
        agent=None, opens_s: float = 0.0, model_files=None, apart: bool = False, brought=None,
        start: int = 0, start_sender=None, **of_run,
    ):  # fmt: skip
        hub = self.hub = FleetHub(
            local, version=version, offer=offer, is_idle=lambda: not self.busy
        )
        log = self.options.get("log")
        after = {} if log is None else {"after_commit": log.after_commit}

        async def weights(version):
            return hub.weights_of(version)

        if start_sender is not None:
            after["sending"] = Sending(start=start_sender, weights=weights)
        self.fleet = Fleet(
            run(model_files=model_files, version=version, **of_run), lease_s=lease_s,
            due=due if isinstance(due, dict) else dict.fromkeys(due, 0),
            start=start, known=known if callable(known) else lambda start: known,
            version=lambda: hub.version, publish=lambda: hub.message, score=hub.score,
            apart=apart, brought=brought, **after,
        )  # fmt: skip
        hub.over(self.fleet)
        async with self.fleet:
            here = None if agent is None else AgentCrew(agent, local)

            def room():
                return 0 if here is None else local.room - here.starting

            crew = FleetCrew(self.fleet, hub, local=here, room=room)
            self.wires.welcome = self.fleet.welcome
            await asyncio.sleep(opens_s)
            async with RolloutLoop(hub, crew=crew, **self.options) as loop:
                yield loop
            await self.fleet.close("over", again=False)
            self.wires.end(self.fleet.welcome)

    @contextlib.asynccontextmanager
    async def killed(self, **options):
        """As `running`, and then as kill -9: nothing more is said."""
        async with self.running(**options) as loop:
            yield loop
            self.wires.end(self.fleet.welcome)


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

    by_files = True

    def __init__(
        self, wires: FakeWires, name: str = "x", *, envs=None, workers=2, **options
    ) -> None:
        self.name, self.wires = name, wires
        self.drain_s = options.pop("drain_s", 60.0)
        self.task_sets = options.pop("task_sets", {})  # by name: the longest response
        self.brings = options.pop("brings", {})  # of these: what each is, as its run is told
        self.stop = asyncio.Event()
        self.said: list[str] = []
        self.disk = options.pop("disk", Disk())
        self.options = options
        self.player = Player(self.disk)
        self.player.load()
        self.connection = Connection(
            name, self.player, connect=partial(wires.connect, name),
            have=options.pop("have", have), say=self.said.append,
            evaluates=options.pop("evaluates", False), brings=self.brings,
            tasks_only=options.pop("tasks_only", False),
            wait_s=options.pop("wait_s", math.inf),
        )  # fmt: skip
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
            while (welcome := await unless(self.stop, self.connection.welcomed())) is not None:
                await self._play_for(welcome)

    async def _play_for(self, welcome: Welcome) -> None:
        options = {"max_running": 4, "version": welcome.version} | self.options

        def agent(max_tokens=8):
            return EnvironmentAgent(envs=self.envs, style=FakeStyle(), max_tokens=max_tokens)

        of_sets = {name: partial(agent, most) for name, most in self.task_sets.items()}
        async with InferenceHub(self.pool, **options) as self.hub:
            await play(
                self.player, self.connection, self.hub,
                AgentCrew(of_sets or agent, self.hub), AgentCrew(of_sets or agent, self.hub),
                stop=self.stop, drain_s=self.drain_s, say=self.said.append,
                by_files=self.by_files,
            )  # fmt: skip

    async def kill(self) -> None:
        """As kill -9: nothing more is said."""
        self.wires.cut(self.name)
        self.task.cancel()
        await asyncio.wait((self.task,))


@contextlib.asynccontextmanager
async def over_a_gate(sending, **told):
    """A connection of an explorer's to a fleet, by a real gate; entered, and welcomed."""
    fleet = Fleet(run(**told), lease_s=30, sending=sending)
    async with contextlib.AsyncExitStack() as opened:
        await opened.enter_async_context(fleet)
        gate = Gate(
            "secret", fleet.welcome, files=FileServer(), host="127.0.0.1", port=0
        )  # fmt: skip
        url = await gate.start()
        opened.push_async_callback(gate.close)
        session = await opened.enter_async_context(aiohttp.ClientSession())
        connection = Connection(
            "x", Player(Disk()), connect=lambda: joined(session, url, "secret"), have=have,
            say=print,
        )  # fmt: skip
        await opened.enter_async_context(connection.kept())
        await connection.welcomed()
        yield connection
