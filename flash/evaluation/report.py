"""What `flash eval` found: each environment's numbers, as data and as a table."""

import io
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table

from flash.errors import EpisodeFailure
from flash.evaluation.statistics import (
    CONFIDENCE,
    Estimate,
    mean_of_tasks,
    pass_at_k,
    powers_of_two,
    rate_of_tasks,
)
from flash.rollout.episode import Episode
from flash.types import Trajectory

FORMAT = 1
_WIDE = 1000
INTERVAL = (
    "means over tasks, each the mean of its samples; rates: Wilson's interval for the effective "
    "number of trials by the standard error clustered by task; reward: Student's t"
)


class EpisodeResult(msgspec.Struct, frozen=True, kw_only=True):
    """One episode. One that failed has no reward, and says how it failed in the end."""

    seed: int
    reward: float | None
    success: bool | None
    failure: str | None = None
    turns: int
    prompt_tokens: int  # that were read, of all requests
    sampled_tokens: int
    unfinished: bool  # its environment did not end it: a limit did
    cut_responses: int  # that ended at a limit of tokens


class EnvironmentResult(msgspec.Struct, frozen=True, kw_only=True):
    """How the model did in one environment; means are of the episodes that did not fail."""

    played_with: dict[str, Any]
    tasks: int
    played: int
    failed: int
    failures: dict[str, int]  # by kind
    unfinished: int
    cut: int  # episodes with a response that was cut
    reward: Estimate | None
    success: Estimate | None
    pass_at: dict[int, Estimate]
    turns_mean: float | None
    prompt_tokens_mean: float | None
    sampled_tokens_mean: float | None
    episodes: list[EpisodeResult]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All of an evaluation, as the JSON file has it; `format` is another where a field changes its
    meaning or goes."""

    format: int = FORMAT
    model: str
    server: str | None
    tasks: int  # that were to be played in each environment
    samples: int
    temperature: float
    complete: bool
    time_s: float
    confidence: float = CONFIDENCE
    interval: str = INTERVAL
    environments: dict[str, EnvironmentResult]


def episode_result(episode: Episode, end: Trajectory | EpisodeFailure) -> EpisodeResult:
    """Of one that came to its end, or failed to the last."""
    whole = end if isinstance(end, Trajectory) else None
    return EpisodeResult(
        seed=episode.task.seed,
        reward=None if whole is None else whole.reward,
        success=None if whole is None else whole.success,
        failure=type(end).__name__ if whole is None else None,
        turns=episode.turns,
        prompt_tokens=episode.prompt_tokens,
        sampled_tokens=episode.generated_tokens,
        unfinished=whole is not None and episode.over is False,
        cut_responses=episode.cut_responses,
    )


def environment_result(
    episodes: Sequence[EpisodeResult], *, played_with: Mapping[str, Any]
) -> EnvironmentResult:
    """The numbers of an environment's episodes."""
    whole = [e for e in episodes if e.failure is None]
    of_task: dict[int, list[EpisodeResult]] = defaultdict(list)
    for episode in whole:
        of_task[episode.seed].append(episode)
    groups = [*of_task.values()]
    most = max(map(len, groups), default=0)
    return EnvironmentResult(
        played_with=dict(played_with),
        tasks=len({e.seed for e in episodes}),
        played=len(whole),
        failed=len(episodes) - len(whole),
        failures=dict(Counter(e.failure for e in episodes if e.failure is not None)),
        unfinished=sum(e.unfinished for e in whole),
        cut=sum(e.cut_responses > 0 for e in whole),
        reward=mean_of_tasks([_reward(group) for group in groups]) if groups else None,
        success=rate_of_tasks([_pass_at(1, group) for group in groups]) if groups else None,
        pass_at={
            k: rate_of_tasks([_pass_at(k, group) for group in groups if len(group) >= k])
            for k in powers_of_two(most)
        },
        turns_mean=_mean([e.turns for e in whole]),
        prompt_tokens_mean=_mean([e.prompt_tokens for e in whole]),
        sampled_tokens_mean=_mean([e.sampled_tokens for e in whole]),
        episodes=sorted(episodes, key=lambda e: e.seed),
    )


def _reward(group: Sequence[EpisodeResult]) -> float:
    return fmean(e.reward for e in group if e.reward is not None)


def _pass_at(k: int, group: Sequence[EpisodeResult]) -> float:
    return pass_at_k(len(group), sum(bool(e.success) for e in group), k)


def _mean(values: Sequence[int]) -> float | None:
    return fmean(values) if values else None


def markdown(report: Report) -> str:
    """A table with a row for each environment."""
    return as_markdown(_table(report))


def as_markdown(table: Table) -> str:
    """A table as it can be pasted."""
    page = io.StringIO()
    Console(file=page, width=_WIDE).print(table)  # a row that wraps can't be pasted
    return page.getvalue().strip()


def _table(report: Report) -> Table:
    shown = Table(box=box.MARKDOWN)
    ks = sorted({k for found in report.environments.values() for k in found.pass_at if k > 1})
    shown.add_column("environment", no_wrap=True)
    for head in ("episodes", "success", *(f"pass@{k}" for k in ks), "reward", "turns", "tokens",
                 "cut off", "failed"):  # fmt: skip
        shown.add_column(head, justify="right", no_wrap=True)
    for name, found in report.environments.items():
        cut_off = sum(e.unfinished or e.cut_responses > 0 for e in found.episodes if not e.failure)
        shown.add_row(
            name,
            str(found.played),
            _rate(found.success),
            *(_rate(found.pass_at.get(k)) for k in ks),
            _number(found.reward),
            _plain(found.turns_mean),
            _plain(found.sampled_tokens_mean),
            str(cut_off),
            str(found.failed),
        )
    return shown


def caption(report: Report) -> str:
    """What the table's numbers are."""
    samples = "" if report.samples == 1 else f" × {report.samples} samples"
    where = f" at {report.server}" if report.server else ""
    cut = "" if report.complete else "; stopped before its end"
    return (
        f"{report.model}{where}: {report.tasks} held-out tasks{samples}, "
        f"temperature {report.temperature:g}, {report.time_s:.0f} s{cut}. "
        f"In parentheses {report.confidence:.0%} confidence intervals, clustered by task. "
        f"Failed episodes are in no mean."
    )


def show(report: Report, json: str | None) -> None:
    """Prints the table; the report as JSON goes to that file, or alone to stdout for `-`."""
    show_as(report, f"{markdown(report)}\n\n{caption(report)}", json)


def show_as(found: msgspec.Struct, page: str, json: str | None) -> None:
    """Prints the page; what was found goes as JSON to that file, or alone to stdout for `-`."""
    data = msgspec.json.format(msgspec.json.encode(found), indent=1).decode()
    if json == "-":
        print(data)
        return
    if json is not None:
        Path(json).write_text(data + "\n", encoding="utf-8")
    print(page)


def _rate(found: Estimate | None) -> str:
    if found is None:
        return "—"
    ends = "" if found.low is None else f" ({100 * found.low:.1f}–{100 * (found.high or 0):.1f})"
    return f"{found.mean:.1%}{ends}"


def _number(found: Estimate | None) -> str:
    if found is None:
        return "—"
    return f"{found.mean:.3g}" + (
        "" if found.low is None else f" ({found.low:.3g} to {found.high:.3g})"
    )


def _plain(mean: float | None) -> str:
    return "—" if mean is None else f"{mean:.1f}"
