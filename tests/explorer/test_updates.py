"""Whether explorers' workers compute what the trainer does, which has time for that or takes it."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from flash.errors import PublishFailure
from flash.evaluation.play import play
from flash.explorer.crew import FleetCrew
from flash.fakes import FakeEnvs, FakeWires
from flash.hub.probe import Probe
from flash.types import Scores, Task
from flash.virtual_time import in_virtual_time
from tests.explorer.fleets import Controller, Explorer
from tests.steady import weights

STEP_S = 10.0
COMPARED_EVERY = 25


class Scoring:
    """A trainer's answers, which let all logprobs pass, or none."""

    def __init__(self) -> None:
        self.asked = 0  # times
        self.passes = True

    async def score(self, sequences):
        self.asked += 1
        logprobs = [[-1.0] * (len(each) - 1) for each in sequences]
        return Scores(logprobs=logprobs, largest_logit=1e4 if self.passes else 0.0)

    def weights(self, version):
        return replace(weights(version), score=self.score)


def explorer(wires, name, load_s=0.0, **options):
    worker = {"load_s": (load_s, load_s)}
    probe = Probe(of_largest=1.0)
    return Explorer(wires, name, workers=1, worker=worker, probe=probe, **options).start()


async def busy_steps(loop, versions, trained):
    """How long each publish took, of what `trained` makes of a version; the trainer waits for
    nothing else."""
    clock, took = asyncio.get_running_loop().time, []
    for version in versions:
        await loop.next_batch()
        await asyncio.sleep(STEP_S)
        began = clock()
        await loop.publish(trained(version))
        took.append(clock() - began)
    return took


@in_virtual_time
async def test_an_explorers_workers_are_probed_while_the_trainer_has_time():
    wires, trainer = FakeWires(), Scoring()
    controller = Controller(wires)
    async with controller.running() as loop:
        a = explorer(wires, "a")
        await loop.next_batch()
        controller.busy = True
        await loop.publish(trainer.weights(1))
        await asyncio.sleep(5)
        assert trainer.asked == 0  # it was busy
        assert a.hub.version == 1
        controller.busy, trainer.passes = False, False
        await loop.next_batch()
        await loop.publish(trainer.weights(2))
        await asyncio.sleep(5)
        with pytest.raises(PublishFailure, match="explorer a: .*logprob"):
            await loop.next_batch()
        assert trainer.asked == 1
        with pytest.raises(PublishFailure):
            await a.task


@in_virtual_time
async def test_a_trainer_that_never_has_time_takes_some_for_all_explorers_once_in_25_steps():
    wires, trainer = FakeWires(), Scoring()
    controller = Controller(wires)
    async with controller.running() as loop:
        explorer(wires, "a")
        explorer(wires, "b", load_s=2.0)
        controller.busy = True
        for began in (1, 1 + COMPARED_EVERY):
            trainer.asked, last = 0, began + COMPARED_EVERY - 1
            took = await busy_steps(loop, range(began, last), trainer.weights)
            assert (trainer.asked, max(took)) == (0, 0.0)
            (took_s,) = await busy_steps(loop, [last], trainer.weights)
            assert trainer.asked == 2
            assert 2.0 < took_s < STEP_S


@in_virtual_time
async def test_a_worker_that_samples_otherwise_ends_a_run_whose_trainer_never_has_time():
    wires, trainer = FakeWires(), Scoring()
    controller = Controller(wires)
    async with controller.running() as loop:
        a = explorer(wires, "a")
        controller.busy, trainer.passes = True, False
        with pytest.raises(PublishFailure, match="explorer a: .*logprob"):
            await busy_steps(loop, range(1, COMPARED_EVERY + 2), trainer.weights)
        assert loop.hub.version == COMPARED_EVERY
        with pytest.raises(PublishFailure):
            await a.task


@in_virtual_time
async def test_a_trainer_waits_for_no_explorer_longer_than_its_steps_take():
    wires, trainer = FakeWires(), Scoring()
    controller = Controller(wires)
    async with controller.running() as loop:
        explorer(wires, "quick")
        explorer(wires, "slow", load_s=2 * STEP_S)
        controller.busy = True
        took = await busy_steps(loop, range(1, 2 * COMPARED_EVERY + 5), trainer.weights)
    assert trainer.asked == 2
    for waited_s in (took.pop(2 * COMPARED_EVERY - 1), took.pop(COMPARED_EVERY - 1)):
        assert STEP_S / 2 < waited_s < 1.1 * STEP_S
    assert max(took) == 0.0


@in_virtual_time
async def test_a_trainer_waits_for_no_explorer_that_is_away_is_lost_or_has_no_weights_yet():
    wires, trainer = FakeWires(), Scoring()
    controller = Controller(wires)
    async with controller.running() as loop:
        explorer(wires, "quick")
        explorer(wires, "lost", load_s=2 * STEP_S)
        away = explorer(wires, "away", load_s=2 * STEP_S)
        controller.busy = True
        await busy_steps(loop, range(1, COMPARED_EVERY), trainer.weights)
        await away.kill()
        starts = Explorer(wires, "starts").connection
        async with starts.kept():
            await starts.welcomed()
            asyncio.get_running_loop().call_later(STEP_S + 3.0, wires.cut, "lost")
            (took_s,) = await busy_steps(loop, [COMPARED_EVERY], trainer.weights)
            assert "away" in controller.fleet.explorers
    assert took_s == pytest.approx(3.0)


@in_virtual_time
async def test_a_trainer_waits_for_no_explorer_that_evaluates_other_weights():
    wires, trainer = FakeWires(), Scoring()
    controller = Controller(wires)
    async with controller.running(apart=True) as loop:
        explorer(wires, "quick")
        slow = FakeEnvs(turns=(20, 20), step_s=(20, 20))
        explorer(wires, "exam", evaluates=True, envs=slow)
        controller.busy = True
        await busy_steps(loop, [1], trainer.weights)
        crew = FleetCrew(controller.fleet, loop.hub, heldout=True)
        exam = asyncio.create_task(play(loop.hub, None, [Task(-1)], concurrency=1, crew=crew))
        took = await busy_steps(loop, range(2, COMPARED_EVERY + 1), trainer.weights)
        exam.cancel()
    assert trainer.asked == 1
    assert max(took) < 1.0


@in_virtual_time
async def test_a_trainer_waits_for_nobody_with_weights_that_are_compared_with_nothing():
    wires = FakeWires()
    controller = Controller(wires)
    async with controller.running() as loop:
        explorer(wires, "a", load_s=1.0)
        controller.busy = True
        took = await busy_steps(loop, range(1, COMPARED_EVERY + 1), weights)
    assert max(took) == 0.0


@in_virtual_time
async def test_a_trainer_waits_for_no_explorer_that_asked_while_it_had_time():
    wires, trainer = FakeWires(), Scoring()
    controller = Controller(wires)
    async with controller.running() as loop:
        explorer(wires, "a", load_s=1.0)
        took = await busy_steps(loop, range(1, COMPARED_EVERY + 1), trainer.weights)
    assert trainer.asked > 1
    assert max(took) == 0.0


@in_virtual_time
async def test_an_explorer_says_that_its_workers_were_not_probed_for_long(caplog):
    wires, trainer = FakeWires(), Scoring()
    controller = Controller(wires)
    async with controller.running() as loop:
        explorer(wires, "quick")
        explorer(wires, "slow", load_s=1.5 * STEP_S)
        controller.busy = True
        await busy_steps(loop, range(1, 121), trainer.weights)
    assert caplog.text.count("could not be compared with the trainer for 50 versions") == 1


@in_virtual_time
async def test_an_explorers_probe_is_told_how_large_the_logits_are():
    """By which its limit grows in half precision."""

    async def score(sequences):
        logprobs = [[np.float64(-1.0)] * (len(each) - 1) for each in sequences]
        return Scores(logprobs=logprobs, largest_logit=1e4)

    wires = FakeWires()
    controller = Controller(wires)
    async with controller.running() as loop:
        a = Explorer(wires, "a", workers=1, probe=Probe(of_largest=1.0)).start()
        await loop.next_batch()
        await loop.publish(replace(weights(1), score=score))
        await asyncio.sleep(5)
        assert a.hub.version == 1
        assert a.hub.stats().publishes == 1, "the probe is over, and was no failure"
