"""An observer that keeps what it hears."""

from flash.rollout.episode import Episode
from flash.rollout.observer import Observer
from flash.rollout.record import EpisodeRecord


class KeepingObserver(Observer):
    """Appends the record of each ended episode, and the report of each stall, to its lists."""

    def __init__(
        self, records: list[EpisodeRecord] | None = None, reports: list[str] | None = None
    ) -> None:
        self.records = [] if records is None else records
        self.reports = [] if reports is None else reports

    def ended(self, episode: Episode, record: EpisodeRecord) -> None:
        self.records.append(record)

    def stalled(self, report: str) -> None:
        self.reports.append(report)
