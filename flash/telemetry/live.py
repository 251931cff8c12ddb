"""What a run shows while it runs: a dashboard in a terminal, a line a step elsewhere."""

import contextlib
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeGuard

from rich.console import Console, Group
from rich.live import Live
from rich.logging import RichHandler
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

_BLOCKS = "▁▂▃▄▅▆▇█"
_BAR_CELLS = 20
_SPARK_CELLS = 48
_PLAIN_PROGRESS_S = 10.0
_MOST_EVALUATIONS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class OfSet:
    """Of a task set at one moment what `Snapshot` has of the run; `held_out` is the last one."""

    success_rate: float | None
    reward_mean: float | None
    held_out: float | None
    running: int
    ready: int
    ages: Mapping[int, int]
    staleness_mean: float | None
    staleness_max: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A run at one moment; None or nan where nothing is known. Shares are 0 to 1.

    `ages` counts episodes under way by the age of their oldest token; `eval_success_rates` and
    `success_rates` are all so far, oldest first.
    """

    step: int
    steps: int
    policy_version: int
    time_s: float
    success_rate: float | None
    reward_mean: float | None
    success_rates: tuple[float, ...]
    eval_success_rates: tuple[float, ...]
    running: int
    ready: int
    capacity: int
    ages: Mapping[int, int]
    tokens_per_s: float | None
    idle: Mapping[str, float | None]
    staleness_mean: float | None
    staleness_max: float | None
    waste_share: float
    outcomes: Mapping[str, int]
    task_sets: Mapping[str, OfSet] = field(default_factory=dict)  # by name, if there are some


class View(Protocol):
    """Where a run is shown. Every method returns at once."""

    def progress(self, what: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        """Work before the first step: so much of it is done."""
        ...

    def say(self, text: str) -> None:
        """A line that stays."""
        ...

    def step(self, snapshot: Snapshot) -> None:
        """A step is done."""
        ...

    def tick(self, snapshot: Snapshot) -> None:
        """Some time has passed."""
        ...


@contextlib.contextmanager
def open_view(console: Console | None = None, *, plain: bool | None = None) -> Iterator[View]:
    """A dashboard if the console is a terminal and `plain` is not asked for, else plain lines."""
    console = console or Console()
    if plain or (plain is None and not console.is_terminal):
        yield _Plain(console)
        return
    with _Dashboard(console) as dashboard:
        yield dashboard


# ── without a terminal ───────────────────────────────────────────────────────────────────────


class _Plain:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._last_progress = -_PLAIN_PROGRESS_S

    def progress(self, what: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        now = time.monotonic()
        if done == total or now - self._last_progress >= _PLAIN_PROGRESS_S:
            self._last_progress = now
            loss = f", loss {metrics['loss']:.3f}" if "loss" in metrics else ""
            self.say(f"{what}: {done} of {total}{loss}")

    def step(self, snapshot: Snapshot) -> None:
        s = snapshot
        latest = s.eval_success_rates[-1] if s.eval_success_rates else None
        evaluated = f"held-out {_share(latest)}  " if s.eval_success_rates else ""
        of_sets = ", ".join(
            f"{name} {_share(of_set.success_rate).strip()}" for name, of_set in s.task_sets.items()
        )
        sets = f"({of_sets})  " if of_sets else ""
        self.say(
            f"step {s.step:4d}/{s.steps}  success {_share(s.success_rate)}  {sets}{evaluated}"
            f"reward {_number(s.reward_mean)}  age mean {_number(s.staleness_mean)} "
            f"max {_number(s.staleness_max, 0)}  {_number(s.tokens_per_s, 0)} tok/s  "
            f"running {s.running} ready {s.ready}  idle: {_idle_text(s.idle)}  {_clock(s.time_s)}"
        )

    def tick(self, snapshot: Snapshot) -> None:
        pass

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


# ── in a terminal ────────────────────────────────────────────────────────────────────────────


class _Dashboard:
    """Redraws itself in place; log lines scroll above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False)
        self._bars = Progress(
            TextColumn("{task.description:>20}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self._bar_ids: dict[str, int] = {}
        self._last_refresh = 0.0

    def __enter__(self) -> "_Dashboard":
        self._live.start()
        # Other handlers would write into the middle of the dashboard.
        self._root = logging.getLogger()
        self._handlers = self._root.handlers[:]
        self._root.handlers = [RichHandler(console=self._console, show_path=False)]
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._live.stop()
        self._root.handlers = self._handlers

    def progress(self, what: str, done: int, total: int, metrics: Mapping[str, float]) -> None:
        if what not in self._bar_ids:
            self._bar_ids[what] = self._bars.add_task(what, total=total, note="")
        note = f"loss {metrics['loss']:.3f}" if "loss" in metrics else ""
        self._bars.update(self._bar_ids[what], completed=done, note=note)  # type: ignore[arg-type]
        now = time.monotonic()
        if done == total or now - self._last_refresh > 0.1:
            self._last_refresh = now
            self._live.update(self._bars, refresh=True)

    def say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    def step(self, snapshot: Snapshot) -> None:
        self.tick(snapshot)

    def tick(self, snapshot: Snapshot) -> None:
        self._live.update(dashboard(snapshot), refresh=True)


def dashboard(snapshot: Snapshot) -> Panel:
    """The picture of one moment."""
    s = snapshot
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", style="bold")
    table.add_column()
    table.add_row("success rate", f"{_share(s.success_rate)}  {sparkline(s.success_rates)}")
    heldout = [_share(rate).strip() for rate in s.eval_success_rates]
    if len(heldout) > _MOST_EVALUATIONS:
        heldout = [heldout[0], "…", *heldout[2 - _MOST_EVALUATIONS :]]
    table.add_row("held out", "  →  ".join(heldout))
    table.add_row("reward", _number(s.reward_mean))
    table.add_row(
        "episodes",
        # A reason may hold brackets, which are no markup.
        Text(
            f"{s.running} running, {s.ready} ready, of {s.capacity} at most   "
            + "  ".join(f"{name} {count}" for name, count in s.outcomes.items())
        ),
    )
    table.add_row(
        "version ages",
        f"under way {_ages_text(s.ages)};  trained: mean {_number(s.staleness_mean)}, "
        f"max {_number(s.staleness_max, 0)}",
    )
    table.add_row(
        "speed", f"{_number(s.tokens_per_s, 0)} tokens/s, {s.waste_share:.0%} of them wasted"
    )
    for role, idle in s.idle.items():
        if _is_known(idle):
            table.add_row(f"{role.replace('_', ' ')} idle", f"{_bar(idle)} {idle:4.0%}")
    left_s = s.time_s / s.step * (s.steps - s.step) if s.step else None
    left = f", about {_clock(left_s)} left" if left_s is not None else ""
    title = f"step {s.step} of {s.steps}, policy version {s.policy_version}, {_clock(s.time_s)}"
    parts = [table, _table_of_sets(s.task_sets)] if s.task_sets else [table]
    return Panel(Group(*parts), title=title + left, title_align="left")


def _table_of_sets(task_sets: Mapping[str, OfSet]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2), header_style="bold")
    names = [
        "task set",
        "success",
        "held out",
        "reward",
        "running",
        "ready",
        "under way",
        "trained",
    ]
    for name in names:
        table.add_column(name, justify="left" if name in ("task set", "under way") else "right")
    for name, of_set in task_sets.items():
        table.add_row(
            name,
            _share(of_set.success_rate),
            _share(of_set.held_out),
            _number(of_set.reward_mean),
            str(of_set.running),
            str(of_set.ready),
            _ages_text(of_set.ages),
            f"{_number(of_set.staleness_mean)}, max {_number(of_set.staleness_max, 0)}",
        )
    return table


def _ages_text(ages: Mapping[int, int]) -> str:
    return "  ".join(f"{age}: {count}" for age, count in sorted(ages.items())) or "-"


def sparkline(values: Sequence[float]) -> str:
    """The newest values as a line of blocks, from 0 to the highest."""
    newest = [value for value in values if _is_known(value)][-_SPARK_CELLS:]
    top = max(newest, default=0.0) or 1.0
    return "".join(_BLOCKS[round(max(0.0, v) / top * (len(_BLOCKS) - 1))] for v in newest)


def _bar(share: float) -> str:
    filled = round(min(1.0, max(0.0, share)) * _BAR_CELLS)
    return "█" * filled + "░" * (_BAR_CELLS - filled)


def _idle_text(idle: Mapping[str, float | None]) -> str:
    known = [f"{role} {share:.0%}" for role, share in idle.items() if _is_known(share)]
    return ", ".join(known) or "-"


def _share(value: float | None) -> str:
    return f"{value:5.1%}" if _is_known(value) else "    -"


def _number(value: float | None, digits: int = 2) -> str:
    return f"{value:.{digits}f}" if _is_known(value) else "-"


def _is_known(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _clock(seconds: float) -> str:
    if not _is_known(seconds):
        return "-"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}"
