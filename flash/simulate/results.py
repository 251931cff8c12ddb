"""What simulations yield: the numbers of one run, and of one combination of a sweep."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from statistics import fmean, stdev
from typing import Any

from flash.hub.reports import HubStats
from flash.rollout.ledger import Ledger
from flash.rollout.record import EpisodeRecord
from flash.simulate.scenario import Scenario
from flash.simulate.worker import SimulatedWorker


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One batch: when its weights were published, and what that took."""

    step: int
    time_s: float
    wait_s: float
    train_s: float
    publish_s: float
    tokens: int
    staleness_mean: float
    staleness_max: int


@dataclass(slots=True, kw_only=True)
class Result:
    """One simulated run. Ages are in versions; means of ages are over sampled tokens.

    `digest` stands for all that happened: every step and every episode's record. `took_s` is the
    time of a core that the simulation took.
    """

    scenario: Scenario
    time_s: float
    trained: int
    samples_per_s: float
    tokens_per_s: float
    idle_trainer: float
    idle_workers: float
    staleness_mean: float
    staleness_max: int
    ages: dict[int, float]
    wasted_tokens: float
    wasted_share: float
    preemptions: int
    cache_hit_share: float
    episode_s: float
    outcomes: dict[str, int]
    steps: list[Step]
    episodes: list[EpisodeRecord] = field(repr=False)
    digest: str
    took_s: float = math.nan

    @classmethod
    def of(
        cls,
        scenario: Scenario,
        *,
        time_s: float,
        steps: list[Step],
        ages: Counter[int],
        episodes: list[EpisodeRecord],
        ledger: Ledger,
        hub: HubStats,
        workers: Sequence[SimulatedWorker],
        grain: int,
    ) -> "Result":
        """The run as it stood when its last step was done, or its time was up."""
        trained = [episode for episode in episodes if episode.outcome == "trained"]
        decoded = sum(worker.decoded_tokens for worker in workers)
        cached = sum(worker.cached_tokens for worker in workers)
        prefilled = sum(worker.prefilled_tokens for worker in workers)
        training_s = sum(step.train_s + step.publish_s for step in steps)
        wasted = ledger.waste_tokens * grain
        return cls(
            scenario=scenario,
            time_s=time_s,
            trained=len(trained),
            # Up to the last publish, so that the moment at which the time is up does not matter.
            samples_per_s=len(steps) * scenario.batch_size / steps[-1].time_s if steps else 0.0,
            tokens_per_s=decoded / time_s if time_s else 0.0,
            idle_trainer=1 - training_s / time_s if time_s else math.nan,
            idle_workers=1 - sum(w.busy_s for w in hub.workers) / max(1e-9, time_s * len(workers)),
            staleness_mean=(
                sum(age * n for age, n in ages.items()) / ages.total() if ages else math.nan
            ),
            staleness_max=max(ages, default=0),
            ages={age: float(n) for age, n in sorted(ages.items())},
            wasted_tokens=wasted,
            wasted_share=wasted / decoded if decoded else 0.0,
            preemptions=sum(worker.preemptions for worker in workers),
            cache_hit_share=cached / (cached + prefilled) if cached + prefilled else 0.0,
            episode_s=(
                fmean(e.ended_s - e.admitted_s - e.stages_s.get("wait", 0.0) for e in trained)
                if trained
                else math.nan
            ),
            outcomes=ledger.reasons(),
            steps=steps,
            episodes=episodes,
            digest=_digest(steps, episodes),
        )

    def summary(self) -> dict[str, Any]:
        """The numbers without the steps and episodes, for JSON."""
        long = ("scenario", "steps", "episodes")
        summary = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in long}
        return {"scenario": self.scenario.model_dump(mode="json"), **summary}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One combination of a sweep: what was changed, and a result for each seed."""

    changes: Mapping[str, Any]
    results: Sequence[Result]

    def mean(self, name: str) -> float:
        """Of a number of the results, over the seeds."""
        return fmean(getattr(result, name) for result in self.results)

    def spread(self, name: str) -> float:
        """Its standard deviation over the seeds; nan for one."""
        values = [getattr(result, name) for result in self.results]
        return stdev(values) if len(values) > 1 else math.nan


def _digest(steps: list[Step], episodes: list[EpisodeRecord]) -> str:
    digest = hashlib.sha256()
    records: list[Step | EpisodeRecord] = [*steps, *episodes]
    for record in records:
        # Shallow: asdict copies each of a hundred thousand records to its depth.
        told = {f.name: getattr(record, f.name) for f in fields(record)}
        digest.update(json.dumps(told).encode())
    return digest.hexdigest()[:16]
