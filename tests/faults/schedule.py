"""One run of hub, loop and agents with everything drawn from a seed, what goes wrong included.

    Schedule(seed).run()      raises Violation if an invariant does not hold; gives the trace

The parts are the production's; the trainer is the schedule itself. A seed decides the settings,
which kinds of faults there are and how often (some seeds have none), and when something is
cancelled.
"""

import asyncio
import contextlib
import hashlib
import itertools
import logging
import math
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from flash import virtual_time
from flash.errors import (
    FlashError,
    InferenceFailure,
    PublishFailure,
    RolloutFailure,
    RolloutStall,
    TrainerFailure,
)
from flash.fakes import FakePool, FakeStyle
from flash.hub.hub import InferenceHub
from flash.rollout.episode import Episode
from flash.rollout.loop import RolloutLoop
from flash.rollout.observer import Observer
from flash.rollout.record import EpisodeRecord
from flash.rollout.tasks import TaskSet
from flash.types import (
    Batch,
    GenerateRequest,
    Sample,
    SamplingParams,
    Task,
    Trajectory,
    UpdateMode,
    Weights,
)
from tests.faults.faulty import Faults, FaultyAgent, FaultyEnvs, FaultyWorker, Truth
from tests.loops import evaluate, loop_options

# The most that a call may go wrong; a seed takes some kinds, and of each a part of this.
RATES = {
    "worker_fail": 0.03, "worker_crash": 0.02, "worker_hang": 0.02, "worker_slow": 0.1,
    "answer_lost": 0.03, "answer_doubled": 0.2, "answer_false": 0.02, "abort_hang": 0.2,
    "control_fail": 0.1, "control_hang": 0.05, "control_crash": 0.05,
    "env_fail": 0.05, "env_hang": 0.03, "env_slow": 0.1, "env_bug": 0.03, "env_cancel": 0.03,
    "reward_bug": 0.1, "reward_hang": 0.1, "reward_slow": 0.2, "reward_cancel": 0.1,
    "agent_bug": 0.05, "agent_cancel": 0.05, "agent_lingers": 0.2, "agent_leaves": 0.05,
    "agent_reports_twice": 0.05,
    "trainer_slow": 0.3, "trainer_dies": 0.05, "batch_impatient": 0.5, "publish_cancelled": 0.2,
    "evaluation": 0.2, "evaluation_cancelled": 0.5, "client_cancelled": 0.2,
    "run_cancelled": 0.3, "tasks_end": 0.2,
}  # fmt: skip

EPISODE_TIMEOUT_S = 200.0
STALL_TIMEOUT_S = 500.0
LINGER_S = 5.0 + 1e-6
LONGEST_S = 1e6  # of a whole schedule; its waits all have deadlines far below


class Violation(AssertionError):
    """An invariant did not hold. Names the seed, which replays it."""


class Schedule:
    """See above. `rates` and `steps` replace what is drawn; so does any setting of the loop."""

    worker_class = FaultyWorker
    reuses = 0.3  # of the seeds that may
    several = 0.0  # of the seeds: of several task sets

    def __init__(self, seed: int, **settings: Any) -> None:
        self.seed = seed
        self.rng = rng = random.Random(f"schedule {seed}")
        self.rates = {}
        if rng.random() < 0.9:
            share = rng.choice([0.1, 0.3, 1.0])
            self.rates = {
                kind: most * rng.random() for kind, most in RATES.items() if rng.random() < share
            }
        self.settings = {
            "group_size": rng.choice([2, 3, 4]),
            "alpha": rng.choice([0, 0.5, 1, 1, 2, 2.5, 4]),
            "on_stale": rng.choice(["regenerate", "wait", "drop"]),
        }
        self.update_mode: UpdateMode = rng.choice(["keep", "abort", "wait"])
        if rng.random() < 0.5:
            self.settings |= {
                "schedule": rng.choice(["queue", "batch"]),
                "replicate": rng.random() < 0.5,
                "redundant_groups": rng.choice([0, 1, 3]),
                "redundant_episodes": rng.choice([0, 1, 2]),
                "filters": rng.choice([(), (_every_third,)]),
                "last_version": rng.choice([None, 6]),
                "max_regenerations": rng.choice([0, 8]),
            }
        self.publish_every = rng.choice([1, 1, 2, 3])
        self.streams = rng.random() < 0.3
        self.overlaps = rng.random() < 0.3  # the next batch is asked for during a publish
        groups = rng.choice([1, 2, 4])
        self.workers_wanted = rng.choice([1, 2, 3])
        self.pooled = rng.random() < 0.5
        self.max_running = rng.choice([1, 4, 16])
        self.tell_s = rng.choice([None, 0.2, 1.0])
        self.turns = rng.choice([(1, 1), (1, 4)])
        self.samples = rng.choice(["whole", "turns"])
        self.deterministic = False
        self.steps = 6
        for name, value in settings.items():
            if name in ("rates", "steps"):
                setattr(self, name, value)
            else:
                self.settings[name] = value
        self.publish_every = min(self.publish_every, 1 + int(self.settings["alpha"]))
        self.sets = self._draw_sets(random.Random(f"sets {seed}"), groups)
        self.settings["batch_size"] = sum(groups * size for groups, size in self.sets.values())
        fewest = min(groups for groups, _ in self.sets.values())
        self._draw_reuse(random.Random(f"reuse {seed}"), fewest)
        if random.Random(f"pool {seed}").random() < 0.2:
            self.workers_wanted = 8  # several of which get new weights at the same time

        self.trace: list[tuple[Any, ...]] = []
        self.records: list[EpisodeRecord] = []
        self.batches: list[Batch] = []
        self._set_of: dict[int, str] = {}  # of each group
        self.held: dict[int, int] = {}  # samples handed over, by version, until the publish
        self.truth = Truth()
        self.outcome = "not run"

    def _draw_sets(self, rng: random.Random, groups: int) -> dict[str, tuple[int, int]]:
        """Of each task set its groups in a batch, and their size."""
        if rng.random() >= self.several:
            return {"": (groups, self.settings["group_size"])}
        names = ["a", "b", "c"][: rng.choice([2, 2, 3])]
        return {name: (rng.choice([1, 2, 3]), rng.choice([2, 3, 4])) for name in names}

    def _draw_reuse(self, rng: random.Random, groups: int) -> None:
        versions = int(self.settings["alpha"])
        if rng.random() < self.reuses and versions and groups > 1:
            self.settings["reuse"] = {
                "uses": 1 + rng.randint(1, versions),
                "share": rng.choice([0.5, 0.75]),
                "priority": rng.choice(["linear_decay", "age_decay"]),
            }
        self.most_uses = self.settings.get("reuse", {}).get("uses", 1)

    def run(self) -> list[tuple[Any, ...]]:
        try:
            with quiet():
                virtual_time.run(self._run())
        except Exception as error:
            cause = f"{type(error).__name__}: {error}"
            raise Violation(f"seed {self.seed} ({self.settings}, {self.rates}): {cause}") from error
        return self.trace

    @property
    def ends(self) -> Counter[str]:
        return Counter({self.outcome: 1})

    def digest(self) -> str:
        return hashlib.sha256(repr(self.trace).encode()).hexdigest()

    def say(self, *what: Any) -> None:
        self.trace.append((round(asyncio.get_running_loop().time(), 6), *what))

    # ── the run ──────────────────────────────────────────────────────────────────────────────

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(self._on_loop_error)
        self._others = asyncio.all_tasks()
        self.loop_errors: list[str] = []
        self.chance = Faults(f"trainer {self.seed}", self.rates, self.say)
        self.envs = FaultyEnvs(
            faults=self._faults("env"), seed=self.seed, turns=self.turns, step_s=(0.0, 2.0),
            deterministic=self.deterministic,
        )  # fmt: skip
        self.workers = [
            self.worker_class(
                f"w{i}", seed=self.rng.randrange(10**6), faults=self._faults(f"worker {i}"),
                truth=self.truth, tell_s=self.tell_s,
            )
            for i in range(self.workers_wanted)
        ]  # fmt: skip
        self._life = life = loop.create_task(self._live(), name="the run")
        if self.chance.draw("run_cancelled"):
            loop.call_later(self.rng.uniform(0, 60), self._cancel_after_turns, life, 5)
        try:
            async with asyncio.timeout(LONGEST_S):
                await asyncio.wait([life])
        finally:
            life.cancel()
        self._note_outcome(life)
        self._check_end()

    def _faults(self, of: str) -> Faults:
        return Faults(f"{of} {self.seed}", self.rates, self.say)

    def _cancel_after_turns(self, task: asyncio.Task[Any], most: int) -> None:
        """A moment is many turns of the loop, and any of them may be the one."""
        if self.rng.randrange(most):
            asyncio.get_running_loop().call_soon(self._cancel_after_turns, task, most)
        else:
            self.say("cancel", task.get_name())
            task.cancel()

    async def _live(self) -> None:
        tasks = 2 * self.settings["batch_size"] if self.chance.draw("tasks_end") else 10**9
        async with (
            self._new_hub() as self.hub,
            self._drained(),
            self._asked_beside(),
            RolloutLoop(
                self.hub,
                task_sets=self._task_sets({name: map(Task, range(tasks)) for name in self.sets}),
                observers=[_Heard(self._on_episode)],
                **self._loop_options(),
            ) as self.rollouts,
            asyncio.TaskGroup() as beside,
        ):  # fmt: skip
            monitor = beside.create_task(self._monitor(), name="monitor")
            publishing: asyncio.Task[None] | None = None
            for step in range(1, self.steps + 1):
                await self._train()
                if step % self.publish_every == 0:
                    if publishing is not None:
                        await publishing
                    publishing = beside.create_task(self._publish(step), name="publish")
                    if not self.overlaps:
                        await publishing
            if publishing is not None:
                await publishing
            monitor.cancel()

    def _new_hub(self, version: int = 0) -> InferenceHub:
        source: Any = self.workers
        if self.pooled:
            source = FakePool(self.workers, start_s=20.0)
            for worker in self.workers:
                worker.pool = source
        return InferenceHub(
            source, max_running=self.max_running, request_timeout_s=60.0, control_timeout_s=30.0,
            recovery_timeout_s=300.0, progress_timeout_s=25.0, update_mode=self.update_mode,
            version=version,
        )  # fmt: skip

    def _loop_options(self) -> dict[str, Any]:
        self._agents = itertools.count()
        settings = {name: value for name, value in self.settings.items() if name != "group_size"}
        return {
            "agent": self._make_agent,
            **loop_options(stall_timeout_s=STALL_TIMEOUT_S, **settings),
        }

    def _task_sets(self, tasks: Mapping[str, Iterable[Task]]) -> list[TaskSet]:
        return [
            TaskSet(name=name, tasks=tasks[name], groups_per_batch=groups, group_size=size)
            for name, (groups, size) in self.sets.items()
        ]

    @contextlib.asynccontextmanager
    async def _asked_beside(self) -> AsyncIterator[None]:
        """Three clients that are no episodes, one of them cancelled now and then as a worker ends
        a request: it may just be given the place."""
        clients: list[asyncio.Task[None]] = []
        leaving: list[asyncio.Task[None]] = []

        async def ask() -> None:
            request = GenerateRequest(token_ids=[1, 2], sampling=SamplingParams(max_tokens=4))
            with contextlib.suppress(FlashError):  # others tell of it
                while True:
                    await self.hub.generate(request)

        def on_answer() -> None:
            if clients and self.chance.draw("client_cancelled"):
                at = self.rng.randrange(len(clients))
                self._cancel_after_turns(clients[at], 4)
                leaving.append(clients[at])
                clients[at] = asyncio.create_task(ask(), name="client")

        for worker in self.workers:
            worker.on_answer = on_answer
        if "client_cancelled" in self.rates:
            clients += [asyncio.create_task(ask(), name="client") for _ in range(3)]
        try:
            yield
        finally:
            leaving += clients
            clients.clear()
            for client in leaving:
                client.cancel()
            if leaving:
                await asyncio.wait(leaving)

    def _make_agent(self) -> FaultyAgent:
        return FaultyAgent(
            faults=self._faults(f"agent {next(self._agents)}"),
            envs=self.envs,
            style=FakeStyle(),
            max_tokens=8,
            samples=self.samples,
            step_timeout_s=20.0,
            episode_timeout_s=EPISODE_TIMEOUT_S,
            reward_timeout_s=10.0,
        )

    async def _train(self) -> None:
        batch = await self._next_batch()
        again = self._trained_before(batch)
        self._check_batch(batch)
        self.held[batch.version] = self.settings["batch_size"] - len(again)
        if self.chance.draw("trainer_dies"):
            raise TrainerFailure("planned")
        slow = self.chance.draw("trainer_slow") is not None
        await asyncio.sleep(self.rng.random() * (300 if slow else 3))

    async def _publish(self, version: int) -> None:
        while not await self._cancellable(
            self.rollouts.publish(Weights(version=version, path=self._path_of(version))),
            "publish_cancelled",
        ):
            await asyncio.sleep(self.rng.random())
        self.held = {v: n for v, n in self.held.items() if v >= version}
        self.say("published", version)
        self._check_published(version)
        if self.chance.draw("evaluation"):
            await self._cancellable(self._evaluate(version), "evaluation_cancelled")

    def _path_of(self, version: int) -> Path:
        """Where the weights of that version would be."""
        return Path("/fake")

    def _check_published(self, version: int) -> None:
        behind = [w for w in self.hub.stats().workers if w.healthy and w.version < version]
        assert not behind, f"a worker takes requests with old weights: {behind}"

    async def _evaluate(self, version: int) -> None:
        await evaluate(self.rollouts, self._make_agent, heldout_tasks())

    async def _next_batch(self) -> Batch:
        """Gives up waiting at random moments; nothing may be lost by it."""
        samples: list[Sample] = []
        while True:
            patience = self.rng.random() * 10 if self.chance.draw("batch_impatient") else None
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    part = await (
                        self.rollouts.next_part() if self.streams else self.rollouts.next_batch()
                    )
                    self._on_part(part)
                    samples += part.samples
                    if part.last:
                        return replace(part, samples=samples)

    def _on_part(self, part: Batch) -> None:
        """What the trainer is given."""

    async def _cancellable(self, coroutine: Any, kind: str) -> bool:
        """Whether it came to its end."""
        task = asyncio.create_task(coroutine, name=kind)
        if self.chance.draw(kind):
            after = self.rng.choice([0.0, 0.1, 1.0, 20.0]) * self.rng.random()
            asyncio.get_running_loop().call_later(after, self._cancel_after_turns, task, 3)
        try:
            await asyncio.wait([task])
        finally:
            task.cancel()
            await asyncio.wait([task])
        if task.cancelled():
            return False
        task.result()
        return True

    def _on_episode(self, record: EpisodeRecord) -> None:
        self.records.append(record)
        self._set_of[record.group] = record.task_set
        self.say("ended", record.episode, record.outcome, record.reason, record.generated_tokens)

    def _on_loop_error(self, loop: object, context: dict[str, Any]) -> None:
        self.loop_errors.append(f"{context['message']}: {context.get('exception')!r}")

    # ── what must hold ───────────────────────────────────────────────────────────────────────

    async def _monitor(self) -> None:
        """Invariants 2, 3 and 5 at many moments, not only at the end."""
        while True:
            rollouts, now = self.rollouts, asyncio.get_running_loop().time()
            rollouts.ledger.check()
            under_way = rollouts.ledger.running + rollouts.ledger.ready + sum(self.held.values())
            assert under_way <= self._most_under_way(), "invariant 3: bounded"
            for is_so in (self._requests_lost, self._workers_idle_in_vain):
                if is_so():
                    await asyncio.sleep(0.001)  # within one moment requests may be on their way
                    assert not is_so(), f"invariant 5: {is_so.__name__}"
            for episode in rollouts.under_way():
                # A run that has failed says so at the trainer's next call; till then it waits.
                if episode.trajectory is None and rollouts._failure is None:
                    self._check_life(now - episode.admitted_at)
            await asyncio.sleep(0.5)

    def _check_life(self, lasts_s: float) -> None:
        """How long an episode may last."""
        assert lasts_s <= EPISODE_TIMEOUT_S + LINGER_S, f"invariant 5: {lasts_s:.0f} s"

    def _most_under_way(self) -> int:
        return sum(self._most_of_set(groups, size) for groups, size in self.sets.values())

    def _most_of_set(self, groups: int, of_group: int) -> int:
        slots = int((1 + self.settings["alpha"]) * groups * of_group)
        slots += self.settings.get("redundant_groups", 0) * of_group
        return slots + math.ceil(slots / of_group) * self.settings.get("redundant_episodes", 0)

    def _requests_lost(self) -> bool:
        hub = self.hub.stats()
        asking = sum(e.stage_name == "generate" for e in self.rollouts.episodes())
        return asking > hub.queued + hub.running

    def _workers_idle_in_vain(self) -> bool:
        """A request waits beside a worker that has room. Without replication some have to."""
        hub = self.hub.stats()
        free = any(
            w.healthy and not w.updating and not w.lent and w.running < self.max_running
            for w in hub.workers
        )
        return bool(free and hub.queued and self.settings.get("replicate", True))

    def _trained_before(self, batch: Batch) -> set[int]:
        """The episodes of it that were in other batches; their tokens are known again."""
        uses = Counter(itertools.chain.from_iterable(_episodes(b) for b in self.batches))
        again = {episode for episode in _episodes(batch) if uses[episode]}
        assert all(uses[episode] < self.most_uses for episode in again), "used too often"
        for sample in itertools.chain.from_iterable(b.samples for b in self.batches):
            for at in np.flatnonzero(sample.loss_mask) if sample.episode in again else ():
                true = sample.logprobs[at], sample.versions[at], sample.token_ids[at - 1]
                self.truth.tokens[int(sample.token_ids[at])] = true
        return again

    def _check_batch(self, batch: Batch) -> None:
        self.say("batch", batch.version, [sample.episode for sample in batch.samples])
        assert batch.version == self._expected_version()
        episodes = Counter((sample.group, sample.episode) for sample in batch.samples)
        assert len(episodes) == self.settings["batch_size"]
        assert self.samples == "turns" or set(episodes.values()) == {1}
        sizes = Counter(group for group, _ in episodes)
        of_sets = Counter((self._set_of[group], size) for group, size in sizes.items())
        mixture = {(name, size): groups for name, (groups, size) in self.sets.items()}
        assert of_sets == mixture, "whole groups are handed over, so many of each task set"
        for sample in batch.samples:
            ages = batch.version - sample.sampled_versions()
            assert ages.min() >= 0
            assert ages.max() <= self.settings["alpha"], "invariant 1: staleness"
            assert (sample.versions[sample.loss_mask == 0] == -1).all()
            sampled = np.flatnonzero(sample.loss_mask)
            for at in sampled.tolist():
                told = sample.logprobs[at], sample.versions[at], sample.token_ids[at - 1]
                true = self._take_truth(int(sample.token_ids[at]), batch)
                assert told == true, f"invariant 4: truth: trained on {told}, sampled {true}"
        self.batches.append(batch)

    def _handed_over(self) -> list[set[int]]:
        """The episodes of each batch."""
        return [_episodes(batch) for batch in self.batches]

    def _waits_for_the_slow(self) -> bool:
        return self.settings["on_stale"] == "wait" and self.settings["alpha"] % 1 == 0

    def _expected_version(self) -> int:
        return len(self.batches)

    def _take_truth(self, token: int, batch: Batch) -> tuple[np.float32, int, int] | None:
        """What is true of a token that is trained; found once, so that a second time is noticed."""
        return self.truth.tokens.pop(token, None)

    @contextlib.asynccontextmanager
    async def _drained(self) -> AsyncIterator[None]:
        """Invariant 6 at the hub, when the loop has ended and the hub has not."""
        try:
            yield
        finally:
            stats = self.hub.stats()
            assert stats.queued == stats.running == 0, f"invariant 6: {stats}"
            assert all(w.outstanding_tokens == 0 for w in stats.workers), f"invariant 6: {stats}"

    def _note_outcome(self, life: asyncio.Task[None]) -> None:
        if life.cancelled():
            self.outcome = "cancelled"
        elif (error := life.exception()) is None:
            self.outcome = "trained"
        else:
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            if not isinstance(error, FlashError):
                raise error
            self.outcome = type(error).__name__
            self._check_warranted(error)
        self.say("end", self.outcome)

    def _check_warranted(self, error: FlashError) -> None:
        """A run ends for what was planted, and says so."""
        if isinstance(error, RolloutStall):
            assert error.cause not in ("nothing_runs", "queue_stuck"), "that is never planted"
        kinds = " ".join(self.rates)
        causes = {
            InferenceFailure: ("worker", "answer", "control"),
            PublishFailure: ("worker", "answer", "control"),
            RolloutFailure: ("worker", "answer", "env", "agent", "reward", "control", "tasks_end"),
            TrainerFailure: ("trainer_dies",),
        }
        planted = next(causes[kind] for kind in type(error).__mro__ if kind in causes)
        assert any(cause in kinds for cause in planted), f"nothing planted: {error!r}"

    def _is_faultless(self) -> bool:
        return not self.rates

    def _check_tasks(self) -> None:
        left = asyncio.all_tasks() - self._others
        assert not left, f"invariant 6: {left}"

    def _check_end(self) -> None:
        assert not self.loop_errors, self.loop_errors
        assert self.envs.open_now == 0, "invariant 6: an environment is open"
        assert all(worker.running == 0 for worker in self.workers), "invariant 6: one samples on"
        if not any(
            kind.startswith(("worker", "abort", "control", "answer")) for kind in self.rates
        ):
            for worker in self.workers:
                assert set(worker.cancelled) <= set(worker.aborted), "invariant 6: not aborted"
        self._check_tasks()
        if not hasattr(self, "rollouts"):
            return
        ledger = self.rollouts.ledger
        assert ledger.running == ledger.ready == 0, "invariant 2: an episode has no outcome"
        ledger.check()
        ids = [record.episode for record in self.records]
        assert len(ids) == len(set(ids)) == ledger.begun, "invariant 2: one outcome each"
        counts = Counter((record.outcome, record.reason) for record in self.records)
        assert counts == ledger.outcomes
        wasted = sum(r.generated_tokens for r in self.records if r.outcome != "trained")
        assert ledger.waste_tokens == wasted
        trained = Counter(r.episode for r in self.records if r.outcome == "trained")
        handed_over = Counter(itertools.chain.from_iterable(self._handed_over()))
        assert trained == Counter(dict.fromkeys(handed_over, 1))
        assert ledger.reused == handed_over.total() - trained.total()
        settings = self.settings
        if self._waits_for_the_slow():
            stale = ledger.outcomes["cancelled", "stale"] + ledger.outcomes["dropped", "stale"]
            assert not stale or settings.get("redundant_groups"), "it was not waited for"
        if self._is_faultless():
            assert self.outcome == "trained"
            assert not ledger.count("failed")


class ScheduleOfSets(Schedule):
    """Each of several task sets."""

    several = 1.0


def heldout_tasks() -> list[Task]:
    return [Task(-1 - number) for number in range(3)]


def _episodes(batch: Batch) -> set[int]:
    return {sample.episode for sample in batch.samples}


class _Heard(Observer):
    """Passes on each ended episode's record."""

    def __init__(self, on_record: Callable[[EpisodeRecord], None]) -> None:
        self._on_record = on_record

    def ended(self, episode: Episode, record: EpisodeRecord) -> None:
        self._on_record(record)


def _every_third(group: Sequence[Trajectory]) -> bool:
    """A filter that drops every third group or so."""
    return sum(len(sequence.token_ids) for t in group for sequence in t.sequences) % 3 == 0


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Thousands of planned failures, each with a warning."""
    logger = logging.getLogger("flash")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
