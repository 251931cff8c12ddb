"""The tasks of a run, also through a resume."""

import itertools

import pytest

from flash.evaluation.config import EvalConfig
from flash.evaluation.play import heldout_tasks
from flash.rollout.tasks import Tasks
from flash.seeds import DEMONSTRATION_SEEDS, LARGEST, TRAINING_SEEDS, derived


def seeds(tasks: Tasks, count: int) -> list[int]:
    return [task.seed for task in itertools.islice(tasks, count)]


def test_runs_of_different_seeds_share_no_task():
    first, second = seeds(Tasks(0), 1000), seeds(Tasks(1), 1000)
    assert first == list(range(1000))
    assert not set(first) & set(second)
    assert seeds(Tasks(1), 1000) == second


def test_no_two_of_a_thousand_runs_are_within_400_000_tasks_of_each_other():
    starts = sorted(next(iter(Tasks(seed))).seed for seed in range(1001))
    around = [*starts[1:], starts[0] + TRAINING_SEEDS]
    assert min(b - a for a, b in zip(starts, around, strict=True)) > 400_000


@pytest.mark.parametrize("seed", [0, 1, 255, 1234, 2**31, 2**32, 2**32 + 1, 2**40, LARGEST])
def test_a_task_s_seed_fits_in_31_bits_and_is_nobody_elses_whatever_the_runs(seed):
    found = seeds(Tasks(seed), 1000)
    assert all(0 <= task < TRAINING_SEEDS for task in found)
    assert len(set(found)) == 1000
    others = {
        task for other in (0, 1, 2, 255) if other != seed for task in seeds(Tasks(other), 1000)
    }
    held_out = {task.seed for task in heldout_tasks(EvalConfig(tasks=1000))}
    assert not set(found) & (others | held_out | {*DEMONSTRATION_SEEDS[:1000]})
    assert max(*held_out, *DEMONSTRATION_SEEDS[-1:]) < 2**31


def test_a_run_that_comes_to_the_end_of_its_seeds_goes_on_at_their_start():
    last = (TRAINING_SEEDS - 1 - next(iter(Tasks(1))).seed) % TRAINING_SEEDS
    begun = [*itertools.islice((task.seed for task in Tasks(1)), 3), TRAINING_SEEDS - 2]
    assert begun[-1] == next(iter(Tasks(1))).seed + last - 1
    assert seeds(Tasks(1, dispatched=begun), 2) == [TRAINING_SEEDS - 1, 0]
    assert seeds(Tasks(1, dispatched=[*begun, TRAINING_SEEDS - 1, 0]), 1) == [1]


def test_what_a_runs_parts_draw_from_is_each_ones_own():
    drawn = [derived(run, f"worker {number}") for run in range(50) for number in range(50)]
    assert len(set(drawn)) == len(drawn)
    assert all(0 <= seed < 2**31 for seed in drawn)


def test_a_resumed_run_begins_with_the_tasks_that_are_to_begin_anew():
    assert seeds(Tasks(0, dispatched=range(5), again=[1, 3]), 4) == [1, 3, 5, 6]


def test_a_task_that_began_twice_sets_the_order_back_no_further():
    assert seeds(Tasks(0, dispatched=[0, 1, 2, 3, 1]), 2) == [4, 5]
