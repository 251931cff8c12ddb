"""Checkpoints of a run: which one it goes on from, how one is made, what a failure leaves."""

import asyncio
import shutil
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import MistralConfig

from flash.checkpoints import (
    Checkpoints,
    Rescue,
    checkpoint_to_go_on_from,
    newest_checkpoint,
    whole_versions,
)
from flash.config import load
from flash.errors import InferenceFailure, TrainerFailure
from flash.parts.training import Training
from flash.rollout.adaptive import AdaptiveAlpha
from flash.rollout.observer import Observer
from flash.virtual_time import in_virtual_time
from tests.saved import fake_checkpoint, fill


class FakeTrainer:
    """Saves as long as `go_on` is set, unless there is an `error`."""

    def __init__(self, version: int = 0) -> None:
        self.version = version
        self.can_save = True
        self.error: Exception | None = None
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.saving = asyncio.Event()
        self._begun: tuple[Path, int] | None = None

    async def save_checkpoint(self, directory: Path) -> None:
        await self.begin_checkpoint(directory)
        await self.written()

    async def begin_checkpoint(self, directory: Path) -> None:
        assert self._begun is None, "one is being written"
        directory.mkdir(parents=True, exist_ok=True)
        self._begun = directory, self.version

    async def written(self) -> None:
        assert self._begun is not None
        self.saving.set()
        try:
            await self.go_on.wait()
            if self.error is not None:
                raise self.error
            fill(*self._begun)
        finally:
            self._begun = None


class KeepingSaved(Observer):
    def __init__(self) -> None:
        self.saved_ones: list[Path] = []

    def saved(self, checkpoint: Path) -> None:
        self.saved_ones.append(checkpoint)


def new(run: Path, minutes: float = 0.0) -> Checkpoints:
    return Checkpoints(run, newest=None, every_s=60 * minutes, observer=Observer())


def training(**parts: Any) -> Training:
    """A run that has only these parts."""
    parts = {"config": load("frozen_lake", {}), "adaptive_alpha": AdaptiveAlpha(1.0)} | parts
    return Training(**{field.name: parts.get(field.name) for field in fields(Training)})


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


# ── which one ────────────────────────────────────────────────────────────────────────────────


def test_the_newest_checkpoint_is_the_highest_version_not_the_last_name(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    for version in (999_999, 1_000_000, 2):
        fake_checkpoint(tmp_path, version)
    assert newest_checkpoint(tmp_path).version == 1_000_000


def _remove(path):
    path.unlink()


def _cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def _empty(path):
    path.write_bytes(b"")


def _garble(path):
    path.write_bytes(b"\xff" * path.stat().st_size)


def _folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [_remove, _cut, _empty, _garble, _folder])
@pytest.mark.parametrize("name", ["trainer.json", "policy/.metadata", "model/config.json"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_and_named(
    name, damage, tmp_path, caplog
):
    before, newest = (fake_checkpoint(tmp_path, version) for version in (3, 4))
    damage(newest / name)
    assert newest_checkpoint(tmp_path).path == before
    (record,) = caplog.records
    told = record.getMessage()
    assert str(newest) in told
    assert name in told
    assert told.endswith(f"here that is {before}")


def test_what_is_of_another_version_is_damaged(tmp_path):
    one = fake_checkpoint(tmp_path, 1)
    shutil.copytree(one, one.with_name("step_000002"))
    assert newest_checkpoint(tmp_path).path == one


def test_if_none_is_whole_all_are_named_with_the_remedy(tmp_path):
    for version in (1, 2):
        (fake_checkpoint(tmp_path, version) / "policy/.metadata").unlink()
    with pytest.raises(ValueError, match="is whole: start anew under another name") as caught:
        newest_checkpoint(tmp_path)
    assert str(caught.value).count("policy/.metadata is missing") == 2


def test_a_run_without_a_whole_one_goes_on_from_the_first_model_and_that_is_said(tmp_path, caplog):
    assert checkpoint_to_go_on_from(tmp_path) is None
    assert not caplog.messages
    whole = fake_checkpoint(tmp_path, 1)
    assert checkpoint_to_go_on_from(tmp_path).path == whole
    (whole / "policy/.metadata").unlink()
    assert checkpoint_to_go_on_from(tmp_path) is None
    assert "or all that the log has is trained again, from the start" in caplog.text


def test_what_is_half_written_is_no_checkpoint(tmp_path):
    whole = fake_checkpoint(tmp_path, 1)
    shutil.copytree(whole, whole.with_name("step_000002.new"))
    assert newest_checkpoint(tmp_path).path == whole


# ── making them ──────────────────────────────────────────────────────────────────────────────


async def test_a_checkpoint_has_its_name_only_when_it_is_whole(tmp_path):
    trainer, checkpoints = FakeTrainer(3), new(tmp_path)
    trainer.go_on.clear()
    async with asyncio.TaskGroup() as tasks:
        saving = tasks.create_task(checkpoints.save(trainer, spare=False))
        await trainer.saving.wait()
        assert newest_checkpoint(tmp_path) is None
        trainer.go_on.set()
        path = await saving
    assert names(tmp_path) == ["step_000003"]
    found = newest_checkpoint(tmp_path)
    assert found.path == path
    assert found.version == 3


async def test_what_a_crash_left_half_written_is_removed_by_the_next_run(tmp_path):
    fake_checkpoint(tmp_path, 1)
    for name in ("step_000002.new", "step_000002.new.partial"):
        (tmp_path / "checkpoints" / name).mkdir()
    new(tmp_path)
    assert names(tmp_path) == ["step_000001"]


async def test_a_damaged_one_is_replaced_when_its_version_comes_again(tmp_path):
    fake_checkpoint(tmp_path, 1)
    damaged = fake_checkpoint(tmp_path, 2)
    (damaged / "policy/.metadata").unlink()
    found = newest_checkpoint(tmp_path)
    checkpoints = Checkpoints(tmp_path, newest=found, every_s=0, observer=Observer())
    await checkpoints.save(FakeTrainer(1), spare=False)  # is there already
    await checkpoints.save(FakeTrainer(2), spare=False)
    assert newest_checkpoint(tmp_path).path == damaged


@in_virtual_time
async def test_spare_ones_come_by_the_clock(tmp_path):
    checkpoints, never = new(tmp_path, minutes=10), new(tmp_path, minutes=0)
    await asyncio.sleep(599)
    assert not checkpoints.spare_is_due()
    await asyncio.sleep(1)
    assert checkpoints.spare_is_due()
    await asyncio.sleep(10**6)
    assert not never.spare_is_due()


async def test_the_newest_two_spare_ones_are_kept_and_all_that_were_asked_for(tmp_path):
    observer = KeepingSaved()
    checkpoints = Checkpoints(tmp_path, newest=None, every_s=0, observer=observer)
    for version in range(1, 7):
        spare = version not in (1, 4)
        await checkpoints.save(FakeTrainer(version), spare=spare)
    assert names(tmp_path) == [f"step_{version:06d}" for version in (1, 4, 5, 6)]
    assert len(observer.saved_ones) == 6


# ── while training goes on ───────────────────────────────────────────────────────────────────


async def test_a_step_is_made_while_one_is_written_which_counts_when_it_is_whole(tmp_path):
    observer, trainer = KeepingSaved(), FakeTrainer(3)
    checkpoints = Checkpoints(tmp_path, newest=None, every_s=0, observer=observer)
    trainer.go_on.clear()
    async with checkpoints.writing():
        await checkpoints.begin(trainer, spare=False)
        trainer.version += 1
        await trainer.saving.wait()
        assert names(tmp_path) == ["step_000003.new"]
        assert not observer.saved_ones
        trainer.go_on.set()
    assert newest_checkpoint(tmp_path).version == 3
    assert observer.saved_ones == [tmp_path / "checkpoints" / "step_000003"]


async def test_one_that_is_begun_while_another_is_written_waits_for_it(tmp_path):
    trainer, checkpoints = FakeTrainer(3), new(tmp_path)
    trainer.go_on.clear()
    async with checkpoints.writing():
        await checkpoints.begin(trainer, spare=False)
        trainer.version = 4
        second = asyncio.create_task(checkpoints.begin(trainer, spare=False))
        await trainer.saving.wait()
        assert not second.done()
        trainer.go_on.set()
        await second
        assert whole_versions(tmp_path) == [3]
        trainer.version = 5
        await checkpoints.save(trainer, spare=False)
        assert whole_versions(tmp_path) == [3, 4, 5]
        await checkpoints.begin(trainer, spare=False)  # is there already


async def test_a_spare_one_is_not_due_while_another_is_written(tmp_path):
    trainer, checkpoints = FakeTrainer(3), new(tmp_path, minutes=1e-9)
    trainer.go_on.clear()
    async with checkpoints.writing():
        assert checkpoints.spare_is_due()
        await checkpoints.begin(trainer, spare=True)
        assert not checkpoints.spare_is_due()
        trainer.go_on.set()
        await checkpoints.written()
        assert checkpoints.spare_is_due()


@pytest.mark.parametrize("error", [TrainerFailure("trainer rank 1 ended"), OSError("no space")])
async def test_one_that_can_not_be_written_is_given_up_by_name_and_the_run_goes_on(
    error, tmp_path, caplog
):
    before = fake_checkpoint(tmp_path, 2)
    trainer, checkpoints = FakeTrainer(3), new(tmp_path)
    trainer.error = error
    async with checkpoints.writing():
        await checkpoints.begin(trainer, spare=False)
        await checkpoints.written()
        assert names(tmp_path) == [before.name]
        (told,) = caplog.messages
        assert told == f"the checkpoint of step 3 is given up, and the run goes on: {error}"
        with pytest.raises(type(error)):  # asked for, it is not given up in silence
            await checkpoints.save(trainer, spare=False)
        trainer.error = None
        await checkpoints.save(trainer, spare=False)
    assert whole_versions(tmp_path) == [2, 3]


async def test_an_error_of_the_run_leaves_what_is_being_written_to_the_next_start(tmp_path):
    trainer, checkpoints = FakeTrainer(3), new(tmp_path)
    trainer.go_on.clear()
    with pytest.raises(ValueError, match="of the run"):
        async with checkpoints.writing():
            await checkpoints.begin(trainer, spare=False)
            await trainer.saving.wait()
            raise ValueError("of the run")
    assert names(tmp_path) == ["step_000003.new"]
    new(tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("steps_done", "whole"), [(4, [3, 4]), (3, [3])], ids=["between steps", "in a step"]
)
async def test_a_run_that_fails_waits_for_the_one_that_is_written_and_adds_what_came_since(
    steps_done, whole, tmp_path
):
    trainer, checkpoints = FakeTrainer(3), new(tmp_path)
    trainer.go_on.clear()
    with pytest.raises(InferenceFailure):
        async with checkpoints.writing(), Rescue(checkpoints, trainer) as rescue:
            rescue.watch(lambda: steps_done)
            await checkpoints.begin(trainer, spare=False)
            trainer.version = 4
            await trainer.saving.wait()
            asyncio.get_running_loop().call_soon(trainer.go_on.set)
            raise InferenceFailure("no worker is left")
    assert whole_versions(tmp_path) == whole


# ── a run that fails ─────────────────────────────────────────────────────────────────────────


async def fails(run: Path, trainer: FakeTrainer, error: BaseException) -> None:
    """A run whose parts fail."""
    async with Rescue(new(run), trainer) as rescue:
        rescue.watch(lambda: trainer.version)
        raise error


async def test_a_run_that_fails_in_the_middle_of_a_step_leaves_that_to_the_log(tmp_path):
    with pytest.raises(InferenceFailure):
        async with Rescue(new(tmp_path), FakeTrainer(5)) as rescue:
            rescue.watch(lambda: 4)
            raise InferenceFailure("no worker is left for the evaluation")
    assert newest_checkpoint(tmp_path) is None


async def test_a_run_that_fails_before_it_is_ready_is_not_saved(tmp_path):
    with pytest.raises(InferenceFailure):
        async with Rescue(new(tmp_path), FakeTrainer(5)):
            raise InferenceFailure("no worker came up")
    assert newest_checkpoint(tmp_path) is None


async def test_a_run_that_fails_is_saved_first_and_ends_for_its_own_reason(tmp_path):
    with pytest.raises(InferenceFailure, match="no worker is left") as caught:
        await fails(tmp_path, FakeTrainer(5), InferenceFailure("no worker is left"))
    found = newest_checkpoint(tmp_path)
    assert found.version == 5
    (note,) = caught.value.__notes__
    assert note == f"all 5 steps are in {found.path}: --resume goes on from there"


@pytest.mark.parametrize(
    ("error", "version", "can_save"),
    [
        (TrainerFailure("a rank died"), 5, False),
        (InferenceFailure("before anything was trained"), 0, True),
        (asyncio.CancelledError(), 5, True),
        (KeyboardInterrupt(), 5, True),
    ],
)
async def test_what_can_not_or_need_not_be_saved_is_not(error, version, can_save, tmp_path):
    trainer = FakeTrainer(version)
    trainer.can_save = can_save
    with pytest.raises(type(error)):
        await fails(tmp_path, trainer, error)
    assert newest_checkpoint(tmp_path) is None


async def test_a_save_that_fails_too_hides_no_error(tmp_path, caplog):
    trainer = FakeTrainer(5)
    trainer.error = OSError("no space left on device")
    with pytest.raises(InferenceFailure):
        await fails(tmp_path, trainer, InferenceFailure("no worker is left"))
    assert "no checkpoint could be made: no space left" in caplog.text


@in_virtual_time
async def test_a_save_that_hangs_ends_after_its_own_time(tmp_path, caplog):
    trainer = FakeTrainer(5)
    trainer.go_on.clear()
    with pytest.raises(InferenceFailure):
        await fails(tmp_path, trainer, InferenceFailure("no worker is left"))
    assert asyncio.get_running_loop().time() == 300
    assert "TimeoutError" in caplog.text


# ── the self-test ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("at_most", "length"), [(512, (116, 96)), (120, (104, 16)), (9, (1, 8))])
async def test_a_run_tests_itself_on_a_text_past_the_window_if_there_is_room(
    at_most, length, tmp_path
):
    MistralConfig(sliding_window=100).save_pretrained(tmp_path)
    asked = []

    async def probe(weights, probe):
        (prompt,) = probe.prompts
        asked.append((len(prompt), probe.tokens))

    async def export_weights():
        return None

    await training(
        config=load("frozen_lake", {"agent.max_sequence_tokens": at_most}),
        trainer=SimpleNamespace(model=str(tmp_path), export_weights=export_weights),
        hub=SimpleNamespace(probe=probe),
    ).self_test()
    assert asked == [length], "the tokens that are sampled after it fit, too"
