"""One simulated run: the engine's own hub, loop and agents, on workers that only keep time.

SimulatedEnvs ─► EnvironmentAgent × N ─► RolloutLoop ─► batch ─► a trainer that sleeps
                         │                    ▲                        │
                   InferenceHub ─► SimulatedWorker × K ◄── publish ────┘
"""

import asyncio
import contextlib
import gc
import itertools
import logging
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from flash import registry, virtual_time
from flash.hub.hub import InferenceHub
from flash.rollout import filters
from flash.rollout.loop import RolloutLoop
from flash.rollout.record import EpisodeRecord
from flash.simulate.results import Result, Step
from flash.simulate.scenario import Scenario
from flash.simulate.timeline import Timeline
from flash.simulate.worker import SimulatedWorker
from flash.simulate.world import SimulatedEnvs, SimulatedStyle, World
from flash.trainer.advantages import per_group
from flash.types import Batch, Task, Weights

_FOREVER_S = 1e9  # deadlines that a scenario has no field for: longer than any simulation


def simulate(scenario: Scenario, *, timeline: Path | None = None) -> Result:
    """What the run would take and yield. The same scenario gives the same result, bit for bit.

    With `timeline` also writes a trace there for Perfetto. Raises FlashError for a run that can't
    go on, as the real one would.
    """
    began = time.process_time()
    with _quiet():
        result = virtual_time.run(_Simulation(scenario).run(timeline))
    result.took_s = time.process_time() - began
    return result


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No line for each of a thousand failed episodes; the result counts them."""
    loggers = [logging.getLogger(name) for name in ("flash.rollout", "flash.hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    # What the simulator makes has no cycles worth looking for, and the search takes a fifth of
    # its time: live objects are many.
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class _Simulation:
    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._episodes: list[EpisodeRecord] = []
        self._steps: list[Step] = []
        self._ages: Counter[int] = Counter()

    async def run(self, timeline_path: Path | None) -> Result:
        scenario = self._scenario
        self._timeline = timeline = Timeline() if timeline_path is not None else None
        self._world = world = World(scenario)
        envs = SimulatedEnvs(scenario, world, timeline)
        style = SimulatedStyle(world)
        workers = [
            SimulatedWorker(f"worker {i:03d}", scenario.workers, world, timeline)
            for i in range(scenario.workers.count)
        ]
        agent = registry.agent("environment")
        hub = InferenceHub(
            workers,
            max_running=scenario.workers.max_running,
            update_mode=scenario.update_mode,
            request_timeout_s=_FOREVER_S,
            control_timeout_s=_FOREVER_S,
            progress_timeout_s=_FOREVER_S,
        )
        rollouts = RolloutLoop(
            hub,
            agent=lambda: agent(
                envs=envs,
                style=style,
                max_tokens=world.entries(scenario.max_tokens),
                max_sequence_tokens=max(2, scenario.max_sequence_tokens // world.grain),
                step_timeout_s=scenario.workload.step_timeout_s,
                episode_timeout_s=_FOREVER_S,
                reward=envs.reward,
                reward_timeout_s=_FOREVER_S,
            ),
            tasks=(Task(seed) for seed in itertools.count()),
            batch_size=scenario.batch_size,
            group_size=scenario.group_size,
            alpha=scenario.alpha,
            on_stale=scenario.on_stale,
            schedule=scenario.schedule,
            max_regenerations=scenario.max_regenerations,
            replicate=scenario.replicate,
            redundant_groups=scenario.redundant_groups,
            redundant_episodes=scenario.redundant_episodes,
            filters=[filters.find(name) for name in scenario.filters],
            max_filtered=scenario.max_filtered,
            last_version=scenario.steps,
            advantages=per_group(lambda rewards: rewards - rewards.mean()),
            stall_timeout_s=_FOREVER_S,
            caller_timeout_s=_FOREVER_S,
            on_episode=self._episodes.append,
        )
        self._clock = asyncio.get_running_loop().time
        async with hub, rollouts:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(scenario.time_s):
                    await self._train(rollouts)
            result = Result.of(
                scenario,
                time_s=self._clock(),
                steps=self._steps,
                ages=self._ages,
                episodes=list(self._episodes),
                ledger=rollouts.ledger,
                hub=hub.stats(),
                workers=workers,
                grain=world.grain,
            )
        if timeline is not None and timeline_path is not None:
            timeline.write(timeline_path)
        return result

    async def _train(self, rollouts: RolloutLoop) -> None:
        """The trainer's life: wait for a batch, train, publish."""
        trainer = self._scenario.trainer
        for number in itertools.count(1):
            wait_s = train_s = 0.0
            tokens = 0
            last = False
            while not last:
                began = self._clock()
                take = rollouts.next_part if self._scenario.stream else rollouts.next_batch
                batch = await take()
                last = batch.last
                took_at = self._clock()
                wait_s += took_at - began
                self._lane("wait", began)
                part = sum(sample.num_tokens for sample in batch.samples) * self._world.grain
                computing_s = part * trainer.token_gpu_s / trainer.gpus + last * trainer.batch_s
                await asyncio.sleep(computing_s)
                self._lane("train", took_at, version=batch.version, tokens=part)
                tokens += part
                train_s += computing_s
            self._count(batch)
            trained_at = self._clock()
            if number % self._scenario.publish_every == 0 or number == self._scenario.steps:
                await asyncio.sleep(trainer.export_s)
                await rollouts.publish(Weights(version=batch.version + 1, path=_NOWHERE))
                self._lane("publish", trained_at, version=batch.version + 1)
            self._steps.append(
                Step(
                    step=number,
                    time_s=self._clock(),
                    wait_s=wait_s,
                    train_s=train_s,
                    publish_s=self._clock() - trained_at,
                    tokens=tokens,
                    staleness_mean=batch.metrics["staleness/mean"],
                    staleness_max=batch.metrics["staleness/max"],
                )
            )
            if number == self._scenario.steps:
                return

    def _count(self, batch: Batch) -> None:
        """The ages of the batch's sampled tokens."""
        for age, entries in enumerate(batch.metrics["staleness/histogram"]):
            self._ages[age] += entries * self._world.grain

    def _lane(self, name: str, began: float, **details: float) -> None:
        if self._timeline is not None:
            self._timeline.trainer(name, began, **details)


_NOWHERE = Path("no weights are written")
