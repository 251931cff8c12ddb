"""A real vLLM server that is given the trainer's adapters, on the CPU build."""

import asyncio
import os
import signal
from pathlib import Path

import psutil
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from flash.config import load
from flash.fakes import fake_sample
from flash.hub.hub import InferenceHub
from flash.hub.vllm_pool import VllmPool
from flash.system.machine import gpus, has_vllm
from flash.trainer.config import LoraConfig, TrainerConfig
from flash.trainer.objectives.settings import Supervised
from flash.trainer.trainer import Trainer
from flash.types import Batch, GenerateRequest, SamplingParams
from flash.warm_start.small_policy import create

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not has_vllm(), reason="vLLM is not installed: make setup-vllm"),
]

PROMPT = list(range(5, 45))  # more than a block of keys and values
START_S = 300


def logprobs(model, token_ids: list[int]) -> list[float]:
    """Of `token_ids[1:]`."""
    tokens = torch.tensor([token_ids])
    with torch.no_grad():
        logits = model(tokens).logits[0, :-1]
    return logits.log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0].tolist()


async def test_requests_have_each_version_of_the_adapters_also_of_a_server_that_is_started_anew(
    tmp_path: Path,
):
    words = [f"w{n}" for n in range(300)]
    model = create(tmp_path / "model", words, layers=2, hidden_size=64, heads=2)
    config = TrainerConfig(
        lora=LoraConfig(rank=4, publish="adapters"), objective=Supervised(), learning_rate=0.02,
        warmup_steps=0, threads=1,
    )  # fmt: skip
    pool = VllmPool(
        str(model), size=1, max_running=8, max_tokens=1024, cache_tokens=16_384,
        tensor_parallel=1, devices=gpus(), gpu_memory=0.3, dtype="float32", threads=1, seed=0,
        arguments=[], log_dir=tmp_path / "logs", start_timeout_s=START_S, adapter_rank=4,
    )  # fmt: skip
    plain = AutoModelForCausalLM.from_pretrained(model)
    of_version = {0: plain}
    async with Trainer(model=model, config=config, run_dir=tmp_path) as trainer:
        first = await trainer.export_weights()
        async with InferenceHub(
            pool, max_running=8, weights=first, recovery_timeout_s=START_S
        ) as hub:
            sampling = SamplingParams(max_tokens=500, temperature=1.0)
            request = GenerateRequest(token_ids=PROMPT, sampling=sampling)
            running = [asyncio.create_task(hub.generate(request)) for _ in range(4)]
            for version in range(2):
                sample = fake_sample([7, 8, 9 + version, 4], [0.0, 1.0, 1.0, 1.0])
                await trainer.step(Batch(samples=[sample], version=version))
                weights = await trainer.export_weights()
                published = list(weights.path.iterdir())
                await trainer.save_model(tmp_path / f"adapters_{version + 1}")
                report = await hub.publish(weights)  # probed: by the trainer's own scores
                assert report.workers == 1
                assert report.gap is not None
            answers = await asyncio.gather(*running)
            answers.append(await hub.generate(request))
            server = psutil.Process(pool.pids[0]).children()[0]
            os.kill(server.pid, signal.SIGKILL)
            again = await asyncio.gather(*(hub.generate(request) for _ in range(4)))
            assert hub.stats().retries  # of those, whose server starts with the model alone
    for version in (1, 2):
        base = AutoModelForCausalLM.from_pretrained(model)
        of_version[version] = PeftModel.from_pretrained(base, tmp_path / f"adapters_{version}")
    assert {path.name for path in published} == {"adapter_config.json", "adapter_model.safetensors"}
    assert {version for answer in [answers[-1], *again] for version in answer.versions} == {2}
    assert len({version for answer in answers for version in answer.versions}) > 1
    for answer in [*answers, *again]:
        for version in set(answer.versions):
            sequence = [*PROMPT, *answer.token_ids]
            expected = logprobs(of_version[version], sequence)[len(PROMPT) - 1 :]
            for got, wanted, of in zip(answer.logprobs, expected, answer.versions, strict=True):
                if of == version:
                    assert got == pytest.approx(wanted, abs=1e-3), f"version {version}"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"engine.transport": "nccl"}, "engine.transport=nccl: adapters come as files"),
        ({"explorers.expected": 1}, "explorers.expected=1: explorers get whole weights: use"),
        ({"trainer.lora.rank": 600}, "trainer.lora.rank=600: vLLM takes ranks up to 512"),
    ],
)
def test_who_would_get_adapters_and_can_not_take_them_is_named(changes, why):
    adapters = {"trainer.lora.rank": 4, "trainer.lora.publish": "adapters", "engine": "vllm"}
    with pytest.raises(ValueError, match=rf"^trainer\.lora\.publish=adapters with {why}"):
        load("frozen_lake", {**adapters, **changes})
