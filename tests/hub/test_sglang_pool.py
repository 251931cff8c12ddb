"""A pool of SGLang servers, and a whole run on it: with servers that only have SGLang's routes."""

import asyncio
import signal
import sys
from pathlib import Path

import psutil
import pytest

from flash.hub.sglang_pool import SglangPool
from flash.telemetry.folder import read_lines
from tests.processes import Watch
from tests.tiny_runs import OUTCOMES, run, tiny

PLANTED = Path(__file__).parent / "planted_sglang"


def make_pool(tmp_path: Path, **options) -> SglangPool:
    return SglangPool(
        "org/model",
        **{
            "size": 2, "max_running": 8, "max_tokens": 512, "tensor_parallel": 2,
            "devices": [1, 2, 3, 4], "gpu_memory": 0.7, "dtype": "bfloat16", "seed": 3,
            "cache_tokens": 4096, "threads": 5,
            "arguments": ("--attention-backend=fa3",), "log_dir": tmp_path, "start_timeout_s": 60,
            **options,
        },
    )  # fmt: skip


def test_a_server_is_started_with_what_rollout_needs(tmp_path):
    pool = make_pool(tmp_path)
    first, second = (pool._command(number, "127.0.0.1", 7) for number in (0, 1))
    assert first[:7] == [
        sys.executable, "-m", "flash.worker.watched_server", "flash.worker.sglang_server",
        "--model-path=org/model", "--host=127.0.0.1", "--port=7",
    ]  # fmt: skip
    assert first[8:] == second[8:] == [
        "--dtype=bfloat16", "--context-length=512", "--max-running-requests=8", "--tp-size=2",
        "--mem-fraction-static=0.7", "--log-level=warning", "--skip-tokenizer-init",
        "--incremental-streaming-output", "--attention-backend=fa3",
    ]  # fmt: skip
    assert first[7] != second[7], "each has a seed of its own"
    environment = pool._environment(1)
    assert environment["SGLANG_RETURN_ORIGINAL_LOGPROB"] == "false"
    assert environment["CUDA_VISIBLE_DEVICES"] == "3,4"
    assert not any(environment["SGLANG_API_KEY"] in word for word in first)


def test_without_a_gpu_it_is_on_the_cpu(tmp_path):
    pool = make_pool(tmp_path, devices=[], tensor_parallel=1)
    assert pool._command(0, "", 0)[-6:-1] == [
        "--device=cpu", "--attention-backend=torch_native", "--max-total-tokens=4096",
        "--skip-tokenizer-init", "--incremental-streaming-output",
    ]  # fmt: skip
    environment = pool._environment(0)
    assert environment["OMP_NUM_THREADS"] == "5"
    assert "CUDA_VISIBLE_DEVICES" not in environment
    assert "OMP_NUM_THREADS" not in make_pool(tmp_path)._environment(0)


@pytest.mark.parametrize(
    ("options", "argument"),
    [({"sleeps": True}, "--enable-memory-saver"),
     ({"keeps_stale": True}, "--disable-overlap-schedule")],
)  # fmt: skip
def test_what_a_server_has_to_be_able_to_is_switched_on(options, argument, tmp_path):
    assert argument in make_pool(tmp_path, **options)._command(0, "", 0)
    assert argument not in make_pool(tmp_path)._command(0, "", 0)


def test_a_server_can_not_have_more_gpus_than_there_are(tmp_path):
    with pytest.raises(ValueError, match="engine.tensor_parallel=8 exceeds the 4 GPUs"):
        make_pool(tmp_path, tensor_parallel=8)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("update_mode", ["keep", "keep_stale_kv"])
async def test_a_run_on_sglang_servers_goes_on_when_one_is_killed(
    update_mode, tmp_path, monkeypatch
):
    monkeypatch.syspath_prepend(PLANTED)
    monkeypatch.setenv("PYTHONPATH", str(PLANTED), prepend=":")
    engine = {"kind": "sglang", "workers": 2, "max_running": 8, "update_mode": update_mode}
    config = tiny("frozen_lake", tmp_path, name="r", eval_every=0, engine=engine, steps=4)
    running = asyncio.create_task(run(config))
    metrics = tmp_path / "r" / "metrics.jsonl"
    while not (metrics.exists() and len(read_lines(metrics)) > 2):  # two publishes
        assert not running.done(), running.result()
        await asyncio.sleep(0.05)
    processes = psutil.Process().children(recursive=True)
    watch = Watch(process.pid for process in processes)
    lines = {process.pid: " ".join(process.cmdline()) for process in processes}
    assert not any("api-key" in line for line in lines.values())
    servers = [
        pid for pid, line in lines.items()
        if "flash.worker.sglang_server" in line and "watched_server" not in line
    ]  # fmt: skip
    assert len(servers) == 2
    psutil.Process(servers[0]).send_signal(signal.SIGKILL)
    summary = await running
    assert summary["steps"] == 4
    for line in read_lines(metrics)[1:]:
        assert line["staleness/max"] <= 1
        assert line["logprob_gap/max"] < 1e-3
        counts = {name: line[f"episodes/{name}"] for name in OUTCOMES}
        assert counts.pop("admitted") == sum(counts.values())
        assert line["episodes/failed"] == 0
    assert not await asyncio.to_thread(watch.left)
