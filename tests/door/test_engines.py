"""The door over real engines: what it records is what the model gives to those tokens."""

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flash.door import Door
from flash.hub.embedded_pool import EmbeddedPool
from flash.hub.hub import InferenceHub
from flash.hub.vllm_pool import VllmPool
from flash.rollout.episode import Episode
from flash.system.machine import gpus, has_vllm
from flash.types import SampledSequence, Task
from flash.warm_start.small_policy import create

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def embedded(path, log_dir) -> EmbeddedPool:
    return EmbeddedPool(
        str(path), size=1, max_running=8, cache_tokens=4096, threads=1, dtype="float32",
        version=0, seed=0, log_dir=log_dir, start_timeout_s=300,
    )  # fmt: skip


def vllm(path, log_dir) -> VllmPool:
    return VllmPool(
        str(path), size=1, max_running=8, max_tokens=512, cache_tokens=4096, tensor_parallel=1,
        devices=gpus(), gpu_memory=0.3, dtype="float32", threads=1, seed=0, arguments=(),
        log_dir=log_dir, start_timeout_s=300,
    )  # fmt: skip


VLLM = pytest.param(
    vllm,
    (1.0,),
    marks=pytest.mark.skipif(not has_vllm(), reason="vLLM is not installed: make setup-vllm"),
)


def gap(model, sequence: SampledSequence) -> float:
    """Between the recorded logprobs and those of a plain forward pass at their temperatures."""
    tokens = torch.tensor(sequence.token_ids)[None]
    with torch.no_grad():
        logits = model(tokens).logits[0, :-1] / torch.tensor(sequence.temperatures[1:, None])
    expected = logits.log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0]
    sampled = torch.tensor(sequence.loss_mask[1:] > 0)
    assert sampled.any()
    return float((expected - torch.tensor(sequence.logprobs[1:]))[sampled].abs().max())


@pytest.mark.parametrize(("engine", "temperatures"), [(embedded, (1.0, 0.6)), VLLM])
async def test_recorded_logprobs_are_the_models_own(tmp_path, engine, temperatures):
    """Also those of a later turn, whose prompt is made of sampled tokens and new ones."""
    words = [f"w{n}" for n in range(300)]
    path = create(tmp_path / "model", words, layers=1, hidden_size=64, heads=2, seed=3)
    model = AutoModelForCausalLM.from_pretrained(path)
    pool = engine(path, tmp_path / "logs")
    tokenizer = AutoTokenizer.from_pretrained(path)
    async with InferenceHub(pool) as hub, Door(hub, tokenizer=tokenizer, model="policy") as door:
        assert hub.constrains is (engine is vllm)
        for number, temperature in enumerate(temperatures):
            episode = Episode(number, Task(number), hub=hub)
            session = door.open(
                episode.generate, max_tokens=8, temperature=temperature, max_sequence_tokens=200
            )
            async with openai.AsyncOpenAI(base_url=session.base_url, api_key="-") as client:
                messages = [{"role": "user", "content": "w1 w2 w3"}]
                for turn in range(4):
                    answer = await client.chat.completions.create(
                        model="policy", messages=messages, logprobs=True
                    )
                    messages += [
                        answer.choices[0].message, {"role": "user", "content": f"w{turn}"},
                    ]  # fmt: skip
                text = await client.completions.create(model="policy", prompt="w7 w8", n=2)
            grown, *texts = session.sequences()
            assert (len(text.choices), len(texts)) == (2, 2)
            last = [entry.logprob for entry in answer.choices[0].logprobs.content]
            assert last == pytest.approx(grown.logprobs[-len(last) :].tolist())
            assert set(grown.sampled_versions()) == {0}
            assert max(gap(model, sequence) for sequence in (grown, *texts)) < 1e-3
