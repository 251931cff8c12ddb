"""Batches trained again from a log, by real ranks: the same weights, to the last bit."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flash.fakes import FakeBatchLog
from flash.trainer.advantage_settings import Gae, ReinforcePp
from flash.trainer.config import CriticConfig, TrainerConfig
from flash.trainer.objectives.settings import Function, KlSettings
from flash.trainer.redo import redo
from flash.trainer.trainer import Trainer
from flash.types import Batch, ExpertSequence, ExpertShare, Sample
from flash.worker.delta import FOLDER

SamplesOf = Callable[..., list[Sample]]
SaveModel = Callable[..., Path]

STEPS = 4
SAVED = 2
CONFIG = TrainerConfig(learning_rate=1e-3, warmup_steps=3, decay_steps=9, threads=1)
NOISY_LOSS = """
import torch
from flash import TokenLoss

def loss(batch):
    return TokenLoss(loss_T=-batch.logprobs_T * torch.rand_like(batch.logprobs_T))
"""
CASES: Mapping[str, Mapping[str, Any]] = {
    "one rank, threads, entropy, reference": {
        "threads": 2, "entropy_bonus": 0.01, "gradient_checkpointing": True,
        "kl": KlSettings(coefficient=0.1, place="loss"),
    },
    "a loss that draws": {"ranks": 2, "tokens_per_micro_batch": 60, "weight_decay": 0.1},
    # It is saved while the policy's optimizer has not begun.
    "critic": {
        "ranks": 2, "mini_batches": 2, "advantages": Gae(whiten=True),
        "critic": CriticConfig(learning_rate=1e-2, warmup_batches=3),
    },
    "reference in whitened rewards": {
        "ranks": 2, "kl": KlSettings(coefficient=0.1, place="reward"), "advantages": ReinforcePp(),
    },
    "mini-batches, expert": {"ranks": 2, "mini_batches": 3, "tokens_per_micro_batch": 60},
    "parts, expert": {"ranks": 2, "tokens_per_micro_batch": 60},
}  # fmt: skip


def given(case: str, samples_of: SamplesOf) -> list[list[Batch]]:
    """What a rollout handed over: each batch as its parts."""
    batches = []
    for version in range(STEPS):
        samples = samples_of(7 + version, seed=version, version=version)
        samples = [replace(s, reward=float(s.episode % 3)) for s in samples]
        cuts = [samples[:2], samples[2:5], samples[5:]] if "parts" in case else [samples]
        parts = [Batch(samples=cut, version=version, last=cut is cuts[-1]) for cut in cuts]
        if "expert" in case:
            written = [
                ExpertSequence(token_ids=s.token_ids, loss_mask=s.loss_mask)
                for s in samples_of(3, seed=20 + version)
            ]
            share = ExpertShare(sequences=written, weight=0.1 * (version + 1))
            parts[-1] = replace(parts[-1], expert=share)
        batches.append(parts)
    return batches


def bytes_of(folder: Path) -> dict[str, bytes]:
    """All but what has an id of the saving in it, or a sum of that."""
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in files
        if p.name not in (".metadata", "trainer.json")
    }


async def exported(trainer: Any) -> dict[str, bytes]:
    """Without what changed since the export before, which may be another one."""
    weights = await trainer.export_weights()
    files = bytes_of(weights.path)
    return {name: of_file for name, of_file in files.items() if not name.startswith(FOLDER)}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
async def test_logged_batches_trained_again_make_the_same_weights_to_the_last_bit(
    case: str,
    tmp_path: Path,
    save_model: SaveModel,
    samples_of: SamplesOf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, config = save_model(tmp_path / "model"), CONFIG.model_copy(update=CASES[case])
    if case == "a loss that draws":
        (tmp_path / "noisy_loss.py").write_text(NOISY_LOSS)
        monkeypatch.syspath_prepend(tmp_path)  # here
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # in the ranks
        config = config.model_copy(update={"objective": Function(run="noisy_loss:loss")})
    log = FakeBatchLog()
    at_version: list[dict[str, bytes]] = []
    saved, end, again = (tmp_path / name for name in ("saved", "end", "again"))
    async with Trainer(model=model, config=config, run_dir=tmp_path / "a", seed=3) as trainer:
        for parts in given(case, samples_of):
            at_version.append(await exported(trainer))
            await trainer.score([range(20)])
            if trainer.version == SAVED:
                await trainer.save_checkpoint(saved)
            for batch in parts:
                log.handed_over(batch)
            for batch in parts[:-1]:
                await trainer.add(batch)
            await trainer.step(parts[-1])
        at_version.append(await exported(trainer))
        await trainer.save_checkpoint(end)
    assert len({str(weights) for weights in at_version}) > 1

    for begin in (None, saved):
        async with Trainer(
            model=model, config=config, run_dir=tmp_path / "b", seed=3, resume_from=begin
        ) as trainer:
            for version in range(trainer.version, STEPS + 1):
                await redo(trainer, log, until=version)
                assert trainer.version == version
                assert await exported(trainer) == at_version[version], f"{begin}: {version}"
            await trainer.save_checkpoint(again)
        assert bytes_of(again) == bytes_of(end), f"from {begin}"
