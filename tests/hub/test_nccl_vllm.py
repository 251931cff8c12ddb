"""A real trainer, a real sender and vLLM's own receiving code, with gloo in NCCL's place.

The server is an explorer's: its hub has the trainer's side through a link alone.
"""

import asyncio
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from flash.explorer.senders import Sending
from flash.fakes import fake_sample
from flash.hub.hub import InferenceHub
from flash.hub.nccl_worker import NcclPool, NcclWorker
from flash.hub.sender import LocalSender, SenderProcess, StartSender
from flash.system.machine import gpus, has_vllm
from flash.system.process import Child
from flash.trainer.config import TrainerConfig
from flash.trainer.trainer import Trainer
from flash.types import Batch, GenerateRequest, SamplingParams, Weights
from flash.warm_start.small_policy import create
from flash.worker.tensors import chunks_of
from tests.explorer.fleets import over_a_gate

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not has_vllm(), reason="vLLM is not installed: make setup-vllm"),
    pytest.mark.skipif(bool(gpus()), reason="gloo stands in for NCCL where there is no GPU"),
]

# Of the servers and the senders: what stands for NCCL, and weights as a GPU has them.
FOLDERS = ":".join(str(Path(__file__).parent / name) for name in ("gloo", "planted"))
CHUNK_BYTES = 20_000
RETURN_S = 400  # for a server to be started anew on a busy machine


class GlooPool(NcclPool):
    """Its first sender dies in the second publish."""

    def __init__(self, model: Path, log_dir: Path, senders: Callable[[int], StartSender]) -> None:
        arguments = (
            "--worker-extension-cls=gloo_engine.Extension",
            '--weight-transfer-config={"backend": "gloo"}',
        )
        super().__init__(
            str(model), size=1, max_running=8, max_tokens=256, cache_tokens=4096,
            tensor_parallel=1, devices=[], gpu_memory=0.3, dtype="float32", threads=1, seed=0,
            senders=senders, arguments=arguments, log_dir=log_dir, start_timeout_s=RETURN_S,
        )  # fmt: skip

    def _client(self, number: int, url: str) -> NcclWorker:
        return NcclWorker(
            url,
            api_key=self._api_key,
            start_sender=self._senders(number),
            chunk_bytes=CHUNK_BYTES,
        )


class GlooSenders:
    """The controller's; the first dies in the second publish. They send what is `published`."""

    def __init__(self, log: Path) -> None:
        self.started = 0
        self.published: dict[int, Weights] = {}
        self._log = log

    def publish(self, weights: Weights) -> Weights:
        """What an explorer is told of them: its path says nothing to it."""
        self.published[weights.version] = weights
        self._chunks = len(chunks_of(weights.path, CHUNK_BYTES))
        return replace(weights, path=Path("elsewhere"))

    async def start(self, explorer: str, worker: int, address: str) -> SenderProcess:
        death = -1 if self.started else self._chunks + 2
        self.started += 1
        child = await Child.start(
            "gloo_sender", name="sender", log_path=self._log, env={"DIE_IN_CHUNK": str(death)}
        )
        return LocalSender(child)

    async def weights(self, version: int) -> Weights | None:
        return self.published.get(version)


def untie(directory: Path) -> None:
    """vLLM on a CPU keeps a head that shares the embedding's weights as it was (0.32)."""
    settings = AutoModelForCausalLM.from_pretrained(directory).config
    settings.tie_word_embeddings = False
    AutoModelForCausalLM.from_config(settings).save_pretrained(directory)


def batch(version: int) -> Batch:
    rng = np.random.default_rng(version)
    samples = [
        fake_sample(
            rng.integers(0, 50, 20),
            np.ones(20, np.float32),
            logprobs=np.full(20, -4.0, np.float32),
            versions=np.full(20, version),
            advantage=float(advantage),
        )
        for advantage in (1.0, -1.0)
    ]
    return Batch(samples=samples, version=version)


async def test_two_ranks_send_to_vllm_and_one_that_breaks_off_returns_with_what_was_published(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", FOLDERS)
    words = [f"w{n}" for n in range(50)]
    model = create(tmp_path / "model", words, layers=2, hidden_size=64, heads=2, seed=0)
    untie(model)
    config = TrainerConfig(ranks=2, learning_rate=1e-2, warmup_steps=0, threads=1)
    ask = GenerateRequest(token_ids=[5, 6, 7], sampling=SamplingParams(max_tokens=16))
    async with Trainer(model=model, config=config, run_dir=tmp_path) as trainer:
        first = await trainer.export_weights()
        senders = GlooSenders(tmp_path / "logs" / "sender.log")
        senders.publish(first)
        sending = Sending(start=senders.start, weights=senders.weights)
        async with (
            over_a_gate(sending) as connection,
            InferenceHub(
                GlooPool(model, tmp_path / "logs", connection.senders.of),
                recovery_timeout_s=2 * RETURN_S,
            ) as hub,
        ):
            assert (await hub.probe(first)).max < 1e-3
            await trainer.step(batch(0))
            report = await hub.publish(senders.publish(await trainer.export_weights()))
            assert report.workers == 1
            assert report.gap.max < 1e-3

            await trainer.step(batch(1))
            published = await trainer.export_weights()
            report = await hub.publish(senders.publish(published))
            assert report.workers == 0  # the sender died
            await trainer.step(batch(2))

            answer = await asyncio.wait_for(hub.generate(ask), RETURN_S)
            assert set(answer.versions) == {2}
            assert senders.started == 2
            sequence = [*ask.token_ids, *answer.token_ids]
            sampled = slice(len(ask.token_ids) - 1, None)
            wanted = logprobs(published.path, sequence)[sampled]
            assert answer.logprobs == pytest.approx(wanted, abs=1e-3)
            # Which is not what the trainer has by now.
            present = (await trainer.score([sequence])).logprobs[0][sampled]
            assert answer.logprobs != pytest.approx(present, abs=1e-2)


def test_vllm_has_what_the_sender_over_nccl_takes_from_it():
    script = """
import inspect
import torch
from vllm.distributed.device_communicators.pynccl_wrapper import ncclDataTypeEnum, ncclUniqueId
from flash.trainer import nccl

inspect.signature(nccl.uid_init_process_group).bind(b"", 0, 2, torch.device("cuda", 0))
inspect.signature(nccl.PyNcclCommunicator.broadcast).bind(None, None, src=0, stream=None)
inspect.signature(nccl.NCCLLibrary.ncclGetUniqueId).bind(None)
group_id = ncclUniqueId()
group_id.internal[0] = -1
assert bytes(group_id.internal) == bytes([255] + [0] * 127)
ncclDataTypeEnum.from_torch(torch.uint8)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def logprobs(directory: Path, token_ids: list[int]) -> list[float]:
    """Of `token_ids[1:]`, by a plain forward pass."""
    tokens = torch.tensor([token_ids])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(directory)(tokens).logits[0, :-1]
    return logits.log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0].tolist()
