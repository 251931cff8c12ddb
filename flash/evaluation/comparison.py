"""`flash eval --compare`: two evaluations of the same tasks, and how they differ task by task.

A task is as hard for one model as for the other, so that the differences of its means vary less
than the means do: the interval is of these differences, with tasks as the units that vary.
"""

from collections import defaultdict
from pathlib import Path
from statistics import fmean

import msgspec
from rich import box
from rich.table import Table

from flash.evaluation.report import (
    FORMAT,
    EnvironmentResult,
    EpisodeResult,
    Report,
    as_markdown,
    show_as,
)
from flash.evaluation.statistics import CONFIDENCE, Estimate, mean_of_tasks

INTERVAL = (
    "of the mean over tasks of each task's difference, second minus first: Student's t; none where "
    "all differences are equal"
)
_MOST_NAMED = 5


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """Means over the tasks of both, and of how many of these the second has more or less."""

    first: float
    second: float
    difference: Estimate
    better: int
    worse: int


class EnvironmentComparison(msgspec.Struct, frozen=True, kw_only=True):
    """`left_out`: tasks of which all episodes failed in one of the two."""

    tasks: int
    left_out: int
    otherwise: list[str]  # of the agent and its sampling: what was not the same in both
    success: Difference
    reward: Difference


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """All of it, as the JSON file has it; `first` and `second` are the models."""

    format: int = FORMAT
    first: str
    second: str
    confidence: float = CONFIDENCE
    interval: str = INTERVAL
    environments: dict[str, EnvironmentComparison]


def read_report(path: Path) -> Report:
    """What `flash eval --json` wrote there. ValueError if it did not."""
    try:
        report = msgspec.json.decode(path.read_bytes(), type=Report)
    except OSError as error:
        raise ValueError(f"--compare {path} can't be read: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise ValueError(
            f"--compare {path} is no report ({error}): give files of flash eval --json"
        ) from error
    if report.format != FORMAT:
        raise ValueError(
            f"--compare {path} has format {report.format}, and this version reads {FORMAT}: "
            f"evaluate again"
        )
    return report


def compare(first: Report, second: Report) -> Comparison:
    """ValueError, with what differs, if they are not of the same tasks in the same environments."""
    names = [*first.environments], [*second.environments]
    if set(names[0]) != set(names[1]):
        raise ValueError(
            f"--compare: environments differ, {', '.join(names[0])} and {', '.join(names[1])}: "
            f"evaluate both models in the same"
        )
    sampling = [] if first.temperature == second.temperature else ["temperature"]
    return Comparison(
        first=first.model,
        second=second.model,
        environments={
            name: _of_environment(name, of_first, second.environments[name], sampling)
            for name, of_first in first.environments.items()
        },
    )


def _of_environment(
    name: str, first: EnvironmentResult, second: EnvironmentResult, sampling: list[str]
) -> EnvironmentComparison:
    played = first.played_with.get("env"), second.played_with.get("env")
    if played[0] != played[1]:
        raise ValueError(
            f"--compare: {name} was played with {played[0]} and {played[1]}: evaluate both with "
            f"the same environment and options"
        )
    tasks = [{episode.seed for episode in one.episodes} for one in (first, second)]
    if tasks[0] != tasks[1]:
        odd = sorted(tasks[0] ^ tasks[1])
        named = ", ".join(map(str, odd[:_MOST_NAMED])) + (", …" if odd[_MOST_NAMED:] else "")
        raise ValueError(
            f"--compare: tasks of {name} don't match, {len(tasks[0])} and {len(tasks[1])}, of "
            f"which {len(odd)} are in one alone (seeds {named}): evaluate both to the end, with "
            f"the same eval.tasks"
        )
    of_first, of_second = _by_task(first), _by_task(second)
    paired = sorted(of_first.keys() & of_second.keys())
    if not paired:
        raise ValueError(
            f"--compare: no task of {name} was played in both: all episodes failed in one; look "
            f"at their failures"
        )
    agents = first.played_with.get("agent", {}), second.played_with.get("agent", {})
    return EnvironmentComparison(
        tasks=len(paired),
        left_out=len(tasks[0]) - len(paired),
        otherwise=sampling
        + sorted(f for f in agents[0] | agents[1] if agents[0].get(f) != agents[1].get(f)),
        success=_difference(
            [_success(of_first[seed]) for seed in paired],
            [_success(of_second[seed]) for seed in paired],
        ),
        reward=_difference(
            [_reward(of_first[seed]) for seed in paired],
            [_reward(of_second[seed]) for seed in paired],
        ),
    )


def _by_task(result: EnvironmentResult) -> dict[int, list[EpisodeResult]]:
    """The episodes that did not fail."""
    found: dict[int, list[EpisodeResult]] = defaultdict(list)
    for episode in result.episodes:
        if episode.failure is None:
            found[episode.seed].append(episode)
    return found


def _success(episodes: list[EpisodeResult]) -> float:
    return fmean(bool(episode.success) for episode in episodes)


def _reward(episodes: list[EpisodeResult]) -> float:
    return fmean(episode.reward or 0.0 for episode in episodes)


def _difference(first: list[float], second: list[float]) -> Difference:
    """Of the same tasks, in the same order."""
    differences = [b - a for a, b in zip(first, second, strict=True)]
    return Difference(
        first=fmean(first),
        second=fmean(second),
        difference=mean_of_tasks(differences),
        better=sum(d > 0 for d in differences),
        worse=sum(d < 0 for d in differences),
    )


def markdown(comparison: Comparison) -> str:
    """A table with two rows for each environment."""
    shown = Table(box=box.MARKDOWN)
    shown.add_column("environment", no_wrap=True)
    shown.add_column("", no_wrap=True)
    for head in ("tasks", "first", "second", "difference", "better", "worse"):
        shown.add_column(head, justify="right", no_wrap=True)
    for name, found in comparison.environments.items():
        for measure, value in (("success", found.success), ("reward", found.reward)):
            of = value.difference
            ends = "" if of.low is None else f" ({of.low:+.3f} to {of.high:+.3f})"
            shown.add_row(
                name, measure, str(found.tasks), f"{value.first:.3f}", f"{value.second:.3f}",
                f"{of.mean:+.3f}{ends}", str(value.better), str(value.worse),
            )  # fmt: skip
    return as_markdown(shown)


def caption(comparison: Comparison) -> str:
    """What the table's numbers are."""
    lines = [
        f"first: {comparison.first}; second: {comparison.second}. In parentheses "
        f"{comparison.confidence:.0%} confidence intervals of the difference, paired by task: one "
        f"that holds 0 tells of no difference. better, worse: tasks of which the second has more, "
        f"less."
    ]
    for name, found in comparison.environments.items():
        if found.left_out:
            lines.append(f"{name}: {found.left_out} tasks are left out, which failed in one.")
        if found.otherwise:
            lines.append(f"{name}: played otherwise: {', '.join(found.otherwise)}.")
    return "\n".join(lines)


def show(comparison: Comparison, json: str | None) -> None:
    """As a report is shown."""
    show_as(comparison, f"{markdown(comparison)}\n\n{caption(comparison)}", json)
