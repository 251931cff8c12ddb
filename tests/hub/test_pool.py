"""Real embedded workers behind the hub: processes that start, serve, die and leave nothing."""

import asyncio
import os
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from flash.errors import InferenceFailure
from flash.hub import EmbeddedPool, InferenceHub
from flash.small_policy import create
from flash.types import GenerateRequest, SamplingParams, Weights

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    words = [f"w{n}" for n in range(50)]
    return [
        create(folder / str(seed), words, layers=1, hidden_size=32, seed=seed) for seed in (0, 1)
    ]


def make_pool(model, tmp_path: Path, size: int = 1, **changes) -> EmbeddedPool:
    options = {
        "max_running": 8, "cache_tokens": 4096, "threads": 1, "dtype": "float32", "version": 0,
        "seed": 0, "log_dir": tmp_path / "logs", "start_timeout_s": 120, **changes,
    }  # fmt: skip
    return EmbeddedPool(str(model), size=size, **options)


def request(max_tokens: int = 4) -> GenerateRequest:
    return GenerateRequest(token_ids=[5, 6, 7], sampling=SamplingParams(max_tokens=max_tokens))


def weights(version: int, model: Path) -> Weights:
    loaded = AutoModelForCausalLM.from_pretrained(model)

    async def score(token_ids):
        tokens = torch.tensor([list(token_ids)])
        with torch.no_grad():
            logprobs = loaded(tokens).logits[0, :-1].log_softmax(-1)
        return logprobs.gather(-1, tokens[0, 1:, None])[:, 0].tolist()

    return Weights(version=version, path=model, score=score)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_two_workers_serve_and_take_new_weights_exactly(models, tmp_path):
    pool = make_pool(models[0], tmp_path, size=2)
    async with InferenceHub(pool) as hub:
        pids = [process.pid for process in pool._processes]
        answers = await asyncio.gather(*(hub.generate(request()) for _ in range(8)))
        assert len({answer.worker for answer in answers}) == 2
        assert {v for answer in answers for v in answer.versions} == {0}
        report = await hub.publish(weights(1, models[1]))
        assert report.workers == 2
        assert report.gap_max < 1e-4
        assert set((await hub.generate(request())).versions) == {1}
    assert not any(map(is_alive, pids))


async def test_requests_of_a_killed_worker_move_and_the_last_ones_death_is_the_end(
    models, tmp_path
):
    pool = make_pool(models[0], tmp_path, size=2)
    async with InferenceHub(pool, max_running=4) as hub:
        calls = [asyncio.ensure_future(hub.generate(request(400))) for _ in range(4)]
        while sum(worker.running for worker in hub.stats().workers) < 4:
            await asyncio.sleep(0)
        first, second = pool._processes
        os.kill(first.pid, signal.SIGKILL)
        answers = await asyncio.gather(*calls)
        assert len({answer.worker for answer in answers}) <= 2
        await first.wait()
        os.kill(second.pid, signal.SIGKILL)
        with pytest.raises(InferenceFailure, match="no inference worker is left"):
            while True:
                await hub.generate(request(400))


async def test_a_worker_that_dies_at_its_start_shows_its_log(tmp_path):
    with pytest.raises(InferenceFailure, match="ended at its start with exit code 1") as caught:
        async with InferenceHub(make_pool(tmp_path / "nothing", tmp_path)):
            pass
    assert "nothing" in str(caught.value)
