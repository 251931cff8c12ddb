"""Who takes a model's files from whom."""

import asyncio

from flash.explorer.files import HERE
from flash.explorer.turns import Seat, Turns
from flash.virtual_time import in_virtual_time


def joined(turns: Turns, count: int) -> list[Seat]:
    seats = [Seat() for _ in range(count)]
    for seat in seats:
        turns.join(seat)
    return seats


def all_served(turns: Turns, seats: list[Seat], *, relays: int) -> None:
    """Until all have it, in the order in which they have sources; so many of them relay."""
    waiting = list(enumerate(seats))
    while waiting:
        number, seat = next(each for each in waiting if each[1].sources)
        waiting.remove((number, seat))
        turns.have(seat, f"peer {number}" if number < relays else "")


@in_virtual_time
async def test_two_take_from_here_and_the_others_wait_for_those():
    turns = Turns(turn_s=60)
    first, second, third, fourth, fifth = joined(turns, 5)
    assert [*first.sources] == [*second.sources] == [HERE]
    assert not third.sources
    turns.have(first, "first")
    assert [*third.sources] == [*fourth.sources] == ["first"]
    assert not fifth.sources
    turns.have(second, "second")
    assert [*fifth.sources] == ["second"]
    assert [*third.sources] == ["first", "second"]  # nobody else waits


@in_virtual_time
async def test_what_is_sent_from_here_does_not_grow_with_the_number_of_explorers():
    for count in (3, 8, 64, 500):
        turns = Turns(turn_s=60)
        seats = joined(turns, count)
        all_served(turns, seats, relays=count)
        assert sum(seat.took_here for seat in seats) == 2


@in_virtual_time
async def test_from_here_is_sent_as_much_as_from_each_peer_where_few_relay():
    turns = Turns(turn_s=60)
    seats = joined(turns, 40)
    all_served(turns, seats, relays=3)
    assert 8 <= sum(seat.took_here for seat in seats) <= 14


@in_virtual_time
async def test_where_nobody_relays_all_is_sent_from_here_two_at_a_time():
    turns = Turns(turn_s=60)
    seats = joined(turns, 6)
    for have in range(6):
        assert sum(bool(seat.sources) for seat in seats[have:]) == min(2, 6 - have)
        turns.have(seats[have], "")


@in_virtual_time
async def test_a_slow_explorer_keeps_nobody_waiting_for_longer_than_its_turn():
    turns = Turns(turn_s=60)
    *slow, third = joined(turns, 3)
    await asyncio.wait_for(third.changed.wait(), 61)
    assert asyncio.get_running_loop().time() == 60
    assert [*third.sources] == [HERE]
    assert all([*seat.sources] == [HERE] for seat in slow)


@in_virtual_time
async def test_a_peer_that_fails_one_explorer_serves_the_others():
    turns = Turns(turn_s=60)
    peer, other, here = joined(turns, 3)
    turns.have(peer, "peer")
    turns.have(other, "")
    assert [*here.sources] == ["peer"]
    turns.lost(here, "peer")
    assert [*here.sources] == [HERE]  # though that is more than its share
    (after,) = joined(turns, 1)
    assert [*after.sources] == ["peer"]


@in_virtual_time
async def test_nobody_is_sent_to_a_peer_that_has_left():
    turns = Turns(turn_s=60)
    peer, slow, first = joined(turns, 3)
    turns.have(peer, "peer")
    assert [*first.sources] == ["peer"]
    turns.leave(peer)
    turns.leave(slow)
    (after,) = joined(turns, 1)
    assert [*after.sources] == [HERE]


@in_virtual_time
async def test_an_explorer_that_leaves_gives_its_turn_to_the_next():
    turns = Turns(turn_s=60)
    first, _, third = joined(turns, 3)
    turns.leave(first)
    assert [*third.sources] == [HERE]


@in_virtual_time
async def test_the_quickest_is_known_whoever_came_first():
    turns = Turns(turn_s=60)
    await asyncio.sleep(5)
    first, second, third = joined(turns, 3)
    assert turns.quickest_s == 0
    await asyncio.sleep(9)
    turns.have(second, "second")
    await asyncio.sleep(7)
    turns.have(third, "")  # it waited for 9 s
    assert turns.quickest_s == 7
    turns.have(first, "")
    assert turns.quickest_s == 7
