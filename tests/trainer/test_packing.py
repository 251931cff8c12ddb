import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from flash.trainer.packing import divide, plan
from flash.types import Sample

lengths_of_batches = st.lists(st.integers(1, 300), min_size=1, max_size=60)


@settings(deadline=None)
@given(lengths_of_batches, st.integers(1, 5), st.integers(1, 4), st.integers(1, 500))
def test_a_plan_has_each_sample_once_within_the_budget_and_keeps_ranks_in_step(
    lengths: list[int], mini_batches: int, ranks: int, budget: int
) -> None:
    planned = plan(lengths, mini_batches=mini_batches, ranks=ranks, tokens_per_micro_batch=budget)
    assert len(planned) == min(mini_batches, len(lengths))
    everything = [i for mini in planned for rank in mini for micro in rank for i in micro]
    assert sorted(everything) == list(range(len(lengths)))
    for mini in planned:
        assert len(mini) == ranks
        assert len({len(rank) for rank in mini}) == 1
        assert any(micro for rank in mini for micro in rank)
        for rank in mini:
            for micro in rank:
                assert len(micro) <= 1 or sum(lengths[i] for i in micro) <= budget


@settings(deadline=None)
@given(lengths_of_batches, st.integers(1, 4))
def test_ranks_differ_by_no_more_than_the_longest_sample(lengths: list[int], ranks: int) -> None:
    (mini,) = plan(lengths, mini_batches=1, ranks=ranks, tokens_per_micro_batch=100)
    loads = [sum(lengths[i] for micro in rank for i in micro) for rank in mini]
    assert max(loads) - min(loads) <= max(lengths)


def test_samples_that_fit_together_share_a_pass() -> None:
    (mini,) = plan([50, 30, 20, 60, 40], mini_batches=1, ranks=1, tokens_per_micro_batch=100)
    assert [sorted(micro) for micro in mini[0]] == [[3, 4], [0, 1, 2]]


def test_mini_batches_take_some_of_every_group() -> None:
    groups_of_four = plan([10] * 8, mini_batches=2, ranks=1, tokens_per_micro_batch=1000)
    assert [sorted(mini[0][0]) for mini in groups_of_four] == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_all_ranks_are_told_the_weight_of_the_whole_mini_batch() -> None:
    samples = [
        Sample(
            token_ids=np.zeros(4, np.int64),
            loss_mask=np.array([1.0, 1.0, 0.0, 0.5], np.float32),
            logprobs=np.zeros(4, np.float32),
            versions=np.zeros(4, np.int64),
            episode=episode,
        )
        for episode in range(5)
    ]
    shares = divide(samples, mini_batches=2, ranks=2, tokens_per_micro_batch=8)
    # 3 and 2 samples; the first token of each counts for nothing
    assert [[mini.total_weight for mini in share] for share in shares] == [[4.5, 3.0]] * 2
    given_out = [s.episode for share in shares for m in share for b in m.micro_batches for s in b]
    assert sorted(given_out) == [0, 1, 2, 3, 4]
