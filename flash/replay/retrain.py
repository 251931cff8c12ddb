"""Logged batches through a trainer again, with its settings as they were or otherwise.

    first model, or a checkpoint ─► batch of version v, v + 1, … ─► numbers beside those logged

Where nothing is changed that is what a resume redoes (`flash/trainer/redo.py`): in float32 on a
CPU the weights are the same to the last bit. Where the run's own settings changed at a resume, each
batch is trained with those that first trained it.

Advantages are those that were handed over. If their settings are changed they are computed again
from the logged rewards, turn rewards and states. Which episodes make a batch, their rewards, and
what the engine said of their tokens stay as logged.
"""

import asyncio
import contextlib
import logging
import math
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from flash.checkpoints import newest_checkpoint
from flash.command_line import nearest
from flash.config import validated
from flash.config.resumed import shown
from flash.config.source import changed
from flash.config.together import check_staleness
from flash.replay.fields import Retraining
from flash.replay.logged_run import LoggedRun, first_model
from flash.rollout.batching import compared, of_tokens
from flash.system.own_logs import own_logs
from flash.trainer.advantages import make_advantages
from flash.trainer.checkpoint import ADAPTERS_FILE, MODEL_FOLDER, checkpoint_version
from flash.trainer.config import TrainerConfig
from flash.trainer.redo import redo
from flash.trainer.trainer import Trainer
from flash.types import Batch, Sample, Trajectory

_BY_NAME = ("objective", "advantages")  # sections whose other fields depend on their name


@dataclass(frozen=True, slots=True, kw_only=True)
class Leg:
    """Batches that follow each other and were trained with the same settings, from version `first`
    to version `until`. With `as_logged` their advantages are those handed over."""

    first: int
    until: int
    settings: TrainerConfig
    as_logged: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is to be trained. `checkpoint` is where it begins, if not at the first model;
    `changes` are to the trainer's fields."""

    model: str
    seed: int
    checkpoint: Path | None
    changes: Mapping[str, Any]
    legs: Sequence[Leg]
    logged: Mapping[int, Mapping[str, Any]]  # the metrics of each step

    def describe(self) -> str:
        """What is trained, and how, in two lines."""
        where = self.checkpoint.name if self.checkpoint else "the first model"
        first, last = self.legs[0].first, self.legs[-1].until - 1
        which = f"batch of version {first}"
        if last > first:
            which = f"batches of versions {first} to {last}"
        given = ", ".join(f"{name} {shown(value)}" for name, value in self.changes.items())
        how = f"with {given}" if given else "with the settings of the run"
        advantages = "as they were handed over"
        if not all(leg.as_logged for leg in self.legs):
            advantages = "computed again, from rewards and states as logged"
        return (
            f"{which} from {where}, {how}\n"
            f"advantages {advantages}; batches, rewards and the engine's logprobs as logged"
        )


@dataclass(frozen=True, slots=True)
class Step:
    """A step that was made again; `logged` is empty if the run never came to its end."""

    number: int
    metrics: Mapping[str, float]
    logged: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Compared:
    """The weights of a version, beside those of the run's own checkpoint of it: equal to the last
    bit or not, and the largest difference."""

    checkpoint: Path
    equal: bool
    difference: float


def plan(run: LoggedRun, changes: Mapping[str, Any], *, checkpoint: str) -> Plan:
    """What there is to train, with `changes` to the trainer's fields, from a checkpoint of the run
    by its name, or from the first model. ValueError if there is nothing, or it can't be done."""
    path = _checkpoint(run, checkpoint) if checkpoint else None
    first = checkpoint_version(path) if path else 0
    with run.reading() as reader:
        start_of = reader.whole_batches(first)
        settings_of = {start.start: start.config["trainer"] for start in reader.starts()}
        logged = {row.step: row.metrics or {} for row in reader.steps()}
    versions = list(start_of)
    if not versions:
        raise ValueError(f"{run.path} has no batch of version {first} or later: nothing to train")
    missing = next((v for v in range(first, versions[-1]) if v not in start_of), None)
    if missing is not None:
        raise ValueError(f"the log has no batch of version {missing}: give a checkpoint after it")
    legs = [
        _leg(list(of_leg), settings, changes)
        for settings, of_leg in groupby(versions, lambda v: settings_of[start_of[v]])
    ]
    for leg in legs:
        if changes:
            check_staleness(leg.settings, alpha=run.config.get("alpha", 1.0))
    return Plan(
        model=first_model(run),
        seed=run.config.get("seed", 0),
        checkpoint=path,
        changes=changes,
        legs=legs,
        logged=logged,
    )


async def retrain(run: LoggedRun, plan: Plan, tell: Callable[[Step | Compared], None]) -> None:
    """Trains all of it, and tells of each step. ValueError for what can't be trained on,
    TrainerFailure as a step raises it."""
    await asyncio.to_thread(_check_samples, run, plan.legs[0].first)
    own = await asyncio.to_thread(_newest_within, run, plan)
    with (
        own_logs("flash-retrain-") as log_dir,
        tempfile.TemporaryDirectory(prefix="flash-retrain-") as kept,
        _other_weights() if plan.changes else contextlib.nullcontext(),
    ):
        begin = plan.checkpoint
        for number, leg in enumerate(plan.legs):
            trainer = Trainer(
                model=plan.model,
                config=leg.settings,
                run_dir=log_dir,
                seed=plan.seed,
                resume_from=begin,
            )
            async with trainer:
                told = _Told(trainer, plan, tell, own, Path(kept) / "compared")
                await redo(told, _Batches(run, leg), leg.until)
                if leg is not plan.legs[-1]:
                    begin = Path(kept) / f"leg_{number}"
                    await trainer.save_checkpoint(begin)


@contextlib.contextmanager
def _other_weights() -> Iterator[None]:
    """The engine sampled from other weights than those of the block, and nobody need be warned."""
    told = logging.getLogger(Trainer.__module__)

    def is_of_something_else(record: logging.LogRecord) -> bool:
        return "mismatch/kl_fresh" not in record.getMessage()

    told.addFilter(is_of_something_else)
    try:
        yield
    finally:
        told.removeFilter(is_of_something_else)


class _Told:
    """A trainer that tells what its steps come to."""

    def __init__(
        self,
        trainer: Trainer,
        plan: Plan,
        tell: Callable[[Step | Compared], None],
        own: tuple[Path, int] | None,
        folder: Path,
    ) -> None:
        self._trainer = trainer
        self._plan = plan
        self._tell = tell
        self._own = own
        self._folder = folder
        self.version = trainer.version

    async def add(self, part: Batch) -> None:
        await self._trainer.add(part)

    async def step(self, batch: Batch) -> Mapping[str, float]:
        metrics = await self._trainer.step(batch)
        self.version = self._trainer.version
        self._tell(Step(self.version, metrics, self._plan.logged.get(self.version, {})))
        if self._own is not None and self._own[1] == self.version:
            mine = self._folder / "retrained"
            await self._trainer.save_model(mine)
            theirs = await asyncio.to_thread(_model_of, self._own[0], self._folder / "own")
            equal, difference = await asyncio.to_thread(_compare, mine, theirs)
            self._tell(Compared(self._own[0], equal, difference))
        return metrics


class _Batches:
    """The batches of a leg, as `flash.trainer.redo.BatchLog` has them."""

    def __init__(self, run: LoggedRun, leg: Leg) -> None:
        self._run = run
        self._leg = leg

    async def batches(self, version: int) -> AsyncIterator[list[Batch]]:
        for number in range(version, self._leg.until):
            yield await asyncio.to_thread(self._parts, number)

    def _parts(self, version: int) -> list[Batch]:
        settings = self._leg.settings
        _check_samples(self._run, version)
        with self._run.reading() as reader:
            parts = reader.batch(version)
            if len(parts) > 1 and (settings.mini_batches > 1 or settings.advantages.needs_batch):
                whole = [sample for part in parts for sample in part.samples]
                parts = [replace(parts[-1], samples=whole)]
            if self._leg.as_logged:
                return parts
            episodes = sorted({sample.episode for part in parts for sample in part.samples})
            worth = reader.worth(episodes)
        return [replace(p, samples=_with_advantages(p.samples, worth, settings)) for p in parts]


def _check_samples(run: LoggedRun, version: int) -> None:
    """ValueError if that batch can't be trained again."""
    with run.reading() as reader:
        has_samples = reader.has_samples(version)
    if not has_samples:
        raise ValueError(
            f"the log has the samples of version {version} no longer: begin at a later checkpoint "
            f"of the run (--from step_NUMBER)"
        )


def _with_advantages(
    samples: Sequence[Sample], worth: Mapping[int, Trajectory], settings: TrainerConfig
) -> list[Sample]:
    """The samples of whole groups with the advantages that these settings give them."""
    groups: dict[int, dict[int, list[Sample]]] = {}
    for sample in samples:
        groups.setdefault(sample.group, {}).setdefault(sample.episode, []).append(sample)
    computed = compared(
        [
            [replace(worth[episode], sequences=list(said)) for episode, said in group.items()]
            for group in groups.values()
        ],
        make_advantages(settings.advantages, finished=not settings.finishes_advantages),
    )
    of_episodes = {
        (role, episode): advantage
        for group, roles in zip(groups.values(), computed, strict=True)
        for role, of_group in roles.items()
        for episode, advantage in zip(group, of_group, strict=True)
    }
    return [replace(s, advantage=of_tokens(of_episodes[s.role, s.episode], s)) for s in samples]


# ── what is planned ──────────────────────────────────────────────────────────────────────────


def _leg(versions: Sequence[int], logged: Mapping[str, Any], changes: Mapping[str, Any]) -> Leg:
    was = validated(Retraining, {"trainer": logged}).trainer
    given = dict(logged)
    for section in _BY_NAME:
        name = changes.get(f"trainer.{section}.name")
        if name is not None and name != getattr(was, section).name:
            given[section] = {}
    settings = validated(Retraining, changed({"trainer": given}, changes)).trainer
    return Leg(
        first=versions[0],
        until=versions[-1] + 1,
        settings=settings,
        as_logged=(settings.advantages, settings.finishes_advantages)
        == (was.advantages, was.finishes_advantages),
    )


def _checkpoint(run: LoggedRun, name: str) -> Path:
    """ValueError if there is none of that name, or it is not whole."""
    known = sorted(path.name for path in run.path.glob("checkpoints/step_*[0-9]"))
    if name not in known:
        there_are = f"there are {', '.join(known)}" if known else "the run has none: leave it out"
        raise ValueError(
            f"--from {name}: no checkpoint of {run.path} has that name: "
            f"{nearest(name, known, there_are)}"
        )
    return run.path / "checkpoints" / name


def _newest_within(run: LoggedRun, plan: Plan) -> tuple[Path, int] | None:
    """The run's newest whole checkpoint, if the plan comes to its version."""
    try:
        found = newest_checkpoint(run.path)
    except ValueError:  # none is whole
        return None
    if found is None or not plan.legs[0].first < found.version <= plan.legs[-1].until:
        return None
    return found.path, found.version


def _model_of(checkpoint: Path, folder: Path) -> Path:
    """Where its weights are as `save_model` has them: its adapters, or a model made in `folder`."""
    if (checkpoint / MODEL_FOLDER / ADAPTERS_FILE).exists():
        return checkpoint / MODEL_FOLDER
    from flash.trainer.hugging_face import export_model  # noqa: PLC0415  (imports torch)

    export_model(checkpoint, folder, dtype="float32")
    return folder


def _compare(folder: Path, other: Path) -> tuple[bool, float]:
    """Whether the weights of two models are the same, and the largest difference."""
    equal, largest = True, 0.0
    with contextlib.ExitStack() as opened:
        mine, theirs = (_weights_in(of, opened) for of in (folder, other))
        if mine.keys() != theirs.keys():
            return False, math.inf
        for name in mine:
            one, another = (files[name].get_tensor(name) for files in (mine, theirs))
            if one.tobytes() != another.tobytes():
                equal = False
                largest = max(largest, float(np.abs(one - another).max()))
    return equal, largest


def _weights_in(folder: Path, opened: contextlib.ExitStack) -> dict[str, Any]:
    """The open file of each weight: how many files there are depends on the ranks."""
    weights: dict[str, Any] = {}
    for path in folder.glob("*.safetensors"):
        file = opened.enter_context(safe_open(path, framework="numpy"))
        weights |= dict.fromkeys(file.keys(), file)
    return weights
