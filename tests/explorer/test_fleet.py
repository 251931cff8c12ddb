"""A run whose episodes are played by explorers, which come, go, and are lost."""

import asyncio

import pytest

from flash.evaluation.config import EvalConfig
from flash.evaluation.evaluations import Evaluations
from flash.explorer.crew import FleetCrew
from flash.fakes import FakeEnvs, FakeWires, KeepingObserver
from flash.rollout.observer import Observer
from flash.rollout.tasks import TaskSet
from flash.types import Task
from flash.virtual_time import in_virtual_time
from tests.explorer.fleets import Controller, Explorer
from tests.steady import weights


async def train(loop, versions):
    for version in versions:
        batch = await loop.next_batch()
        assert batch.metrics["staleness/max"] <= loop.alpha
        await loop.publish(weights(version))


@in_virtual_time
async def test_explorers_play_a_run():
    wires = FakeWires()
    kept = KeepingObserver()
    controller = Controller(wires, observers=[kept])
    async with controller.running() as loop:
        explorers = [Explorer(wires, name).start() for name in "ab"]
        await train(loop, range(1, 6))
        assert {e.played > 0 for e in controller.fleet.explorers.values()} == {True}
    await asyncio.wait([e.task for e in explorers], timeout=60)
    assert all(e.task.done() for e in explorers)
    assert loop.ledger.count("trained") == 40
    loop.ledger.check()


@in_virtual_time
async def test_what_explorers_have_sampled_is_counted_once_whether_they_are_here_or_not():
    wires = FakeWires()
    controller = Controller(wires)
    async with controller.running(lease_s=10) as loop:
        explorers = [Explorer(wires, name).start() for name in "ab"]
        await train(loop, [1, 2])
        await asyncio.sleep(2)  # what was sampled is told each second
        before = controller.hub.stats()
        wires.parted = True
        await asyncio.sleep(20)
        assert controller.fleet.explorers == {}
        gone = controller.hub.stats()
        assert (gone.generated_tokens, gone.requests) == (before.generated_tokens, before.requests)
        assert gone.running == 0 and gone.workers == ()
        wires.parted = False
        await asyncio.sleep(30)
        sampled = [explorer.hub.stats().generated_tokens for explorer in explorers]
        assert controller.hub.stats().generated_tokens == sum(sampled) >= gone.generated_tokens


@in_virtual_time
async def test_explorers_play_each_task_set_with_its_own_agents():
    wires, kept = FakeWires(), KeepingObserver()
    sets = [
        TaskSet(name=name, tasks=map(Task, range(1000)), groups_per_batch=1, group_size=4)
        for name in ("brief", "long")
    ]
    controller = Controller(wires, observers=[kept], task_sets=sets)
    async with controller.running() as loop:
        explorers = [
            Explorer(wires, name, task_sets={"brief": 1, "long": 8}).start() for name in "ab"
        ]
        await train(loop, range(1, 4))
    await asyncio.wait([e.task for e in explorers], timeout=60)
    said = {"brief": 0.0, "long": 0.0}
    for record in [record for record in kept.records if record.outcome == "trained"]:
        a_turn = record.generated_tokens / record.turns
        said[record.task_set] = max(said[record.task_set], a_turn)
    assert said["brief"] == 1
    assert said["long"] > 1


@in_virtual_time
async def test_what_a_killed_explorer_held_goes_on_elsewhere_from_where_it_was():
    wires, kept = FakeWires(), KeepingObserver()
    controller = Controller(wires, observers=[kept])
    envs = {"turns": (6, 6), "step_s": (1, 1), "deterministic": True}
    async with controller.running(lease_s=20) as loop:
        a = Explorer(wires, "a", envs=FakeEnvs(**envs)).start()
        await asyncio.sleep(4.5)
        held = list(controller.fleet.explorers["a"].plays)
        assert len(held) == loop.capacity
        await a.kill()
        Explorer(wires, "b", envs=FakeEnvs(**envs)).start()
        await asyncio.sleep(10)
        assert set(loop.under_way()) == {loop.under_way()[n] for n in range(len(held))}
        assert controller.fleet.counts["losses"] == 0  # its lease is not over
        await train(loop, [1])
        assert controller.fleet.counts["losses"] == 1
    cut = [record for record in kept.records if record.reason == "interrupted"]
    assert [record.episode for record in cut] == held
    assert all(record.outcome == "cancelled" for record in cut)
    trained = [record for record in kept.records if record.outcome == "trained"]
    assert len(trained) == 8
    assert all(record.turns == 6 for record in trained)
    # What was said before the kill was said by a, and is not sampled again.
    assert controller.fleet.counts["cut_off"] == len(held)
    loop.ledger.check()


@in_virtual_time
async def test_an_explorer_that_comes_back_in_time_goes_on_with_what_it_held():
    wires, kept = FakeWires(), KeepingObserver()
    controller = Controller(wires, observers=[kept])
    async with controller.running(lease_s=30) as loop:
        Explorer(wires, "a").start()
        await train(loop, [1])
        for version in range(2, 8):
            wires.cut()
            await train(loop, [version])
        fleet = controller.fleet
        assert fleet.counts["returns"] >= 6
        assert (fleet.counts["losses"], fleet.counts["late"]) == (0, 0)
    assert not any(record.reason == "interrupted" for record in kept.records)
    assert len({r.episode for r in kept.records}) == len(kept.records)


@in_virtual_time
async def test_a_lost_explorers_late_answers_are_refused():
    wires, kept = FakeWires(), KeepingObserver()
    controller = Controller(wires, observers=[kept])
    slow = FakeEnvs(turns=(3, 3), step_s=(3, 3))
    async with controller.running(lease_s=5) as loop:
        a = Explorer(wires, "a", envs=slow).start()
        await asyncio.sleep(4)
        wires.parted = True
        await asyncio.sleep(20)
        assert controller.fleet.counts["losses"] == 1
        assert len(a.disk.kept) == 16  # it has finished all of them meanwhile, and kept them
        wires.parted = False
        await train(loop, [1, 2])
        assert controller.fleet.counts["late"] == 16
        assert a.disk.kept == {}
    trained = [record for record in kept.records if record.outcome == "trained"]
    assert len(trained) == len({record.episode for record in trained}) == 16
    loop.ledger.check()


@in_virtual_time
async def test_what_an_explorer_finished_alone_counts_when_it_is_back_within_its_lease():
    wires, kept = FakeWires(), KeepingObserver()
    controller = Controller(wires, observers=[kept])
    slow = FakeEnvs(turns=(3, 3), step_s=(3, 3))
    async with controller.running(lease_s=60) as loop:
        a = Explorer(wires, "a", envs=slow).start()
        await asyncio.sleep(4)
        wires.cut()
        wires.parted = True
        await asyncio.sleep(20)
        assert len(a.disk.kept) == 16
        assert loop.ledger.ready == 0
        wires.parted = False
        await train(loop, [1])
        await asyncio.sleep(1)
        assert a.disk.kept == {}
    assert {record.reason for record in kept.records} <= {"", "shutdown"}


@in_virtual_time
async def test_an_explorer_that_leaves_ends_what_it_plays_or_hands_it_back():
    wires, kept = FakeWires(), KeepingObserver()
    controller = Controller(wires, observers=[kept])
    slow = FakeEnvs(turns=(30, 30), step_s=(1, 1), deterministic=True)
    async with controller.running() as loop:
        a = Explorer(wires, "a").start()
        b = Explorer(wires, "b", envs=slow, drain_s=2).start()
        await asyncio.sleep(10)
        a.stop.set()
        await asyncio.wait((a.task,), timeout=100)
        assert a.task.done()
        assert controller.fleet.counts["handed_back"] == 0
        b.stop.set()
        Explorer(wires, "c").start()
        await asyncio.wait((b.task,), timeout=10)
        assert b.task.done()
        await asyncio.sleep(1)
        assert controller.fleet.counts["drains"] == 2
        assert controller.fleet.counts["handed_back"] > 0
        await train(loop, [1, 2])
    assert controller.fleet.counts["losses"] == 0
    loop.ledger.check()


@in_virtual_time
async def test_an_explorer_whose_weights_are_too_old_is_given_nothing():
    wires = FakeWires()
    controller = Controller(wires, alpha=0)
    async with controller.running() as loop:
        Explorer(wires, "fast", workers=1).start()
        slow = Explorer(wires, "slow", workers=1, worker={"load_s": (1000, 1000)}).start()
        await train(loop, [1])
        played = controller.fleet.explorers["slow"].played
        assert played > 0
        await train(loop, range(2, 10))
        assert slow.hub.version == 0
        assert controller.fleet.explorers["slow"].played == played
        assert asyncio.get_running_loop().time() < 500  # it delayed nobody


@in_virtual_time
async def test_explorers_may_start_before_the_controller():
    wires = FakeWires()
    a = Explorer(wires, "a").start()
    await asyncio.sleep(100)
    assert a.said == ["waiting for the run's controller: nobody is there"]
    controller = Controller(wires)
    async with controller.running() as loop:
        assert loop.crew_waits_for.startswith("an explorer")
        await train(loop, [1])
        assert loop.crew_waits_for == ""


class Examined(Observer):
    def __init__(self):
        self.evaluations = []

    def evaluated(self, evaluation):
        self.evaluations.append(evaluation)


@in_virtual_time
async def test_an_explorer_that_evaluates_plays_nothing_else_with_weights_that_stay():
    wires, kept = FakeWires(), Examined()
    controller = Controller(wires, observers=[kept])
    slow = {"envs": FakeEnvs(turns=(3, 3), step_s=(20, 20)), "evaluates": True}
    async with controller.running(apart=True) as loop:
        Explorer(wires, "a").start()
        exam = Explorer(wires, "exam", workers=1, **slow).start()
        await train(loop, [1])

        def crew():
            version = loop.hub.version
            return FleetCrew(controller.fleet, loop.hub, heldout=True, version=lambda: version)

        evaluations = Evaluations(
            EvalConfig(tasks=8), loop, hub=loop.hub, agent=None, crew=crew, apart=True, every=1,
            last=100, observer=kept, stop=asyncio.Event(),
        )  # fmt: skip
        async with evaluations:
            await evaluations.after(1)
            await train(loop, range(2, 30))
            assert kept.evaluations == []  # beside it rollout goes on
            assert exam.hub.version == 1
            await evaluations.finish()
        (evaluation,) = kept.evaluations
        assert (evaluation.versions, evaluation.episodes) == ((1,), 8)
        fleet = controller.fleet
        assert fleet.explorers["exam"].played == 8
        await asyncio.sleep(5)
        assert exam.hub.version == 29
        assert fleet.placing.waits_for() == fleet.placing.waits_for(heldout=True) == ""
        await exam.kill()
        await asyncio.sleep(60)
        assert "--evaluates" in fleet.placing.waits_for(heldout=True)


@in_virtual_time
async def test_an_explorer_whose_disk_is_full_ends_with_that():
    async def full(files):
        raise OSError(28, "No space left on device")

    wires = FakeWires()
    async with Controller(wires).running() as loop:
        a = Explorer(wires, "a", have=full).start()
        await loop.next_batch()
        await loop.publish(weights(1))
        with pytest.raises(OSError, match="No space left"):
            async with asyncio.timeout(60):
                await a.task
