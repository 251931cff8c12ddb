"""A real SGLang server behind the hub, on a CPU, shared by these tests."""

import asyncio
import importlib.util
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from flash.hub.hub import InferenceHub
from flash.hub.pool import LOOPBACK
from flash.hub.sender import LocalSender, StartSender
from flash.hub.sglang_nccl import SglangNcclWorker
from flash.hub.sglang_pool import SglangPool
from flash.hub.worker import BadRequest, WorkerBroken, WorkerFailure
from flash.system.process import Child
from flash.types import Completion, SamplingParams, Weights
from flash.warm_start.small_policy import create
from tests.hub.test_vllm import PROMPT, logprobs, mixed_logprobs, request, weights
from tests.processes import Watch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        importlib.util.find_spec("sglang") is None, reason="SGLang is not installed"
    ),
    pytest.mark.asyncio(loop_scope="module"),
]

START_S = 500
CHUNK_BYTES = 20_000


class Server:
    """The pool of one, its worker, and the models that it gets in turn."""

    def __init__(self, pool: SglangPool, models: list[Path]) -> None:
        self.pool = pool
        self.models = models
        self.version = 0

    @asynccontextmanager
    async def hub(self, update_mode="keep", sender=None):
        """With the next version; a hub closes its workers, so each has a client of its own.

        It gets weights from such a sender, if there is one, or from files.
        """
        self.version += 1
        url = f"http://127.0.0.1:{self.pool._seats[0].port}"
        worker = self.pool._client(0, url)
        if sender is not None:
            await worker.close()
            worker = SglangNcclWorker(
                url, api_key=self.pool._api_key, start_sender=sender, chunk_bytes=CHUNK_BYTES
            )
        async with InferenceHub(
            [worker], version=self.version, weights=self.weights(), update_mode=update_mode
        ) as hub:
            yield hub, worker

    def weights(self) -> Weights:
        return weights(self.version, self.model(self.version))

    def model(self, version: int) -> Path:
        return self.models[version % 2]

    def assert_exact(self, prompt: list[int], answer: Completion, temperature=1.0) -> None:
        """Each token's logprob is that of the model of its version."""
        sequence = [*prompt, *answer.token_ids]
        for version in set(answer.versions):
            expected = logprobs(self.model(version), sequence, temperature)[len(prompt) - 1 :]
            for got, wanted, of in zip(answer.logprobs, expected, answer.versions, strict=True):
                if of == version:
                    assert got == pytest.approx(wanted, abs=1e-4), f"version {version}"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sglang")
    words = [f"w{n}" for n in range(300)]
    models = [
        create(folder / str(seed), words, layers=2, hidden_size=64, heads=2, seed=seed)
        for seed in range(2)
    ]
    pool = SglangPool(
        str(models[0]), size=1, max_running=8, max_tokens=1024, cache_tokens=16_384,
        tensor_parallel=1, devices=[], gpu_memory=0.3, dtype="float32", threads=1, seed=0,
        arguments=(), log_dir=folder / "logs", start_timeout_s=START_S, keeps_stale=True,
    )  # fmt: skip
    await pool.start(lambda *_: None, lambda _: None)
    watch = Watch(pool.pids)
    yield Server(pool, models)
    await pool.stop()
    assert not await asyncio.to_thread(watch.left)
    log = (folder / "logs" / "worker_0.log").read_text()
    assert pool._api_key not in log


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("max_tokens", [60, 200])  # whole, in events
async def test_logprobs_are_the_models_own_after_the_temperature(server, temperature, max_tokens):
    async with server.hub() as (hub, _):
        answer = await hub.generate(request(max_tokens, temperature=temperature))
        assert len(answer.token_ids) == max_tokens
        assert set(answer.versions) == {server.version}
        server.assert_exact(PROMPT, answer, temperature)


@pytest.fixture
def sender(tmp_path) -> StartSender:
    """Starts what sends weights, by gloo in NCCL's place."""

    async def start() -> LocalSender:
        module, log = "flash.trainer.process_group", tmp_path / "sender.log"
        return LocalSender(await Child.start(module, "cpu", LOOPBACK, name="sender", log_path=log))

    return start


@pytest.mark.parametrize("sends", [False, True])
@pytest.mark.parametrize("mode", ["keep", "keep_stale_kv", "abort", "wait"])
async def test_versions_are_exact_whatever_a_publish_does_to_what_runs(server, mode, sends, sender):
    async with server.hub(mode, sender if sends else None) as (hub, _):
        old = server.version
        prompts = [[*PROMPT, 20 + number] for number in range(4)]
        sampled = [asyncio.Event() for _ in prompts]
        calls = [
            asyncio.ensure_future(
                hub.generate(request(300, prompt), on_sampled=lambda _, e=event: e.set())
            )
            for prompt, event in zip(prompts, sampled, strict=True)
        ]
        for event in sampled:
            await event.wait()
        server.version += 1
        report = await hub.publish(server.weights())
        assert report.workers == 1
        assert report.gap.max < 1e-4
        for prompt, call in zip(prompts, calls, strict=True):
            answer = await call
            assert len(answer.token_ids) == 300
            kept = answer.versions.index(server.version) if mode != "wait" else 300
            assert 0 < kept <= 300
            assert answer.versions == [old] * kept + [server.version] * (300 - kept)
            if mode != "keep_stale_kv":
                server.assert_exact(prompt, answer)
                continue
            sequence, seen = [*prompt, *answer.token_ids], len(prompt) + kept - 1
            models = server.model(old), server.model(server.version)
            expected = logprobs(models[0], sequence)[len(prompt) - 1 : seen]
            expected += mixed_logprobs(*models, sequence, seen)
            assert answer.logprobs == pytest.approx(expected, abs=1e-4)
        later = await hub.generate(request(40, prompts[0]))
        assert set(later.versions) == {server.version}
        server.assert_exact(prompts[0], later)


async def test_only_what_a_request_names_stops_it(server):
    """The model's own end of a text does not, of which a hot policy says many."""
    async with server.hub() as (hub, _):
        stop = 7
        ends, went_on = 0, 0
        for number in range(40):
            prompt = [*PROMPT, 20 + number]
            asked = request(100, prompt, temperature=3.0)
            asked = replace(asked, sampling=replace(asked.sampling, stop_token_ids=(stop,)))
            answer = await hub.generate(asked)
            server.assert_exact(prompt, answer, 3.0)
            assert stop not in answer.token_ids[:-1]
            assert (answer.finish_reason == "stop") == (answer.token_ids[-1] == stop)
            ends += answer.finish_reason == "stop"
            went_on += 2 in answer.token_ids[:-1]
        assert ends
        assert went_on


async def test_an_abort_is_of_one_request(server):
    async with server.hub() as (_, worker):
        sampling = SamplingParams(max_tokens=400)
        told = asyncio.Event()
        first = asyncio.ensure_future(worker.generate("1", PROMPT, sampling, lambda *_: told.set()))
        second = asyncio.ensure_future(worker.generate("10", PROMPT, sampling))
        await told.wait()
        await worker.abort("1")
        cut = await first
        assert (cut.finish_reason, (await second).finish_reason) == ("abort", "length")
        assert 0 < len(cut.token_ids) < 400
        server.assert_exact(PROMPT, cut)


async def test_a_publish_that_broke_off_is_made_good(server):
    async with server.hub() as (_, worker):
        sampling = SamplingParams(max_tokens=900)
        told = asyncio.Event()
        frozen = asyncio.ensure_future(
            worker.generate("frozen", PROMPT, sampling, lambda *_: told.set())
        )
        await told.wait()
        await worker.pause("keep_stale_kv")
        await worker.check_health()
        async with server.hub() as (hub, _):
            assert (await frozen).finish_reason == "abort"
            server.assert_exact(PROMPT, await hub.generate(request(20)))


async def test_what_it_refuses_is_told(server, tmp_path):
    async with server.hub() as (_, worker):
        with pytest.raises(BadRequest, match="longer than the model's context length"):
            await worker.generate("id", [1] * 1025, SamplingParams(max_tokens=1))
        with pytest.raises(WorkerFailure, match="update_weights_from_disk answered 400.*see the f"):
            await worker.load_weights(Weights(version=9, path=tmp_path))


async def test_requests_wait_with_a_server_that_sleeps(server):
    """Without a GPU it gives no memory away, but is as silent as with one."""
    server.version += 1
    seat = server.pool._seats[0]
    worker = server.pool._client(0, f"http://127.0.0.1:{seat.port}")

    async def make_room() -> None:
        """There is room."""

    async with InferenceHub(
        [worker], version=server.version, weights=server.weights(), make_room=make_room
    ) as hub:
        told = asyncio.Event()
        call = asyncio.ensure_future(hub.generate(request(300), on_sampled=lambda _: told.set()))
        await told.wait()
        async with hub.asleep():
            assert not call.done()
        answer = await call
        assert len(answer.token_ids) == 300
        server.assert_exact(PROMPT, answer)


async def test_a_group_is_made_anew_after_its_sender_and_a_transfer_that_breaks_off_is_told(
    server, sender
):
    """The last of these tests: such a server has to be started anew."""
    started = []

    async def start() -> LocalSender:
        started.append(await sender())
        return started[-1]

    async with server.hub("keep", start) as (hub, worker):
        started[0].kill()
        await started[0].stop()
        server.version += 1
        assert (await hub.publish(server.weights())).gap.max < 1e-4
        assert len(started) == 2
        server.assert_exact(PROMPT, await hub.generate(request(20)))

        async def die(number: int) -> None:
            started[1].kill()

        started[1].send = die
        await worker.pause("keep")
        with pytest.raises(WorkerBroken):
            await worker.load_weights(server.weights())
        with pytest.raises(WorkerBroken, match="broke off"):
            await worker.check_health()
