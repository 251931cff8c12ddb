"""The lines of episodes.jsonl, written beside the event loop."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from types import TracebackType
from typing import IO, Self

import msgspec

from flash.plain import plain
from flash.rollout.record import EpisodeRecord

_GATHERS_S = 0.2


class EpisodeLines:
    """Adds lines to a file, in their order, from a thread; those of a moment together.

    What could not be written is raised where more is to be, and at the end. Leaving it writes all
    that was added, and closes the file.
    """

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._thread = ThreadPoolExecutor(1, "episodes.jsonl")
        self._lock = threading.Lock()
        self._records: list[EpisodeRecord] = []  # guarded by the lock
        self._awaited = threading.Event()  # somebody waits for the lines
        self._failure: Exception | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: object, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.flush()
        finally:
            self._thread.shutdown()
            self._file.close()

    def add(self, record: EpisodeRecord) -> None:
        """Its line is in the file soon, or after `flush`."""
        if self._failure is not None:
            raise self._failure
        with self._lock:
            self._records.append(record)
            is_first = len(self._records) == 1
        if is_first:
            self._thread.submit(self._write_soon)

    def flush(self) -> None:
        """Waits until all lines are in the file."""
        self._awaited.set()
        self._thread.submit(self._write).result()
        self._awaited.clear()
        if self._failure is not None:
            raise self._failure

    def _write_soon(self) -> None:
        self._awaited.wait(_GATHERS_S)
        self._write()

    def _write(self) -> None:
        with self._lock:
            records, self._records = self._records, []
        try:
            self._file.write("".join(f"{_json(record)}\n" for record in records))
            self._file.flush()
        except Exception as error:  # it is for whoever adds the next
            self._failure = error


def _json(record: EpisodeRecord) -> str:
    try:
        return msgspec.json.encode(record).decode()
    except (TypeError, ValueError):  # a number of NumPy's, half a surrogate pair
        return json.dumps(plain(asdict(record)))
