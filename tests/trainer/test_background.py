"""Checkpoints that are written while training goes on."""

import asyncio
import os
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from flash.checkpoints import Checkpoints, whole_versions
from flash.errors import TrainerFailure
from flash.fakes import FakeBatchLog, FakeRanks
from flash.rollout.observer import Observer
from flash.trainer import background
from flash.trainer.advantage_settings import Gae
from flash.trainer.checkpoint import checkpoint_version
from flash.trainer.config import LoraConfig, TrainerConfig
from flash.trainer.trainer import Trainer
from flash.types import Sample
from tests.saved import save
from tests.trainer.test_lasting import batch, files_of, lasting, ranks
from tests.trainer.test_rank import started, step

SamplesOf = Callable[..., list[Sample]]
SaveModel = Callable[..., Path]


@contextmanager
def held_up(directory: Path, rank: int) -> Iterator[None]:
    """What that rank writes there waits for the end of the block, and fails then: its file is a
    pipe, and nobody reads."""
    pipe = directory / "policy" / f"__{rank}_0.distcp"
    pipe.parent.mkdir(parents=True)
    os.mkfifo(pipe)
    yield
    if pipe.exists():
        os.close(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK))


@pytest.fixture
def go_on(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """What is to be written waits for it."""
    event, write = threading.Event(), background.save
    event.set()

    def save_when_set(*args: Any, **settings: Any) -> object:
        assert event.wait(60)
        return write(*args, **settings)

    monkeypatch.setattr(background, "save", save_when_set)
    return event


@pytest.mark.parametrize(
    "config",
    [
        TrainerConfig(warmup_steps=0),
        TrainerConfig(warmup_steps=0, advantages=Gae()),
        TrainerConfig(warmup_steps=0, lora=LoraConfig(rank=4, alpha=8)),
    ],
    ids=["policy", "critic", "adapters"],
)
def test_a_step_that_is_made_while_a_checkpoint_is_written_changes_nothing_of_it(
    config: TrainerConfig,
    tmp_path: Path,
    save_model: SaveModel,
    samples_of: SamplesOf,
    go_on: threading.Event,
) -> None:
    with started(save_model(tmp_path / "model"), tmp_path, config) as rank:
        step(rank, samples_of(4), config)
        save(rank, tmp_path / "before", 1)
        go_on.clear()
        rank.begin_checkpoint(str(tmp_path / "during"), 1)
        step(rank, samples_of(4, seed=1), config)
        assert not rank.written().done()
        go_on.set()
        rank.written().result()
        save(rank, tmp_path / "after", 2)
    before, during, after = (files_of(tmp_path / name) for name in ("before", "during", "after"))
    assert during == before
    assert after["policy/__0_0.distcp"] != before["policy/__0_0.distcp"]


def test_one_that_is_begun_while_another_is_written_copies_nothing_before_that_has_ended(
    tmp_path: Path,
    save_model: SaveModel,
    go_on: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def waiting(futures: tuple[Future[None]]) -> object:
        go_on.set()
        return wait(futures)

    monkeypatch.setattr(background, "wait", waiting)
    go_on.clear()
    with started(save_model(tmp_path / "model"), tmp_path, TrainerConfig()) as rank:
        rank.begin_checkpoint(str(tmp_path / "first"), 0)
        first = rank.written()
        rank.begin_checkpoint(str(tmp_path / "second"), 0)
        had_ended = first.done()
        go_on.set()
        rank.written().result()
        assert had_ended
    assert files_of(tmp_path / "first") == files_of(tmp_path / "second")


@pytest.mark.filterwarnings("ignore:Detected an existing checkpoint")
def test_a_folder_that_is_written_again_is_whole_when_that_is_and_not_before(
    tmp_path: Path, save_model: SaveModel
) -> None:
    saved = tmp_path / "saved"
    with started(save_model(tmp_path / "model"), tmp_path, TrainerConfig()) as rank:
        save(rank, saved, 1)
        save(rank, saved, 2)
        assert checkpoint_version(saved) == 2
        shutil.rmtree(saved / "policy")
        (saved / "policy" / "__0_0.distcp").mkdir(parents=True)
        with pytest.raises(CheckpointException, match="Is a directory"):
            save(rank, saved, 3)
        assert not (saved / "trainer.json").exists()


def test_what_can_not_be_written_is_not_kept_in_memory_with_its_error(
    tmp_path: Path, save_model: SaveModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[weakref.ref[Tensor]] = []

    def full(state: dict[str, Tensor], **_: object) -> None:
        copies.append(weakref.ref(state["updates"]))
        if len(copies) == 1:
            raise OSError("no space left on device")

    monkeypatch.setattr(background, "save", full)
    with started(save_model(tmp_path / "model"), tmp_path, TrainerConfig()) as rank:
        rank.begin_checkpoint(str(tmp_path / "first"), 1)
        first = rank.written()
        (tmp_path / "second").mkdir()
        save(rank, tmp_path / "second", 1)  # its thread is done with the first
        assert isinstance(first.exception(), OSError)
        assert copies[0]() is None


async def test_ranks_that_take_the_place_of_others_are_not_asked_for_the_checkpoint_of_these(
    tmp_path: Path,
) -> None:
    ranks = FakeRanks({"start": "", "begin_checkpoint": None, "written": None})
    config = TrainerConfig(ranks=2)
    trainer = Trainer(model="none", config=config, run_dir=tmp_path, starter=ranks)
    async with trainer:
        await trainer.begin_checkpoint(tmp_path / "saved")
        await trainer.written()
        await trainer.restart(None)
        with pytest.raises(TrainerFailure, match="trainer rank 0"):
            await trainer.written()


@pytest.mark.slow
async def test_a_rank_that_dies_while_it_writes_ends_that_checkpoint_alone(
    tmp_path: Path,
    save_model: SaveModel,
    samples_of: SamplesOf,
    caplog: pytest.LogCaptureFixture,
) -> None:
    log, run = FakeBatchLog(), tmp_path / "run"
    checkpoints = Checkpoints(run, newest=None, every_s=0, observer=Observer())
    async with (
        lasting(save_model(tmp_path / "model"), run, log) as trainer,
        checkpoints.writing(),
    ):
        with held_up(run / "checkpoints" / "step_000000.new", rank=1):
            await checkpoints.begin(trainer, spare=False)
            for version in range(2):
                log.handed_over(batch(version, samples_of))
                await trainer.step(batch(version, samples_of))
            assert trainer.restarts == 0
            ranks()[1].kill()
            await checkpoints.written()
        assert "step 0 is given up, and the run goes on: trainer rank 1 (pid" in caplog.text
        assert whole_versions(run) == []
        assert [*(run / "checkpoints").iterdir()] == []
        log.handed_over(batch(2, samples_of))
        assert (await trainer.step(batch(2, samples_of)))["trainer/restarts"] == 1
        await checkpoints.begin(trainer, spare=False)
    assert whole_versions(run) == [3]


@pytest.mark.slow
async def test_what_can_not_be_written_is_told_and_no_rank_is_started_anew(
    tmp_path: Path,
    save_model: SaveModel,
    samples_of: SamplesOf,
    caplog: pytest.LogCaptureFixture,
) -> None:
    log, run = FakeBatchLog(), tmp_path / "run"
    checkpoints = Checkpoints(run, newest=None, every_s=0, observer=Observer())
    async with (
        lasting(save_model(tmp_path / "model"), run, log) as trainer,
        checkpoints.writing(),
    ):
        making = run / "checkpoints" / "step_000000.new"
        (making / "policy" / "__1_0.distcp").mkdir(parents=True)
        await checkpoints.begin(trainer, spare=False)
        await checkpoints.written()
        assert "Is a directory" in caplog.text
        log.handed_over(batch(0, samples_of))
        await asyncio.gather(
            trainer.step(batch(0, samples_of)),
            trainer.score([range(9)]),
        )
        await checkpoints.begin(trainer, spare=False)
        assert trainer.restarts == 0
    assert whole_versions(run) == [1]
