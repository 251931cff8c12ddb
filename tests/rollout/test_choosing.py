"""Which groups make a batch."""

import math
from types import SimpleNamespace

from flash.rollout.choosing import choose_groups
from flash.rollout.groups import Group
from flash.types import Task


def group(number, *, oldest, complete):
    """Of one episode, whose oldest token has that version; None: it has not begun to sample."""
    member = SimpleNamespace(oldest=math.inf if oldest is None else oldest)
    return Group(number, Task(number), 1, members={number: member}, ready=int(complete))


def chosen(groups, wanted, **options):
    return [group.id for group in choose_groups(groups, wanted, **options).groups]


def test_the_oldest_complete_groups_are_chosen_and_nobody_is_waited_for():
    groups = [group(n, oldest=0, complete=n != 0) for n in range(4)]
    assert chosen(groups, 2, version=1, alpha=1) == [1, 2]


def test_with_wait_a_group_in_its_last_batch_has_a_place_kept():
    groups = [
        group(0, oldest=0, complete=False),
        *(group(n, oldest=1, complete=True) for n in (1, 2)),
    ]
    assert chosen(groups, 2, version=1, alpha=1, wait_for=(2, 1)) == [1]
    assert chosen(groups, 2, version=0, alpha=1, wait_for=(2, 0)) == [1, 2], "the next one will do"


def test_with_wait_no_more_are_overtaken_than_the_batches_left_to_them_can_take():
    """Two that only the batches 1 and 2 can take, of one group each: one of them must be in 1."""
    fresh = group(3, oldest=1, complete=True)

    def at_1(*complete):
        old = [group(n, oldest=0, complete=n in complete) for n in (1, 2)]
        return chosen([*old, fresh], 1, version=1, alpha=2, wait_for=(1, 1))

    assert at_1() == []
    assert at_1(2) == [2], "whichever is complete"
    assert at_1(1, 2) == [1]
    one = [group(1, oldest=0, complete=False), fresh]
    assert chosen(one, 1, version=1, alpha=2, wait_for=(1, 1)) == [3], "batch 2 has room for it"


def test_with_wait_a_group_that_has_not_begun_to_sample_may_do_so_from_what_is_published():
    groups = [group(n, oldest=None, complete=False) for n in (1, 2)] + [
        group(3, oldest=1, complete=True)
    ]
    assert chosen(groups, 1, version=1, alpha=2, wait_for=(1, 0)) == []
    assert chosen(groups, 1, version=1, alpha=2, wait_for=(1, 1)) == [3]


def test_it_says_for_whom_places_are_kept():
    early, late, begun_late = (
        group(number, oldest=oldest, complete=False) for number, oldest in ((0, 0), (1, 0), (2, 1))
    )
    ready = [group(number, oldest=1, complete=True) for number in (3, 4, 5)]

    def choice(groups, **options):
        return choose_groups(groups, 3, version=1, alpha=1, **options)

    kept = choice([early, late, begun_late, *ready], wait_for=(3, 1))
    assert (kept.groups, kept.kept, kept.awaited) == (ready[:1], 2, [early, late])
    assert choice([begun_late, *ready], wait_for=(3, 1)).awaited == []
    assert choice([early, late, *ready]).awaited == []
