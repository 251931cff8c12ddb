"""The tasks of a run, also through a resume."""

import itertools

from flash.rollout.tasks import Tasks


def seeds(tasks: Tasks, count: int) -> list[int]:
    return [task.seed for task in itertools.islice(tasks, count)]


def test_runs_of_different_seeds_share_no_task():
    first, second = seeds(Tasks(0), 1000), seeds(Tasks(1), 1000)
    assert first == list(range(1000))
    assert not set(first) & set(second)
    assert seeds(Tasks(1), 1000) == second


def test_a_resumed_run_begins_with_the_tasks_that_were_begun_and_not_trained():
    tasks = Tasks(0)
    seeds(tasks, 5)
    resumed = Tasks(0)
    resumed.go_on(given=tasks.given, unfinished=[1, 3])
    assert resumed.given == 5
    assert seeds(resumed, 4) == [1, 3, 5, 6]


def test_tasks_that_a_resumed_run_had_no_time_for_are_kept_for_the_next():
    resumed = Tasks(0)
    resumed.go_on(given=5, unfinished=[1, 3])
    assert seeds(resumed, 1) == [1]
    assert (resumed.given, resumed.left) == (5, [3])
