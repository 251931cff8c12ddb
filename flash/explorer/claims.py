"""What the last start of a run had given out: it goes on at who holds it, if that comes in time."""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence

from flash.explorer.messages import Ended, GiveUp, Holding, Said, Step, start_of
from flash.explorer.seat import Explorer, Play


class Claims:
    """Joins what explorers hold of the last start to the episodes that continue it.

    Either may come first: what an explorer tells meanwhile is kept in its `early`.

    Args:
        explorers: those that are here, or away.
        due: numbers of episodes that they may hold, each with the start that gave it out.
        known: the newest version that is still what the start of that number called so.
        wait_s: how long an episode waits for its holder, and a holder for its episode; from when
            the first episode began.
        on_claim: told of an episode, who plays it, and what it has told by now.
        on_unclaimed: told of an episode whose holder did not come.
    """

    def __init__(
        self,
        explorers: Mapping[str, Explorer],
        *,
        due: Mapping[int, int],
        known: Callable[[int], int],
        wait_s: float,
        on_claim: Callable[[Explorer, Play, Sequence[Step]], None],
        on_unclaimed: Callable[[Play], None],
    ) -> None:
        self._explorers = explorers
        self._starts = due
        self._due = set(due)
        self._known = known
        self._wait_s = wait_s
        self._on_claim = on_claim
        self._on_unclaimed = on_unclaimed
        self._claimable: dict[int, Play] = {}  # by the episode that they continue
        # Of those that had ended when they were heard of first, the versions that may be in them.
        self._ended_before: dict[int, int] = {}
        self._until: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """Episodes that wait for their holders."""
        return len(self._claimable)

    def may_go_on(self, held: Holding) -> bool:
        """Whether an explorer may, with what it holds.

        A start that died before its log knew of an episode leaves the number to another episode of
        the next: who holds the former does not hold that.
        """
        number = held.episode
        due = number in self._due or number in self._claimable
        return due and start_of(held.controller) >= self._starts[number]

    def close(self) -> None:
        if self._until is not None:
            self._until.cancel()

    def begin(self, play: Play) -> bool:
        """An episode has begun; whether it waits here, for who holds what it continues."""
        loop = asyncio.get_running_loop()
        continues = play.episode.continues
        if self._due and self._until is None:
            self._until = loop.call_later(self._wait_s, self._end)
        if continues is None or continues not in self._due:
            return False
        self._due.discard(continues)
        self._claimable[continues] = play
        if any(continues in explorer.early for explorer in self._explorers.values()):
            loop.call_soon(self.claim, continues)
        assert self._until is not None
        loop.call_at(self._until.when(), self._end_of, continues)
        return True

    def drop(self, play: Play) -> bool:
        """It is not wanted any more; whether it waited here."""
        number = play.episode.continues
        if number is None or self._claimable.get(number) is not play:
            return False
        del self._claimable[number]
        self._refuse(number)
        return True

    def keep(self, explorer: Explorer, held: Holding) -> None:
        """It goes on with what it holds, which is due."""
        explorer.early[held.episode] = []
        if held.ended:
            self._ended_before[held.episode] = self._known(start_of(held.controller))

    def claim(self, number: int) -> None:
        """What an explorer holds is what this episode continues: it goes on there."""
        play = self._claimable.get(number)
        holders = [e for e in self._explorers.values() if number in e.early]
        if play is None or not holders:
            return
        explorer = holders[0]
        steps = explorer.early[number]
        if number in self._ended_before:
            if not steps:
                return
            if _newest_version(steps) > self._ended_before[number]:  # of what will never be again
                self._end_of(number)
                return
        del self._claimable[number], explorer.early[number]
        self._refuse(number)  # of others, where a spool was copied
        # Of one that nobody claims this is not the number: what was refused under it, and not told
        # of that yet, would be taken for what is played anew.
        play.number = number
        play.explorer = explorer
        explorer.plays[number] = play
        self._on_claim(explorer, play, steps)

    def _end_of(self, number: int) -> None:
        """Nobody came who holds it: it is played from where its logged history ends."""
        play = self._claimable.pop(number, None)
        if play is not None:
            self._refuse(number)
            self._on_unclaimed(play)

    def _end(self) -> None:
        """What has not begun by now does so without those who hold it."""
        for number in list(self._due):
            self._due.discard(number)
            self._refuse(number)

    def _refuse(self, number: int) -> None:
        for explorer in self._explorers.values():
            steps = explorer.early.pop(number, None)
            if steps and isinstance(steps[-1], Ended):
                explorer.settle(number)
            elif steps is not None:
                explorer.send(GiveUp(number, "unwanted"))


def _newest_version(steps: Iterable[Step]) -> int:
    """Of the tokens; -1 if there are none."""
    said = (step.step.completion.versions for step in steps if isinstance(step, Said))
    return max((max(versions, default=-1) for versions in said), default=-1)
