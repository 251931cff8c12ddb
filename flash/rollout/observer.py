"""What a run tells while it happens: each event once, to everybody who keeps books of it.

    RolloutLoop ─► Ledger, LengthBias, Activity    what the loop and its watchdog go by
    train ───────► Progress, RunFolder, your own   numbers, files, a view

A part that wants to know of a run is an Observer; it is called in no other way.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from flash.evaluation.result import Evaluation
from flash.hub.reports import PublishReport
from flash.rollout.episode import Episode
from flash.rollout.history import Sampled
from flash.rollout.record import EpisodeRecord
from flash.types import Batch, Observation


class Observer:
    """Hears of each event of a run once, in order, from the event loop. Override what you need.

    Every method must return at once. What one raises ends the run, and the others hear all the
    same.
    """

    def admitted(self, episode: Episode) -> None:
        """An episode begins."""

    def observed(self, episode: Episode, observation: Observation) -> None:
        """Its environment has answered; the first time to the reset."""

    def sampled(self, episode: Episode, step: Sampled) -> None:
        """The policy has answered."""

    def begun_anew(self, episode: Episode) -> None:
        """It could not go on from its history: what was observed and sampled in it until now is
        no part of it."""

    def played(self, episode: Episode) -> None:
        """It runs no longer. With `episode.trajectory` it came to its end, and waits for a batch;
        without, it failed or was given up."""

    def ended(self, episode: Episode, record: EpisodeRecord) -> None:
        """It has its one outcome."""

    def trained_again(self, episode: Episode, uses: int) -> None:
        """It ended as `trained` before, and is in one more batch: in so many by now."""

    def given_up(self, group: int, reason: str) -> None:
        """Nothing more becomes of a group; its episodes end, each by itself."""

    def handed_over(self, batch: Batch) -> None:
        """A batch, or a part of one, goes to the trainer. Its episodes have ended as `trained` by
        then, if it is the last part."""

    def trained(self, metrics: Mapping[str, Any]) -> None:
        """The trainer has taken what was handed over; of a part it tells nothing yet."""

    def published(self, report: PublishReport) -> None:
        """Weights have become the policy."""

    def evaluated(self, evaluation: Evaluation) -> None:
        """Held-out tasks were played, by the version that `evaluation.versions` names."""

    def measured(self, metrics: Mapping[str, Any]) -> None:
        """A step's line of numbers, once all of it is known."""

    def step_done(self, step: int) -> None:
        """All of a step is done, its evaluation too."""

    def saved(self, checkpoint: Path) -> None:
        """A checkpoint is whole."""

    def stalled(self, report: str) -> None:
        """Nothing moved for too long; the report says why."""


class Observers(Observer):
    """Several observers as one; each hears in their order.

    `on_error` gets what one of them raises. Without it the error comes out of the event.
    """

    def __init__(
        self,
        observers: Iterable[Observer] = (),
        *,
        on_error: Callable[[Exception], None] | None = None,
    ) -> None:
        self._observers = list(observers)
        self._on_error = on_error
        self._hearers: dict[str, list[_Hearer]] = {}
        self._part_of: list[Observers] = []
        for observer in self._observers:
            if isinstance(observer, Observers):
                observer._part_of.append(self)

    def add(self, observer: Observer) -> None:
        """It hears of what happens from now on."""
        self._observers.append(observer)
        if isinstance(observer, Observers):
            observer._part_of.append(self)
        self._look_again()

    def hears(self, event: str) -> bool:
        """Whether any of them does anything at that event."""
        return bool(self._hearers_of(event))

    def admitted(self, episode: Episode) -> None:
        self._tell("admitted", episode)

    def observed(self, episode: Episode, observation: Observation) -> None:
        self._tell("observed", episode, observation)

    def sampled(self, episode: Episode, step: Sampled) -> None:
        self._tell("sampled", episode, step)

    def begun_anew(self, episode: Episode) -> None:
        self._tell("begun_anew", episode)

    def played(self, episode: Episode) -> None:
        self._tell("played", episode)

    def ended(self, episode: Episode, record: EpisodeRecord) -> None:
        self._tell("ended", episode, record)

    def trained_again(self, episode: Episode, uses: int) -> None:
        self._tell("trained_again", episode, uses)

    def given_up(self, group: int, reason: str) -> None:
        self._tell("given_up", group, reason)

    def handed_over(self, batch: Batch) -> None:
        self._tell("handed_over", batch)

    def trained(self, metrics: Mapping[str, Any]) -> None:
        self._tell("trained", metrics)

    def published(self, report: PublishReport) -> None:
        self._tell("published", report)

    def evaluated(self, evaluation: Evaluation) -> None:
        self._tell("evaluated", evaluation)

    def measured(self, metrics: Mapping[str, Any]) -> None:
        self._tell("measured", metrics)

    def step_done(self, step: int) -> None:
        self._tell("step_done", step)

    def saved(self, checkpoint: Path) -> None:
        self._tell("saved", checkpoint)

    def stalled(self, report: str) -> None:
        self._tell("stalled", report)

    def _tell(self, event: str, *of_it: Any) -> None:
        hearers = self._hearers.get(event)
        if hearers is None:
            hearers = self._hearers_of(event)
        for hear, on_error in hearers:
            try:
                hear(*of_it)
            except Exception as error:  # the boundary to the observer's code
                if on_error is None:
                    raise
                on_error(error)

    def _hearers_of(self, event: str) -> "list[_Hearer]":
        """Those who do anything at it, in whatever observers they are: most hear of a few alone."""
        hearers = self._hearers.get(event)
        if hearers is None:
            hearers = self._hearers[event] = []
            silent = getattr(Observer, event)
            for observer in self._observers:
                if isinstance(observer, Observers):
                    within = observer._hearers_of(event)
                    hearers += [(hear, own or self._on_error) for hear, own in within]
                elif getattr(hear := getattr(observer, event), "__func__", None) is not silent:
                    hearers.append((hear, self._on_error))
        return hearers

    def _look_again(self) -> None:
        self._hearers.clear()
        for several in self._part_of:
            several._look_again()


_Hearer = tuple[Callable[..., None], Callable[[Exception], None] | None]
"""What hears, and what gets its errors."""
