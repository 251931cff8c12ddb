"""Trainers whose ranks share passes, in real processes: steps, scores and checkpoints are those of
a trainer of one rank."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from flash.fakes import fake_sample
from flash.trainer.advantage_settings import Gae
from flash.trainer.config import CriticConfig, LoraConfig, TrainerConfig
from flash.trainer.objectives.settings import Gspo, KlSettings
from flash.trainer.trainer import Trainer
from flash.types import Batch, ExpertSequence, ExpertShare, Sample
from tests.families import save_family

SamplesOf = Callable[..., list[Sample]]
SaveModel = Callable[..., Path]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
CONFIG = TrainerConfig(
    learning_rate=1e-3, warmup_steps=0, threads=1, tokens_per_micro_batch=30, mini_batches=2
)
# All that is computed of whole sequences, or beside logprobs.
OF_SEQUENCES = {
    "objective": Gspo(),
    "kl": KlSettings(coefficient=0.1),
    "entropy_bonus": 0.01,
    "gradient_checkpointing": True,
}
OF_CRITIC = {
    "advantages": Gae(gamma=0.9, lam=0.8),
    "critic": CriticConfig(learning_rate=1e-2),
}


def long_and_short(samples_of: SamplesOf, version: int) -> list[Sample]:
    """Samples that pack, and one that no rank's pass has room for."""
    rng = np.random.default_rng(version)
    mask = (np.arange(201) % 40 > 20).astype(np.float32)
    long = fake_sample(
        rng.integers(0, 97, 201),
        mask,
        logprobs=(mask * rng.uniform(-6, -3, 201)).astype(np.float32),
        versions=np.where(mask > 0, version, -1),
        advantage=0.7,
        episode=99,
    )
    samples = [*samples_of(6, seed=version, version=version), long]
    return [replace(sample, reward=float(sample.episode % 3)) for sample in samples]


def imitated(samples: list[Sample]) -> ExpertShare:
    sequences = [
        ExpertSequence(token_ids=s.token_ids, loss_mask=s.loss_mask, source=f"e.jsonl:{number}")
        for number, s in enumerate(samples)
    ]
    return ExpertShare(sequences=sequences, weight=0.3)


def with_experts(samples: list[Sample]) -> list[Sample]:
    """Two of four experts in each of two layers, but for the last token."""
    rng = np.random.default_rng(3)

    def row() -> list[int]:
        return [int(expert) for _ in range(2) for expert in rng.permutation(4)[:2]]

    return [
        replace(s, experts=np.array([*(row() for _ in s.token_ids[1:]), [-1] * 4], np.int16))
        for s in samples
    ]


async def steps(
    model: Path, run: Path, config: TrainerConfig, samples_of: SamplesOf
) -> tuple[list[dict[str, float]], list[list[float]], dict[str, Any]]:
    """Metrics of two steps, and scores and weights after them."""
    async with Trainer(model=model, config=config, run_dir=run) as trainer:
        metrics = []
        for version in range(2):
            expert = imitated(samples_of(3, seed=7)) if version else None
            samples = long_and_short(samples_of, version)
            if config.router_replay:
                samples = with_experts(samples)
            metrics.append(
                await trainer.step(Batch(samples=samples, version=version, expert=expert))
            )
            del metrics[-1]["time/train_s"]
        scores = await trainer.score([list(range(90)), list(range(5, 12))])
        weights: dict[str, Any] = {}
        for file in (await trainer.export_weights()).path.glob("*.safetensors"):
            weights |= load_file(file)
    return metrics, scores.logprobs, weights


@pytest.mark.parametrize(
    ("kind", "settings", "divisions"),
    [
        ("llama", OF_SEQUENCES, [(2, 2), (4, 2), (4, 4)]),
        ("qwen2", {}, [(4, 4)]),
        ("qwen2", OF_CRITIC, [(2, 2)]),
        ("llama", {"lora": LoraConfig(rank=4), "kl": KlSettings(coefficient=0.1)}, [(4, 2)]),
        ("qwen3_moe", {"router_replay": True}, [(4, 2)]),
    ],
    ids=["sequences", "plain", "critic", "adapters", "experts"],
)
async def test_ranks_that_share_passes_make_the_steps_of_one(
    kind: str,
    settings: dict[str, Any],
    divisions: list[tuple[int, int]],
    tmp_path: Path,
    save_model: SaveModel,
    samples_of: SamplesOf,
) -> None:
    model = tmp_path / "model"
    if "moe" in kind:
        save_family(model, kind)
    else:
        save_model(model, kind)
    config = CONFIG.model_copy(update=settings)
    metrics, scores, weights = await steps(model, tmp_path / "one", config, samples_of)
    for ranks, sequence_ranks in divisions:
        changes = {"ranks": ranks, "sequence_ranks": sequence_ranks}
        divided = config.model_copy(update=changes)
        run = tmp_path / f"{ranks}_{sequence_ranks}"
        found = await steps(model, run, divided, samples_of)
        for told, expected in zip(found[0], metrics, strict=True):
            assert told == pytest.approx(expected, abs=1e-4, rel=1e-4)
        for one, other in zip(found[1], scores, strict=True):
            assert one == pytest.approx(other, abs=1e-4)
        assert found[2].keys() == weights.keys()
        for name, tensor in weights.items():
            np.testing.assert_allclose(found[2][name], tensor, atol=2e-5, err_msg=name)
