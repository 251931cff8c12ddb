"""A run's log, opened to be read; the run may be going on meanwhile."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flash.config import SMALL, validated
from flash.config.source import read_mapping
from flash.errors import LogFailure
from flash.log.config import LogConfig, shown
from flash.log.run_log import ID_FILE
from flash.log.store import SQLITE_FILE, Store, StoreError, sqlite_url
from flash.replay.episodes import EpisodeReader
from flash.section import Section, revealed
from flash.warm_start.config import PolicyConfig, WarmStartConfig

GIVE_A_RUN = "give the folder of a run, runs/NAME"


class _Where(Section):
    """What is checked of a run's configuration: the rest may need modules that are not here."""

    log: LogConfig = LogConfig()


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedRun:
    """`config` is what the run's folder has of its configuration, as plain values."""

    path: Path
    config: Mapping[str, Any]
    store: Store
    number: int

    @contextlib.contextmanager
    def reading(self) -> Iterator[EpisodeReader]:
        """What is read in the block fits together; it blocks. LogFailure if it can't be read."""
        try:
            with self.store.transaction() as connection:
                yield EpisodeReader(connection, self.number)
        except StoreError as error:
            raise LogFailure(f"the log {shown(self.store.url)} can't be read: {error}") from error


@contextlib.contextmanager
def open_run(path: Path, *, url: str = "") -> Iterator[LoggedRun]:
    """The run of a folder. `url` is its log's, where the folder doesn't keep it.

    ValueError if the folder is no run's, or its log is not where it says.
    """
    if not (path / ID_FILE).is_file():
        raise ValueError(f"{path} holds no run with a log ({ID_FILE}): {GIVE_A_RUN}")
    config = read_mapping(path / "config.yaml", "env: NAME")
    section = config.get("log") or {}
    settings = validated(_Where, {"log": {**section, "url": url} if url else section}).log
    given = revealed(settings.url)
    if not given and not (path / SQLITE_FILE).is_file():
        raise ValueError(
            f"{path} holds no log ({SQLITE_FILE}): {GIVE_A_RUN}, or --log.url of the database that "
            f"has it"
        )
    store = Store(given or sqlite_url(path), run=(path / ID_FILE).read_text(), name=path.name)
    with contextlib.closing(store):
        try:
            number = store.find()
        except StoreError as error:
            raise LogFailure(f"the log {shown(store.url)} can't be read: {error}") from error
        if number is None:
            raise ValueError(
                f"log.url={shown(store.url)!r} has no run {path.name} ({ID_FILE}): give the "
                f"log.url that the run had"
            )
        yield LoggedRun(path=path, config=config, store=store, number=number)


def first_model(run: LoggedRun) -> str:
    """What the run began with: a directory, or a hub name. ValueError for a small policy that is
    not kept any more."""
    model = str(run.config.get("model", SMALL))
    if model != SMALL:
        local = Path(model).expanduser()
        return str(local) if local.is_dir() else model
    # Imports what trains it.
    from flash.warm_start.teach import folder_name, key_of  # noqa: PLC0415

    config = run.config
    sets: Mapping[str, Any] = config.get("task_sets") or {"": {}}
    name = folder_name(
        key_of(of_set.get("env", config["env"]) for of_set in sets.values()),
        PolicyConfig.model_validate(config.get("policy", {})),
        WarmStartConfig.model_validate(config.get("warm_start", {})),
        config.get("seed", 0),
    )
    kept = run.path.resolve().parent / ".small_policies" / name
    if not kept.is_dir():
        raise ValueError(
            f"model=small: the policy that {run.path} began with is not at {kept} any more: put it "
            f"there"
        )
    return str(kept)
