"""Who takes a folder's files from whom, so that many have it soon and nobody sends it to all.

controller ─┬► explorer ─┬► explorer      two at a time take from each that has all of it;
            └► explorer ─┴► explorer …    who has it is a source too
"""

import asyncio
from collections import Counter
from dataclasses import dataclass, field

from flash.explorer.files import HERE

_AT_ONCE = 2  # that take from one source
_SOURCES = 2  # that one takes from, where there are enough


@dataclass(slots=True, eq=False)
class Seat:
    """One that wants the files, or has them. `changed` is set when it has other `sources`."""

    sources: dict[str, bool] = field(default_factory=dict)  # whether its turn is over there
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    lost: set[str] = field(default_factory=set)
    relay: str = ""  # where others take from it
    began_at: float = 0.0  # when it had its first source
    took_here: bool = False


class Turns:
    """Gives seats their sources: peers first, and HERE as far as that is its share of the copies.

    Who takes longer than `turn_s` keeps its source, but is not waited for: another may take from it
    as well. `quickest_s` is the least time that anybody took, 0 before somebody has all of it.
    """

    def __init__(self, *, turn_s: float) -> None:
        self.turn_s = turn_s
        self.quickest_s = 0.0
        self._taking: dict[Seat, None] = {}  # in the order in which they came
        self._peers: dict[str, Seat] = {}
        self._have = 0  # that came to have all of it
        self._served = 0  # of these, that took from here

    def join(self, seat: Seat) -> None:
        """It wants all of it."""
        self._taking[seat] = None
        self._assign()

    def lost(self, seat: Seat, source: str) -> None:
        """To this seat that source is of no use; others may fare better."""
        seat.lost.add(source)
        if seat.sources.pop(source, None) is not None:
            self._assign()

    def have(self, seat: Seat, relay: str) -> None:
        """It has all of it, and others may take it there, if `relay` is not empty."""
        if seat not in self._taking:
            return
        del self._taking[seat]
        if seat.began_at:
            took_s = asyncio.get_running_loop().time() - seat.began_at
            self.quickest_s = min(took_s, self.quickest_s or took_s)
        self._have += 1
        self._served += seat.took_here
        if relay:
            seat.relay = relay
            self._peers[relay] = seat
        self._assign()

    def leave(self, seat: Seat) -> None:
        """It is not heard of any more, and nobody is sent there."""
        self._taking.pop(seat, None)
        if self._peers.get(seat.relay) is seat:
            del self._peers[seat.relay]
        self._assign()

    def _assign(self) -> None:
        """To those first that have fewest, and came first."""
        free = self._free()
        for count in range(_SOURCES):
            for seat in self._taking:
                if not free:
                    return
                source = self._choice(seat, free) if len(seat.sources) == count else None
                if source is not None:
                    self._give(seat, source)
                    free[source] -= 1
                    free = +free

    def _free(self) -> Counter[str]:
        """How many more may take from each source."""
        load = Counter(
            source for seat in self._taking for source, over in seat.sources.items() if not over
        )
        return +Counter({source: _AT_ONCE - load[source] for source in (*self._peers, HERE)})

    def _choice(self, seat: Seat, free: Counter[str]) -> str | None:
        unused = [
            source for source in free if source not in seat.sources and source not in seat.lost
        ]
        if peers := [source for source in unused if source != HERE]:
            return max(peers, key=lambda source: free[source])
        share_is_left = self._served * (len(self._peers) + 1) <= self._have
        if HERE in unused and (share_is_left or seat.lost >= self._peers.keys()):
            return HERE
        return None

    def _give(self, seat: Seat, source: str) -> None:
        loop = asyncio.get_running_loop()
        seat.began_at = seat.began_at or loop.time()
        seat.sources[source] = False
        seat.took_here |= source == HERE
        seat.changed.set()
        loop.call_later(self.turn_s, self._end_turn, seat, source)

    def _end_turn(self, seat: Seat, source: str) -> None:
        if seat in self._taking and source in seat.sources:
            seat.sources[source] = True
            self._assign()
