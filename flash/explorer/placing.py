"""Who plays what: episodes wait here until somebody has room for them, and for whom they wait."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Mapping

from flash.explorer.brought import Brought
from flash.explorer.messages import Begin, Said, Told
from flash.explorer.seat import Explorer, Play
from flash.rollout.history import Sampled

_LOOK_AGAIN_S = 0.05  # at whether there is room here


class Placing:
    """Gives what waits to who has the most room, of those whose weights are new enough.

    Args:
        explorers: those that are here, or away.
        brought: task sets that are for who brings them.
        apart: evaluations are for explorers that do nothing else.
        on_fatal: told of an error of the agents here.
    """

    def __init__(
        self,
        explorers: Mapping[str, Explorer],
        *,
        brought: Brought,
        apart: bool,
        on_fatal: Callable[[Exception], None],
    ) -> None:
        self._explorers = explorers
        self._brought = brought
        self._apart = apart
        self._on_fatal = on_fatal
        # Those of training and of evaluations (True), of each set that is brought and of the rest:
        # none waits for what another lacks. What the fewest can play comes first.
        self._waiting: dict[tuple[str, bool], OrderedDict[Play, None]] = {
            (name, heldout): OrderedDict() for name in (*brought, "") for heldout in (False, True)
        }
        self._looks_again = False

    def __len__(self) -> int:
        """Episodes that wait."""
        return sum(map(len, self._waiting.values()))

    @property
    def has_heldout(self) -> bool:
        """Whether one of an evaluation waits."""
        return any(waiting for (_, heldout), waiting in self._waiting.items() if heldout)

    def is_for(self, explorer: Explorer, *, heldout: bool, brought: str = "") -> bool:
        """Whether episodes of that kind are for it."""
        if (brought not in explorer.brings) if brought else explorer.tasks_only:
            return False
        if heldout:
            return explorer.evaluates or not self._apart
        return not explorer.evaluates

    def waits_for(self, *, heldout: bool = False, here: bool = False) -> str:
        """What must come before all of that kind can be played; empty if it can be. `here`: what
        nobody brings is played in this process as well."""
        kinds = [] if here or not self._brought.has_others else [""]
        kinds += [name for name in self._brought if self._waiting[name, heldout]]
        return "; ".join(filter(None, (self._lacks(name, heldout=heldout) for name in kinds)))

    def _lacks(self, brought: str, *, heldout: bool) -> str:
        able = [
            explorer
            for explorer in self._explorers.values()
            if self.is_for(explorer, heldout=heldout, brought=brought)
        ]
        if not able:
            option = " --evaluates" if heldout and self._apart else ""
            if brought:
                return (
                    f"an explorer that brings task set {brought}: flash explore{option} --tasks "
                    f"FILE starts one"
                )
            return f"an explorer: flash explore{option} starts one"
        if all(explorer.version < 0 for explorer in able):
            told = (f"{e.name} ({e.state.doing or 'away'})" for e in able)
            return f"explorers: {', '.join(told)}"
        return ""

    def wait(self, play: Play, *, first: bool = False) -> None:
        waiting = self._of(play)
        waiting[play] = None
        if first:
            waiting.move_to_end(play, last=False)

    def drop(self, play: Play) -> None:
        """It waits no longer, if it did."""
        self._of(play).pop(play, None)

    def place(self) -> None:
        """Gives what waits to who has room: of each kind in turns."""
        kinds = [waiting for waiting in self._waiting.values() if waiting]
        while kinds:
            kinds = [waiting for waiting in kinds if self._place_first(waiting) and waiting]
        first = [next(iter(waiting)) for waiting in self._waiting.values() if waiting]
        if not self._looks_again and any(play.play_here is not None for play in first):
            self._looks_again = True
            asyncio.get_running_loop().call_later(_LOOK_AGAIN_S, self._look_again)

    def _place_first(self, waiting: OrderedDict[Play, None]) -> bool:
        """Whether somebody has it now."""
        play = next(iter(waiting))
        explorer, here = self._best(play), play.room_here()
        if play.play_here is not None and here > (explorer.room if explorer else 0):
            del waiting[play]
            play.here = True
            try:
                play.play_here(play.episode)
            except Exception as error:  # of an agent's making: no explorer is to blame for it
                play.here = False
                self._on_fatal(error)
        elif explorer is not None:
            del waiting[play]
            if name := self._set_brought(play):
                self._brought.begin(name, explorer.brings[name])
            _give(explorer, play)
        else:
            return False
        return True

    def _of(self, play: Play) -> OrderedDict[Play, None]:
        return self._waiting[self._set_brought(play), play.heldout]

    def _set_brought(self, play: Play) -> str:
        """The task set, if explorers bring it."""
        name = play.episode.task.task_set
        return name if name in self._brought else ""

    def _look_again(self) -> None:
        self._looks_again = False
        self.place()

    def _best(self, play: Play) -> Explorer | None:
        oldest, name = play.oldest_wanted(), self._set_brought(play)
        able = [
            explorer
            for explorer in self._explorers.values()
            if explorer.link is not None
            and self.is_for(explorer, heldout=play.heldout, brought=name)
            and not explorer.leaving
            and explorer.room > 0
            and explorer.version >= oldest
        ]
        return max(able, key=lambda explorer: explorer.room, default=None)


def _give(explorer: Explorer, play: Play) -> None:
    explorer.room -= 1
    explorer.begun += 1
    explorer.plays[play.number] = play
    play.explorer = explorer
    episode = play.episode
    explorer.send(
        Begin(
            episode=play.number,
            task=episode.task,
            group=episode.group,
            attempt=episode.attempt,
            heldout=play.heldout,
            history=[Said(s) if isinstance(s, Sampled) else Told.of(s) for s in play.history],
        )
    )
