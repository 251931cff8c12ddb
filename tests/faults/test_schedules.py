"""Invariants 1-6 of the loop, hub and agents, on schedules in which anything may fail.

A seed that fails is in the error: `python -m tests.faults.soak --seed SEED` replays it. Likewise,
with `--kind logged`, what is promised of a run that is killed while its disk goes wrong; and with
`--kind explorers` of one whose explorers come, go and die besides.
"""

import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flash.explorer.fleet import Fleet
from tests.faults.disk import AILMENTS, FaultyStore
from tests.faults.explored import ExploredSchedule, ExploredSets
from tests.faults.explorers import DEEDS, WIRE_RATES
from tests.faults.faulty import FaultyWorker
from tests.faults.logged import ENDS, LoggedSchedule, LoggedSets
from tests.faults.schedule import RATES, Schedule, ScheduleOfSets, Violation

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "first",
    [pytest.param(n, marks=[pytest.mark.slow] if n >= 40 else []) for n in range(0, 200, 20)],
)
def test_the_invariants_hold_whatever_fails(first):
    """`make soak` tries as many as asked; these are the first ones."""
    for seed in range(first, first + 20):
        Schedule(seed).run()


@pytest.mark.parametrize("first", [0, pytest.param(20, marks=pytest.mark.slow)])
def test_the_invariants_hold_for_several_task_sets(first):
    for seed in range(first, first + 20):
        ScheduleOfSets(seed).run()


@pytest.mark.parametrize("kind", RATES)
def test_the_invariants_hold_where_one_kind_of_fault_is_frequent(kind):
    rates = {kind: min(0.5, 3 * RATES[kind])}
    if kind in ("agent_leaves", "run_cancelled", "tasks_end"):  # drawn once in a life
        rates = {kind: 0.5 if kind == "agent_leaves" else 1.0}
    if kind == "evaluation_cancelled":
        rates["evaluation"] = 0.5
    if kind == "abort_hang":
        rates["answer_lost"] = 0.05
    schedule = Schedule(1, rates=rates, steps=10)
    schedule.run()
    assert any(entry[1:] == ("fault", kind) for entry in schedule.trace), "it never happened"


def test_the_invariants_hold_where_many_groups_are_trained_again():
    class Schedules(Schedule):
        reuses = 1.0

    reused = 0
    for seed in [*range(30), 191]:
        (schedule := Schedules(seed)).run()
        reused += schedule.rollouts.ledger.reused
    assert reused > 100


def test_without_faults_no_episode_fails_and_all_batches_are_trained():
    for seed in range(10):
        schedule = Schedule(seed, rates={})
        schedule.run()
        assert (schedule.outcome, len(schedule.batches)) == ("trained", schedule.steps)


def test_alpha_zero_is_on_policy_token_for_token():
    for seed in range(10):
        schedule = Schedule(seed, rates={}, alpha=0)
        schedule.run()
        for batch in schedule.batches:
            for sample in batch.samples:
                assert set(sample.sampled_versions().tolist()) == {batch.version}


def test_alpha_lets_rollout_and_training_overlap():
    """With α=1 some tokens are older than the version they are trained at."""
    schedule = Schedule(3, rates={}, alpha=1, steps=8)
    schedule.run()
    ages = [b.version - s.sampled_versions() for b in schedule.batches for s in b.samples]
    assert np.concatenate(ages).max() == 1


def test_the_same_seed_gives_the_same_trace_in_this_process_and_in_another():
    seeds = [0, 1, 2]
    digests = []
    for seed in seeds:
        schedule = Schedule(seed)
        schedule.run()
        digests.append(schedule.digest())
    code = (
        "from tests.faults.schedule import Schedule\n"
        f"for seed in {seeds}:\n"
        "    schedule = Schedule(seed); schedule.run(); print(schedule.digest())"
    )
    again = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONHASHSEED": str(random.randrange(1, 1000))}, timeout=100,
    )  # fmt: skip
    assert again.stdout.split() == digests
    assert len(set(digests)) == len(digests)


def test_a_violation_names_the_seed_and_what_did_not_hold():
    """A worker whose streamed tokens differ from those it sampled, for example."""

    class Schedules(Schedule):
        def _check_batch(self, batch):
            self.truth.tokens[int(batch.samples[0].token_ids[-1])] = (np.float32(0), 0, 0)
            super()._check_batch(batch)

    with pytest.raises(Violation, match=r"seed 7 .*invariant 4: truth"):
        Schedules(7, rates={}).run()


def test_an_answer_that_is_made_up_is_noticed():
    """The checks of truth are not idle: this is what the hub can't see to be false."""

    class Plausible(FaultyWorker):
        def _falsified(self, answer):
            return replace(answer, logprobs=[logprob - 1 for logprob in answer.logprobs])

    class Schedules(Schedule):
        worker_class = Plausible

    with pytest.raises(Violation, match="invariant 4: truth"):
        Schedules(7, rates={"answer_false": 1.0}).run()


@pytest.mark.parametrize(
    "first",
    [pytest.param(n, marks=[pytest.mark.slow] if n else []) for n in range(0, 60, 6)],
)
def test_nothing_is_lost_whatever_fails_and_whoever_dies(first):
    for seed in range(first, first + 6):
        schedule = LoggedSchedule(seed)
        schedule.run()
        assert schedule.outcome == "trained"


@pytest.mark.parametrize("first", [0, pytest.param(6, marks=pytest.mark.slow)])
def test_nothing_is_lost_of_several_task_sets(first):
    for seed in range(first, first + 6):
        schedule = LoggedSets(seed)
        schedule.run()
        assert schedule.outcome == "trained"


@pytest.mark.parametrize("kind", [*AILMENTS, "disk_slow", "log_unreadable", "rank_dies"])
def test_nothing_is_lost_where_one_kind_of_fault_of_the_log_is_frequent(kind):
    rates = {kind: 0.1 if kind == "log_unreadable" else 0.3, "checkpoint": 0.5}
    schedule = LoggedSchedule(3, rates=rates)
    schedule.run()
    assert any(entry[1:] == ("fault", kind) for entry in schedule.trace), "it never happened"


@pytest.mark.parametrize("end", [end for end in ENDS if end])
def test_nothing_is_lost_where_every_start_ends_alike(end):
    schedule = LoggedSchedule(1, end=end, rates={"checkpoint": 0.5})
    schedule.run()
    assert any(end.replace("_", " ") in ended for ended in schedule.ends), schedule.ends


def test_a_disk_that_stays_broken_ends_its_start_by_name_and_the_next_goes_on():
    schedule = LoggedSchedule(3, end="", rates={"disk_full": 0.1, "disk_forever": 1.0})
    schedule.run()
    assert schedule.ends["LogFailure"]
    assert schedule.outcome == "trained"


def test_a_disk_that_lies_about_what_it_has_taken_is_noticed():
    """The checks of a log are not idle."""

    class Lying(FaultyStore):
        def commit(self, changes):
            self._lied = getattr(self, "_lied", 0) + 1
            if self._lied % 7:
                super().commit(changes)

    class Schedules(LoggedSchedule):
        store_class = Lying

    with pytest.raises(Violation, match="not committed|without its tokens"):
        Schedules(3, rates={}).run()


def test_the_same_seed_kills_and_fails_alike():
    digests = []
    for _ in range(2):
        schedule = LoggedSchedule(4)
        schedule.run()
        digests.append(schedule.digest())
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(
            2052, id="a step that two starts trained with other settings, and none logged"
        ),
        pytest.param(2110, id="a batch to train and ready groups beside it, at alpha 0"),
    ],
)
def test_what_a_schedule_found_stays_mended(seed):
    LoggedSchedule(seed).run()


@pytest.mark.parametrize(
    "first",
    [pytest.param(n, marks=[pytest.mark.slow] if n else []) for n in range(0, 60, 6)],
)
def test_nothing_is_lost_whatever_befalls_explorers(first):
    for seed in range(first, first + 6):
        schedule = ExploredSchedule(seed)
        schedule.run()
        assert schedule.outcome == "trained"


@pytest.mark.parametrize("first", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 8))])
def test_nothing_is_lost_of_task_sets_that_not_all_explorers_bring(first):
    for seed in range(first, 2 * first):
        schedule = ExploredSets(seed)
        schedule.run()
        assert schedule.outcome == "trained"


@pytest.mark.parametrize("deed", DEEDS)
def test_nothing_is_lost_where_one_thing_befalls_explorers_often(deed):
    schedule = ExploredSchedule(1, rates={"checkpoint": 0.5})
    schedule.world.befall(deed)
    schedule.run()
    assert schedule.world.counts[deed] > 3


@pytest.mark.parametrize("kind", WIRE_RATES)
def test_nothing_is_lost_where_one_fault_of_connections_is_frequent(kind):
    schedule = ExploredSchedule(2, rates={"checkpoint": 0.5})
    schedule.world.befall(wires={kind: 5 * WIRE_RATES[kind]})
    schedule.run()
    assert kind == "double" or schedule.of_fleets["returns"]


def test_a_fleet_that_forgets_to_settle_is_noticed():
    """The checks of what explorers hold are not idle."""

    class Forgetful(Fleet):
        def _committed(self, number):
            pass

    class Schedules(ExploredSchedule):
        fleet_class = Forgetful

    schedule = Schedules(0, rates={})
    schedule.world.befall()
    with pytest.raises(Violation, match=" holds "):
        schedule.run()


def test_the_same_seed_befalls_explorers_alike():
    digests = []
    for _ in range(2):
        schedule = ExploredSchedule(4)
        schedule.run()
        digests.append(schedule.digest())
    assert digests[0] == digests[1]
