"""New weights on their way to the workers: publish, probe, lend."""

import asyncio
import itertools
import math
from pathlib import Path

import pytest

from flash.errors import PublishFailure
from flash.fakes import FakeWorker
from flash.hub.hub import InferenceHub
from flash.hub.policy import Policy
from flash.hub.probe import Probe
from flash.hub.publisher import Publisher
from flash.hub.queue import RequestQueue
from flash.hub.slot import Slot
from flash.hub.worker import BadRequest
from flash.types import Completion
from flash.virtual_time import in_virtual_time
from tests.steady import now, request, steady, weights


def publisher(slots: list[Slot], tasks: asyncio.TaskGroup, excluded: list[Slot]) -> Publisher:
    """Over these workers alone; no hub."""

    async def nobody_asks(*args) -> Completion:
        raise AssertionError("weights without a score are not probed")

    return Publisher(
        slots, RequestQueue(slots, max_running=1), Policy(0, None), tasks,
        ask=nobody_asks, exclude=lambda slot, cause: excluded.append(slot), update_mode="keep",
        control_timeout_s=10.0, request_timeout_s=10.0, probe=Probe(),
    )  # fmt: skip


# ── publish ──────────────────────────────────────────────────────────────────────────────────────


@in_virtual_time
async def test_keep_freezes_requests_and_their_later_tokens_carry_the_new_version():
    async with InferenceHub([steady()], update_mode="keep") as hub:
        call = asyncio.ensure_future(hub.generate(request(max_tokens=10)))
        await asyncio.sleep(3.5)
        report = await hub.publish(weights(1))
        answered = await call
        assert answered.versions == [0, 0, 0] + [1] * 7
        assert report.paused_s == 1
        assert hub.version == 1
        assert hub.stats().mixed_tokens == 0
        assert report.gap is None


@in_virtual_time
async def test_a_publish_tells_what_the_workers_were_paused_for():
    def worker(name: str, load_s: float) -> FakeWorker:
        return FakeWorker(name, token_s=(1, 1), load_s=(load_s, load_s), recompute_s=2)

    async with InferenceHub([worker("a", 1), worker("b", 5)]) as hub:
        report = await hub.publish(weights(1))
        assert [(w.paused_s, w.load_s, w.reset_s) for w in report.per_worker] == [
            (3, 1, 2), (7, 5, 2)
        ]  # fmt: skip
        assert (report.paused_s, report.load_s, report.reset_s) == (10, 6, 4)
        await hub.publish(weights(2))
        stats = hub.stats()
        assert (stats.paused_s, stats.load_s, stats.reset_s) == (20, 12, 8)


@in_virtual_time
async def test_stale_keys_and_values_are_kept_if_so_wished_and_their_tokens_counted():
    worker = steady()
    async with InferenceHub([worker], update_mode="keep_stale_kv") as hub:
        call = asyncio.ensure_future(hub.generate(request(max_tokens=10)))
        await asyncio.sleep(3.5)
        report = await hub.publish(weights(1))
        assert (await call).versions == [0, 0, 0] + [1] * 7
        assert (worker.recomputed, report.reset_s) == (0, 0)
        await hub.generate(request(max_tokens=5))
        assert hub.stats().mixed_tokens == 7


@in_virtual_time
async def test_a_worker_that_was_away_computes_everything_anew_whatever_is_kept_else():
    worker = steady()
    async with InferenceHub([worker], update_mode="keep_stale_kv") as hub:
        await hub.publish(weights(1))
        worker.die()
        call = asyncio.ensure_future(hub.generate(request(max_tokens=4)))
        await asyncio.sleep(3)
        worker.restart()
        assert (await call).versions == [1] * 4
        assert worker.recomputed == 1


@in_virtual_time
async def test_abort_samples_the_rest_anew_and_the_caller_notices_nothing():
    async with InferenceHub([steady()], update_mode="abort") as hub:
        starts = []
        call = asyncio.ensure_future(hub.generate(request(max_tokens=10), starts.append))
        await asyncio.sleep(3.5)
        await hub.publish(weights(1))
        answered = await call
        assert answered.versions == [0, 0, 0] + [1] * 7
        assert len(answered.token_ids) == len(answered.logprobs) == 10
        assert answered.finish_reason == "length"
        assert starts == [0, 1]


@in_virtual_time
async def test_the_rest_of_an_aborted_response_is_sampled_after_what_there_is():
    prompts = []

    class Recording(FakeWorker):
        async def generate(self, request_id, token_ids, sampling, on_tokens=None):
            prompts.append((list(token_ids), sampling.max_tokens))
            return await super().generate(request_id, token_ids, sampling)

    worker = Recording("w", token_s=(1, 1), tokens=(100, 100))
    async with InferenceHub([worker], update_mode="abort") as hub:
        call = asyncio.ensure_future(hub.generate(request(max_tokens=10)))
        await asyncio.sleep(3.5)
        await hub.publish(weights(1))
        sampled = (await call).token_ids
    assert prompts == [([0, 1, 2, 3, 4], 10), ([0, 1, 2, 3, 4, *sampled[:3]], 7)]


@in_virtual_time
async def test_wait_lets_requests_end_with_the_version_they_began_with():
    async with InferenceHub([steady()], update_mode="wait") as hub:
        call = asyncio.ensure_future(hub.generate(request(max_tokens=10)))
        await asyncio.sleep(3.5)
        late = asyncio.ensure_future(hub.publish(weights(1)))
        await asyncio.sleep(1)
        new = asyncio.ensure_future(hub.generate(request(max_tokens=2)))
        assert (await call).versions == [0] * 10
        await late
        assert now() == 11
        assert (await new).versions == [1, 1]


@pytest.mark.parametrize("mode", ["keep", "abort", "wait"])
@in_virtual_time
async def test_a_publish_under_requests_at_two_workers(mode):
    """Each worker takes a second to load; b is frozen one second after a."""
    expected = {
        "keep": [[0] * 3 + [1] * 7, [0] * 4 + [1] * 6],
        "abort": [[0] * 3 + [1] * 7, [0] * 4 + [1] * 6],
        "wait": [[0] * 10, [0] * 10],
    }

    workers = [steady("a"), steady("b")]
    async with InferenceHub(workers, update_mode=mode) as hub:
        calls = [asyncio.ensure_future(hub.generate(request())) for _ in range(2)]
        await asyncio.sleep(3.5)
        report = await hub.publish(weights(1))
        answers = await asyncio.gather(*calls)
        assert [answered.versions for answered in answers] == expected[mode]
        for answered in answers:
            assert len(answered.token_ids) == len(answered.logprobs) == 10
            assert answered.finish_reason == "length"
        assert report.workers == 2
        assert [worker.loaded for worker in workers] == [[Path("/fake/1")]] * 2
        assert {worker.version for worker in hub.stats().workers} == {1}


@in_virtual_time
async def test_a_worker_that_fails_in_a_publish_is_left_out_and_its_requests_move():
    workers = [steady("a"), steady("b")]
    async with InferenceHub(workers) as hub:
        call = asyncio.ensure_future(hub.generate(request()))
        await asyncio.sleep(3.5)
        workers[0].fail_next(1)
        report = await hub.publish(weights(1))
        assert report.workers == 1
        assert (await call).worker == "b"
        await asyncio.sleep(10)
        assert workers[0].version == 1, "it got them when it came back"


@in_virtual_time
async def test_a_publish_to_nobody_has_no_gap_to_tell():
    async def score(token_ids):
        raise AssertionError("there is nothing to compare with")

    worker = steady()
    async with InferenceHub([worker]) as hub:
        worker.fail_next(1)
        report = await hub.publish(weights(1, score))
        assert report.gap is None
        assert report.workers == 0


@in_virtual_time
async def test_workers_are_updated_one_after_another_while_the_others_serve():
    workers = [steady("a"), steady("b")]
    async with InferenceHub(workers) as hub:
        publishing = asyncio.ensure_future(hub.publish(weights(1)))
        await asyncio.sleep(0.5)
        assert (await hub.generate(request(max_tokens=1))).worker == "b"
        await publishing
        assert [worker.version for worker in workers] == [1, 1]
        assert now() == 2, "one second each; the request at b was frozen for a while"


@in_virtual_time
async def test_versions_only_grow():
    async with InferenceHub([steady()], version=4) as hub:
        for version in (4, 3):
            with pytest.raises(ValueError, match="not newer than the published 4"):
                await hub.publish(weights(version))


@in_virtual_time
async def test_wait_gives_requests_the_time_that_requests_have():
    worker = steady()
    async with InferenceHub(
        [worker], control_timeout_s=10, request_timeout_s=100, update_mode="wait"
    ) as hub:
        call = asyncio.ensure_future(hub.generate(request(max_tokens=80)))
        await asyncio.sleep(0.5)
        report = await hub.publish(weights(1))
        assert report.workers == 1
        assert (await call).versions == [0] * 80
        assert hub.stats().retries == 0


@in_virtual_time
async def test_a_publish_that_is_cancelled_leaves_no_worker_paused_or_between_two_weights():
    workers = [steady("a"), steady("b")]
    async with InferenceHub(workers) as hub:
        publishing = asyncio.ensure_future(hub.publish(weights(1)))
        await asyncio.sleep(0.5)  # a is loading
        publishing.cancel()
        await asyncio.gather(publishing, return_exceptions=True)
        assert [worker.healthy for worker in hub.stats().workers] == [False, True]
        assert hub.version == 0
        await hub.publish(weights(1))
        await asyncio.sleep(10)
        assert [worker.version for worker in workers] == [1, 1]
        assert all(worker.healthy for worker in hub.stats().workers)
        answers = await asyncio.gather(*(hub.generate(request()) for _ in range(2)))
        assert {answer.worker for answer in answers} == {"a", "b"}


@in_virtual_time
async def test_a_worker_that_hangs_while_it_recovers_holds_up_no_publish():
    class Stuck(FakeWorker):
        async def load_weights(self, weights):
            await asyncio.Event().wait()

    workers = [steady("stuck", Stuck), steady("b")]
    async with InferenceHub(workers, control_timeout_s=300) as hub:
        workers[0].fail_next(1)
        await hub.generate(request())
        await hub.publish(weights(1))
        await asyncio.sleep(30)  # stuck is given the weights, and never says that it has them
        began = now()
        report = await hub.publish(weights(2))
        assert now() - began == 1
        assert [(w.name, w.updated) for w in report.per_worker] == [
            ("stuck", False),
            ("b", True),
        ]


@pytest.mark.parametrize("returning", [0, 1])
@in_virtual_time
async def test_a_worker_that_comes_back_while_a_publish_is_under_way_comes_with_the_new_weights(
    returning,
):
    workers = [steady("a", load_s=(5, 5)), steady("b", load_s=(5, 5))]
    async with InferenceHub(workers) as hub:
        await hub.publish(weights(1))
        workers[returning].fail_next(1)
        calls = [asyncio.ensure_future(hub.generate(request())) for _ in range(2)]
        await asyncio.sleep(1)  # it is given version 1 again
        report = await hub.publish(weights(2))
        await asyncio.gather(*calls)
        await asyncio.sleep(20)
        assert report.version == 2
        assert workers[returning].loaded == [Path(f"/fake/{v}") for v in (1, 1, 2)]
        assert [worker.version for worker in workers] == [2, 2]


@in_virtual_time
async def test_a_worker_that_has_the_new_weights_already_is_left_alone():
    workers = [steady("a", load_s=(5, 5)), steady("b")]
    async with InferenceHub(workers) as hub:
        workers[1].fail_next(1)
        calls = [asyncio.ensure_future(hub.generate(request())) for _ in range(2)]
        await asyncio.sleep(0.1)
        await hub.publish(weights(1))  # b is back before a has loaded
        await asyncio.gather(*calls)
        assert [worker.loaded for worker in workers] == [[Path("/fake/1")]] * 2


@in_virtual_time
async def test_a_worker_that_is_excluded_in_its_turn_ends_its_turn():
    workers = [steady("a"), steady("b")]
    async with InferenceHub(
        workers, request_timeout_s=20, control_timeout_s=1000, update_mode="wait"
    ) as hub:
        call = asyncio.ensure_future(hub.generate(request()))
        more = asyncio.ensure_future(hub.generate(request(max_tokens=15)))  # b's turn is later
        await asyncio.sleep(0.5)
        workers[0].hang()
        report = await hub.publish(weights(1))  # waits for the request that hangs
        assert now() == 20 + 10 + 1, "its deadline, then all of it at b, then b's load"
        assert report.per_worker[0].paused_s == 19.5
        assert report.workers == 2, "a came back meanwhile, with the new weights"
        assert (await call).worker == (await more).worker == "b"
        workers[0].wake()


@in_virtual_time
async def test_a_worker_that_refuses_the_weights_gets_no_more_requests():
    class Refusing(FakeWorker):
        async def load_weights(self, weights):
            raise BadRequest("lacks weights of this model")

    workers = [steady("r", Refusing), steady("b")]
    async with InferenceHub(workers) as hub:
        with pytest.raises(PublishFailure, match="version 1: lacks weights"):
            await hub.publish(weights(1))
        answers = await asyncio.gather(*(hub.generate(request()) for _ in range(3)))
        assert {answer.worker for answer in answers} == {"b"}
        assert hub.stats().retries == 0, "r is paused: what goes there hangs"


@in_virtual_time
async def test_the_report_tells_each_workers_pause_and_gap():
    workers = [steady("a"), steady("b", load_s=(3, 3)), steady("c")]
    for worker in workers:
        for _ in range(8):
            worker.lie_next(logprobs=[-0.5] * 16)
    scored = itertools.count()

    async def score(token_ids):
        of_worker = next(scored) // 8
        return [-0.5 - 1e-4 * (1 + of_worker)] * (len(token_ids) - 1)

    async with InferenceHub(workers) as hub:
        workers[2].die()
        report = await hub.publish(weights(1, score))
        assert [worker.name for worker in report.per_worker] == ["a", "b", "c"]
        assert [worker.updated for worker in report.per_worker] == [True, True, False]
        assert [worker.paused_s for worker in report.per_worker] == [1, 3, 0]
        gaps = [worker.gap for worker in report.per_worker]
        assert [gap.max for gap in gaps[:2]] == pytest.approx([1e-4, 2e-4])
        assert gaps[2] is None
        assert report.gap == gaps[1], "the worst"


# ── probe ────────────────────────────────────────────────────────────────────────────────────────


def probed(worker: FakeWorker, by: float):
    """A score that differs from what the worker says by `by`."""
    said: dict[tuple[int, ...], list[float]] = {}
    generate = worker.generate

    async def listening(request_id, token_ids, sampling, on_tokens=None):
        completion = await generate(request_id, token_ids, sampling)
        said[*token_ids, *completion.token_ids] = completion.logprobs
        return completion

    worker.generate = listening

    async def score(token_ids):
        of_answer = said[tuple(token_ids)]
        unknown = [0.0] * (len(token_ids) - 1 - len(of_answer))
        return unknown + [logprob + by for logprob in of_answer]

    return score


@in_virtual_time
async def test_the_probe_accepts_equal_logprobs_and_tells_the_gap():
    worker = steady()
    async with InferenceHub([worker]) as hub:
        report = await hub.publish(weights(1, probed(worker, 5e-5)))
        gap = report.gap
        assert [gap.median, gap.p90, gap.max] == pytest.approx([5e-5] * 3)
        assert gap.kl == pytest.approx(25e-10 / 2, rel=1e-3)
        assert 5e-5 < gap.logits < 1e-3


@in_virtual_time
async def test_a_worker_with_other_weights_than_the_trainer_fails_the_publish():
    worker = steady("tied")
    async with InferenceHub([worker]) as hub:
        with pytest.raises(
            PublishFailure, match=r"tied should sample with version 1.*\(engine.gap_limit\).*0\.01"
        ):
            await hub.publish(weights(1, probed(worker, 0.01)))


@in_virtual_time
async def test_a_nan_anywhere_in_the_probe_fails_the_publish():
    worker = steady()
    exact = probed(worker, 0.0)

    async def score(token_ids):
        logprobs = await exact(token_ids)
        return [*logprobs[:-1], math.nan]

    async with InferenceHub([worker]) as hub:
        with pytest.raises(PublishFailure, match="within nan of the trainer's"):
            await hub.publish(weights(1, score))


@in_virtual_time
async def test_a_worker_that_still_samples_with_the_old_version_fails_the_publish():
    class Forgetful(FakeWorker):
        async def set_version(self, version):
            pass

    worker = Forgetful("forgetful")
    async with InferenceHub([worker]) as hub:
        with pytest.raises(PublishFailure, match=r"version 1: it says \[0\]"):
            await hub.publish(weights(1, probed(worker, 0.0)))


@in_virtual_time
async def test_a_probe_can_be_made_without_a_publish():
    worker = steady(version=3)
    async with InferenceHub([worker], version=3) as hub:
        assert (await hub.probe(weights(3, probed(worker, 0.0)))).logits == 0
        assert await hub.probe(weights(3)) is None
        with pytest.raises(PublishFailure, match="0.5"):
            await hub.probe(weights(3, probed(worker, 0.5)))


@in_virtual_time
async def test_a_refused_probe_fails_the_publish():
    async def score(token_ids):
        return []

    class Refusing(FakeWorker):
        async def generate(self, request_id, token_ids, sampling, on_tokens=None):
            raise BadRequest("token_ids must lie in 0 … 2")

    async with InferenceHub([Refusing("r")]) as hub:
        with pytest.raises(PublishFailure, match="refused the probe: token_ids must lie"):
            await hub.publish(weights(1, score))


# ── lend ─────────────────────────────────────────────────────────────────────────────────────────


@in_virtual_time
async def test_a_lent_worker_keeps_its_version_and_gets_what_was_published_when_it_is_back():
    workers = [steady("a"), steady("b")]
    async with InferenceHub(workers) as hub:
        async with hub.lend(1) as share:
            report = await hub.publish(weights(1))
            assert [worker.updated for worker in report.per_worker] == [False, True]
            assert (await share.generate(request())).versions == [0] * 10
            assert (await hub.generate(request())).versions == [1] * 10
            assert (share.version, hub.version) == (0, 1)
        await asyncio.sleep(5)
        assert [worker.loaded for worker in workers] == [[Path("/fake/1")]] * 2
        assert not any(worker.lent for worker in hub.stats().workers)


@in_virtual_time
async def test_what_a_borrower_was_answered_is_in_the_totals_of_the_lender():
    async with InferenceHub([steady("a"), steady("b")]) as hub:
        async with hub.lend(1) as share:
            await share.generate(request(max_tokens=4, prompt=3))
        await hub.generate(request(max_tokens=2, prompt=1))
        stats = hub.stats()
        assert (stats.requests, stats.prompt_tokens, stats.generated_tokens) == (2, 4, 6)


@in_virtual_time
async def test_a_lent_worker_that_its_borrower_gave_up_is_checked_before_it_is_back():
    workers = [steady("a"), steady("b")]
    async with InferenceHub(workers) as hub:
        async with hub.lend(1) as share:
            share.give_up("a", "it hangs")
        await asyncio.sleep(0.1)
        assert [worker.healthy for worker in hub.stats().workers] == [False, True]
        assert (await hub.generate(request(max_tokens=1))).worker == "b"
        await asyncio.sleep(10)
        assert all(worker.healthy for worker in hub.stats().workers)


# ── alone ────────────────────────────────────────────────────────────────────────────────────────


@in_virtual_time
async def test_a_publisher_hands_a_worker_that_fails_to_who_excludes_it_and_goes_on():
    workers = [steady("a"), steady("b"), steady("c")]
    slots, excluded = [Slot(worker, 0) for worker in workers], []
    workers[1].fail_next(1)
    async with asyncio.TaskGroup() as tasks:
        report = await publisher(slots, tasks, excluded).publish(weights(1))
    assert excluded == [slots[1]]
    assert [slot.version for slot in slots] == [1, 0, 1]
    assert [worker.updated for worker in report.per_worker] == [True, False, True]


@in_virtual_time
async def test_a_publisher_lends_the_least_busy_workers_and_not_while_it_publishes():
    workers = [steady("a"), steady("b")]
    slots = [Slot(worker, 0) for worker in workers]
    slots[0].begin(cost=5)
    async with asyncio.TaskGroup() as tasks:
        publishes = publisher(slots, tasks, [])
        publishing = asyncio.ensure_future(publishes.publish(weights(1)))
        await asyncio.sleep(0.5)  # a is loading, and b has the old weights
        async with publishes.lend(1) as loan:
            assert (now(), loan.version) == (2, 1)
            assert [slot.lent is not None for slot in slots] == [False, True]
        await publishing


@in_virtual_time
async def test_a_probe_after_a_long_prompt_shows_what_a_short_one_hides():
    worker = steady()
    exact = probed(worker, 0.0)

    async def score(token_ids):
        """A trainer that looks back further than the worker."""
        far = 0.01 if len(token_ids) > 64 else 0.0
        return [logprob + far for logprob in await exact(token_ids)]

    asked = []
    generate = worker.generate

    async def recorded(request_id, token_ids, *rest):
        asked.append(list(token_ids))
        return await generate(request_id, token_ids, *rest)

    worker.generate = recorded
    async with InferenceHub([worker]) as hub:
        assert (await hub.probe(weights(0, score))).max == 0
        long = Probe(prompts=[range(64)], tokens=96)
        with pytest.raises(
            PublishFailure, match=r"96 tokens, after prompts of 64, differ by 0\.01"
        ):
            await hub.probe(weights(0, score), long)
    assert (max(map(len, asked[:-1])) < 64, asked[-1]) == (True, list(range(64)))
