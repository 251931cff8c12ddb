"""A run whose explorers are on hosts of their own: no disk is shared, and the network is bad."""

import asyncio
import contextlib
import signal

import pytest

from flash.telemetry.status import Status
from tests.commands import Lines, flash
from tests.crash.account import Books, violations
from tests.hosts.network import Network, Weather, unavailable

MOST_S = 300  # it takes 50
GOES_S = 20
LAST_LINES = 60
PORT = 8765
TOKEN = "known-to-all-hosts-of-the-run"
BAD = Weather(loss=0.03, delay_s=0.02, jitter_s=0.03, doubled=0.01, reordered=0.01)
PROMISED = {"batch_size": 16, "group_size": 4, "alpha": 1, "seed": 0}
TINY = PROMISED | {
    "eval_every": 0, "eval.tasks": 4, "policy.layers": 1, "policy.hidden_size": 32,
    "policy.heads": 2, "warm_start.steps": 3, "warm_start.demonstrations": 12,
    "explorers.expected": 3, "explorers.lease_s": 6, "engine.workers": 0, "steps": 1000,
    "rollout.stall_timeout_s": 60,
}  # fmt: skip


class Hosts:
    """A controller and explorers that see nothing of its folder, and what all of them say."""

    def __init__(self, network, stack, folder) -> None:
        self.network = network
        self.run = folder / "runs/r"
        self.run.parent.mkdir()
        self.said: dict[str, Lines] = {}
        self._folder = folder
        self._stack = stack
        self._processes = []

    async def add(self, *names) -> None:
        self.controller = await self.network.add("controller")
        hidden = (self.run.parent, "/dev/shm")
        self.explorers = {name: await self.network.add(name, hidden=hidden) for name in names}

    async def train(self, *words):
        address = "--explorers.host", self.controller.address, "--explorers.port", PORT
        return await self._start(
            "train", self.controller, *words, *address, "--explorers.token", TOKEN
        )

    async def explore(self, name, *words):
        host = self.explorers[name]
        folder = self._folder / name
        told = "--token", TOKEN, "--name", name, "--folder", folder
        url = f"http://{self.controller.address}:{PORT}"
        return await self._start("explore", host, url, *told, *words)

    async def _start(self, command, host, *words):
        process = await self._stack.enter_async_context(flash(command, *words, inside=host.inside))
        self._processes.append(process)
        lines = self.said[f"{host.name}, {len(self.said)}"] = Lines(process)
        return process, lines

    async def until(self, condition) -> None:
        """Waits until that holds of the run's status, which nobody leaves before."""
        while not (status := self.status()) or not condition(status):
            assert {process.returncode for process in self._processes} == {None}
            await asyncio.sleep(0.1)

    async def tell_where_they_are(self) -> None:
        """The last that each has said, and where each thread of it is: it ends by that."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGABRT)
        for name, lines in reversed(self.said.items()):
            await lines.end()
            print(f"── {name}", *lines.said[-LAST_LINES:], sep="\n")

    def status(self):
        with contextlib.suppress(ValueError):
            return Status.read(self.run)
        return None


@contextlib.asynccontextmanager
async def hosts(folder):
    async with Network(BAD) as network, contextlib.AsyncExitStack() as stack:
        there = Hosts(network, stack, folder)
        try:
            async with asyncio.timeout(MOST_S):
                yield there
        except BaseException:
            print(network.counts, there.status())
            await there.tell_where_they_are()
            raise
        finally:
            for lines in there.said.values():
                await lines.close()


async def left(explorer) -> int:
    """Its exit code. One that was on its way back when the run ended waits, and is asked to go."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(GOES_S):
            return await explorer.wait()
    explorer.send_signal(signal.SIGTERM)
    return await explorer.wait()


def versions(status):
    """Of the explorers that have workers."""
    return {
        role.role.removeprefix("explorer "): role.version
        for role in status.roles
        if role.role.startswith("explorer ") and role.version is not None
    }


@pytest.mark.slow
@pytest.mark.timeout(MOST_S + 60)
async def test_hosts_that_are_cut_off_cost_what_they_held_and_come_back(tmp_path):
    if why := unavailable():
        pytest.skip(why)
    async with hosts(tmp_path) as there:
        network = there.network
        await there.add("a", "b", "c")
        # Any order; of the weights b and c take some from a.
        relay = "--relay", there.explorers["a"].address
        a, heard_a = await there.explore("a", *relay)
        b, heard_b = await there.explore("b")
        c, heard_c = await there.explore("c")
        settings = [word for name, value in TINY.items() for word in (f"--{name}", value)]
        train, _ = await there.train(
            "frozen_lake", "--runs_dir", there.run.parent, "--name", "r", *settings
        )
        await there.until(lambda now: sum(v >= 2 for v in versions(now).values()) == 3)

        # One is cut off for longer than its lease: others play what it had.
        network.cut_off(there.explorers["b"])
        await there.until(lambda now: "b" not in versions(now))
        step = there.status().step
        await there.until(lambda now: now.step >= step + 2)

        # All are cut off, for half of it: they go on.
        network.cut_off(there.controller)
        for lines in (heard_a, heard_c):
            await lines.until("the controller is away")
        network.join(there.controller, there.explorers["b"])
        step = there.status().step
        await there.until(lambda now: min(versions(now).get(n, -1) for n in "abc") > step)

        # The controller is stopped, and resumed: they come back to it, and hear of its end.
        train.send_signal(signal.SIGTERM)
        assert await train.wait() == 0
        done = there.status().step + 6
        train, _ = await there.train(there.run / "config.yaml", "--resume", "--steps", done)
        assert await train.wait() == 0
        assert await asyncio.gather(left(a), left(b), left(c)) == [0, 0, 0]
        heard = [str(lines) for lines in (heard_a, heard_b, heard_c)]
        assert any(said.endswith("the run is over") for said in heard)
        # They have gone on with the workers that they had.
        assert [said.count("plays for run r") for said in heard] == [1, 1, 1]

    relayed = there.explorers["a"].sent
    assert relayed["b"] or relayed["c"]
    settings = PROMISED | {"steps": done}
    assert list(violations(Books("", there.run), there.run, settings)) == []
    (policy,) = (there.run.parent / ".small_policies").iterdir()
    for name in "abc":
        (model,) = (tmp_path / name / "model").iterdir()
        for path in policy.iterdir():
            assert (model / path.name).read_bytes() == path.read_bytes()
        # Of two versions, and what changed between them.
        assert 1 <= len(list((tmp_path / name / "weights").iterdir())) <= 3
