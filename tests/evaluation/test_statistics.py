"""pass@k and the intervals of means over tasks, against known values and by simulation."""

import itertools
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flash.evaluation.statistics import (
    mean_of_tasks,
    pass_at_k,
    powers_of_two,
    rate_of_tasks,
    student_t,
)


@given(st.integers(1, 9), st.data())
def test_pass_at_k_is_the_share_of_k_samples_of_which_one_succeeds(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    outcomes = [True] * c + [False] * (n - c)
    picks = [any(pick) for pick in itertools.combinations(outcomes, k)]
    assert pass_at_k(n, c, k) == pytest.approx(sum(picks) / comb(n, k))


@given(st.integers(1, 300), st.data())
def test_pass_at_k_grows_with_k_and_at_1_is_the_share_of_successes(n, data):
    c = data.draw(st.integers(0, n))
    of_each = [pass_at_k(n, c, k) for k in range(1, n + 1)]
    assert of_each == sorted(of_each)
    assert of_each[0] == pytest.approx(c / n)
    assert of_each[-1] == (c > 0)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 5), (4, 1, 0), (4, 5, 2), (4, -1, 1)])
def test_there_is_no_pass_at_k_of_more_samples_than_there_are(n, c, k):
    with pytest.raises(ValueError, match=f"pass@{k} of {c} successes in {n} samples"):
        pass_at_k(n, c, k)


def test_k_are_the_powers_of_two_up_to_the_samples():
    assert [[*powers_of_two(n)] for n in (0, 1, 3, 8)] == [[], [1], [1, 2], [1, 2, 4, 8]]


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    # Of a table of Student's t, two-sided 95%.
    [(1, 12.706), (4, 2.776), (5, 2.571), (6, 2.447), (10, 2.228), (30, 2.042), (120, 1.980)],
)
def test_students_t_is_as_tables_have_it(degrees, quantile):
    assert student_t(degrees) == pytest.approx(quantile, abs=1.5e-3)


def test_the_interval_of_a_mean_is_as_worked_by_hand():
    # Mean 2.5, variance 5/3, standard error sqrt(5/12), t of 3 degrees 3.1824.
    found = mean_of_tasks([1.0, 2.0, 3.0, 4.0])
    assert (found.tasks, found.mean) == (4, 2.5)
    assert (found.low, found.high) == pytest.approx((0.4457, 4.5543), abs=1e-4)


def test_one_task_has_no_interval_nor_have_rewards_that_are_all_equal():
    for estimate in (mean_of_tasks([3.0]), rate_of_tasks([0.5]), mean_of_tasks([0.0, 0.0])):
        assert (estimate.low, estimate.high) == (None, None)


def test_where_all_tasks_agree_a_rate_is_still_not_certain():
    found = rate_of_tasks([1.0] * 20)
    # Wilson's lower end of 20 of 20 is n / (n + t²), with t of 19 degrees 2.093.
    assert (found.mean, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(20 / (20 + 2.093**2), abs=1e-4)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=40))
def test_a_rates_interval_holds_the_rate_and_stays_within_0_and_1(rates):
    found = rate_of_tasks(rates)
    assert found.low is not None and found.high is not None
    assert 0 <= found.low <= found.mean + 1e-9
    assert found.mean - 1e-9 <= found.high <= 1


@pytest.mark.parametrize(
    ("tasks", "share", "at_least"),
    [(16, 0.5, 0.94), (64, 0.5, 0.94), (16, 0.1, 0.88), (64, 0.1, 0.93)],
)
def test_intervals_cover_the_truth_as_often_as_they_say_where_samples_of_a_task_are_alike(
    tasks, share, at_least
):
    rng = np.random.default_rng(0)
    samples, trials = 8, 1000
    # Of each task its own rate: Beta with the mean `share`, so that a task's samples are alike.
    rates = rng.beta(share, 1 - share, size=(trials, tasks))
    means = rng.binomial(samples, rates) / samples
    covered = naive = 0
    for of_trial in means.tolist():
        found = rate_of_tasks(of_trial)
        covered += found.low <= share <= found.high
        p = found.mean
        naive += abs(p - share) <= 1.96 * (p * (1 - p) / (tasks * samples)) ** 0.5
    assert at_least <= covered / trials <= 0.985
    assert naive / trials < 0.8, "taking samples for independent would be wrong here"
