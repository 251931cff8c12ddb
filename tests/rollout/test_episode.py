"""Where an episode's time goes."""

import asyncio
from dataclasses import replace

import pytest

from flash.fakes import FakeWorker
from flash.hub.hub import InferenceHub
from flash.rollout.episode import Episode
from flash.types import Completion, SamplingParams, Task, Trajectory
from flash.virtual_time import run


class SlowHub:
    """Answers after as many seconds as the prompt has tokens."""

    async def generate(self, request, on_start=None, on_sampled=None):
        await asyncio.sleep(len(request.token_ids))
        return Completion(
            token_ids=[1], logprobs=[-1.0], versions=[0], temperature=1.0, finish_reason="stop"
        )


def episode() -> Episode:
    return Episode(1, Task(1), hub=SlowHub())


def test_calls_at_the_same_time_are_not_added_up():
    async def main():
        one = episode()
        async with asyncio.TaskGroup() as calls:
            for seconds in (2, 5, 3):
                calls.create_task(one.generate([0] * seconds, SamplingParams(max_tokens=1)))
        return one.seconds, one.stage_name, one.turns

    assert run(main()) == ({"generate": 5.0}, "start", 3)


def test_an_inner_stages_time_is_not_the_outer_ones():
    async def main():
        one = episode()
        with one.stage("agent"):
            await asyncio.sleep(1)
            await one.generate([0] * 4, SamplingParams(max_tokens=1))
            await asyncio.sleep(2)
            assert (one.stage_name, one.stage_since) == ("agent", 5.0 + one.admitted_at)
        return one.seconds

    assert run(main()) == {"agent": 3.0, "generate": 4.0}


@pytest.mark.parametrize("wanted", [True, False])
def test_what_is_sampled_is_told_to_a_witness_that_wants_to_know_of_it(wanted):
    heard = []

    class Witness:
        def hears(self, event):
            return wanted and event == "sampled"

        def sampled(self, episode, step):
            heard.append((episode.id, step.completion.token_ids))

    async def main():
        one = Episode(1, Task(1), hub=SlowHub(), witness=Witness())
        await one.generate([5], SamplingParams(max_tokens=1))

    run(main())
    assert heard == ([(1, [1])] if wanted else [])


def test_the_versions_of_an_episode_span_those_of_all_its_answers():
    answers = [[4, 4], [3, 5], [4, 4]]

    class Hub:
        async def generate(self, request, on_start=None, on_sampled=None):
            return Completion(
                token_ids=[1, 2], logprobs=[-1.0, -1.0], versions=answers.pop(0),
                temperature=1.0, finish_reason="stop",
            )  # fmt: skip

    async def main():
        one, spans = Episode(1, Task(1), hub=Hub()), []
        while answers:
            await one.generate([5], SamplingParams(max_tokens=2))
            spans.append((one.oldest_version, one.newest_version))
        return spans

    assert run(main()) == [(4, 4), (3, 5), (3, 5)]


def test_a_call_that_outlives_its_episode_changes_nothing():
    async def main():
        one = episode()
        call = asyncio.ensure_future(one.generate([0] * 9, SamplingParams(max_tokens=1)))
        await asyncio.sleep(1)
        one.finish(Trajectory(sequences=[], reward=0.0, turns=1))
        before = one.stage_name, one.stage_since, dict(one.seconds)
        await call
        assert (one.stage_name, one.stage_since, one.seconds) == before
        return one.stage_name

    assert run(main()) == "ready"


def test_an_episode_knows_the_oldest_and_the_newest_worker_that_it_had():
    """In a publish workers are updated one after another, so a later turn may meet an older one."""

    versions = iter([5, 4, 6, 5])

    class Versions(SlowHub):
        async def generate(self, request, on_start=None, on_sampled=None):
            version = next(versions)
            on_start(version)
            return replace(await super().generate(request), versions=[version])

    async def main():
        one = Episode(1, Task(1), hub=Versions())
        for _ in range(4):
            await one.generate([0], SamplingParams(max_tokens=1))
        return one.oldest_version, one.newest_version

    assert run(main()) == (4, 6)


def test_the_tokens_of_a_response_that_is_cut_off_are_known_as_far_as_they_were_told():
    async def main(tell_s):
        worker = FakeWorker("w", token_s=(1.0, 1.0), tell_s=tell_s)
        async with InferenceHub([worker]) as hub:
            one, sampling = Episode(1, Task(1), hub=hub), SamplingParams(max_tokens=20)
            await one.generate([1], sampling)
            assert one.generated_tokens == hub.stats().generated_tokens == 20
            call = asyncio.create_task(one.generate([1], sampling))
            await asyncio.sleep(9.5)
            under_way = one.generated_tokens
            call.cancel()
            await asyncio.wait([call])
            assert one.generated_tokens == hub.stats().generated_tokens == under_way
            assert one.turns == 1
            return under_way

    assert run(main(tell_s=2.1)) == 20 + 8
    assert run(main(tell_s=None)) == 20


def test_tokens_that_a_failed_worker_took_with_it_are_not_the_episodes():
    async def main():
        workers = [FakeWorker(name, token_s=(1.0, 1.0), tell_s=2.1) for name in "ab"]
        async with InferenceHub(workers) as hub:
            one = Episode(1, Task(1), hub=hub)
            call = asyncio.create_task(one.generate([1], SamplingParams(max_tokens=20)))
            await asyncio.sleep(9.5)
            hub.give_up(next(w.name for w in workers if w.running), "it is said to hang")
            await call
            return one.generated_tokens, hub.stats().generated_tokens

    assert run(main()) == (20, 20)
