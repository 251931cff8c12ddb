"""Ranks that die: others take their place, and the weights are those of a trainer undisturbed."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
from safetensors.torch import load_file

from flash.errors import TrainerFailure
from flash.fakes import FakeBatchLog
from flash.trainer.config import TrainerConfig
from flash.trainer.lasting import LastingTrainer
from flash.trainer.objectives.settings import Function
from flash.trainer.trainer import Trainer
from flash.types import Batch, Sample, Scores
from flash.worker.shared import shared_weights

SamplesOf = Callable[..., list[Sample]]
SaveModel = Callable[..., Path]

CONFIG = TrainerConfig(learning_rate=1e-3, threads=1, ranks=2, tokens_per_micro_batch=60)
STEPS = 2
FAILING_LOSS = """
from pathlib import Path
from flash import TokenLoss

def loss(batch):
    if not Path("{flag}").exists():
        raise RuntimeError("no memory is left")
    return TokenLoss(loss_T=-batch.logprobs_T)
"""


def ranks() -> list[psutil.Process]:
    """In their order, which is that of their guards."""
    guards = [child for child in psutil.Process().children() if "flash.trainer" in child.cmdline()]
    in_order = sorted(guards, key=lambda guard: (guard.create_time(), guard.pid))
    return [rank for guard in in_order for rank in guard.children()]


async def killed(rank: int) -> None:
    ranks()[rank].kill()


def batch(version: int, samples_of: SamplesOf) -> Batch:
    return Batch(samples=samples_of(5, seed=version, version=version), version=version)


def weights_of(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]


def files_of(folder: Path) -> dict[str, bytes]:
    """All but what has an id of the saving in it, or a sum of that."""
    files = [p for p in folder.rglob("*") if p.is_file()]
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in files
        if p.name not in (".metadata", "trainer.json")
    }


def lasting(
    model: Path, run: Path, log: FakeBatchLog, *, config: TrainerConfig = CONFIG, **more: Any
) -> LastingTrainer:
    trainer = Trainer(model=model, config=config, run_dir=run)
    saved = run / "saved"
    newest = lambda: saved if saved.exists() else None  # noqa: E731
    return LastingTrainer(trainer, log=log, newest=newest, **{"max_restarts": 2, **more})


@dataclass(frozen=True)
class Undisturbed:
    """What a trainer comes to whose ranks live: weights by version, scores, a checkpoint."""

    weights: list[list[bytes]]
    scores: Scores
    saved: dict[str, bytes]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, save_model: SaveModel, samples_of: SamplesOf
) -> Undisturbed:
    folder, weights = tmp_path_factory.mktemp("undisturbed"), []
    model = save_model(folder / "model")
    async with Trainer(model=model, config=CONFIG, run_dir=folder) as trainer:
        for version in range(STEPS):
            await trainer.step(batch(version, samples_of))
            weights.append(weights_of((await trainer.export_weights()).path))
        scores = await trainer.score([range(9)])
        await trainer.save_checkpoint(folder / "saved")
    return Undisturbed(weights, scores, files_of(folder / "saved"))


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_ranks_that_die_are_replaced_at_the_same_weights(
    tmp_path: Path, save_model: SaveModel, samples_of: SamplesOf, undisturbed: Undisturbed
) -> None:
    model, saved = save_model(tmp_path / "model"), tmp_path / "saved"
    log = FakeBatchLog()
    async with lasting(model, tmp_path, log) as trainer:
        for version in range(STEPS):
            of_version = batch(version, samples_of)
            log.handed_over(of_version)
            stepping = asyncio.ensure_future(trainer.step(of_version))
            await asyncio.sleep(0)  # it is under way
            await killed(version)  # once from the first model, then from the checkpoint
            metrics = await stepping
            assert metrics["trainer/restarts"] == 2 * version + 1
            await killed(1 - version)
            exported = await trainer.export_weights()
            assert exported.version == trainer.version == version + 1
            assert weights_of(exported.path) == undisturbed.weights[version]
            if version == 0:
                await trainer.save_checkpoint(saved)
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
        await trainer.score([range(9)])
        assert trainer.state().dead == ""
        await killed(1)
        with pytest.raises(TrainerFailure, match="trainer rank 1") as caught:
            await trainer.score([range(9)])
        assert "1 times without a step (trainer.max_restarts)" in caught.value.__notes__[0]
        assert "trainer rank 1" in trainer.state().dead
        assert not trainer.can_save
        with pytest.raises(TrainerFailure):
            await trainer.export_weights()


@pytest.mark.slow
async def test_a_call_in_whose_middle_a_rank_dies_is_made_again(
    tmp_path: Path,
    save_model: SaveModel,
    samples_of: SamplesOf,
    undisturbed: Undisturbed,
    caplog: pytest.LogCaptureFixture,
) -> None:
    log, saved = FakeBatchLog(), tmp_path / "end"

    async def disturbed(calls: Any) -> Any:
        held_up = ranks()[1]  # and so is the other, in a collective
        held_up.suspend()
        task = asyncio.ensure_future(calls)
        await asyncio.sleep(0)
        held_up.kill()
        return await task

    model = save_model(tmp_path / "model")
    with caplog.at_level(logging.WARNING, "flash.trainer.lasting"):
        async with lasting(model, tmp_path, log, max_restarts=3) as trainer:
            for version in range(STEPS):
                log.handed_over(of_version := batch(version, samples_of))
                made = trainer.step(of_version)
                await (disturbed(made) if version else made)
            exported = await disturbed(trainer.export_weights())
            assert exported.version == STEPS
            assert weights_of(exported.path) == undisturbed.weights[-1]
            assert await disturbed(exported.score([range(9)])) == undisturbed.scores
            await disturbed(trainer.save_checkpoint(saved))
            assert trainer.restarts == 4
    assert [path.name for path in tmp_path.glob("end*")] == ["end"]
    assert files_of(saved) == undisturbed.saved
    lines = [record.getMessage() for record in caplog.records if "restart" in record.msg]
    for line, redone in zip(lines, (1, 2, 2, 2), strict=True):
        assert line.startswith("trainer rank 1 (pid ")
        assert "ended with exit code 137" in line  # 128 and SIGKILL
        assert line.endswith(f"from the first model, batches to train again: {redone}")
        assert "\n" not in line


@pytest.mark.slow
async def test_parts_of_a_batch_are_given_again_and_weights_stay_where_they_are(
    tmp_path: Path, save_model: SaveModel, samples_of: SamplesOf
) -> None:
    model = save_model(tmp_path / "model")

    async def run(name: str, *, dies: bool) -> list[list[bytes]]:
        log, found = FakeBatchLog(), []
        async with lasting(model, tmp_path / name, log) as trainer:
            published = await trainer.export_weights()
            for version in range(2):
                whole = batch(version, samples_of)
                cuts = [whole.samples[:1], whole.samples[1:3], whole.samples[3:]]
                for cut in cuts:
                    part = replace(whole, samples=cut, last=cut is cuts[-1])
                    log.handed_over(part)
                    await (trainer.step(part) if part.last else trainer.add(part))
                    if dies and version == 1 and cut is cuts[1]:
                        await killed(0)
                assert published.path.is_dir()  # of the one before, which a worker may be reading
                published = await trainer.export_weights()
                found.append(weights_of(published.path))
            assert trainer.restarts == dies
        return found

    assert await run("a", dies=False) == await run("b", dies=True)


@pytest.mark.slow
async def test_ranks_that_hang_past_the_deadline_of_a_step_are_replaced(
    tmp_path: Path, save_model: SaveModel, samples_of: SamplesOf
) -> None:
    log = FakeBatchLog()
    config = CONFIG.model_copy(update={"ranks": 1, "step_timeout_s": 10.0})
    async with lasting(save_model(tmp_path / "m"), tmp_path, log, config=config) as trainer:
        log.handed_over(batch(0, samples_of))
        ranks()[0].suspend()
        metrics = await trainer.step(batch(0, samples_of))
        assert (trainer.version, metrics["trainer/restarts"]) == (1, 1)


@pytest.mark.slow
async def test_a_rank_that_raises_is_replaced_and_one_that_always_does_is_given_up(
    tmp_path: Path,
    save_model: SaveModel,
    samples_of: SamplesOf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flag = tmp_path / "memory"
    (tmp_path / "failing_loss.py").write_text(FAILING_LOSS.format(flag=flag))
    monkeypatch.syspath_prepend(tmp_path)  # here
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # in the ranks
    loss = Function(run="failing_loss:loss")
    config = CONFIG.model_copy(update={"ranks": 1, "objective": loss})
    model = save_model(tmp_path / "model")
    for memory_returns in (True, False):
        log = FakeBatchLog()
        log.handed_over(of_version := batch(0, samples_of))

        class Trains(Trainer):
            async def restart(self, checkpoint: Path | None) -> None:
                if memory_returns:  # noqa: B023
                    flag.touch()
                await super().restart(checkpoint)

        trainer = LastingTrainer(
            Trains(model=model, config=config, run_dir=tmp_path),
            log=log, newest=lambda: None, max_restarts=1,
        )  # fmt: skip
        async with trainer:
            if memory_returns:
                assert (await trainer.step(of_version))["trainer/restarts"] == 1
                flag.unlink()
            else:
                with pytest.raises(TrainerFailure, match="no memory is left"):
                    await trainer.step(of_version)
                assert (trainer.version, trainer.restarts) == (0, 1)


@pytest.mark.slow
async def test_a_sample_that_cannot_be_trained_on_starts_no_ranks_anew(
    tmp_path: Path, save_model: SaveModel, samples_of: SamplesOf
) -> None:
    config = CONFIG.model_copy(update={"ranks": 1})
    log = FakeBatchLog()
    async with lasting(save_model(tmp_path / "m"), tmp_path, log, config=config) as trainer:
        unfit = replace(batch(0, samples_of).samples[0], advantage=float("nan"))
        with pytest.raises(ValueError, match="not finite"):
            await trainer.step(Batch(samples=[unfit], version=0))
        assert trainer.restarts == 0
        assert trainer.can_save


@pytest.mark.slow
async def test_a_log_that_lacks_a_batch_ends_the_trainer_with_both_causes(
    tmp_path: Path, save_model: SaveModel, samples_of: SamplesOf
) -> None:
    config = CONFIG.model_copy(update={"ranks": 1})
    trainer = lasting(save_model(tmp_path / "m"), tmp_path, FakeBatchLog(), config=config)
    async with trainer:
        await trainer.step(batch(0, samples_of))
        await killed(0)
        with pytest.raises(TrainerFailure, match=r"(?s)rank 0.*the log has no batch of .* 0"):
            await trainer.export_weights()
        assert trainer.state().dead


async def test_a_trainer_that_starts_anew_is_told_to_be_at_it_and_not_dead(
    tmp_path: Path,
) -> None:
    begun, may_end = asyncio.Event(), asyncio.Event()

    class Restarting(Trainer):
        failures = 1

        async def score(self, sequences: Any) -> Scores:
            if self.failures:
                self.failures -= 1
                raise TrainerFailure("trainer rank 0 was killed")
            return Scores(logprobs=[[0.0]])

        async def restart(self, checkpoint: Path | None) -> None:
            begun.set()
            await may_end.wait()

    trainer = LastingTrainer(
        Restarting(model="none", config=CONFIG, run_dir=tmp_path),
        log=FakeBatchLog(), newest=lambda: None, max_restarts=1,
    )  # fmt: skip
    scoring = asyncio.ensure_future(trainer.score([[1, 2]]))
    await begun.wait()
    state = trainer.state()
    assert (state.doing, state.dead, trainer.can_save) == ("restart", "", False)
    may_end.set()
    assert (await scoring).logprobs == [[0.0]]
    assert trainer.state().doing == ""


class TurnTaking(Trainer):
    """Keeps what it was asked, and whether it had the GPUs to itself then."""

    failures = 0
    free = 1.0

    def __init__(self, run: Path) -> None:
        super().__init__(model="none", config=CONFIG, run_dir=run)
        self.asked: list[tuple[str, bool]] = []
        self.alone = 0

    def ask(self, method: str) -> None:
        self.asked.append((method, self.alone > 0))
        if self.failures:
            self.failures -= 1
            raise TrainerFailure("trainer rank 0 was killed")

    async def step(self, batch: Batch) -> dict[str, float]:
        self.ask("step")
        self.version += 1
        return {}

    async def save_checkpoint(self, directory: Path) -> None:
        self.ask("save")

    async def score(self, sequences: Any) -> Scores:
        self.ask("score")
        return Scores(logprobs=[])

    async def make_room(self, share: float) -> float:
        self.ask("make_room")
        return self.free

    async def restart(self, checkpoint: Path | None) -> None:
        self.ask("restart")


def turn_taking(run: Path) -> tuple[LastingTrainer, TurnTaking]:
    """A turn that was taken ends with room for others, as one at a hub does."""
    inner = TurnTaking(run)
    trainer = LastingTrainer(inner, log=FakeBatchLog(), newest=lambda: None, max_restarts=2)

    @contextlib.asynccontextmanager
    async def turn() -> AsyncIterator[None]:
        inner.alone += 1
        yield
        if inner.alone == 1:
            await trainer.make_room(0.5)
        inner.alone -= 1

    trainer.take_turns(turn)
    return trainer, inner


async def test_ranks_have_their_gpus_to_themselves_to_step_and_to_save_and_not_to_score(
    tmp_path: Path, samples_of: SamplesOf
) -> None:
    trainer, inner = turn_taking(tmp_path)
    async with trainer.turn():
        await trainer.step(batch(0, samples_of))
        await trainer.score([])
    await trainer.score([])
    await trainer.step(batch(1, samples_of))
    await trainer.save_checkpoint(tmp_path)
    assert inner.asked == [
        ("step", True), ("score", True), ("make_room", True),
        ("score", False),
        ("step", True), ("make_room", True),
        ("save", True), ("make_room", True),
    ]  # fmt: skip


async def test_ranks_that_die_where_others_have_the_gpus_take_a_turn_to_start_anew(
    tmp_path: Path,
) -> None:
    trainer, inner = turn_taking(tmp_path)
    inner.failures = 1
    async with asyncio.timeout(5):  # room is made at the end of a turn, by the same trainer
        await trainer.score([])
    assert inner.asked == [
        ("score", False), ("restart", True), ("score", True), ("make_room", True)
    ]  # fmt: skip


async def test_a_share_that_the_weights_do_not_leave_is_refused_before_others_start(
    tmp_path: Path,
) -> None:
    trainer, inner = turn_taking(tmp_path)
    inner.free = 0.4
    with pytest.raises(ValueError, match=r"engine.gpu_memory=0.5 .* leave 0.40 of a GPU's memory"):
        await trainer.make_room(0.5)
    inner.free = 0.6
    await trainer.make_room(0.5)
    inner.free = 0.45  # others that sleep have some, which they bring along
    await trainer.make_room(0.5)


@pytest.mark.slow
async def test_ranks_share_the_weights_that_they_export_as_long_as_they_have_them(
    tmp_path: Path, save_model: SaveModel, samples_of: SamplesOf
) -> None:
    log = FakeBatchLog()
    async with lasting(save_model(tmp_path / "model"), tmp_path / "run", log) as trainer:
        log.handed_over(batch(0, samples_of))
        weights = await trainer.export_weights()
        assert weights.share is not None
        exported: dict[str, Any] = {}
        for file in weights.path.glob("*.safetensors"):
            exported |= load_file(file)
        await killed(1)  # others take their place first
        async with weights.share() as directory:
            assert directory is not None
            with shared_weights(directory, "cpu") as tensors:
                assert {name: tensor.tolist() for name, tensor in tensors} == {
                    name: tensor.tolist() for name, tensor in exported.items()
                }
        assert not directory.exists()
        assert weights.path.exists()
        await trainer.step(batch(0, samples_of))
        async with weights.share() as directory:
            assert directory is None
