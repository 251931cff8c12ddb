"""Task sets that explorers bring: who plays their episodes, and that all play the same."""

import asyncio
import logging

import pytest

from flash.agents.environment_agent import EnvironmentAgent
from flash.config.task_sets import PlayedWith
from flash.config.task_source import source_of_brought
from flash.evaluation.config import EvalConfig
from flash.evaluation.evaluations import Evaluations
from flash.explorer.brought import BROUGHT_FILE, Brought
from flash.explorer.crew import FleetCrew
from flash.fakes import FakeEnvs, FakeStyle, FakeWires, FakeWorker, KeepingObserver
from flash.hub.hub import InferenceHub
from flash.rollout.tasks import TaskSet
from flash.types import Task
from flash.virtual_time import in_virtual_time
from tests.explorer.fleets import Controller, Explorer
from tests.steady import weights


def source(size=4, hosts=0, **more):
    env = {"name": "frozen_lake", "options": {"size": size}, "hosts": hosts}
    return source_of_brought(PlayedWith.model_validate({"env": env, **more}))


BRINGS = {"web": source()}
OWN, WEB = {"own": 8}, {"web": 8}  # who makes agents of which sets


class Records(KeepingObserver):
    """Which explorer played each episode, too."""

    def __init__(self):
        super().__init__()
        self.fleet = None
        self.at = {}

    def observed(self, episode, observation):
        self.at.setdefault((episode.task.task_set, self.fleet.where_is(episode.id)), 0)

    def evaluated(self, evaluation):
        self.evaluation = evaluation


def controller_of(wires, **options):
    sets = [
        TaskSet(name=name, tasks=map(Task, range(1000)), groups_per_batch=1, group_size=4)
        for name in ("own", "web")
    ]
    return Controller(wires, task_sets=sets, **options)


def brought(folder=None):
    return Brought(["web"], others=["own"], folder=folder)


async def train(loop, versions):
    for version in versions:
        batch = await loop.next_batch()
        sets = [sample.group for sample in batch.samples]
        assert len(sets) == 8
        await loop.publish(weights(version))


@in_virtual_time
async def test_a_set_is_played_by_who_brings_it_and_the_rest_by_all_who_play_others():
    wires, kept = FakeWires(), Records()
    controller = controller_of(wires, observers=[kept])
    async with controller.running(brought=brought()) as loop:
        kept.fleet = controller.fleet
        Explorer(wires, "plain", task_sets=OWN).start()
        Explorer(wires, "both", task_sets=OWN | WEB, brings=BRINGS).start()
        Explorer(wires, "alone", task_sets=WEB, brings=BRINGS, tasks_only=True).start()
        await train(loop, range(1, 8))
    assert set(kept.at) == {
        ("own", "plain"), ("own", "both"), ("web", "both"), ("web", "alone")
    }  # fmt: skip
    assert loop.ledger.count("trained") == 56
    loop.ledger.check()


@in_virtual_time
async def test_workers_of_the_run_itself_play_no_set_that_is_brought():
    wires, kept = FakeWires(), Records()
    controller = controller_of(wires, observers=[kept])

    def agent():
        return EnvironmentAgent(envs=FakeEnvs(), style=FakeStyle(), max_tokens=8)

    async with (
        InferenceHub([FakeWorker("here", tokens=(1, 8))], max_running=64) as local,
        controller.running(local=local, agent={"own": agent}, brought=brought()) as loop,
    ):
        kept.fleet = controller.fleet
        Explorer(wires, "alone", task_sets=WEB, brings=BRINGS, tasks_only=True).start()
        await train(loop, range(1, 4))
    assert set(kept.at) == {("own", ""), ("web", "alone")}


@in_virtual_time
async def test_a_run_waits_for_who_brings_a_set_says_so_and_is_not_stalled():
    wires = FakeWires()
    controller = controller_of(wires)
    async with controller.running(brought=brought()) as loop:
        Explorer(wires, "plain", task_sets=OWN).start()
        waiting = asyncio.create_task(loop.next_batch())
        await asyncio.sleep(5000)  # the watchdog has looked often
        assert not waiting.done()
        assert loop.crew_waits_for == (
            "an explorer that brings task set web: flash explore --tasks FILE starts one"
        )
        assert loop.ledger.ready_of["own"] == 8, "what is not web goes on"
        both = Explorer(wires, "both", task_sets=OWN | WEB, brings=BRINGS).start()
        await waiting
        assert loop.crew_waits_for == ""
        await loop.publish(weights(1))
        await both.kill()
        waiting = asyncio.create_task(train(loop, [2, 3, 4]))
        await asyncio.sleep(1000)
        assert not waiting.done()
        assert "brings task set web" in loop.crew_waits_for
        Explorer(wires, "again", task_sets=WEB, brings=BRINGS, tasks_only=True).start()
        await waiting
    loop.ledger.check()


@in_virtual_time
async def test_what_only_one_can_play_comes_before_what_all_can():
    wires = FakeWires()
    one_by_one = {"envs": FakeEnvs(turns=(1, 1)), "workers": 1, "max_running": 1}
    async with controller_of(wires).running(brought=brought()) as loop:
        Explorer(
            wires, "both", task_sets=OWN | WEB, brings=BRINGS, worker={"token_s": (10, 10)},
            **one_by_one,
        ).start()  # fmt: skip
        while loop.ledger.ready < 4:
            await asyncio.sleep(10)
        assert loop.ledger.ready_of["web"] == loop.ledger.ready


@in_virtual_time
async def test_an_evaluation_is_played_by_evaluators_that_bring_the_set():
    wires, kept = FakeWires(), Records()
    controller = controller_of(wires, observers=[kept])
    async with controller.running(brought=brought(), apart=True) as loop:
        kept.fleet = fleet = controller.fleet
        for name, evaluates in (("a", False), ("exam", True)):
            Explorer(
                wires, name, task_sets=OWN | WEB, brings={} if evaluates else BRINGS,
                evaluates=evaluates,
            ).start()  # fmt: skip
        await train(loop, [1])

        def crew():
            return FleetCrew(fleet, loop.hub, heldout=True, version=lambda: 1)

        evaluations = Evaluations(
            EvalConfig(tasks=3), loop, hub=loop.hub, agent=None, crew=crew, apart=True, every=1,
            last=100, observer=kept, stop=asyncio.Event(), task_sets=["own", "web"],
        )  # fmt: skip
        async with evaluations:
            await evaluations.after(1)
            await train(loop, range(2, 5))
            await asyncio.sleep(100)
            assert evaluations.waits_for == (
                "an explorer that brings task set web: flash explore --evaluates --tasks FILE "
                "starts one"
            )
            Explorer(wires, "b", task_sets=WEB, brings=BRINGS, evaluates=True).start()
            await evaluations.finish()
            assert evaluations.waits_for == ""
        assert kept.evaluation.episodes == 6
        assert set(kept.evaluation.task_sets) == {"own", "web"}


@in_virtual_time
async def test_who_brings_a_set_as_something_else_is_refused_in_a_line(tmp_path):
    wires = FakeWires()
    controller = controller_of(wires)
    async with controller.running(brought=brought(tmp_path)) as loop:
        with pytest.raises(
            ValueError, match="task set other can't be brought: explorers bring web"
        ):
            await Explorer(wires, "x", brings={"other": source()}).start().task
        with pytest.raises(ValueError, match=r"own is the run's own: set task_sets\.own\.brought"):
            await Explorer(wires, "x", brings={"own": source()}).start().task
        mistaken = Explorer(wires, "a", brings={"web": source(9)}, evaluates=True).start()
        await asyncio.sleep(5)
        with pytest.raises(
            ValueError, match=r"not what explorer a brings: env\.options\.size 9 → 4: bring the"
        ):
            await Explorer(wires, "b", brings=BRINGS, task_sets=WEB).start().task
        await mistaken.kill()
        await asyncio.sleep(5)
        Explorer(wires, "b", brings=BRINGS, task_sets=OWN | WEB).start()
        same = source(hosts=3, agent={"step_timeout_s": 5})
        Explorer(wires, "c", brings={"web": same}, task_sets=OWN | WEB).start()
        await train(loop, [1])
        assert controller.fleet.explorers["c"].played
    wires = FakeWires()  # the run's next start
    async with controller_of(wires).running(brought=brought(tmp_path)):
        with pytest.raises(ValueError, match="not what the run has begun with"):
            await Explorer(wires, "b", brings={"web": source(9)}).start().task


def test_all_that_is_learned_from_is_told_of_a_set_and_no_key(monkeypatch):
    monkeypatch.setenv("KEY_OF_JUDGE", "secret")
    judge = {
        "name": "judge", "url": "https://judge/v1", "model": "m", "api_key": "$KEY_OF_JUDGE",
        "timeout_s": 3,
    }  # fmt: skip
    told = source(agent={"temperature": 0.5, "env": "A=secret"}, reward=judge)
    for kept in ("secret", "KEY_OF_JUDGE", "https", "timeout_s"):
        assert kept not in told
    for known in ('"agent.temperature":0.5', '"env.options.size":4', '"reward.model":"m"'):
        assert known in told


def test_what_was_begun_is_known_to_the_next_start_and_a_full_disk_ends_nothing(tmp_path, caplog):
    brought(tmp_path).begin("web", source())
    assert (tmp_path / BROUGHT_FILE).is_file()
    assert "begun with" in brought(tmp_path).refusal({"web": source(9)}, [])
    assert brought(tmp_path).refusal({"web": source()}, []) == ""
    assert "it can't be read" in brought(tmp_path).refusal({"web": "{}"}, [])
    with caplog.at_level(logging.WARNING):
        brought(tmp_path / "none").begin("web", source())
    assert "may be brought as another" in caplog.text
    (tmp_path / BROUGHT_FILE).write_text("nothing")
    with pytest.raises(ValueError, match="remove that file"):
        brought(tmp_path)
