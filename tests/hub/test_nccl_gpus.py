"""Weights over NCCL itself, on NVIDIA GPUs: a controller's sender, and an explorer's vLLM server.

NCCL takes no group in which two ranks are on one GPU: all but the first test needs two.
"""

import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from flash.explorer.senders import Sending
from flash.hub.hub import InferenceHub
from flash.hub.nccl_worker import NcclPool
from flash.hub.sender import SenderProcess, StartSender, listening_at, nccl_sender
from flash.system.machine import gpus, has_vllm
from flash.types import GenerateRequest, SamplingParams, Weights
from flash.warm_start.small_policy import create
from tests.explorer.fleets import over_a_gate

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not has_vllm(), reason="vLLM is not installed: make setup-vllm"),
]
TWO = pytest.mark.skipif(len(gpus()) < 2, reason="the ranks of a NCCL group are on GPUs apart")
START_S = 400


def sender(folder: Path, address: str) -> StartSender:
    """On the first GPU, as a run with explorers starts them."""
    log = folder / "sender.log"
    return nccl_sender(0, name="sender", log_path=log, env=listening_at(address))


def model_of(folder: Path, seed: int) -> Path:
    made = create(
        folder, [f"w{n}" for n in range(50)], layers=2, hidden_size=128, heads=2, seed=seed
    )
    settings = AutoModelForCausalLM.from_pretrained(made).config
    settings.tie_word_embeddings = False
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(settings).save_pretrained(made)
    return made


def pool_of(model: Path, logs: Path, senders: Callable[[int], StartSender], **options) -> NcclPool:
    return NcclPool(
        str(model), size=1, max_running=8, max_tokens=256, cache_tokens=4096, gpu_memory=0.3,
        dtype="bfloat16", threads=0, seed=0, arguments=("--enforce-eager",), senders=senders,
        log_dir=logs, start_timeout_s=START_S, **options,
    )  # fmt: skip


async def test_a_sender_listens_at_the_address_that_it_is_given(tmp_path):
    process = await sender(tmp_path, "127.0.0.1")()
    try:
        group_id = await process.new_id()
        # After a number of 8 bytes: the family, the port and the address of a socket.
        assert socket.inet_ntoa(group_id[12:16]) == "127.0.0.1"
    finally:
        process.kill()
        await process.stop()


@TWO
@pytest.mark.parametrize("ranks", [1, 2])
async def test_an_explorers_server_samples_with_what_the_controller_sent(tmp_path, ranks):
    if len(gpus()) < 1 + ranks:
        pytest.skip(f"a sender and {ranks} ranks of a server are on GPUs apart")
    folders = {version: model_of(tmp_path / str(version), version) for version in range(3)}

    async def start(explorer: str, worker: int, address: str) -> SenderProcess:
        return await sender(tmp_path, address)()

    async def weights(version: int) -> Weights | None:
        return Weights(version=version, path=folders[version])

    ask = GenerateRequest(token_ids=[5, 6, 7], sampling=SamplingParams(max_tokens=16))
    async with (
        over_a_gate(Sending(start=start, weights=weights)) as connection,
        InferenceHub(
            pool_of(
                folders[0], tmp_path / "logs", connection.senders.of,
                devices=gpus()[1 : 1 + ranks], tensor_parallel=ranks,
            )
        ) as hub,
    ):  # fmt: skip
        for version in (1, 2):
            report = await hub.publish(Weights(version=version, path=Path("elsewhere")))
            assert report.workers == 1
            answer = await hub.generate(ask)
            assert set(answer.versions) == {version}
            told = partial(logprobs, ask.token_ids, answer.token_ids)
            assert answer.logprobs == pytest.approx(told(folders[version]), abs=0.1)
            assert answer.logprobs != pytest.approx(told(folders[version - 1]), abs=0.1)


def logprobs(prompt: list[int], answer: list[int], folder: Path) -> list[float]:
    """Of the answer, by a plain forward pass."""
    tokens = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(tokens).logits[0, :-1]
    told = logits.log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0]
    return told[len(prompt) - 1 :].tolist()
