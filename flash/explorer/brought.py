"""The task sets of a run that explorers bring: who may bring which, and as what.

    Hello: brings ─► refused, if the run has none of that name, or what was begun is another
    first episode ─► what its explorer brings is the run's from now on, after a resume too

The episodes of a group are compared with each other, and may be played by several explorers, before
and after a resume; so all that bring a set must bring the same.
"""

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from flash.config.task_source import changed_source, value_in

logger = logging.getLogger(__name__)

BROUGHT_FILE = "brought.json"


class Brought:
    """Those of these names.

    Args:
        others: task sets that the run has itself.
        folder: the run's, which keeps what was begun; None keeps it here alone.
    """

    def __init__(
        self,
        names: Collection[str] = (),
        *,
        others: Collection[str] = (),
        folder: Path | None = None,
    ) -> None:
        self._names = sorted(names)
        self._others = others
        self._path = None if folder is None else folder / BROUGHT_FILE
        self._begun: dict[str, str] = {} if self._path is None else _read(self._path)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: str) -> bool:
        return name in self._names

    @property
    def has_others(self) -> bool:
        """Whether the run has tasks that nobody need bring."""
        return bool(self._others) or not self._names

    def refusal(
        self, brings: Mapping[str, str], here: Iterable[tuple[str, Mapping[str, str]]]
    ) -> str:
        """Why an explorer that brings these, each as `source_of_brought` tells it, can't join;
        empty if it can. `here`: explorers that are here, with what they bring."""
        others = list(here)
        for name, source in brings.items():
            if name not in self._names:
                return self._unknown(name)
            theirs = [(f"explorer {who} brings", of[name]) for who, of in others if name in of]
            if name in self._begun:
                theirs = [("the run has begun with", self._begun[name])]
            for what, before in theirs:
                if changed := _changed(before, source):
                    return (
                        f"task set {name} is not what {what}: {changed}: bring the same, or give "
                        f"the set another name, in the run too"
                    )
        return ""

    def _unknown(self, name: str) -> str:
        if name in self._others:
            return (
                f"task set {name} is the run's own: set task_sets.{name}.brought=true there, and "
                f"leave out what it is played with; or leave it out of --tasks"
            )
        if not self._names:
            return (
                f"task set {name} can't be brought: the run has none that explorers bring: set "
                f"task_sets.{name}.brought=true there"
            )
        return (
            f"task set {name} can't be brought: explorers bring {', '.join(self._names)} to this "
            f"run: use one of these names, or set task_sets.{name}.brought=true there"
        )

    def begin(self, name: str, source: str) -> None:
        """An episode of that set begins, played with that."""
        if name in self._begun:
            return
        self._begun[name] = source
        if self._path is None:
            return
        try:
            partial = self._path.with_name(f".{BROUGHT_FILE}.partial")
            partial.write_bytes(msgspec.json.encode(self._begun))
            partial.replace(self._path)
        except OSError as error:
            logger.warning(
                "%s can't be written (%s): after a resume task set %s may be brought as another",
                self._path, error, name,
            )  # fmt: skip


def brought_value(run: Path, name: str, field: str) -> Any:
    """A field of what a task set is played with in that run's folder, as it was brought; None if
    that does not say it. ValueError if the file can't be read."""
    begun = _read(run / BROUGHT_FILE)
    return value_in(begun[name], field) if name in begun else None


def _changed(before: str, source: str) -> str:
    try:
        return changed_source(before, source)
    except ValueError:
        return "it can't be read"


def _read(path: Path) -> dict[str, str]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, str])
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.MsgspecError) as error:
        raise ValueError(f"{path} can't be read: {error}: remove that file") from error
