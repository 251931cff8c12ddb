"""Real vLLM servers behind the hub: two of them, shared by these tests, on the CPU build."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import aiohttp
import jsonschema
import numpy as np
import psutil
import pytest
import pytest_asyncio
import torch
from openai import AsyncOpenAI, BadRequestError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples import attach_to_vllm
from flash.door import Door
from flash.errors import InferenceFailure, PublishFailure
from flash.hub.http_worker import HttpWorker
from flash.hub.hub import InferenceHub
from flash.hub.vllm_pool import VllmPool
from flash.system.machine import gpus, has_vllm
from flash.tools.formats import FORMATS
from flash.types import Completion, GenerateRequest, SamplingParams, Scores, Weights
from flash.warm_start.small_policy import create
from flash.worker.shared import SharedWeights
from tests.hub.deltas import stepped
from tests.processes import Watch
from tests.tools.templates import HERMES, tokenizer_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not has_vllm(), reason="vLLM is not installed: make setup-vllm"),
    pytest.mark.asyncio(loop_scope="module"),
]

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12]
Answer = tuple[list[int], Completion]  # with its prompt
RETURN_S = 300  # for a server to be started anew on a busy machine


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[Path]:
    """Small policies, with tied embeddings, one seed each; they speak in bytes."""
    folder = tmp_path_factory.mktemp("models")
    words = [f"w{n}" for n in range(300)]
    models = [
        create(folder / str(seed), words, layers=2, hidden_size=64, heads=2, seed=seed)
        for seed in range(3)
    ]
    for model in models:
        tokenizer_of(HERMES).save_pretrained(model)
    return models


def make_pool(model: Path, log_dir: Path, size: int, arguments=()) -> VllmPool:
    return VllmPool(
        str(model), size=size, max_running=8, max_tokens=1024, cache_tokens=16_384,
        tensor_parallel=1, devices=gpus(), gpu_memory=0.3, dtype="float32", threads=1, seed=0,
        arguments=arguments, log_dir=log_dir, start_timeout_s=RETURN_S,
    )  # fmt: skip


class Servers:
    """The pool and hub of these tests, and the versions that the hub has published."""

    def __init__(self, hub: InferenceHub, pool: VllmPool, models: list[Path]) -> None:
        self.hub = hub
        self.pool = pool
        self.models = models
        self.model_of = {0: models[0]}

    async def publish(self, mode="keep", share=None):
        """The model after the present one, as the next version."""
        version = self.hub.version + 1
        model = self.models[version % len(self.models)]
        self.model_of[version] = model
        self.hub._publisher.update_mode = mode
        new = weights(version, model)
        if share is not None:
            new = replace(new, share=lambda: share(model))
        return await self.hub.publish(new)

    def assert_exact(self, prompt: list[int], answer: Completion, temperature: float = 1.0) -> None:
        """Each token's logprob is that of the model of its version, by a plain forward pass."""
        sequence = [*prompt, *answer.token_ids]
        for version in set(answer.versions):
            expected = logprobs(self.model_of[version], sequence, temperature)[len(prompt) - 1 :]
            for got, wanted, of in zip(answer.logprobs, expected, answer.versions, strict=True):
                if of == version:
                    assert got == pytest.approx(wanted, abs=1e-3), f"version {version}"

    def assert_all_exact(self, answers: list[Answer]) -> None:
        for prompt, answer in answers:
            self.assert_exact(prompt, answer)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def servers(models, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent / "planted"))
        pool = make_pool(
            models[0], tmp_path_factory.mktemp("logs"), 2,
            ["--worker-extension-cls=planted_fault.FaultyLoader"],
        )  # fmt: skip
        async with InferenceHub(pool, max_running=8, recovery_timeout_s=RETURN_S) as hub:
            yield Servers(hub, pool, models)
            watch = Watch(pool.pids)
    assert not await asyncio.to_thread(watch.left)


@asynccontextmanager
async def in_memory(model: Path, folder: Path) -> AsyncIterator[Path]:
    """As a rank shares them."""
    tensors = load_file(model / "model.safetensors")
    layout = [(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]
    memory = SharedWeights(layout, folder, "cpu")
    memory.fill(tensors.items())
    memory.tell()
    yield folder


def logprobs(model: Path, token_ids: list[int], temperature: float = 1.0) -> list[float]:
    """Of `token_ids[1:]`."""
    tokens = torch.tensor([token_ids])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model)(tokens).logits[0, :-1]
    return (logits / temperature).log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0].tolist()


def mixed_logprobs(old: Path, new: Path, token_ids: list[int], kept: int) -> list[float]:
    """Of `token_ids[kept + 1:]` by `new`, on keys and values of the first `kept` by `old`."""
    tokens = torch.tensor([token_ids])
    with torch.no_grad():
        cache = AutoModelForCausalLM.from_pretrained(old)(tokens[:, :kept]).past_key_values
        model = AutoModelForCausalLM.from_pretrained(new)
        logits = model(tokens[:, kept:], past_key_values=cache).logits[0, :-1]
    return logits.log_softmax(-1).gather(-1, tokens[0, kept + 1 :, None])[:, 0].tolist()


def weights(version: int, model: Path) -> Weights:
    async def score(sequences):
        return Scores(
            logprobs=[await asyncio.to_thread(logprobs, model, list(each)) for each in sequences]
        )

    return Weights(version=version, path=model, score=score)


def request(max_tokens: int, prompt=PROMPT, temperature: float = 1.0) -> GenerateRequest:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature)
    return GenerateRequest(token_ids=prompt, sampling=sampling)


@asynccontextmanager
async def traffic(hub: InferenceHub, prefix=PROMPT) -> AsyncIterator[list[Answer]]:
    """Eight who each ask anew when they are answered, no two at the same time.

    So some requests are in flight whenever the body of the block runs, however fast the machine.
    """
    answers: list[Answer] = []
    over = False

    async def ask(number: int, answered: asyncio.Event) -> None:
        prompt = [*prefix, 20 + number]
        max_tokens = 150 + 20 * number
        while not over:
            answer = await hub.generate(request(max_tokens, prompt))
            assert len(answer.token_ids) == max_tokens
            answers.append((prompt, answer))
            answered.set()

    async with asyncio.TaskGroup() as group:
        first = [asyncio.Event() for _ in range(8)]
        for number, answered in enumerate(first):
            group.create_task(ask(number, answered))
        for answered in first:
            await answered.wait()
        assert len({answer.worker for _, answer in answers}) == 2
        yield answers
        over = True


def versions_of(answers: list[Answer]) -> list[list[int]]:
    """For each answer, the versions in the order in which they sampled."""
    return [[version for version, _ in groupby(answer.versions)] for _, answer in answers]


async def all_healthy(hub: InferenceHub) -> None:
    async with asyncio.timeout(RETURN_S):
        while not all(worker.healthy for worker in hub.stats().workers):
            await asyncio.sleep(0.2)


async def test_logprobs_are_the_models_own_after_the_temperature(servers):
    for temperature in (1.0, 0.6):
        answer = await servers.hub.generate(request(60, temperature=temperature))
        assert len(answer.token_ids) == 60
        servers.assert_exact(PROMPT, answer, temperature)


async def test_an_answer_ends_where_nothing_more_is_needed(servers):
    """Also one that is streamed; sooner than by its length."""
    tokenizer = AutoTokenizer.from_pretrained(servers.models[0])
    for max_tokens in (100, 900):
        sampling = SamplingParams(max_tokens=max_tokens, stop=("a", "e", "i", "o", "u", "t", "n"))
        asked = GenerateRequest(token_ids=PROMPT, sampling=sampling)
        answer = await servers.hub.generate(asked)
        if max_tokens == 900:
            assert answer.finish_reason == "stop"
        *others, last = map(tokenizer.decode, answer.token_ids)
        assert last in sampling.stop or answer.finish_reason == "length"
        assert not {*others} & {*sampling.stop}
        servers.assert_exact(PROMPT, answer)


async def test_an_answer_keeps_to_its_schema_and_a_demanded_call_is_made(servers):
    """By a policy that would never do so by itself; its logprobs are of what the grammar leaves."""
    tokenizer = AutoTokenizer.from_pretrained(servers.models[0])
    hermes = FORMATS["hermes"]
    fields = {name: field for name, field in hermes["fields"].items() if name != "thinking"}
    tokenizer.response_template = hermes | {"fields": fields}  # it would think to the last token
    options = {"max_tokens": 500, "temperature": 1.0, "max_sequence_tokens": 1000}
    schema = {
        "type": "object",
        "properties": {"to": {"enum": ["north", "south"]}, "far": {"type": "boolean"}},
        "required": ["to", "far"],
        "additionalProperties": False,
    }
    tool = {"type": "function", "function": {"name": "move", "parameters": schema}}
    given = {"type": "json_schema", "json_schema": {"name": "place", "schema": schema}}
    asked = {"model": "policy", "messages": [{"role": "user", "content": "Where?"}]}

    async def generate(token_ids, sampling):
        return await servers.hub.generate(GenerateRequest(token_ids=token_ids, sampling=sampling))

    async with Door(servers.hub, tokenizer=tokenizer, model="policy") as door:
        session = door.open(generate, **options)
        async with AsyncOpenAI(base_url=session.base_url, api_key=session.api_key) as client:
            create = client.chat.completions.create
            words = await create(**asked, response_format=given)
            calls = await create(
                **asked, tools=[tool], tool_choice="required", parallel_tool_calls=False
            )
            with pytest.raises(BadRequestError, match="response_format="):
                unknown = {"name": "x", "schema": {"$ref": "#/nowhere"}}
                await create(
                    **asked, response_format={"type": "json_schema", "json_schema": unknown}
                )
        sequences = session.sequences()
    (call,) = calls.choices[0].message.tool_calls
    said = [words.choices[0].message.content, call.function.arguments]
    for text in said:
        jsonschema.validate(json.loads(text), schema)
    assert call.function.name == "move"
    for sequence in sequences:
        assert not sequence.loss_mask.any()
        own = logprobs(servers.model_of[servers.hub.version], sequence.token_ids.tolist())
        known = sequence.turns[1:] >= 0
        told, own = sequence.logprobs[1:][known], np.array(own)[known]
        assert (told > own - 1e-3).all()
        assert told.sum() > own.sum() + 10


@pytest.mark.parametrize(("mode", "versions"), [("keep", 2), ("abort", 1)])
async def test_a_constraint_holds_through_a_publish(servers, mode, versions):
    """Where the request is broken off, it begins anew."""
    tokenizer = AutoTokenizer.from_pretrained(servers.models[0])
    schema = {"type": "array", "items": {"const": "w" * 50}, "minItems": 12, "maxItems": 12}
    form = {"type": "json_schema", "json_schema": schema}
    sampling = SamplingParams(
        max_tokens=1000,
        stop_token_ids=(tokenizer.eos_token_id,),
        constraint=json.dumps({"type": "structural_tag", "format": form}),
    )
    under_way = asyncio.Event()
    asked = GenerateRequest(token_ids=PROMPT, sampling=sampling)
    call = asyncio.create_task(
        servers.hub.generate(asked, on_sampled=lambda sampled: sampled and under_way.set())
    )
    await under_way.wait()
    await servers.publish(mode)
    answer = await call
    assert len(set(answer.versions)) == versions
    assert answer.versions[-1] == servers.hub.version
    assert answer.finish_reason == "stop"
    # Its end is any that the model's files name, of which one is a byte here.
    jsonschema.validate(json.loads(tokenizer.decode(answer.token_ids[:-1])), schema)


async def test_nobody_without_the_key_reaches_any_route(servers):
    url = servers.hub.stats().workers[0].name
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{url}/weight_info") as response:
            assert response.status == 401
        async with session.post(f"{url}/collective_rpc", json={"method": "exec"}) as response:
            assert response.status == 401


async def test_keep_goes_on_with_the_new_weights_exactly_from_the_seam(servers):
    async with traffic(servers.hub) as answers:
        report = await servers.publish("keep")
    assert report.workers == 2
    assert report.gap.max < 1e-3
    assert 0 < report.reset_s < report.paused_s - report.load_s
    assert [servers.hub.version - 1, servers.hub.version] in versions_of(answers)
    servers.assert_all_exact(answers)


async def test_stale_keys_and_values_are_those_of_what_ran_and_of_nothing_later(servers):
    hub = servers.hub
    shared = list(range(5, 105))  # three blocks of the cache, which every later request looks for
    async with traffic(hub, shared) as answers:
        report = await servers.publish("keep_stale_kv")
    old, new = servers.model_of[hub.version - 1], servers.model_of[hub.version]
    assert report.workers == 2
    assert report.gap.max < 1e-3
    assert report.reset_s == 0
    later = [[*shared, 20 + number] for number in range(8)]
    completions = await asyncio.gather(*(hub.generate(request(20, prompt)) for prompt in later))
    servers.assert_all_exact(list(zip(later, completions, strict=True)))
    mixed = [answer for answer in answers if len(set(answer[1].versions)) == 2]
    assert mixed
    of_mixed = 0
    for prompt, answer in mixed:
        before = answer.versions.count(hub.version - 1)
        of_mixed += len(answer.versions) - before
        sequence = [*prompt, *answer.token_ids]
        # The last token before the seam is computed with the first one after it.
        expected = mixed_logprobs(old, new, sequence, len(prompt) + before - 1)
        assert answer.logprobs[before:] == pytest.approx(expected, abs=1e-3)
        anew = logprobs(new, sequence)[len(prompt) + before - 1 :]
        assert answer.logprobs[before:] != pytest.approx(anew, abs=1e-2)
    assert hub.stats().mixed_tokens >= of_mixed


async def test_abort_samples_the_rest_anew(servers):
    async with traffic(servers.hub) as answers:
        await servers.publish("abort")
    assert [servers.hub.version - 1, servers.hub.version] in versions_of(answers)
    servers.assert_all_exact(answers)


async def test_wait_lets_every_request_end_with_the_weights_it_began_with(servers):
    async with traffic(servers.hub) as answers:
        await servers.publish("wait")
    assert all(len(versions) == 1 for versions in versions_of(answers))
    assert versions_of(answers)[-1] == [servers.hub.version]
    servers.assert_all_exact(answers)


@pytest.mark.parametrize("mode", ["keep", "abort"])
async def test_servers_sleep_with_their_requests_and_wake_with_the_new_weights(
    servers, mode, tmp_path, monkeypatch
):
    """Without a GPU they give no memory away, but all else is as with one."""
    hub = servers.hub
    await servers.publish(mode)  # they know which weights they would wake with
    hub._turns._update_mode = mode
    async with traffic(hub) as answers:
        async with hub.asleep():
            workers = [slot.worker for slot in hub._slots]
            for worker in workers:
                assert b"true" in await worker._call("GET", "/is_sleeping")
            sampled = hub.stats().generated_tokens
            with monkeypatch.context() as patch:
                patch.setattr(HttpWorker, "_load_whole", None)  # it would fail
                report = await servers.publish(mode, share=lambda of: in_memory(of, tmp_path))
            assert report.workers == 2
            assert report.gap.max < 1e-3
        async with hub.asleep():  # they wake with the weights that they had
            pass
        for worker in workers:
            assert b"false" in await worker._call("GET", "/is_sleeping")
    assert hub.stats().generated_tokens > sampled
    assert [hub.version - 1, hub.version] in versions_of(answers)
    servers.assert_all_exact(answers)


async def test_a_server_that_is_killed_loses_no_token_and_returns_with_the_present_weights(servers):
    hub = servers.hub
    restarts = hub.stats().retries
    async with traffic(hub) as answers:
        victim = psutil.Process(servers.pool.pids[0])
        family = [victim, *victim.children(recursive=True)]
        watch = Watch(process.pid for process in family)
        lines = (" ".join(process.cmdline()).strip() for process in family)
        assert [line for line in lines if line.startswith("VLLM::")] == ["VLLM::EngineCore"]
        os.kill(family[1].pid, signal.SIGKILL)  # the API server; its engine would live on
    assert hub.stats().retries > restarts
    servers.assert_all_exact(answers)
    await servers.publish()  # while it is away
    await all_healthy(hub)
    assert not await asyncio.to_thread(watch.left)
    answers = await asyncio.gather(*(hub.generate(request(20)) for _ in range(16)))
    assert len({answer.worker for answer in answers}) == 2
    assert {v for answer in answers for v in answer.versions} == {hub.version}
    for answer in answers:
        servers.assert_exact(PROMPT, answer)


async def test_a_server_whose_engine_stands_still_is_started_anew(servers):
    hub = servers.hub
    standing = hub._slots[1]
    async with traffic(hub) as answers:
        engines = psutil.Process(servers.pool.pids[1]).children(recursive=True)
        watch = Watch(process.pid for process in engines)
        for process in engines[1:]:  # all but the API server, which goes on to say that it is well
            process.suspend()
        hub._supervisor.progress_timeout_s = 5.0
        if standing.progress_timer is not None:  # it would look after 120 s
            standing.progress_timer.cancel()
            standing.progress_timer = None
        hub._supervisor.watch_progress(standing)
        async with asyncio.timeout(60):
            while standing.healthy:
                await asyncio.sleep(0.2)
        hub._supervisor.progress_timeout_s = 120.0
    servers.assert_all_exact(answers)
    await all_healthy(hub)
    assert not await asyncio.to_thread(watch.left)


@pytest.mark.skipif(bool(gpus()), reason="on a GPU nothing is packed, and what changed is loaded")
async def test_servers_whose_weights_are_packed_load_all_in_the_place_of_a_delta(
    servers, tmp_path, caplog
):
    await servers.publish()
    version = servers.hub.version + 1
    model = stepped(servers.model_of[version - 1], tmp_path / "stepped", seed=1)
    servers.model_of[version] = model
    report = await servers.hub.publish(weights(version, model))
    assert report.workers == 2
    assert report.gap.max < 1e-3
    assert caplog.text.count("gets whole weights from now on") == 2


async def test_another_hub_attaches_to_servers_that_run(servers):
    urls = [worker.name for worker in servers.hub.stats().workers]
    model = servers.models[0]
    answers = await attach_to_vllm.main(model, urls, api_key=servers.pool._api_key)
    assert {answer.worker for answer in answers} == set(urls)
    assert any(set(answer.versions) == {0, 1} for answer in answers)
    for answer in answers:  # both versions are of one model
        expected = logprobs(model, [5, 6, 7, *answer.token_ids])[2:]
        assert answer.logprobs == pytest.approx(expected, abs=1e-3)


async def test_a_head_that_keeps_its_old_weights_ends_the_run(servers, tmp_path):
    """The last of these tests: afterwards the hub has failed its publish."""
    version = servers.hub.version + 1
    model = servers.models[1]  # what the hub before has left is the first one
    planted = tmp_path / "planted"
    shutil.copytree(model, planted)
    (planted / "planted").touch()
    with pytest.raises(PublishFailure, match="of its logits are within .* of the trainer.s, where"):
        await servers.hub.publish(weights(version, planted))


async def test_a_server_that_dies_at_its_start_shows_why(models, tmp_path):
    pool = make_pool(models[0], tmp_path, 1, ["--max-model-len=1000000"])
    with pytest.raises(InferenceFailure, match="(?s)ended at its start.*max_model_len"):
        await pool.start(lambda *_: None, lambda _: None)


async def test_no_server_outlives_a_controller_that_is_killed(models, tmp_path):
    controller = f"""
import asyncio
from pathlib import Path
from tests.hub.test_vllm import make_pool

async def main():
    pool = make_pool(Path({str(models[0])!r}), Path({str(tmp_path)!r}), 1)
    await pool.start(lambda *_: None, lambda _: None)
    print(pool.pids[0], flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""
    root = Path(__file__).parents[2]
    process = subprocess.Popen(  # noqa: ASYNC220  (a child that is killed, and read in a thread)
        [sys.executable, "-c", controller], stdout=subprocess.PIPE, cwd=root, text=True
    )
    assert process.stdout is not None
    server = psutil.Process(int(await asyncio.to_thread(process.stdout.readline)))
    watch = Watch(p.pid for p in [server, *server.children(recursive=True)])
    assert len(watch) >= 3
    process.kill()
    process.wait()
    process.stdout.close()
    assert not await asyncio.to_thread(watch.left)
