"""What observers hear: each event once, in order, whatever another of them does."""

from collections import Counter

import pytest

from flash.agents import EnvironmentAgent
from flash.fakes import FakeEnvs, FakeStyle, FakeWorker
from flash.hub.hub import InferenceHub
from flash.rollout.loop import RolloutLoop
from flash.rollout.observer import Observer, Observers
from flash.types import Task
from flash.virtual_time import in_virtual_time
from tests.steady import weights

EVENTS = [name for name in vars(Observer) if not name.startswith("_")]


class Listing(Observer):
    """Lists what it hears, with the episode or the version of it."""

    def __init__(self):
        self.heard = []

    def admitted(self, episode):
        self.heard.append(("admitted", episode.id))

    def played(self, episode):
        self.heard.append(("played", episode.id))

    def ended(self, episode, record):
        assert episode.ended_at == record.ended_s
        self.heard.append(("ended", episode.id))

    def handed_over(self, batch):
        self.heard.append(("handed_over", batch.version))

    def published(self, report):
        self.heard.append(("published", report.version))


@in_virtual_time
async def test_each_episode_is_admitted_played_and_ended_once_and_in_this_order():
    listing = Listing()
    async with (
        InferenceHub([FakeWorker("w")]) as hub,
        RolloutLoop(
            hub,
            agent=lambda: EnvironmentAgent(
                envs=FakeEnvs(fail_rate=0.1), style=FakeStyle(), max_tokens=4
            ),
            tasks=(Task(seed) for seed in range(10**6)),
            batch_size=4, group_size=2, alpha=1, observers=[listing],
        ) as loop,
    ):  # fmt: skip
        for version in range(1, 6):
            await loop.next_batch()
            await loop.publish(weights(version))
    of_episode = {}
    for event, number in listing.heard:
        if event not in ("handed_over", "published"):
            of_episode.setdefault(number, []).append(event)
    assert len(of_episode) == loop.ledger.begun > 20
    assert Counter(map(tuple, of_episode.values())).keys() == {("admitted", "played", "ended")}
    steps = [(event, v) for event, v in listing.heard if event in ("handed_over", "published")]
    assert steps == [
        (e, v) for n in range(5) for e, v in (("handed_over", n), ("published", n + 1))
    ]
    # A batch's episodes have ended by the time that it is handed over.
    at = listing.heard.index(("handed_over", 0))
    assert sum(event == "ended" for event, _ in listing.heard[:at]) >= 4


@pytest.mark.parametrize("event", EVENTS)
def test_several_observers_hear_each_event_as_one_would(event):
    first, second = Listing(), Listing()
    arguments = [object()] * (getattr(Observer, event).__code__.co_argcount - 1)
    for listing in (first, second):
        setattr(listing, event, lambda *told, heard=listing.heard: heard.append(told))
    getattr(Observers([first, Observers([second])]), event)(*arguments)
    assert first.heard == second.heard == [tuple(arguments)]


def test_an_observer_that_is_added_late_hears_what_comes_then():
    late, several = Listing(), Observers([Listing()])
    late.step_done = late.heard.append
    several.step_done(1)
    several.add(late)
    several.step_done(2)
    assert late.heard == [2]


def test_so_does_one_that_is_added_to_observers_within_others():
    late, within = Listing(), Observers()
    several = Observers([Observers([within])])
    late.step_done = late.heard.append
    several.step_done(1)
    assert not several.hears("step_done")
    within.add(Observers([late]))
    several.step_done(2)
    assert late.heard == [2]
    assert several.hears("step_done")
    assert not several.hears("saved")


def test_errors_within_others_go_to_the_nearest_that_takes_them():
    class Full(Observer):
        def step_done(self, step):
            raise OSError(f"no space left for {step}")

    outer, inner = [], []
    several = Observers(
        [Observers([Full()], on_error=inner.append), Observers([Full()])], on_error=outer.append
    )
    several.step_done(5)
    assert [len(inner), len(outer)] == [1, 1]


def test_one_that_raises_keeps_the_others_from_nothing_where_errors_are_taken():
    class Full(Observer):
        def step_done(self, step):
            raise OSError("no space left on device")

    errors, last = [], Listing()
    last.step_done = last.heard.append
    several = Observers([Full()], on_error=errors.append)
    several.add(last)
    several.step_done(3)
    assert last.heard == [3]
    assert [str(error) for error in errors] == ["no space left on device"]
    with pytest.raises(OSError, match="no space left"):
        Observers([Full(), last]).step_done(4)
