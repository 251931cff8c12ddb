"""Ranks that die: others take their place, and the weights are those of a trainer undisturbed."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from flash.errors import TrainerFailure
from flash.fakes import FakeBatchLog
from flash.trainer.config import TrainerConfig
from flash.trainer.lasting import LastingTrainer
from flash.trainer.trainer import Trainer
from flash.types import Batch, Sample

SamplesOf = Callable[..., list[Sample]]
SaveModel = Callable[..., Path]

CONFIG = TrainerConfig(learning_rate=1e-3, threads=1, ranks=2, tokens_per_micro_batch=60)
STEPS = 3


def ranks() -> list[psutil.Process]:
    """In their order."""
    children = psutil.Process().children(recursive=True)
    found = [child for child in children if "flash.trainer" in " ".join(child.cmdline())]
    return sorted(found, key=lambda child: child.create_time())


async def killed(rank: int) -> None:
    ranks()[rank].kill()


def batch(version: int, samples_of: SamplesOf) -> Batch:
    return Batch(samples=samples_of(5, seed=version, version=version), version=version)


def weights_of(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]


async def undisturbed(model: Path, run: Path, samples_of: SamplesOf) -> list[list[bytes]]:
    found = []
    async with Trainer(model=model, config=CONFIG, run_dir=run) as trainer:
        for version in range(STEPS):
            await trainer.step(batch(version, samples_of))
            found.append(weights_of((await trainer.export_weights()).path))
    return found


def lasting(model: Path, run: Path, log: FakeBatchLog, **more: Any) -> LastingTrainer:
    trainer = Trainer(model=model, config=CONFIG, run_dir=run)
    saved = run / "saved"
    newest = lambda: saved if saved.exists() else None  # noqa: E731
    return LastingTrainer(trainer, log=log, newest=newest, **{"max_restarts": 2, **more})


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
async def test_ranks_that_die_are_replaced_at_the_same_weights(
    rank: int, tmp_path: Path, save_model: SaveModel, samples_of: SamplesOf
) -> None:
    model = save_model(tmp_path / "model")
    expected = await undisturbed(model, tmp_path / "a", samples_of)
    log = FakeBatchLog()
    async with lasting(model, tmp_path / "b", log) as trainer:
        for version in range(STEPS):
            of_version = batch(version, samples_of)
            log.handed_over(of_version)
            stepping = asyncio.ensure_future(trainer.step(of_version))
            await asyncio.sleep(0)  # it is under way
            await killed(rank)  # once from the first model, then from the checkpoint
            metrics = await stepping
            assert metrics["trainer/restarts"] == 2 * version + 1
            await killed(rank)
            exported = await trainer.export_weights()
            assert exported.version == trainer.version == version + 1
            assert weights_of(exported.path) == expected[version]
            if version == 0:
                await trainer.save_checkpoint(tmp_path / "b" / "saved")
    assert not ranks()


@pytest.mark.slow
async def test_a_trainer_is_given_up_with_the_cause_after_so_many_restarts_without_a_step(
    tmp_path: Path, save_model: SaveModel, samples_of: SamplesOf
) -> None:
    log = FakeBatchLog()
    trainer = lasting(save_model(tmp_path / "model"), tmp_path, log, max_restarts=1)
    async with trainer:
        log.handed_over(batch(0, samples_of))
        await killed(0)
        await trainer.score(range(9))
        assert trainer.state().dead == ""
        await killed(1)
        with pytest.raises(TrainerFailure, match="trainer rank 1") as caught:
            await trainer.score(range(9))
        assert "1 times without a step (trainer.max_restarts)" in caught.value.__notes__[0]
        assert "trainer rank 1" in trainer.state().dead
        assert not trainer.can_save
        with pytest.raises(TrainerFailure):
            await trainer.export_weights()
