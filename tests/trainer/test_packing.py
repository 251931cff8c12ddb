from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash.fakes import fake_sample
from flash.trainer.config import TrainerConfig
from flash.trainer.objectives.aggregation import scales
from flash.trainer.objectives.settings import Gspo
from flash.trainer.packing import divide, in_passes, plan
from flash.types import Sample

lengths_of_batches = st.lists(st.integers(1, 300), min_size=1, max_size=60)


@given(lengths_of_batches, st.integers(1, 500))
def test_passes_have_every_sequence_in_order_and_no_more_than_one_that_is_too_long(
    lengths: list[int], budget: int
) -> None:
    sequences = [[number] * length for number, length in enumerate(lengths)]
    passes = in_passes(sequences, budget)
    assert [sequence for passed in passes for sequence in passed] == sequences
    for passed, following in zip(passes, [*passes[1:], [[0] * 1000]], strict=True):
        tokens = sum(map(len, passed))
        assert tokens <= budget or len(passed) == 1
        assert tokens + len(following[0]) > budget, "the next one would have had room"


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


def test_ranks_that_share_passes_have_the_same_of_them_with_room_for_the_tokens_of_all() -> None:
    samples = [fake_sample(range(length), episode=length) for length in (50, 30, 20, 60, 40)]
    config = TrainerConfig(ranks=4, sequence_ranks=2, tokens_per_micro_batch=55)
    shares = divide(samples, config)
    assert shares[0] == shares[1]
    assert shares[2] == shares[3]
    of_groups = [[s.episode for s in mini.micro_batches[0]] for (mini,) in shares[::2]]
    assert of_groups == [[60, 30, 20], [50, 40]]
    alone = divide(samples, config.model_copy(update={"ranks": 2, "sequence_ranks": 1}))
    assert [mini.scales[0][0] for (mini,) in shares[::2]] == [
        mini.scales[0][0] for (mini,) in alone
    ]


def test_samples_that_fit_together_share_a_pass() -> None:
    (mini,) = plan([50, 30, 20, 60, 40], mini_batches=1, ranks=1, tokens_per_micro_batch=100)
    assert [sorted(micro) for micro in mini[0]] == [[3, 4], [0, 1, 2]]


def test_mini_batches_take_some_of_every_group() -> None:
    groups_of_four = plan([10] * 8, mini_batches=2, ranks=1, tokens_per_micro_batch=1000)
    assert [sorted(mini[0][0]) for mini in groups_of_four] == [[0, 2, 4, 6], [1, 3, 5, 7]]


def samples_with_masks(*masks: list[float]) -> list[Sample]:
    return [
        fake_sample([0] * len(mask), mask, episode=episode) for episode, mask in enumerate(masks)
    ]


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        # The first token counts for nothing: masses 1.5 and 3.
        ("token_mean", [1 / 4.5, 1 / 4.5]),
        ("sequence_mean", [1 / 3, 1 / 6]),
        ("sequence_sum", [1 / 2, 1 / 2]),
        ("fixed_length", [1 / 20, 1 / 20]),
    ],
)
def test_the_scales_of_samples_by_hand(aggregation: Any, expected: list[float]) -> None:
    samples = samples_with_masks([1, 1, 0, 0.5], [0, 1, 1, 1])
    assert scales(samples, aggregation, fixed_length=10) == pytest.approx(expected)


def test_the_scales_are_those_of_the_whole_mini_batch_on_all_ranks() -> None:
    samples = samples_with_masks(*[[1.0, 1.0, 0.0, 0.5]] * 5)
    config = TrainerConfig(mini_batches=2, ranks=2, tokens_per_micro_batch=8)
    shares = divide(samples, config)
    # 3 and 2 samples, of mass 1.5 each
    for share in shares:
        for mini, mass in zip(share, (4.5, 3.0), strict=True):
            assert [len(m) for m in mini.scales] == [len(m) for m in mini.micro_batches]
            assert {s for micro in mini.scales for s in micro} <= {1 / mass}
    given_out = [s.episode for share in shares for m in share for b in m.micro_batches for s in b]
    assert sorted(given_out) == [0, 1, 2, 3, 4]


def test_losses_are_added_up_as_is_usual_for_the_objective_unless_told_otherwise() -> None:
    samples = samples_with_masks([0, 1, 1, 1], [0, 1])

    def first_scale(**settings: Any) -> float:
        return divide(samples, TrainerConfig(**settings))[0][0].scales[0][0]

    assert first_scale() == 1 / 4
    assert first_scale(objective=Gspo()) == 1 / 6
    assert first_scale(objective=Gspo(), aggregation="token_mean") == 1 / 4
