"""What explorers and controllers go on with after links, and each other, were lost."""

import asyncio
from pathlib import Path

import pytest

from flash.agents.environment_agent import EnvironmentAgent
from flash.errors import FlashError, InferenceFailure, PublishFailure, TrainerFailure
from flash.evaluation.play import play
from flash.explorer.crew import FleetCrew
from flash.explorer.files import FetchFailure, GoneError
from flash.explorer.fleet import Fleet
from flash.explorer.link import Link
from flash.explorer.messages import (
    PROTOCOL,
    Begin,
    Files,
    Hello,
    News,
    Returned,
    Score,
    Scored,
    Trouble,
    Welcome,
)
from flash.explorer.player import Player
from flash.fakes import FakeEnvs, FakeStyle, FakeWires, FakeWorker, KeepingObserver
from flash.hub.hub import InferenceHub
from flash.hub.worker import BadRequest
from flash.rollout.committed import NoLog
from flash.rollout.crew import AgentCrew
from flash.rollout.restored import DueEpisode, OpenGroup, Restored
from flash.types import Task, Weights
from flash.virtual_time import in_virtual_time
from tests.explorer.fleets import Controller, Disk, Explorer, run
from tests.explorer.test_fleet import train
from tests.steady import weights

SLOW = {"turns": (3, 3), "step_s": (3, 3), "deterministic": True}


class HeldLog(NoLog):
    """Commits when it is told to."""

    def __init__(self) -> None:
        self.waiting = []

    def after_commit(self, then):
        self.waiting.append(then)

    def commit(self):
        waiting, self.waiting = self.waiting, []
        for then in waiting:
            then()


def due(episodes, **options):
    """What a start goes on with whose group of four had these under way."""
    group = OpenGroup(group=0, task=Task(0), due=[DueEpisode(episode=n) for n in episodes])
    return {"restored": Restored(groups=[group], first_ids=(100, 10))} | options


async def finished_alone(wires):
    """An explorer and four episodes that it finished with version 1, while it was cut off from a
    controller that is gone by now."""
    async with Controller(wires).killed() as loop:
        a = Explorer(wires, "a", envs=FakeEnvs(**SLOW)).start()
        await train(loop, [1])
        await asyncio.sleep(8)
        wires.parted = True
        await asyncio.sleep(20)
        episodes = [episode for _, episode in a.disk.kept][:4]
        assert len(episodes) == 4
    return a, episodes


# ── links ────────────────────────────────────────────────────────────────────────────────────


@in_virtual_time
async def test_a_run_is_not_over_before_its_explorers_have_heard_of_it():
    wires = FakeWires(latency_s=(0.5, 0.5))
    explorer = Explorer(wires)
    async with Controller(wires).running() as loop:
        explorer.start()
        await train(loop, [1, 2])
    async with asyncio.timeout(60):
        await explorer.task


@in_virtual_time
async def test_an_explorer_returns_to_its_own_seat_where_another_has_its_name():
    wires, kept = FakeWires(), KeepingObserver()
    controller = Controller(wires, observers=[kept])
    async with controller.running() as loop:
        Explorer(wires, "x", envs=FakeEnvs(**SLOW)).start()
        await asyncio.sleep(0.1)
        Explorer(wires, "x", envs=FakeEnvs(**SLOW)).start()
        for version in range(1, 5):
            await asyncio.sleep(1)
            wires.cut()
            await train(loop, [version])
        assert set(controller.fleet.explorers) == {"x", "x-2"}
        assert controller.fleet.counts["losses"] == 0
    assert not [record for record in kept.records if record.reason == "interrupted"]


@pytest.mark.parametrize("of_explorers", [False, True])
@in_virtual_time
async def test_an_explorer_whose_link_has_stalled_is_back_within_its_lease(of_explorers):
    wires, kept = FakeWires(), KeepingObserver()
    controller = Controller(wires, observers=[kept])
    async with controller.running(lease_s=10) as loop:
        Explorer(wires, "a", envs=FakeEnvs(turns=(3, 3), step_s=(6, 6))).start()
        await asyncio.sleep(4)
        wires.stall(of_explorers=of_explorers)
        await train(loop, [1])
        assert controller.fleet.counts["returns"] == 1
        assert controller.fleet.counts["losses"] == 0
    assert not [record for record in kept.records if record.reason == "interrupted"]


@in_virtual_time
async def test_what_explorers_hold_outlives_a_suspension_of_all():
    """As of a laptop, or of a virtual machine, for longer than the lease."""
    wires = FakeWires()
    controller = Controller(wires)
    async with controller.running() as loop:
        Explorer(wires, "a", envs=FakeEnvs(**SLOW)).start()
        await asyncio.sleep(4)
        asyncio.get_running_loop()._now += 100
        await train(loop, [1])
        assert controller.fleet.counts["cut_off"] == controller.fleet.counts["losses"] == 0


@in_virtual_time
async def test_a_next_start_may_evaluate_where_the_last_did_not():
    wires = FakeWires()
    controller = Controller(wires)
    async with controller.running(apart=True) as loop:
        a = Explorer(wires, "a").start()
        await loop.next_batch()
        await a.kill()
        assert controller.fleet.placing.waits_for(heldout=True)
        Explorer(wires, "a", evaluates=True).start()
        await asyncio.sleep(5)
        assert controller.fleet.placing.waits_for()
        assert not controller.fleet.placing.waits_for(heldout=True)


@in_virtual_time
async def test_what_was_handed_over_and_is_not_committed_is_held_through_a_lost_link():
    wires, log = FakeWires(), HeldLog()
    controller = Controller(wires, log=log)
    async with controller.running():
        a = Explorer(wires, "a", envs=FakeEnvs(**SLOW)).start()
        await asyncio.sleep(15)
        assert len(log.waiting) >= 16  # all have ended
        assert len(a.player.holds()) == 16
        wires.cut()
        await asyncio.sleep(5)
        assert len(a.player.holds()) == 16
        assert len(a.disk.kept) == 16
        log.commit()
        await asyncio.sleep(1)
        assert not {hold.episode for hold in a.player.holds()} & set(range(16))
        assert a.disk.kept == {}


@in_virtual_time
async def test_an_episode_that_begins_as_its_explorer_leaves_is_handed_back():
    wires = FakeWires(latency_s=(0.9, 1.1))
    controller = Controller(wires)
    async with controller.running() as loop:
        a = Explorer(wires, "a", drain_s=0).start()
        while not (seat := controller.fleet.explorers.get("a")) or not seat.plays:
            await asyncio.sleep(0.1)
        assert a.player.running == 0  # they are on their way to it
        a.stop.set()
        Explorer(wires, "b").start()
        await train(loop, [1])
        assert a.task.done() and a.task.exception() is None
        assert controller.fleet.counts["drains"] == 1
        assert controller.fleet.counts["losses"] == 0


@in_virtual_time
async def test_what_begins_where_nothing_can_be_played_any_more_is_handed_back():
    class Kept(list):
        send = list.append

    sent = Kept()
    player = Player(Disk())
    welcome = Welcome("run", "run", "c", {}, "here", "model", None, 0, 0, 30.0, [])
    player.attach(sent, welcome)
    player.begin(Begin(7, Task(0), group=0, attempt=1, heldout=False, history=[]))
    assert sent[-1] == Returned([7])


@in_virtual_time
async def test_what_was_finished_before_a_kill_counts_though_the_dead_ones_link_seems_alive():
    wires, kept = FakeWires(), KeepingObserver()
    controller = Controller(wires, observers=[kept])
    async with controller.running(lease_s=60) as loop:
        a = Explorer(wires, "a", envs=FakeEnvs(**SLOW)).start()
        await asyncio.sleep(4)
        wires.parted = True
        wires.vanish("a")
        await asyncio.sleep(12)
        assert len(a.disk.kept) == 16
        again = Disk()
        again.kept = dict(a.disk.kept)
        a.task.cancel()
        wires.parted = False
        Explorer(wires, "a", disk=again).start()
        await asyncio.sleep(2)
        assert loop.ledger.ready == 16
        assert again.kept == {}


@in_virtual_time
async def test_an_explorer_that_fails_hands_back_what_it_plays_at_once():
    wires = FakeWires()
    controller = Controller(wires)
    async with controller.running() as loop:
        a = Explorer(wires, "a", envs=FakeEnvs(**SLOW)).start()
        await asyncio.sleep(4)
        a.connection.fail(InferenceFailure("planned"))
        await asyncio.wait((a.task,))
        assert isinstance(a.task.exception(), InferenceFailure)
        Explorer(wires, "b").start()
        await train(loop, [1])
        assert controller.fleet.counts["handed_back"] == 16
        assert controller.fleet.counts["losses"] == 0


# ── starts of a controller ───────────────────────────────────────────────────────────────────


async def killed_at(wires, seconds, explorer, **options):
    """A controller whose sixteen episodes are under way."""
    async with Controller(wires).killed(**options) as loop:
        explorer.start()
        await asyncio.sleep(seconds)
        assert len(loop.under_way()) == 16


@pytest.mark.parametrize("opens_s", [0.0, 20.0])
@in_virtual_time
async def test_a_controllers_next_start_gets_what_its_explorers_went_on_with(opens_s):
    """However late its loop is ready, and whether they have ended or not."""
    wires, kept = FakeWires(), KeepingObserver()
    a = Explorer(wires, "a", envs=FakeEnvs(**SLOW))
    await killed_at(wires, 4, a)
    again = Controller(wires, observers=[kept], **due(range(4)))
    async with again.running(due=range(4), opens_s=opens_s) as loop:
        await asyncio.sleep(16)
        assert again.fleet.counts["claims"] == 4
        first = [episode for episode in loop.episodes() if episode.group == 0]
        assert [episode.continues for episode in first] == [0, 1, 2, 3]
        assert all(episode.ready for episode in first)
        await asyncio.sleep(40)
        assert not {hold.episode for hold in a.player.holds()} & set(range(16))
        assert a.disk.kept == {}


@in_virtual_time
async def test_what_is_due_and_does_not_begin_is_held_by_nobody_for_ever():
    wires = FakeWires()
    a = Explorer(wires, "a", envs=FakeEnvs(turns=(90, 90), step_s=(3, 3)))
    await killed_at(wires, 4, a)
    again = Controller(wires, **due(range(4)))
    async with again.running(due=range(8), lease_s=10):
        await asyncio.sleep(5)
        assert {4, 5, 6, 7} <= {hold.episode for hold in a.player.holds()}
        await asyncio.sleep(10)
        held = {hold.episode for hold in a.player.holds()}
        assert {0, 1, 2, 3} <= held
        assert again.fleet.where_is(100) == "a"  # which continues 0
        assert not {4, 5, 6, 7} & held


@in_virtual_time
async def test_what_two_explorers_hold_counts_once_and_both_may_leave():
    """A machine was copied, with what an explorer on it had finished."""
    wires = FakeWires()
    a = Explorer(wires, "a", envs=FakeEnvs(**SLOW))
    await killed_at(wires, 4, a)
    await asyncio.sleep(30)
    await a.kill()
    copies = [Explorer(wires, "a", disk=Disk()) for _ in range(2)]
    for copy in copies:
        copy.disk.kept = dict(a.disk.kept)
        copy.player.load()
        copy.start()
    held = sorted(episode for _, episode in a.disk.kept)[:4]
    again = Controller(wires, **due(held))
    async with again.running(due=held, known=10):
        await asyncio.sleep(20)
        assert again.fleet.counts["claims"] == 4
        for copy in copies:
            copy.stop.set()
        await asyncio.sleep(40)
        assert all(copy.task.done() and copy.player.empty for copy in copies)
        assert [copy.disk.kept for copy in copies] == [{}, {}]


@in_virtual_time
async def test_an_explorer_whose_controller_stays_away_leaves_and_keeps_what_it_finished():
    a = Explorer(wires := FakeWires(), "a", envs=FakeEnvs(**SLOW), wait_s=300)
    await killed_at(wires, 4, a)
    await asyncio.sleep(290)
    assert not a.task.done()
    assert len(a.disk.kept) == 16
    with pytest.raises(FlashError, match=r"^a leaves: .* away for 300 s \(.*\), .*--wait_s"):
        await a.task
    assert asyncio.get_running_loop().time() < 330
    assert len(a.disk.kept) == 16


@in_virtual_time
async def test_how_long_a_controller_is_away_begins_anew_each_time():
    a = Explorer(wires := FakeWires(), "a", wait_s=300).start()
    for _ in range(3):
        await asyncio.sleep(280)
        async with Controller(wires).killed():
            await asyncio.sleep(30)
    assert not a.task.done()
    await a.kill()


@in_virtual_time
async def test_an_explorer_leaves_a_run_that_never_begins():
    a = Explorer(FakeWires(), "a", wait_s=300).start()
    await asyncio.sleep(290)
    assert not a.task.done()
    with pytest.raises(FlashError, match="a leaves"):
        await a.task
    assert asyncio.get_running_loop().time() < 330


@in_virtual_time
async def test_explorers_are_back_within_a_short_lease_though_the_controller_was_away_for_long():
    wires = FakeWires()
    a = Explorer(wires, "a", envs=FakeEnvs(**SLOW))
    await killed_at(wires, 4, a, lease_s=6)
    await asyncio.sleep(93)
    again = Controller(wires, **due(range(4)))
    async with again.running(lease_s=6, due=range(4)):
        await asyncio.sleep(6)
        assert again.fleet.counts["claims"] == 4


@in_virtual_time
async def test_what_nobody_brings_is_played_anew_after_the_lease():
    wires = FakeWires()
    a = Explorer(wires, "a", envs=FakeEnvs(**SLOW))
    await killed_at(wires, 4, a)
    await a.kill()
    again = Controller(wires, **due(range(4)))
    async with again.running(due=range(4), lease_s=20) as loop:
        Explorer(wires, "b", envs=FakeEnvs(turns=(1, 1))).start()
        await asyncio.sleep(19)
        first = [episode for episode in loop.episodes() if episode.group == 0]
        assert [episode.turns for episode in first] == [0, 0, 0, 0]
        await asyncio.sleep(10)
        assert all(episode.ready for episode in first)


@in_virtual_time
async def test_what_was_finished_stays_on_disk_until_the_next_start_has_committed_it():
    wires, log = FakeWires(), HeldLog()
    a = Explorer(wires, "a", envs=FakeEnvs(**SLOW))
    await killed_at(wires, 4, a)
    await asyncio.sleep(20)
    assert len(a.disk.kept) == 16
    again = Controller(wires, log=log, **due(range(4)))
    async with again.running(due=range(4)):
        await asyncio.sleep(12)
        assert {episode for _, episode in a.disk.kept} == {0, 1, 2, 3}
        assert len({controller for controller, _ in a.disk.kept}) == 1
        await a.kill()
        assert len(a.disk.kept) == 4  # its next start has them
        log.commit()


@in_virtual_time
async def test_an_explorer_that_comes_as_the_run_stops_waits_for_its_next_start():
    wires = FakeWires()
    for again, done in ((True, False), (False, True)):
        fleet = Fleet(run(), lease_s=30)
        async with fleet:
            await fleet.close("it is late", again=again)
            wires.welcome = fleet.welcome
            a = Explorer(wires, "a").start()
            await asyncio.sleep(5)
            assert a.task.done() is done
            a.task.cancel()
            await asyncio.wait((a.task,))
            wires.end(fleet.welcome)


@in_virtual_time
async def test_what_a_dead_controller_published_is_not_loaded_for_its_next_start():
    wires = FakeWires()
    async with Controller(wires).killed() as loop:
        a = Explorer(wires, "a").start()
        await train(loop, range(1, 4))
        await asyncio.sleep(5)
        assert a.hub.version == 3
    async with Controller(wires).running(version=2):
        await asyncio.sleep(30)
        assert a.hub.version == 2


@in_virtual_time
async def test_what_another_run_gave_is_not_told_to_this_one():
    wires = FakeWires()
    a = Explorer(wires, "a", envs=FakeEnvs(turns=(9, 9), step_s=(3, 3)))
    await killed_at(wires, 4, a)
    heard = []
    fleet = Fleet(run(id="another"), lease_s=30)
    hear = fleet._hear

    def listen(explorer, message):
        heard.append(message)
        hear(explorer, message)

    fleet._hear = listen
    async with fleet:
        wires.welcome = fleet.welcome
        await asyncio.sleep(40)
        assert not [message for message in heard if isinstance(message, News)]
        assert a.player.running == 0
        await fleet.close("it is over", again=False)


# ── weights ──────────────────────────────────────────────────────────────────────────────────


@in_virtual_time
async def test_weights_that_were_replaced_before_they_were_there_are_no_failure():
    """The trainer keeps those of some versions only."""
    wires = FakeWires()

    async def have(files: Files) -> Path:
        await asyncio.sleep(20)
        if files.path == "/fake/1":
            raise GoneError("it is gone")
        return Path(files.path)

    async with Controller(wires).running() as loop:
        a = Explorer(wires, "a", have=have).start()
        await loop.next_batch()
        await loop.publish(weights(1))
        await asyncio.sleep(5)
        await loop.publish(weights(2))
        await asyncio.sleep(60)
        assert not a.task.done()
        assert a.hub.version == 2


@in_virtual_time
async def test_weights_that_were_removed_while_they_were_loaded_are_no_failure():
    """Nobody waits for an explorer that shares the trainer's disk and is slow."""
    wires, removed = FakeWires(), set()

    async def have(files: Files) -> Path:
        if files.path in removed:
            raise GoneError("it is gone")
        return Path(files.path)

    class Loads(FakeWorker):
        async def load_weights(self, weights: Weights) -> None:
            await asyncio.sleep(20)
            if str(weights.path) in removed:
                raise BadRequest(f"no safetensors in {weights.path}")

    async with Controller(wires).running() as loop:
        a = Explorer(wires, "a", have=have)
        a.pool = [Loads(name, tokens=(1, 8)) for name in "vw"]
        a.start()
        await loop.next_batch()
        await loop.publish(weights(1))
        await asyncio.sleep(5)
        removed.add("/fake/1")
        await asyncio.sleep(30)
        await loop.publish(weights(2))
        await asyncio.sleep(80)
        assert a.hub.version == 2
        await train(loop, [3])


# ── what goes wrong at the controller ────────────────────────────────────────────────────────


@in_virtual_time
async def test_an_evaluation_that_waits_for_new_weights_holds_up_no_training():
    wires = FakeWires()
    controller = Controller(wires)
    async with controller.running() as loop:
        Explorer(wires, "slow", worker={"load_s": (50, 50)}).start()
        await loop.next_batch()
        await loop.publish(weights(1))
        crew = FleetCrew(controller.fleet, loop.hub, heldout=True, version=lambda: loop.hub.version)
        exam = asyncio.create_task(
            play(loop.hub, None, [Task(-1), Task(-2)], concurrency=2, crew=crew)
        )
        await asyncio.sleep(1)
        assert controller.fleet.waiting >= 2
        await loop.next_batch()
        assert not exam.done()
        assert asyncio.get_running_loop().time() < 50
        assert (await exam).versions == (1,)


@in_virtual_time
async def test_training_that_waits_for_new_weights_holds_up_no_evaluation():
    wires = FakeWires()
    controller = Controller(wires, alpha=0)
    async with controller.running() as loop:
        Explorer(wires, "slow", worker={"load_s": (50, 50)}).start()
        await loop.next_batch()
        await loop.publish(weights(1))
        await asyncio.sleep(1)
        assert controller.fleet.waiting
        crew = FleetCrew(controller.fleet, loop.hub, heldout=True, version=lambda: 0)
        await play(loop.hub, None, [Task(-1)], concurrency=1, crew=crew)
        assert asyncio.get_running_loop().time() < 50


@in_virtual_time
async def test_after_an_evaluation_the_run_hears_still_of_what_ends_it():
    wires = FakeWires()
    controller = Controller(wires)
    async with controller.running() as loop:
        a = Explorer(wires, "a").start()
        crew = FleetCrew(controller.fleet, loop.hub, heldout=True)
        await play(loop.hub, None, [Task(-1)], concurrency=1, crew=crew)
        a.connection._link.send(Trouble("publish", "planned"))
        await asyncio.sleep(1)
        with pytest.raises(PublishFailure, match="explorer a: planned"):
            await loop.next_batch()


@in_virtual_time
async def test_an_evaluation_that_is_cancelled_while_it_ends_leaves_nothing_behind():
    wires = FakeWires()
    controller = Controller(wires)

    def agent():
        return EnvironmentAgent(envs=FakeEnvs(**SLOW), style=FakeStyle(), max_tokens=8)

    async with InferenceHub([FakeWorker("here")]) as local, controller.running() as loop:
        Explorer(wires, "a", envs=FakeEnvs(**SLOW)).start()
        here = AgentCrew(agent, local)
        crew = FleetCrew(
            controller.fleet, loop.hub, local=here, room=lambda: 2 - len(here.episodes()),
            heldout=True,
        )  # fmt: skip
        tasks = [Task(-seed) for seed in range(8)]
        exam = asyncio.create_task(play(loop.hub, None, tasks, concurrency=8, crew=crew))
        await asyncio.sleep(2)
        assert 0 < len(here.episodes()) < len(crew.episodes())
        wires.parted = True  # nobody says that it has given them up
        for _ in range(2):
            exam.cancel()
            await asyncio.sleep(1)
        await asyncio.wait([exam], timeout=30)
        assert exam.cancelled()
        assert not crew.episodes()
        assert not here.episodes()
        wires.parted = False
        await train(loop, [1])


@in_virtual_time
async def test_an_agent_that_cannot_be_made_ends_the_run_and_no_link():
    wires, fails = FakeWires(), asyncio.Event()

    def agent():
        if fails.is_set():
            raise RuntimeError("planned")
        return EnvironmentAgent(envs=FakeEnvs(**SLOW), style=FakeStyle(), max_tokens=8)

    controller = Controller(wires, batch_size=64)
    workers = [FakeWorker("here", token_s=(1, 1), tokens=(8, 8))]
    async with (
        InferenceHub(workers, max_running=4) as local,
        controller.running(local=local, agent=agent) as loop,
    ):
        Explorer(wires, "a", envs=FakeEnvs(**SLOW)).start()
        await asyncio.sleep(4)
        fails.set()
        with pytest.raises(RuntimeError, match="planned"):
            await loop.next_batch()
        assert controller.fleet.explorers["a"].link is not None


@in_virtual_time
async def test_a_question_that_the_trainer_fails_at_is_answered():
    wires = FakeWires()

    async def score(question):
        raise TrainerFailure("planned")

    fleet = Fleet(run(), lease_s=30, score=score)
    async with fleet, asyncio.TaskGroup() as tasks:
        wires.welcome = fleet.welcome
        async with wires.connect() as wire, Link(wire, Welcome | Scored, deadline_s=30) as link:
            link.send(Hello(PROTOCOL, "1", "x", "p", [], "here"))
            link.send(Score(7, 0, [[1, 2]]))
            messages = link.messages()
            assert isinstance(await anext(messages), Welcome)
            assert await anext(messages) == Scored(7, None)
        tasks.create_task(fleet.close("over", again=False))


@in_virtual_time
async def test_a_run_ends_though_an_explorer_reads_nothing():
    class Deaf:
        """Takes a first frame, and no other."""

        def __init__(self, wire):
            self.wire, self.sent = wire, 0
            self.receive, self.close = wire.receive, wire.close

        async def send(self, frame):
            self.sent += 1
            if self.sent > 1:
                await asyncio.Event().wait()
            await self.wire.send(frame)

    wires = FakeWires()
    fleet = Fleet(run(), lease_s=30)
    async with fleet:
        wires.welcome = lambda wire: fleet.welcome(Deaf(wire))
        Explorer(wires, "a").start()
        await asyncio.sleep(1)
        assert fleet.explorers["a"].link is not None
        await fleet.close("over", again=False)
        assert asyncio.get_running_loop().time() < 10


@in_virtual_time
async def test_an_explorer_that_cannot_have_the_weights_ends_alone():
    async def full(files):
        raise FetchFailure("files can't be stored: no space left")

    wires = FakeWires()
    async with Controller(wires).running() as loop:
        a = Explorer(wires, "a", have=full).start()
        Explorer(wires, "b").start()
        await loop.next_batch()
        await loop.publish(weights(1))
        with pytest.raises(FetchFailure, match="no space left"):
            await a.task
        await train(loop, [2, 3])


@in_virtual_time
async def test_what_was_sampled_by_weights_that_will_never_be_again_does_not_count():
    """The last start's version 1, and this one's, are different weights: it trains otherwise."""
    wires, kept = FakeWires(), KeepingObserver()
    a, episodes = await finished_alone(wires)
    await a.kill()
    wires.parted = False
    for known, claims in ((0, 0), (1, 4)):
        disk = Disk()
        disk.kept = dict(a.disk.kept)
        b = Explorer(wires, "a", disk=disk).start()
        again = Controller(wires, observers=[kept], **due(episodes))
        async with again.killed(due=episodes, known=known):
            await asyncio.sleep(5)
            assert again.fleet.counts["claims"] == claims
            assert disk.kept == {}
        await b.kill()


@in_virtual_time
async def test_what_was_refused_is_not_taken_for_what_is_played_in_its_place():
    """The explorer has not heard of either when its link is lost."""
    wires = FakeWires()
    a, episodes = await finished_alone(wires)
    again = Controller(wires, batch_size=4, **due(episodes))
    async with again.killed(due=episodes) as loop:
        wires.parted = False
        while not ("a" in again.fleet.explorers and again.fleet.explorers["a"].plays):
            await asyncio.sleep(1e-4)
        wires.cut("a")
        assert a.disk.kept, "it has not heard that they were refused"
        batch = await loop.next_batch()
        assert {version for sample in batch.samples for version in sample.versions} == {-1, 0}


@pytest.mark.parametrize("known", [1, 2])
@in_virtual_time
async def test_an_explorer_begins_anew_where_its_weights_are_not_known(known):
    wires = FakeWires()
    async with Controller(wires).killed() as loop:
        a = Explorer(wires, "a").start()
        await train(loop, [1, 2])
        await asyncio.sleep(5)
        first = a.hub
        assert first.version == 2
    async with Controller(wires).running(known=known, version=1):
        await asyncio.sleep(20)
        assert (a.hub is first) == (known == 2)
        assert a.hub.version == known


@in_virtual_time
async def test_an_explorer_that_missed_the_last_weights_of_a_start_gets_them_from_the_next():
    wires = FakeWires()
    async with Controller(wires, alpha=0).killed() as loop:
        a = Explorer(wires, "a").start()
        await loop.next_batch()
        wires.parted = True
        await loop.publish(weights(1))
        await asyncio.sleep(1)
        assert a.hub.version == 0
    wires.parted = False
    model = Files(path="/model/1", stamp="", key="")
    async with (
        Controller(wires, alpha=0).running(known=1, version=1, model_files=model) as loop,
        asyncio.timeout(100),
    ):
        first = a.hub
        await train(loop, [2])
        assert a.hub is first, "its workers are the same"


@pytest.mark.parametrize(("known", "goes_on"), [({1: 2, 2: 2}, True), ({1: 1, 2: 2}, False)])
@in_virtual_time
async def test_an_explorer_that_missed_a_start_goes_on_with_what_no_start_did_anew(known, goes_on):
    wires, kept = FakeWires(), KeepingObserver()
    controller = Controller(wires)
    async with controller.killed(start=1) as loop:
        a = Explorer(wires, "a", envs=FakeEnvs(**SLOW)).start()
        await train(loop, [1, 2])
        await asyncio.sleep(3)
        first, episodes = a.hub, sorted(controller.fleet.explorers["a"].plays)[-4:]
        assert first.version == 2
    await asyncio.sleep(60)  # the second start comes and goes
    again = Controller(wires, observers=[kept], **due(episodes))
    async with again.running(start=3, due=episodes, known=known.__getitem__, version=2):
        await asyncio.sleep(20)
        assert (a.hub is first) == goes_on
        assert again.fleet.counts["claims"] == (4 if goes_on else 0)


@in_virtual_time
@pytest.mark.parametrize("given_out_by, claims", [(1, 4), (2, 0)])
async def test_a_number_that_was_given_out_again_is_not_claimed_by_who_holds_the_former(
    given_out_by, claims
):
    """Start 1 died before its log knew of these episodes, so start 2 may have used the numbers."""
    wires = FakeWires()
    controller = Controller(wires)
    async with controller.killed(start=1) as loop:
        Explorer(wires, "a", envs=FakeEnvs(**SLOW)).start()
        await train(loop, [1, 2])
        await asyncio.sleep(3)
        episodes = sorted(controller.fleet.explorers["a"].plays)[-4:]
    again = Controller(wires, **due(episodes))
    async with again.running(
        start=3, due=dict.fromkeys(episodes, given_out_by), known=2, version=2
    ):
        await asyncio.sleep(20)
        assert again.fleet.counts["claims"] == claims


@in_virtual_time
async def test_an_explorer_begins_anew_for_another_run_though_the_versions_are_the_same():
    """A run that was started anew under its name may have another model."""
    wires = FakeWires()
    async with Controller(wires).killed() as loop:
        a = Explorer(wires, "a").start()
        await loop.next_batch()
        first = a.hub
    async with Controller(wires).running(id="another"):
        await asyncio.sleep(30)
        assert a.hub is not first
