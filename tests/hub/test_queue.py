"""Which worker a request gets, by the queue alone."""

import asyncio
import itertools
import random
from collections.abc import Sequence

import pytest

from flash.hub.queue import RequestQueue
from flash.hub.slot import Slot
from flash.types import GenerateRequest, SamplingParams
from flash.virtual_time import in_virtual_time
from tests.steady import steady


class LookingAtAll(RequestQueue):
    """The rule as it is said: of those that accept and have room, the least loaded, the first."""

    def _least_loaded(self):
        self._meet_new_ones()
        able = [s for s in self._slots if s.accepting and s.running < self._max_running]
        return min(able, key=lambda slot: slot.outstanding_tokens, default=None)


def some_slots(count: int, kind: type[Slot] = Slot) -> list[Slot]:
    return [kind(steady(f"w{number}"), 0) for number in range(count)]


def asking(session: str = "", pin: str = "") -> GenerateRequest:
    sampling = SamplingParams(max_tokens=1)
    return GenerateRequest(token_ids=[1], sampling=sampling, session=session, pin=pin)


async def turns() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def story(kind: type[RequestQueue], seed: int) -> list[tuple[int, str]]:
    """Requests come, end and are cancelled, workers go and come back: who got which worker."""
    rng = random.Random(seed)
    slots = some_slots(rng.choice([1, 2, 5, 12]))
    later = some_slots(rng.choice([0, 2]))
    queue = kind(slots, max_running=rng.choice([1, 2, 8]))
    given: list[tuple[int, str]] = []
    held: list[tuple[Slot, int]] = []
    waiting: dict[int, asyncio.Task[None]] = {}

    async def ask(arrival: int, request: GenerateRequest, cost: int) -> None:
        slot = await queue.acquire(request, cost=cost, arrival=arrival)
        given.append((arrival, slot.worker.name))
        held.append((slot, cost))

    for arrival in range(300):
        what = rng.random()
        if what < 0.5:
            session, pin = f"s{rng.randrange(6)}", rng.choice(["", "", f"p{rng.randrange(4)}"])
            call = ask(arrival, asking(session, pin), rng.randrange(1, 20))
            waiting[arrival] = asyncio.create_task(call)
        elif what < 0.8 and held:
            slot, cost = held.pop(rng.randrange(len(held)))
            queue.release(slot, cost=cost)
        elif what < 0.85 and waiting:
            waiting.pop(rng.choice(list(waiting))).cancel()
        elif what < 0.9:
            slot = rng.choice(slots)
            slot.healthy = not slot.healthy
            if slot.healthy:
                queue.accepts(slot)
        elif what < 0.95:
            slot = rng.choice(slots)
            slot.updating = not slot.updating
            if not slot.updating:
                queue.accepts(slot)
        elif later:
            slots += later
            later = []
        if rng.random() < 0.6:
            await turns()
    for task in waiting.values():
        task.cancel()
    await asyncio.gather(*waiting.values(), return_exceptions=True)
    return given


@pytest.mark.parametrize("first", range(0, 80, 40))
@in_virtual_time
async def test_every_request_gets_the_worker_that_a_look_at_all_of_them_would_give_it(first):
    for seed in range(first, first + 40):
        given = await story(RequestQueue, seed)
        assert given == await story(LookingAtAll, seed)
        assert len(given) > 5


@in_virtual_time
async def test_a_request_among_thousands_of_workers_looks_at_a_few():
    looked = 0

    class Counted(Slot):
        @property
        def accepting(self) -> bool:
            nonlocal looked
            looked += 1
            return True

    slots = some_slots(2000, Counted)
    queue = RequestQueue(slots, max_running=2)

    async def ask(arrivals: Sequence[int]) -> None:
        for arrival in arrivals:
            slot = await queue.acquire(asking(), cost=arrival, arrival=arrival)
            queue.release(slot, cost=arrival)

    await ask(range(1))
    looked = 0
    await ask(range(1, 101))
    assert looked < 100 * 10


@in_virtual_time
async def test_who_waits_for_one_worker_does_not_hold_up_those_behind():
    slots = some_slots(2)
    queue = RequestQueue(slots, max_running=1)
    arrivals = itertools.count()

    def ask(pin: str = "") -> asyncio.Task[Slot]:
        call = queue.acquire(asking(pin=pin), cost=1, arrival=next(arrivals))
        return asyncio.create_task(call)

    first = ask("p")
    await turns()
    second, third, fourth = ask("p"), ask(), ask()
    await turns()
    assert (await first, await third) == (slots[0], slots[1])
    assert not second.done()
    queue.release(slots[1], cost=1)
    assert await fourth is slots[1]
    queue.release(slots[0], cost=1)
    assert await second is slots[0]
