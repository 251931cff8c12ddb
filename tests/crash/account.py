"""What a run's log and files say in the end: what was lost, what came twice, what broke a promise.

All of it is read from the log and the folder; nothing of the run's own code judges the run, but
for the columns' formats.
"""

import contextlib
import json
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Row, Table, create_engine, select

from flash.log import schema
from flash.seeds import TRAINING_SEEDS, first_task

# A group that came to nothing for one of these has its task trained in another.
BEGUN_ANEW = ("abandoned", "source_changed", "settings_changed")
# What a run leaves to its next start; the log has no outcome of it.
LEFT = ("shutdown", "over")
# Why a ready episode may end without being trained.
DROPPED = ("stale", "redundant", "too_slow", "filtered", "group_failed", "stall", *BEGUN_ANEW)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What was committed when a run was killed."""

    batches: dict[int, list[tuple[int, ...]]]
    ready: set[int]
    episodes: set[int]
    groups: dict[int, int]
    steps: int


@dataclass(slots=True)
class Account:
    """What of a snapshot is missing in the end, and what came twice."""

    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)


class Books:
    """The rows of one run. `live`: it is being written."""

    def __init__(self, url: str, run: Path, *, live: bool = False) -> None:
        uuid = (run / "log.id").read_text()
        with _connected(url, run, live=live) as connection:
            where = schema.RUNS.c.uuid == uuid
            number = connection.scalar(select(schema.RUNS.c.run).where(where))
            self._rows = {
                table.name: list(
                    connection.execute(
                        select(table).where(table.c.run == number).order_by(*table.primary_key)
                    )
                )
                for table in schema.METADATA.sorted_tables
                if table is not schema.RUNS
            }

    def of(self, table: Table) -> list[Row[Any]]:
        return self._rows[table.name]

    def batches(self) -> dict[int, list[tuple[int, ...]]]:
        """Of each that is whole, its samples."""
        whole = {row.version for row in self.of(schema.BATCHES) if row.last}
        found: dict[int, list[tuple[int, ...]]] = {version: [] for version in sorted(whole)}
        for row in self.of(schema.SAMPLES):
            if row.version in whole:
                sample = (row.part, row.position, row.episode, row.number, row.group)
                found[row.version].append(sample)
        return found

    def snapshot(self) -> Snapshot:
        episodes = self.of(schema.EPISODES)
        return Snapshot(
            batches=self.batches(),
            ready={row.episode for row in episodes if row.outcome is None and row.played_at},
            episodes={row.episode for row in episodes},
            groups={row.group: row.seed for row in self.of(schema.GROUPS)},
            steps=len(self.of(schema.STEPS)),
        )


@contextlib.contextmanager
def _connected(url: str, run: Path, *, live: bool) -> Iterator[Connection]:
    """To the database; of a file that a kill has left to a copy: to look must change nothing."""
    with tempfile.TemporaryDirectory(prefix="crash-log-") as copy:
        path = run / "log.sqlite"
        if not url and not live:
            for name in ("log.sqlite", "log.sqlite-wal"):
                if (run / name).exists():
                    shutil.copy(run / name, copy)
            path = Path(copy) / path.name
        engine = create_engine(
            url.replace("postgresql://", "postgresql+psycopg://")
            or (f"sqlite:///file:{path}?mode=ro&uri=true" if live else f"sqlite:///{path}")
        )
        try:
            with engine.connect() as connection:
                yield connection
        finally:
            engine.dispose()


def compare(before: Snapshot, after: Books) -> Account:
    """What became of what was committed at a kill."""
    account = Account()
    episodes = {row.episode: row for row in after.of(schema.EPISODES)}
    batches = after.batches()
    seeds = {row.group: row.seed for row in after.of(schema.GROUPS)}
    account.lost += [f"episode {n} is gone" for n in sorted(before.episodes - set(episodes))]
    account.lost += [
        f"group {group} is gone"
        for group, seed in before.groups.items()
        if seeds.get(group) != seed
    ]
    for episode in sorted(before.ready & set(episodes)):
        row = episodes[episode]
        if row.outcome not in (None, "trained") and not row.reason.startswith(DROPPED):
            account.lost.append(f"episode {episode} was ready, and was {row.outcome}: {row.reason}")
    for version, samples in before.batches.items():
        if batches.get(version) != samples:
            account.lost.append(f"the batch of version {version} is not what it was")
    steps = len(after.of(schema.STEPS))
    if steps < before.steps:
        account.lost.append(f"{steps} steps, and there were {before.steps}")
    return account


def violations(books: Books, run: Path, settings: dict[str, Any]) -> Iterable[str]:
    """What the run that has ended broke of what is promised."""
    yield from log_violations(books, settings)
    yield from _of_files(books, run, settings)


def log_violations(books: Books, settings: dict[str, Any]) -> Iterable[str]:
    """Likewise, as far as its log tells; the tasks of `left` would have begun anew next."""
    yield from _of_batches(books, settings)
    yield from _of_outcomes(books)
    yield from _of_tasks(books, settings)


def _of_batches(books: Books, settings: dict[str, Any]) -> Iterable[str]:
    batches = books.batches()
    if list(batches) != list(range(settings["steps"])):
        yield f"batches of the versions {list(batches)} for {settings['steps']} steps"
    sequences: dict[int, dict[int, Row[Any]]] = defaultdict(dict)
    for row in books.of(schema.SEQUENCES):
        sequences[row.episode][row.number] = row
    episodes = {row.episode: row for row in books.of(schema.EPISODES)}
    set_of = {row.group: row.task_set for row in books.of(schema.GROUPS)}
    # Of each task set its groups in a batch, and their size.
    size = settings["group_size"]
    sets = settings.get("sets", {"": (settings["batch_size"] // size, size)})
    trained_at: dict[int, int] = {}
    for version, samples in batches.items():
        of_groups: dict[int, set[int]] = defaultdict(set)
        numbers: dict[int, list[int]] = defaultdict(list)
        for _, _, episode, number, group in samples:
            of_groups[group].add(episode)
            numbers[episode].append(number)
            sequence = sequences[episode].get(number)
            if sequence is None:
                yield f"version {version}: sequence {number} of episode {episode} is not there"
                continue
            sampled = sequence.versions[sequence.loss_mask > 0]
            if len(sampled) and version - sampled.min() > settings["alpha"]:
                yield f"version {version}: episode {episode} has a token of {sampled.min()}"
            if len(sampled) and sampled.max() > version:
                yield f"version {version}: episode {episode} has a token of {sampled.max()}"
        task_sets = Counter(set_of[group] for group in of_groups)
        if task_sets != {name: groups for name, (groups, _) in sets.items()}:
            yield f"version {version}: {dict(task_sets)} groups"
        for group, members in of_groups.items():
            if len(members) != sets[set_of[group]][1]:
                yield f"version {version}: group {group} has {len(members)} episodes"
            for episode in members:
                row = episodes[episode]
                if episode in trained_at:
                    yield f"doubled: episode {episode} in {trained_at[episode]} and {version}"
                trained_at[episode] = version
                if row.group != group:
                    yield f"version {version}: episode {episode} is not of group {group}"
                if (row.outcome, row.trained_at_version) != ("trained", version):
                    yield (
                        f"version {version}: episode {episode} is {row.outcome} at "
                        f"{row.trained_at_version}"
                    )
        for episode, found in numbers.items():
            if sorted(found) != sorted(sequences[episode]):
                yield f"version {version}: of episode {episode} the sequences {sorted(found)} only"
    for row in episodes.values():
        if row.outcome == "trained" and row.episode not in trained_at:
            yield f"lost: episode {row.episode} is trained, and in no batch"


def _of_outcomes(books: Books) -> Iterable[str]:
    groups = {row.group: row for row in books.of(schema.GROUPS)}
    for row in books.of(schema.EPISODES):
        group = groups.get(row.group)
        if group is None:
            yield f"episode {row.episode} has no group"
        elif row.outcome is None and group.outcome is not None:
            yield f"episode {row.episode} has no outcome, and its group {row.group} has one"
        elif row.outcome is None and row.ended_at is not None:
            yield f"episode {row.episode} has ended, and no outcome"
        elif row.outcome == "trained" and group.outcome != "trained":
            yield f"episode {row.episode} is trained, and its group {group.outcome}"
        elif row.outcome == "cancelled" and row.played_at is not None and not row.reason:
            yield f"episode {row.episode} was played, and cancelled"


def _of_tasks(books: Books, settings: dict[str, Any]) -> Iterable[str]:
    of_sets: dict[str, list[Row[Any]]] = defaultdict(list)
    for row in books.of(schema.GROUPS):
        of_sets[row.task_set].append(row)
    for name, rows in of_sets.items():
        first = first_task(settings["seed"], name)
        left = [task.seed for task in settings.get("left", ()) if task.task_set == name]
        yield from _of_set(rows, first=first, left=left)


def _of_set(rows: Iterable[Row[Any]], *, first: int, left: Iterable[int]) -> Iterable[str]:
    of_seed: dict[int, list[Row[Any]]] = defaultdict(list)
    for row in rows:
        of_seed[(row.seed - first) % TRAINING_SEEDS].append(row)
    if sorted(of_seed) != list(range(len(of_seed))):
        missing = sorted(set(range(max(of_seed) + 1)) - set(of_seed))
        yield f"lost: the tasks {missing} of {len(of_seed)} never began"
    for place, groups in sorted(of_seed.items()):
        outcomes = [(row.outcome, row.reason) for row in groups]
        if [outcome for outcome, _ in outcomes].count("trained") > 1:
            yield f"doubled: task {place} was trained more than once: {outcomes}"
        for outcome, reason in outcomes[:-1]:
            if outcome != "dropped" or reason not in BEGUN_ANEW:
                yield f"doubled: task {place} began again after {outcome} {reason}"
        outcome, reason = outcomes[-1]
        if reason in BEGUN_ANEW and groups[-1].seed not in left:
            yield f"lost: task {place} was given up ({reason}), and never began again"
        if outcome == "dropped" and not reason:
            yield f"task {place} was dropped for no reason"


def _of_files(books: Books, run: Path, settings: dict[str, Any]) -> Iterable[str]:
    lines = _lines(run / "metrics.jsonl")
    steps = [line["step"] for line in lines]
    if steps != list(range(settings["steps"] + 1)):  # 0 is the policy that it begins with
        yield f"metrics.jsonl has the steps {steps}"
    logged = {row.step: row.metrics for row in books.of(schema.STEPS)}
    for line in lines:
        if logged.get(line["step"]) != line:
            yield f"metrics.jsonl and the log differ on step {line['step']}"
        if line.get("mismatch/kl_fresh", 0.0) > 1e-6:
            yield f"step {line['step']}: tokens of the policy's version are not of its weights"
        if line.get("staleness/max", 0) > settings["alpha"]:
            yield f"step {line['step']}: a token is {line['staleness/max']} versions old"
    written = _lines(run / "episodes.jsonl")
    counts = Counter(line["episode"] for line in written)
    yield from (f"episode {n} has {c} lines" for n, c in counts.items() if c > 1)
    outcomes = {row.episode: row for row in books.of(schema.EPISODES)}
    for line in written:
        row = outcomes.get(line["episode"])
        if row is None:
            yield f"episodes.jsonl has an episode {line['episode']}, and the log has not"
        elif row.outcome is None:
            if line["reason"] not in LEFT:
                yield f"episodes.jsonl says {line['outcome']} of the open episode {row.episode}"
        else:
            of_log = (row.outcome, row.reason, row.trained_at_version, row.reward)
            names = ("outcome", "reason", "trained_at_version", "reward")
            if of_log != (of_line := tuple(line[name] for name in names)):
                yield f"episode {row.episode} is {of_log} in the log, {of_line} in episodes.jsonl"
    for episode, row in outcomes.items():
        if row.outcome is not None and episode not in counts:
            yield f"episodes.jsonl lacks episode {episode}: {row.outcome} {row.reason}"


def kept_turns(books: Books) -> tuple[int, int]:
    """Of the responses in episodes that were cut off, how many there were when another went on
    in their place and came to its end, and how many it kept."""
    said: dict[int, list[list[int]]] = defaultdict(list)
    for row in books.of(schema.COMPLETIONS):
        said[row.episode].append(row.token_ids.tolist())
    sampled: dict[int, list[int]] = defaultdict(list)
    for row in books.of(schema.SEQUENCES):
        sampled[row.episode] += row.token_ids[row.loss_mask > 0].tolist()
    there = kept = 0
    for row in books.of(schema.EPISODES):
        if row.continues is None or not sampled[row.episode]:
            continue
        before: list[int] = []
        for tokens in said[row.continues]:
            before += tokens
            there += 1
            kept += sampled[row.episode][: len(before)] == before
    return there, kept


def weights(path: Path) -> tuple[int, list[str]]:
    """How many versions were exported by more than one start, and those whose weights differed."""
    of_version: dict[int, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for line in _lines(path):
        of_version[line["version"]][line["start"]].add(line["sum"])
    several = {version: of for version, of in of_version.items() if len(of) > 1}
    differ = [
        f"version {version} has the weights {sorted(set().union(*of_starts.values()))}"
        for version, of_starts in of_version.items()
        if len(set().union(*of_starts.values())) > 1
    ]
    return len(several), differ


def _lines(path: Path) -> list[dict[str, Any]]:
    """Of a run that has ended all are whole, but for one of the weights that a kill cut off."""
    found = []
    for text in path.read_text().splitlines():
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError:
            if path.name != "weights.jsonl":
                raise
    return found
