"""A run that is killed again and again, whose log lies on a disk that goes wrong.

    LoggedSchedule(seed).run()      raises Violation if a promise was broken; gives the trace

Loop, hub, agents, log and resume are the production's; the trainer's weights are a sum over all
that it was ever trained on, so that a redo that differs in a bit is seen. The last start meets no
fault, and has to bring the run to its end.
"""

import asyncio
import contextlib
import functools
import hashlib
import math
import random
import shutil
import sqlite3
import tempfile
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from flash.config import Config, load
from flash.errors import FlashError, LogFailure
from flash.log import schema
from flash.log.config import LogConfig
from flash.log.log import Log
from flash.log.past import Past
from flash.log.run_log import RunLog
from flash.rollout.adaptive import AdaptiveAlpha
from flash.rollout.loop import RolloutLoop
from flash.trainer.redo import redo
from flash.types import Batch, Task, Weights
from tests.crash.account import Books, Snapshot, compare, log_violations
from tests.faults.disk import AILMENTS, Disk, FaultyStore, copy, copy_torn
from tests.faults.faulty import Faults, Truth
from tests.faults.promises import Heard, Promises, sum_of
from tests.faults.schedule import Schedule

LOG_RATES = {
    "disk_slow": 0.1, "disk_full": 0.03, "disk_readonly": 0.03, "disk_fsync": 0.1,
    "disk_forever": 0.3, "log_unreadable": 0.02, "rank_dies": 0.1, "checkpoint": 0.7,
}  # fmt: skip
# How a start ends, if nothing else ends it before; a kill in a commit at a place of it.
ENDS = ("killed", "row", "commit", "torn", "committed", "taken_over", "")
LATEST_END_S = 150.0
MOST_COMMITS = 150
# Settings that a user may change at a resume.
RATE, SOURCE, SETTING = "trainer.learning_rate", "env.options", "agent.samples"


class LoggedSchedule:
    """See above. `end`, of all starts but the last, and settings as of a Schedule replace what is
    drawn."""

    store_class = FaultyStore
    several = 0.0  # of the seeds: of several task sets

    def __init__(self, seed: int, *, end: str | None = None, **settings: Any) -> None:
        self.seed = seed
        self.given = settings
        self.end = end
        self.rng = random.Random(f"logged schedule {seed}")
        self.num_starts = self.rng.choice([2, 3, 4, 6])
        self.outcome = "not run"
        self.ends: Counter[str] = Counter()
        self.trace: list[tuple[Any, ...]] = []
        self.settings: dict[str, Any] = {}
        self.rates: dict[str, float] = {}

        self.truth = Truth()
        self.sampled_in: dict[int, int] = {}  # the start of each token
        self.trained_at: dict[int, int] = {}  # the version of each token that was trained
        self.weights: dict[int, str] = {0: ""}  # of each version, as it is today
        self.published: dict[tuple[int, int], str] = {}  # by start and version
        self.checkpoints: dict[int, str] = {}
        self.batches: dict[int, str] = {}  # what was handed over at each version
        self.snapshots: list[Snapshot] = []
        self.most_alpha = 0.0
        self.choices = {"rate": 0, "source": 0, "samples": None}

    run = Schedule.run
    digest = Schedule.digest
    say = Schedule.say

    async def _run(self) -> None:
        root = Path(tempfile.mkdtemp(prefix="flash-log-", dir=_quick_folder()))
        try:
            await self._live_in(root)
        finally:
            shutil.rmtree(root)

    async def _live_in(self, root: Path) -> None:
        folder = root / "0"
        folder.mkdir()
        before: Start | None = None
        for number in range(self.num_starts):
            last = number == self.num_starts - 1
            start = self._new_start(number, folder, last=last, before=before)
            before = await start.live()
            folder = start.left
            if before is None:
                self.ends[start.outcome] += 1
            if start.outcome == "trained":
                break
        assert start.outcome == "trained", f"the last start ended as {start.outcome}"
        self.outcome = start.outcome
        books = Books("", folder)
        settings = {
            **start.settings, "seed": 0, "steps": start.steps, "alpha": self.most_alpha,
            "left": [Task(s, task_set=of) for of, seeds in start.again.items() for s in seeds],
            "sets": start.sets,
        }  # fmt: skip
        broken = list(log_violations(books, settings))
        for snapshot in self.snapshots:
            account = compare(snapshot, books)
            broken += account.lost + account.doubled
        assert not broken, broken

    def _new_start(self, number: int, folder: Path, **options: Any) -> "Start":
        return Start(self, number, folder, **options)


class LoggedSets(LoggedSchedule):
    """Each of several task sets."""

    several = 1.0


class Start(Promises):
    """One of its starts, on what the one before has left in `folder`."""

    def __init__(
        self,
        run: LoggedSchedule,
        number: int,
        folder: Path,
        *,
        last: bool,
        before: "Start | None",
    ) -> None:
        self.several = run.several
        super().__init__(run.seed, **run.given)
        self.of_run = run
        self.number = number
        self.folder = self.left = folder
        self.dead = False
        self.taken_over_at = float("inf")
        self.all_was_done = False  # when it was taken over
        self.trace = run.trace
        self.rng = rng = random.Random(f"start {number} of {run.seed}")
        self._before = before
        self._plan(rng, last)
        self.truth = TruthOfStart(run, number)
        self.deterministic = random.Random(run.seed).random() < 0.5

    def _plan(self, rng: random.Random, last: bool) -> None:
        run = self.of_run
        most = 2 if len(self.sets) == 1 else 1
        self.sets = {name: (min(most, groups), size) for name, (groups, size) in self.sets.items()}
        self.settings["batch_size"] = sum(groups * size for groups, size in self.sets.values())
        self.rates.pop("tasks_end", None)
        self.end = ""
        if last:
            self.rates = {"checkpoint": 0.3}
        else:
            share = rng.choice([0.0, 0.3, 1.0]) * ("rates" not in run.given)
            self.rates |= {
                kind: most * rng.random()
                for kind, most in LOG_RATES.items()
                if rng.random() < share
            }
            self.end = rng.choice(ENDS) if run.end is None else run.end
        self.end_s = rng.uniform(0, LATEST_END_S)
        self.end_commit = rng.randrange(MOST_COMMITS)
        if self.number:
            for name, values in {"rate": 2, "source": 5}.items():
                if rng.random() < 0.3:
                    run.choices[name] = min(1, rng.randrange(values))
            if rng.random() < 0.1:
                run.choices["samples"] = rng.choice(["whole", "turns"])
            if rng.random() < 0.2:
                self.settings["alpha"] = max(self.publish_every - 1, rng.choice([0, 1, 2, 4]))
        self.samples = run.choices["samples"] = run.choices["samples"] or self.samples
        self.rate = [1e-6, 1e-5][run.choices["rate"]]
        run.most_alpha = max(run.most_alpha, self.settings["alpha"])
        if self.settings.get("last_version"):
            self.settings["last_version"] = self.steps
        run.settings, run.rates = self.settings, self.rates
        self.config = _config(
            tuple(self.sets.items()), self.settings.get("redundant_episodes", 0), self.samples,
            self.rate, run.choices["source"],
        )  # fmt: skip
        self.log_config = LogConfig(
            max_lag_s=rng.choice([2.0, 10.0, 30.0]), timeout_s=rng.choice([20.0, 60.0, 300.0])
        )

    def _faults(self, of: str) -> Faults:
        return Faults(f"{of} {self.number} of {self.seed}", self.rates, self.say)

    # ── its life ─────────────────────────────────────────────────────────────────────────────

    async def live(self) -> "Start | None":
        """Itself, if it lives on when another is to take over."""
        self.say("start", self.number, self.end, self.rates)
        life = asyncio.create_task(self._run(), name=f"start {self.number}")
        if self.end == "taken_over":
            await asyncio.wait([life], timeout=self.end_s)
            while not (life.done() or hasattr(self, "rollouts")):  # it owns the log not yet
                await asyncio.wait([life], timeout=1.0)
            if not life.done():
                self.life = life
                return self
        elif self.end == "killed":
            asyncio.get_running_loop().call_later(self.end_s, self._die_after_turns, 5)
        await life
        await self._see_end_of_the_one_before()
        return None

    async def _see_end_of_the_one_before(self) -> None:
        if self._before is not None:
            await self._before.life
            self.of_run.ends[f"taken over: {self._before.outcome}"] += 1

    async def _live(self) -> None:
        self.disk = Disk(self._faults("disk"))
        self.disk.at_commit = self._at_commit
        self._commits = 0
        self._told: dict[tuple[int, int], float] = {}
        self._told_of: list[Batch] = []
        self._known: set[int] = set()
        self._said: dict[int, list[Any]] = defaultdict(list)  # in episodes before this start
        self._continues: dict[int, int | None] = {}
        self._kept: dict[
            int, list[int]
        ] = {}  # the tokens that an episode of this start begins with
        self.log_gave_up = False
        checkpoint = None
        if self.number:
            versions = sorted({0, *self.of_run.checkpoints})
            checkpoint = versions[-1] if self.rng.random() < 0.7 else self.rng.choice(versions)
            for damaged in [version for version in versions if version > checkpoint]:
                del self.of_run.checkpoints[damaged]
        async with RunLog(
            self.folder, self.log_config, thread=self.disk,
            store=functools.partial(self.of_run.store_class, disk=self.disk),
        ) as run_log:  # fmt: skip
            past = await run_log.take_over(checkpoint=checkpoint, config=self.config)
            if checkpoint is not None:
                self._check_past(past)
            self.trainer = self._new_trainer(past.checkpoint)
            await self._redo_as_logged(run_log, past)
            alpha = AdaptiveAlpha(self.settings["alpha"])
            with contextlib.closing(sqlite3.connect(self.folder / "log.sqlite")) as self.looks:
                async with run_log.writing(past, alpha=alpha.state) as log:
                    await self._go_on(run_log, past, log)

    def _given_up(self, failure: Exception) -> None:
        self.log_gave_up = True
        self.rollouts.fail(failure)

    def _new_trainer(self, version: int) -> "_Trainer":
        weights = self.of_run.checkpoints.get(version, "")
        return _Trainer(version, weights, self.rate, self._note_weights)

    def _note_weights(self, version: int, weights: str) -> None:
        if not self._is_over:
            known = self.of_run.weights.setdefault(version, weights)
            assert known == weights, f"version {version} was trained again to other weights"

    async def _redo_as_logged(self, run_log: RunLog, past: Past) -> None:
        """As `flash.parts.training` does it."""
        for until, settings in past.with_other_settings:
            self.trainer.rate = settings["learning_rate"]
            await redo(self.trainer, run_log, until)
            self.of_run.checkpoints[until] = self.trainer.weights
        self.trainer.rate = self.rate
        self._first_version = self.trainer.version
        self._first_weights = self.trainer.weights
        await redo(self.trainer, run_log, past.version)

    async def _go_on(self, run_log: RunLog, past: Past, log: Log) -> None:
        for worker in self.workers:
            worker.version = self._first_version
        self._note_published(self._first_version, self._first_weights)
        self._steps_done = 0
        self._logged_version = past.logged_version
        self.again = {name: deque(seeds) for name, seeds in past.again.items()}
        self._first_group = past.restored.first_ids[1]
        self.past, self.log = past, log
        async with self._rescuing(log), self._new_hub(self._first_version) as self.hub:
            if self.hub.version < past.version:
                self._note_published(self.trainer.version, self.trainer.weights)
                version = self.trainer.version
                await self.hub.publish(Weights(version=version, path=self._path_of(version)))
            async with (
                self._drained(),
                self._asked_beside(),
                RolloutLoop(
                    self.hub,
                    task_sets=self._task_sets(
                        {name: past.tasks(0, task_set=name) for name in self.sets}
                    ),
                    restored=past.restored,
                    observers=[log, Heard(self)],
                    log=log,
                    **self._loop_options(),
                ) as self.rollouts,
                asyncio.TaskGroup() as beside,
            ):
                log.fail_with(self._given_up)
                monitor = beside.create_task(self._monitor(), name="monitor")
                while self.trainer.version < self.steps:
                    await self._train()
                    batch = self._batch
                    if self.chance.draw("rank_dies"):
                        await self._restart_trainer(run_log)
                    await self.trainer.step(batch)
                    if self.trainer.version % self.publish_every == 0:
                        self._note_published(self.trainer.version, self.trainer.weights)
                        await self._publish(self.trainer.version)
                    await asyncio.sleep(self.rng.random() * 5)  # an evaluation, say
                    log.measured({"step": self.trainer.version})
                    self._steps_done = self.trainer.version
                    if self.chance.draw("checkpoint"):
                        await asyncio.sleep(self.rng.random() * 3)
                        self._save(log)
                monitor.cancel()

    @contextlib.asynccontextmanager
    async def _rescuing(self, log: Log) -> AsyncIterator[None]:
        try:
            yield
        except Exception:
            if self.trainer.version and self.trainer.version == self._steps_done:
                self._save(log)
            raise

    def _save(self, log: Log) -> None:
        version = self.trainer.version
        if not self._is_over:
            self.of_run.checkpoints[version] = self.trainer.weights
        log.saved(Path(f"/run/checkpoints/step_{version:06d}"))

    async def _restart_trainer(self, run_log: RunLog) -> None:
        version = self.trainer.version
        newest = max((v for v in self.of_run.checkpoints if v <= version), default=0)
        self.trainer = self._new_trainer(newest)
        await redo(self.trainer, run_log, version)

    def _note_published(self, version: int, weights: str) -> None:
        self.of_run.published[self.number, version] = weights

    # ── its end ──────────────────────────────────────────────────────────────────────────────

    @property
    def _is_over(self) -> bool:
        """Nothing that it does counts any more."""
        return self.dead or asyncio.get_running_loop().time() >= self.taken_over_at

    def _at_commit(self, place: str) -> None:
        """A kill in mid-commit; and what there is in the moment of a take-over."""
        if place == "owned":
            if self._before is not None and not self._before.life.done():
                self._before.taken_over_at = asyncio.get_running_loop().time()
            if self.number:
                self._books = Books("", self.folder, live=True)
                if self._before is not None:
                    done = len(self._books.of(schema.STEPS))
                    self._before.all_was_done = done == self.steps
            return
        if self.dead:
            return
        if place == "row":
            self._commits += 1  # each has one such place at least
        if self._commits < self.end_commit or self.end not in (
            "row",
            "commit",
            "torn",
            "committed",
        ):
            return
        before, after = self.folder / "before", self.folder / "after"
        if place == self.end:
            self._die()
        elif self.end == "torn" and place == "commit":
            shutil.rmtree(before, ignore_errors=True)
            copy(self.folder, before)
        elif self.end == "torn" and place == "committed":
            copy(self.folder, after)
            self._die(lambda left: copy_torn(before, after, left, self.rng))

    def _die_after_turns(self, most: int) -> None:
        if self.rng.randrange(most):
            asyncio.get_running_loop().call_soon(self._die_after_turns, most)
        else:
            self._die()

    def _die(self, leave: Any = None) -> None:
        """What it has on disk is left, and nothing else."""
        if self.dead or self._life.done():
            return
        self.say("killed", self.number, self.end)
        self.dead = True
        if not self._one_before_goes_on:
            self.left = self.folder.with_name(str(self.number + 1))
            (leave or functools.partial(copy, self.folder))(self.left)
        self._life.cancel()

    @property
    def _one_before_goes_on(self) -> bool:
        """Whether the start that was to be taken over has not been yet, and writes the log."""
        before = self._before
        return before is not None and before.taken_over_at == math.inf and not before.life.done()

    def _note_outcome(self, life: asyncio.Task[None]) -> None:
        if self.dead:
            self.outcome = f"killed: {self.end}"
            self.say("end", self.outcome)
        else:
            super()._note_outcome(life)

    def _check_warranted(self, error: FlashError) -> None:
        if not isinstance(error, LogFailure):
            super()._check_warranted(error)
        elif "can't be read" in str(error):
            assert "log_unreadable" in self.rates, error
        elif "another process has gone on" in str(error):
            assert self.taken_over_at < float("inf"), error
        else:
            cause = AILMENTS.get(self.disk.ails, "nothing ails the disk")
            assert f"(log.timeout_s): {cause}" in str(error), error
            assert self.disk.trying_since is not None
            tried_s = asyncio.get_running_loop().time() - self.disk.trying_since
            assert tried_s >= self.log_config.timeout_s, f"given up after {tried_s:.0f} s"

    def _most_under_way(self) -> int:
        """With what was ready under the largest α that the run has had."""
        alphas = self.of_run.most_alpha - self.settings["alpha"]
        more = [(math.ceil(alphas * groups * size), size) for groups, size in self.sets.values()]
        return super()._most_under_way() + sum(n + math.ceil(n / size) * size for n, size in more)

    def _check_end(self) -> None:
        if not self.dead and self._before is None and self.end != "taken_over":
            super()._check_end()
        if self.taken_over_at < float("inf"):
            assert self.outcome != "trained" or self.all_was_done, "it ends as if it owned the log"


class TruthOfStart(Truth):
    """What is true of a run's tokens, told by the workers of one of its starts."""

    def __init__(self, run: LoggedSchedule, number: Any) -> None:
        super().__init__(tokens=run.truth.tokens, ids=run.truth.ids)
        self._sampled_in = run.sampled_in
        self._number = number

    def note(self, before: int, token_ids: Any, logprobs: Any, versions: Any) -> None:
        super().note(before, token_ids, logprobs, versions)
        self._sampled_in.update(dict.fromkeys(token_ids, self._number))


class _Trainer:
    """Its weights are a sum over what it was trained on, and with what."""

    def __init__(
        self, version: int, weights: str, rate: float, note: Callable[[int, str], None]
    ) -> None:
        self.version = version
        self.weights = weights
        self.rate = rate
        self._note = note
        self._parts: list[Batch] = []

    async def add(self, part: Batch) -> None:
        self._parts.append(part)

    async def step(self, batch: Batch) -> None:
        assert batch.version == self.version
        trained = f"{self.weights} {self.rate} {sum_of(*self._parts, batch)}"
        self.weights = hashlib.sha256(trained.encode()).hexdigest()[:16]
        self._parts = []
        self.version += 1
        self._note(self.version, self.weights)


@functools.lru_cache
def _config(
    sets: tuple[tuple[str, tuple[int, int]], ...], redundant: int, samples: str, rate: float,
    source: int,
) -> Config:  # fmt: skip
    several = {
        f"task_sets.{name}": {"weight": groups * size, "group_size": size}
        for name, (groups, size) in sets if name
    }  # fmt: skip
    return load(
        "frozen_lake",
        {
            "group_size": sets[0][1][1], **several,
            "batch_size": sum(groups * size for _, (groups, size) in sets),
            "rollout.redundant_episodes": redundant, "agent.samples": samples,
            "trainer.learning_rate": rate, "env.options.size": [4, 5][source],
        },
    )  # fmt: skip


def _quick_folder() -> str | None:
    """In memory, where there is such a place: what is promised of a disk is SQLite's part."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None
