"""A real vLLM server that is given what changed of its weights, by two ranks of the CPU build."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from flash.hub.hub import InferenceHub
from flash.hub.nccl_worker import NcclPool, NcclWorker
from flash.hub.sender import LocalSender
from flash.hub.vllm_pool import VllmPool
from flash.system.machine import gpus, has_vllm
from flash.system.process import Child
from flash.types import GenerateRequest, SamplingParams, Weights
from flash.warm_start.small_policy import create
from flash.worker.delta import KEY, PLACE_BYTES, delta_of, file_in
from tests.hub.deltas import stepped
from tests.hub.test_nccl_vllm import FOLDERS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not has_vllm(), reason="vLLM is not installed: make setup-vllm"),
    pytest.mark.skipif(bool(gpus()), reason="the ranks of the server are processes of a CPU"),
]

ASK = GenerateRequest(token_ids=[5, 6, 7], sampling=SamplingParams(max_tokens=16))
RETURN_S = 300


def as_bfloat16(model: Path, folder: Path) -> Path:
    shutil.copytree(model, folder)
    tensors = load_file(model / "model.safetensors")
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def spoil(export: Path, name: str) -> None:
    """The last bit of the first of a tensor's values in its delta."""
    delta = delta_of(export)
    changed = {tensor.name: tensor.changed for tensor in delta.tensors}[name]
    parts = load_file(file_in(export))
    parts[name][PLACE_BYTES * changed] ^= 1
    save_file(parts, file_in(export), {KEY: msgspec.json.encode(delta).decode()})


def logprobs(folder: Path, answer: list[int]) -> list[float]:
    """Of the answer, by a plain forward pass in float32."""
    tokens = torch.tensor([[*ASK.token_ids, *answer]])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        told = model(tokens).logits[0, :-1].log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0]
    return told[len(ASK.token_ids) - 1 :].tolist()


def by_files(model: Path, folder: Path) -> VllmPool:
    arguments = ("--worker-extension-cls=unpacked.UnpackedLoader",)
    return VllmPool(str(model), **options(folder), arguments=arguments)


class GlooPool(NcclPool):
    def _client(self, number: int, url: str) -> NcclWorker:
        return NcclWorker(
            url,
            api_key=self._api_key,
            start_sender=self._senders(number),
            chunk_bytes=2000,
            takes_deltas=True,
        )


def by_group(model: Path, folder: Path) -> VllmPool:
    async def start() -> LocalSender:
        log = folder / "sender.log"
        return LocalSender(await Child.start("gloo_sender", name="sender", log_path=log))

    arguments = (
        "--worker-extension-cls=gloo_engine.Extension",
        '--weight-transfer-config={"backend": "gloo"}',
    )
    return GlooPool(
        str(model), **options(folder), arguments=arguments, senders=lambda number: start
    )


def options(folder: Path) -> dict[str, Any]:
    return {
        "size": 1, "max_running": 8, "max_tokens": 256, "cache_tokens": 4096, "tensor_parallel": 2,
        "devices": [], "gpu_memory": 0.3, "dtype": "float32", "threads": 1, "seed": 0,
        "log_dir": folder, "start_timeout_s": RETURN_S,
    }  # fmt: skip


@pytest.mark.parametrize("pool_of", [by_files, by_group])
async def test_two_ranks_have_what_changed_and_the_whole_where_that_is_not_enough_or_they_are_new(
    pool_of, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("PYTHONPATH", f"{FOLDERS}:{os.environ.get('PYTHONPATH', '')}")
    words = [f"w{n}" for n in range(300)]
    first = create(tmp_path / "0", words, layers=2, hidden_size=64, heads=2, seed=0)
    pool = pool_of(first, tmp_path)
    async with InferenceHub(pool, recovery_timeout_s=2 * RETURN_S) as hub:
        client = type(hub._slots[0].worker)

        async def publish(folder: Path, version: int) -> None:
            report = await hub.publish(Weights(version=version, path=folder))
            assert report.workers == 1
            await answers_as(folder, version)

        async def answers_as(folder: Path, version: int) -> None:
            answer = await hub.generate(ASK)
            assert set(answer.versions) == {version}
            told = answer.logprobs
            assert told == pytest.approx(logprobs(folder, answer.token_ids), abs=1e-3)

        second = stepped(first, tmp_path / "1", 1)
        await publish(second, 1)  # whole: what it was started with is not known
        half = as_bfloat16(second, tmp_path / "half")
        await publish(half, 2)  # likewise, for the delta is of others
        with monkeypatch.context() as patch:
            patch.setattr(client, "_load_whole", None)  # it would fail
            for version in (3, 4):
                half = stepped(half, tmp_path / str(version), version)
                await publish(half, version)
        wrong = stepped(half, tmp_path / "5", 5)
        spoil(wrong, "model.norm.weight")
        await publish(wrong, 5)
        assert "has not all of model.norm.weight after a delta" in caplog.text
        server = psutil.Process(pool.pids[0]).children()[0]
        os.kill(server.pid, signal.SIGKILL)  # its ranks end with it
        await answers_as(wrong, 5)
