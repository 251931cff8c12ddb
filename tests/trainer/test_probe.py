"""The probe with real models on both sides: what it must see, and what it must let pass."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MistralConfig

from flash.config import load
from flash.errors import PublishFailure
from flash.hub.hub import InferenceHub
from flash.parts.workers import probe_of
from flash.trainer.config import TrainerConfig
from flash.trainer.packing import divide
from flash.trainer.rank import Rank
from flash.types import Completion, Sample, SamplingParams, Scores, Weights
from flash.worker.engine import EmbeddedEngine, EngineRequest

pytestmark = pytest.mark.slow

BOTH = [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")]


class EngineWorker:
    """An embedded engine as a worker, in the test's own process."""

    def __init__(self, model: Path, dtype: str) -> None:
        self.name = "engine"
        self.temperature = 1.0  # of what it samples, whatever it is asked
        self._engine = EmbeddedEngine(
            str(model), device="cpu", dtype=dtype, cache_tokens=4096, max_running=16
        )

    async def generate(
        self, request_id: str, token_ids: Any, sampling: SamplingParams, on_tokens: Any = None
    ) -> Completion:
        result = await self._engine.generate(
            EngineRequest(
                request_id=request_id,
                token_ids=token_ids,
                max_tokens=sampling.max_tokens,
                temperature=self.temperature,
            )
        )
        versions = [version for version, start, end in result.spans for _ in range(start, end)]
        return Completion(
            token_ids=result.token_ids,
            logprobs=result.logprobs,
            versions=versions,
            temperature=sampling.temperature,
            finish_reason=result.finish_reason,
            worker=self.name,
        )

    async def abort(self, request_id: str) -> None:
        self._engine.abort(request_id)

    async def pause(self, mode: Any) -> None:
        await self._engine.pause(mode)

    async def load_weights(self, weights: Weights) -> None:
        self._engine.load_weights(weights.path)

    async def recompute(self) -> None:
        """It is in what it loads."""

    async def set_version(self, version: int) -> None:
        self._engine.set_version(version)

    async def resume(self) -> None:
        await self._engine.resume()

    async def check_health(self) -> None:
        pass

    async def close(self) -> None:
        self._engine.close()


@contextlib.contextmanager
def started(model: Path, config: TrainerConfig) -> Iterator[Rank]:
    rank = Rank()
    try:
        rank.start(str(model), None, config, 0, 1, None, 0)
        yield rank
    finally:
        dist.destroy_process_group()


def probe_between(worker: str, trainer: str) -> Any:
    return probe_of(load("frozen_lake", {"engine.dtype": worker, "trainer.dtype": trainer}))


def exported(rank: Rank, path: Path) -> Path:
    path.mkdir()
    rank.export(str(path))
    return path


def mixed(new: Path, old: Path, stays: str, folder: Path) -> Path:
    """The new weights, but of the old ones what has a name with `stays`."""
    shutil.copytree(new, folder)
    for file in folder.glob("*.safetensors"):
        before, tensors = load_file(old / file.name), load_file(file)
        for name in tensors:
            if stays in name:
                tensors[name] = before[name]
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(("worker_dtype", "trainer_dtype"), BOTH)
async def test_the_probe_lets_new_weights_pass_and_none_of_which_a_part_is_old(
    worker_dtype: str,
    trainer_dtype: Any,
    save_model: Callable[..., Path],
    samples_of: Callable[..., list[Sample]],
    tmp_path: Path,
) -> None:
    model = save_model(tmp_path / "model", tied=False)
    config = TrainerConfig(dtype=trainer_dtype, learning_rate=5e-3)
    worker = EngineWorker(model, worker_dtype)
    with started(model, config) as rank:
        old = exported(rank, tmp_path / "old")
        for number in range(40):
            rank.step(divide(samples_of(8, seed=number), config)[0], number)
        new = exported(rank, tmp_path / "new")

        async def score(sequences: Any) -> Scores:
            return rank.score(sequences)

        def weights(version: int, path: Path) -> Weights:
            return Weights(version=version, path=path, score=score)

        probe = probe_between(worker_dtype, trainer_dtype)
        async with InferenceHub([worker], probe=probe) as hub:
            for version in range(1, 6):
                report = await hub.publish(weights(version, new))
                assert report.gap is not None
                assert report.gap.tokens == 128
            for version, part in enumerate(["lm_head", "layers.0.", "layers.1."], start=10):
                path = mixed(new, old, part, tmp_path / part)
                with pytest.raises(PublishFailure, match="it has other weights"):
                    await hub.publish(weights(version, path))
            await hub.publish(weights(20, new))
            worker.temperature = 0.7
            with pytest.raises(PublishFailure, match="another temperature"):
                await hub.publish(weights(21, new))


@pytest.mark.parametrize(("worker_dtype", "trainer_dtype"), BOTH)
async def test_a_worker_with_another_window_is_seen_after_a_long_text_alone(
    worker_dtype: str, trainer_dtype: Any, tmp_path: Path
) -> None:
    models = [with_window(tmp_path / str(window), window) for window in (32, 64)]
    text = [(7 * place) % 97 for place in range(100)]
    probe = probe_between(worker_dtype, trainer_dtype)
    long = replace(probe, prompts=[text], tokens=96)
    with started(models[0], TrainerConfig(dtype=trainer_dtype)) as rank:

        async def score(sequences: Any) -> Scores:
            return rank.score(sequences)

        weights = Weights(version=0, path=models[0], score=score)
        async with InferenceHub([EngineWorker(models[0], worker_dtype)], probe=probe) as hub:
            await hub.probe(weights)
            await hub.probe(weights, long)
        async with InferenceHub([EngineWorker(models[1], worker_dtype)], probe=probe) as hub:
            await hub.probe(weights)
            with pytest.raises(PublishFailure, match="96 tokens, after prompts of 100"):
                await hub.probe(weights, long)


def with_window(folder: Path, window: int) -> Path:
    config = MistralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        initializer_range=0.3, sliding_window=window, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    model: Any = AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model.from_config(config).save_pretrained(folder)
    return folder
