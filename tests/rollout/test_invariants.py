"""Invariants 1-6 as properties, under virtual time with fake workers and fake environments."""

import asyncio
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flash import virtual_time
from flash.agents.environment_agent import EnvironmentAgent
from flash.fakes import FakeEnvs, FakeStyle, FakeWorker
from flash.hub import InferenceHub
from flash.rollout import RolloutLoop
from flash.types import Task, Weights


class CrashingAgent(EnvironmentAgent):
    """Crashes in mid-episode now and then."""

    def __init__(self, *, rng: random.Random, crash_rate: float, **kwargs) -> None:
        super().__init__(**kwargs)
        self._rng = rng
        self._crash_rate = crash_rate

    async def play(self, episode):
        if self._rng.random() < self._crash_rate:
            await asyncio.sleep(self._rng.random())
            raise RuntimeError("a bug in the agent")
        return await super().play(episode)


class Scenario:
    """A run of a few steps with everything drawn from one seed."""

    def __init__(
        self, seed: int, *, alpha: float, on_stale: str, update_mode: str, features=None, **rates
    ):
        self.rng = random.Random(seed)
        self.alpha = alpha
        self.on_stale = on_stale
        self.update_mode = update_mode
        self.features = features or {}
        self.rates = {"fail": 0.0, "hang": 0.0, "crash": 0.0, "worker_death": 0.0, **rates}
        self.group_size = self.rng.choice([2, 3, 4])
        self.groups = self.rng.choice([1, 2, 4])
        self.records = []
        self.batches = []
        self.envs = FakeEnvs(
            seed=seed, turns=(1, 4), step_s=(0.0, 2.0),
            fail_rate=self.rates["fail"], hang_rate=self.rates["hang"],
        )  # fmt: skip

    @property
    def batch_size(self):
        return self.group_size * self.groups

    def make_agent(self):
        return CrashingAgent(
            rng=self.rng, crash_rate=self.rates["crash"], envs=self.envs, style=FakeStyle(),
            max_tokens=8, step_timeout_s=20.0, episode_timeout_s=200.0,
        )  # fmt: skip

    async def run(self, steps: int = 5) -> None:
        workers = [
            FakeWorker(f"w{i}", seed=self.rng.randrange(10**6), token_s=(0.01, 0.3))
            for i in range(2)
        ]
        async with (
            InferenceHub(workers, max_running=8) as hub,
            RolloutLoop(
                hub, agent=self.make_agent, tasks=(Task(i) for i in range(10**6)),
                batch_size=self.batch_size, group_size=self.group_size, alpha=self.alpha,
                on_stale=self.on_stale, update_mode=self.update_mode,
                on_episode=self.records.append, **self.features,
            ) as rollouts,
        ):  # fmt: skip
            self.rollouts = rollouts
            async with asyncio.TaskGroup() as tasks:
                monitor = tasks.create_task(self.monitor(rollouts))
                for _ in range(steps):
                    batch = await self.impatient_next_batch(rollouts)
                    self.check_batch(batch, hub.version)
                    if self.rng.random() < self.rates["worker_death"]:
                        victim = self.rng.choice(workers)
                        victim.fail_next(3)
                    await asyncio.sleep(self.rng.random() * 3)  # the trainer trains
                    weights = Weights(version=batch.version + 1, path=Path("/fake"))
                    await rollouts.publish(weights)
                monitor.cancel()
        self.check_end(workers)

    async def impatient_next_batch(self, rollouts):
        """Cancels the wait at random moments; nothing may be lost by it."""
        while True:
            try:
                async with asyncio.timeout(self.rng.choice([0.0, 0.5, 5.0, 1e4])):
                    return await rollouts.next_batch()
            except TimeoutError:
                continue

    async def monitor(self, rollouts):
        """Invariants 2 and 3 at many moments, not only at the end."""
        while True:
            self.check_bounds(rollouts)
            await asyncio.sleep(0.05)

    def check_bounds(self, rollouts):
        ledger = rollouts.ledger
        ledger.check()
        redundant = self.features.get("redundant_groups", 0) * self.group_size
        slots = int((1 + self.alpha) * self.batch_size) + redundant
        groups = math.ceil(slots / self.group_size)
        spares = groups * self.features.get("redundant_episodes", 0)
        assert ledger.running + ledger.ready <= slots + spares, "invariant 3"

    def check_batch(self, batch, version):
        assert batch.version == version
        assert len(batch.samples) == self.batch_size
        sizes = Counter(sample.group for sample in batch.samples)
        assert set(sizes.values()) == {self.group_size}, "a group is handed over whole"
        for sample in batch.samples:
            ages = batch.version - sample.sampled_versions()
            assert ages.min() >= 0
            assert ages.max() <= self.alpha, "invariant 1"
            assert (sample.versions[sample.loss_mask == 0] == -1).all()
            assert np.isfinite(sample.logprobs).all()
        self.batches.append(batch)

    def check_end(self, workers):
        ledger = self.rollouts.ledger
        assert ledger.running == ledger.ready == 0
        ids = [record.episode for record in self.records]
        assert len(ids) == len(set(ids)) == ledger.admitted, "invariant 2: one outcome each"
        trained = [r.episode for r in self.records if r.outcome == "trained"]
        assert sorted(trained) == sorted(s.episode for b in self.batches for s in b.samples)
        assert self.envs.open_now == 0, "invariant 6: every environment is closed"
        assert all(worker.running == 0 for worker in workers), "invariant 6: nothing samples on"
        assert asyncio.all_tasks() == {asyncio.current_task()}, "invariant 6: no task outlives"


SCHEDULES = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)  # fmt: skip


@SCHEDULES
@given(
    seed=st.integers(0, 10**6),
    alpha=st.sampled_from([0, 0.5, 1, 2, 2.5, 4]),
    on_stale=st.sampled_from(["regenerate", "wait", "drop"]),
    update_mode=st.sampled_from(["keep", "abort", "wait"]),
)
def test_the_invariants_hold_on_random_schedules(seed, alpha, on_stale, update_mode):
    virtual_time.run(Scenario(seed, alpha=alpha, on_stale=on_stale, update_mode=update_mode).run())


@SCHEDULES
@given(
    seed=st.integers(0, 10**6),
    alpha=st.sampled_from([0, 1, 2]),
    on_stale=st.sampled_from(["regenerate", "wait", "drop"]),
    update_mode=st.sampled_from(["keep", "abort", "wait"]),
)
def test_the_invariants_hold_when_everything_fails_now_and_then(seed, alpha, on_stale, update_mode):
    scenario = Scenario(
        seed, alpha=alpha, on_stale=on_stale, update_mode=update_mode,
        fail=0.05, hang=0.02, crash=0.05, worker_death=0.3,
    )  # fmt: skip
    virtual_time.run(scenario.run())


def some_rewards_alike(group):
    """A filter that drops every third group or so."""
    return sum(int(s.token_ids.sum()) for t in group for s in t.samples) % 3 == 0


@SCHEDULES
@given(
    seed=st.integers(0, 10**6),
    alpha=st.sampled_from([0, 0.5, 1, 2, 2.5]),
    on_stale=st.sampled_from(["regenerate", "wait", "drop"]),
    update_mode=st.sampled_from(["keep", "abort", "wait"]),
    features=st.fixed_dictionaries(
        {
            "schedule": st.sampled_from(["queue", "batch"]),
            "replicate": st.booleans(),
            "redundant_groups": st.sampled_from([0, 1, 3]),
            "redundant_episodes": st.sampled_from([0, 1, 2]),
            "filters": st.sampled_from([(), (some_rewards_alike,)]),
            "last_version": st.sampled_from([None, 5]),
        }
    ),
    failing=st.booleans(),
)
def test_the_invariants_hold_with_every_feature_in_any_combination(
    seed, alpha, on_stale, update_mode, features, failing
):
    rates = {"fail": 0.05, "hang": 0.02, "crash": 0.05, "worker_death": 0.3} if failing else {}
    scenario = Scenario(
        seed, alpha=alpha, on_stale=on_stale, update_mode=update_mode, features=features, **rates
    )
    virtual_time.run(scenario.run())
    assert len(scenario.batches) == 5


def test_alpha_zero_is_on_policy_token_for_token():
    for seed in range(10):
        scenario = Scenario(seed, alpha=0, on_stale="regenerate", update_mode="keep")
        virtual_time.run(scenario.run())
        for batch in scenario.batches:
            for sample in batch.samples:
                assert set(sample.sampled_versions().tolist()) == {batch.version}


def test_alpha_lets_rollout_and_training_overlap():
    """With α=1 some tokens are older than the version they are trained at."""
    scenario = Scenario(3, alpha=1, on_stale="regenerate", update_mode="keep")
    virtual_time.run(scenario.run(steps=8))
    ages = [b.version - s.sampled_versions() for b in scenario.batches for s in b.samples]
    assert np.concatenate(ages).max() == 1
