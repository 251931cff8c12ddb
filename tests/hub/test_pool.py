"""Real embedded workers behind the hub: processes that start, serve, die and leave nothing."""

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from flash.errors import InferenceFailure
from flash.hub.embedded_pool import EmbeddedPool
from flash.hub.hub import InferenceHub
from flash.hub.pool import ProcessPool
from flash.hub.vllm_pool import VllmPool
from flash.types import GenerateRequest, SamplingParams, Scores, Weights
from flash.warm_start.small_policy import create
from tests.processes import Watch

pytestmark = pytest.mark.slow
DEAF = (lambda worker, why, final: None, lambda worker: None)


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

    def logprobs(token_ids):
        tokens = torch.tensor([list(token_ids)])
        with torch.no_grad():
            logprobs = loaded(tokens).logits[0, :-1].log_softmax(-1)
        return logprobs.gather(-1, tokens[0, 1:, None])[:, 0].tolist()

    async def score(sequences):
        return Scores(logprobs=list(map(logprobs, sequences)))

    return Weights(version=version, path=model, score=score)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.timeout(500)
async def test_a_pool_serves_publishes_exactly_and_outlives_its_workers(models, tmp_path):
    """One test of one pool, because a worker's start is seconds of imports."""
    pool = make_pool(models[0], tmp_path, size=2)
    async with InferenceHub(pool, max_running=4) as hub:
        answers = await asyncio.gather(*(hub.generate(request()) for _ in range(8)))
        assert len({answer.worker for answer in answers}) == 2
        assert {v for answer in answers for v in answer.versions} == {0}
        assert (await hub.probe(weights(0, models[0]))).max < 1e-4
        report = await hub.publish(weights(1, models[1]))
        assert report.workers == 2
        assert report.gap.max < 1e-4
        assert set((await hub.generate(request())).versions) == {1}

        for victims in (1, 2):  # one, then all of them
            calls = [asyncio.ensure_future(hub.generate(request(400))) for _ in range(8)]
            while sum(worker.running for worker in hub.stats().workers) < 8:
                await asyncio.sleep(0)
            retries = hub.stats().retries
            for pid in pool.pids[:victims]:
                os.kill(pid, signal.SIGKILL)
            answers = await asyncio.gather(*calls)
            assert all(len(answer.token_ids) == 400 for answer in answers)
            assert {v for answer in answers for v in answer.versions} == {1}
            assert hub.stats().retries > retries, "it had requests when it was killed"
            async with asyncio.timeout(200):
                while not all(worker.healthy for worker in hub.stats().workers):
                    await asyncio.sleep(0.05)
        assert (await hub.probe(weights(1, models[1]))).max < 1e-4, "back with the first weights"
        pids = pool.pids
    assert not any(map(is_alive, pids))


async def test_a_start_that_is_cancelled_leaves_no_process(models, tmp_path):
    pool = make_pool(models[0], tmp_path, size=2)
    starting = asyncio.ensure_future(pool.start(*DEAF))
    while len(pool.pids) < 2:
        await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert not any(map(is_alive, pool.pids))


async def test_a_worker_that_is_not_ready_in_time_is_told_with_its_log(models, tmp_path):
    pool = make_pool(models[0], tmp_path, start_timeout_s=0.01)
    with pytest.raises(InferenceFailure, match="was not ready after engine.start_timeout_s=0.01"):
        await pool.start(*DEAF)
    assert not any(map(is_alive, pool.pids))


def test_a_worker_whose_parent_is_killed_dies(models, tmp_path):
    parent = f"""
import asyncio
from pathlib import Path
from flash.hub.embedded_pool import EmbeddedPool

async def main():
    pool = EmbeddedPool({str(models[0])!r}, size=1, max_running=8, cache_tokens=4096, threads=1,
        dtype="float32", version=0, seed=0, log_dir=Path({str(tmp_path)!r}), start_timeout_s=120)
    await pool.start(lambda worker, why, final: None, lambda worker: None)
    print(pool.pids[0], flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE)
    assert process.stdout is not None
    worker = Watch([int(process.stdout.readline())])
    process.kill()
    process.wait()
    process.stdout.close()
    assert not worker.left()


async def test_a_worker_that_dies_at_its_start_shows_its_log(tmp_path):
    with pytest.raises(InferenceFailure, match="ended at its start with exit code") as caught:
        async with InferenceHub(make_pool(tmp_path / "nothing", tmp_path)):
            pass
    assert str(tmp_path / "nothing") in str(caught.value)


# ── the pool itself, with a worker whose start is quick ──────────────────────────────────────

QUICK = """
import sys
from aiohttp import web
from flash.fakes import FakeWorker, worker_app
from flash.system.process import die_with_parent
die_with_parent()
web.run_app(worker_app(FakeWorker("w")), host="127.0.0.1", port=int(sys.argv[1]), print=None)
"""


class TakenPool(ProcessPool):
    """Its worker has not come to listening when somebody else takes the port."""

    def __init__(self, tmp_path: Path) -> None:
        super().__init__(size=1, log_dir=tmp_path, start_timeout_s=1)
        self.impostor = socket.socket()

    def _command(self, number: int, host: str, port: int) -> list[str]:
        self.impostor.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.impostor.bind((host, port))
        self.impostor.listen()
        return ["sleep", "1000"]

    def _environment(self, number: int) -> dict[str, str]:
        return {}


async def test_whoever_else_listens_at_a_workers_port_is_not_told_the_key(tmp_path):
    pool = TakenPool(tmp_path)
    with pool.impostor, pytest.raises(InferenceFailure, match="was not ready after"):
        try:
            await pool.start(*DEAF)
        finally:
            pool.impostor.setblocking(False)
            with pytest.raises(BlockingIOError):
                pool.impostor.accept()


class QuickPool(ProcessPool):
    """Fake workers behind HTTP; the code of later starts can be another."""

    def __init__(self, tmp_path: Path, later: str = QUICK) -> None:
        super().__init__(size=1, log_dir=tmp_path, start_timeout_s=60)
        self.starts = 0
        self._later = later

    def _command(self, number: int, host: str, port: int) -> list[str]:
        self.starts += 1
        return [sys.executable, "-c", QUICK if self.starts == 1 else self._later, str(port)]

    def _environment(self, number: int) -> dict[str, str]:
        return {}


async def test_a_worker_that_dies_is_started_anew_under_its_name(tmp_path):
    exits: asyncio.Queue = asyncio.Queue()
    returns: asyncio.Queue = asyncio.Queue()
    pool = QuickPool(tmp_path)
    (worker,) = await pool.start(lambda *told: exits.put_nowait(told), returns.put_nowait)
    (pid,) = pool.pids
    os.kill(pid, signal.SIGKILL)
    told, why, final = await exits.get()
    assert told is worker
    assert f"(pid {pid}) ended with exit code -9" in why
    assert not final
    assert await returns.get() is worker
    await worker.check_health()
    pool.restart(worker)
    assert (await exits.get())[2] is False
    assert await returns.get() is worker
    assert pool.starts == 3
    await pool.stop()


async def test_a_pool_that_is_held_starts_nobody_until_it_is_released(tmp_path):
    exits: asyncio.Queue = asyncio.Queue()
    returns: asyncio.Queue = asyncio.Queue()
    pool = QuickPool(tmp_path)
    (worker,) = await pool.start(lambda *told: exits.put_nowait(told), returns.put_nowait)
    pool.hold()
    pool.restart(worker)
    await exits.get()
    (waits,) = [task for task in asyncio.all_tasks() if task.get_name() == "keep worker 0"]
    with pytest.raises(TimeoutError):  # longer than it backs off
        await asyncio.wait_for(asyncio.shield(waits), timeout=2)
    assert pool.starts == 1
    pool.release()
    assert await returns.get() is worker
    await pool.stop()


async def test_a_worker_that_dies_at_every_start_is_given_up_with_its_log(tmp_path, monkeypatch):
    monkeypatch.setattr("flash.hub.pool._FIRST_BACKOFF_S", 0.0)
    exits: asyncio.Queue = asyncio.Queue()
    pool = QuickPool(tmp_path, later="raise SystemExit('no memory')")
    await pool.start(lambda *told: exits.put_nowait(told), lambda worker: None)
    os.kill(pool.pids[0], signal.SIGKILL)
    told = [await exits.get() for _ in range(5)]
    assert [final for _, _, final in told] == [False, False, False, False, True]
    assert "no memory" in told[-1][1]
    await pool.stop()
    assert exits.empty()


SLOW_START = """
import os, sys, time
from pathlib import Path
port, heard = sys.argv[1], Path(sys.argv[2])
for line in ("(EngineCore pid=9) INFO [core.py:133] Initializing a V1 LLM engine (v0.32.0) with",
             "(Worker pid=9) INFO [gpu_model_runner.py:5040] Starting to load model org/model...",
             "Loading safetensors checkpoint shards: 100% Completed | 1/1",
             "INFO [backends.py:1105] Using cache directory: /c for vLLM's torch.compile",
             "Capturing CUDA graphs (mixed prefill-decode, PIECEWISE):   0%|   | 0/51"):
    print(line, end="" if "Capturing" in line else "\\n", flush=True)
    deadline = time.monotonic() + 60
    while "shards" not in line and line[-12:] not in heard.read_text():
        assert time.monotonic() < deadline, heard.read_text()
        time.sleep(0.01)
os.execv(sys.executable, [sys.executable, "-c", {quick!r}, port])
"""


class StagedPool(QuickPool):
    """Its worker goes on with its start only when each stage has been told."""

    _STAGES = VllmPool._STAGES

    def __init__(self, tmp_path: Path) -> None:
        super().__init__(tmp_path)
        self.said: list[str] = []
        self._say = self._told
        self._heard = tmp_path / "heard"
        self._heard.touch()

    def _told(self, text: str) -> None:
        self.said.append(re.sub(r"\d+ s", "N s", text))
        log = (self._log_dir / "worker_0.log").read_text().splitlines()
        self._heard.write_text("\n".join([*self._heard.read_text().splitlines(), log[-1][-12:]]))

    def _command(self, number: int, host: str, port: int) -> list[str]:
        code = SLOW_START.replace("{quick!r}", repr(QUICK))
        return [sys.executable, "-c", code, str(port), str(self._heard)]


async def test_what_vllm_is_at_while_it_starts_is_told(tmp_path):
    pool = StagedPool(tmp_path)
    await pool.start(*DEAF)
    await pool.stop()
    assert pool.said == [
        "engine: vLLM starts its engine (after N s)",
        "engine: vLLM loads the model (after N s)",
        "engine: vLLM compiles the model, or takes what it compiled before (after N s)",
        "engine: vLLM captures CUDA graphs (after N s)",
        "engine: ready after N s",
    ]
