"""`flash replay` and `flash export`, once their words are understood."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from flash.plain import plain
from flash.replay.episodes import EpisodeReader, LoggedEpisode
from flash.replay.logged_run import open_run
from flash.replay.page import Colour, as_data, legend, print_page
from flash.replay.text import decoder_of

# Imported where they are needed: to look at an episode must not wait for what trains.
# ruff: noqa: PLC0415

_TOLD = {"loss": "loss", "grad_norm": "grad norm", "kl_behaviour": "KL", "weight/ess": "ESS"}


def show(
    path: Path,
    choose: Callable[[EpisodeReader], list[LoggedEpisode]],
    *,
    url: str,
    colour: Colour,
    as_json: bool,
) -> None:
    """Prints the episodes that `choose` finds."""
    with open_run(path, url=url) as run:
        with run.reading() as reader:
            episodes = choose(reader)
        decode = decoder_of(run)
        console = Console()
        if console.is_terminal and not as_json:
            console.print(legend(colour), soft_wrap=True)
        for number, episode in enumerate(episodes):
            if as_json:
                _print_json(as_data(episode, decode))
                continue
            if number:
                console.print()
            print_page(episode, decode, colour=colour, console=console)


async def rescore(path: Path, function: str, *, url: str, as_json: bool) -> None:
    """Prints what that reward would have changed."""
    from flash.replay.rescore import rescore, table

    with open_run(path, url=url) as run:
        rescored = await rescore(run, function, decoder_of(run))
    if as_json:
        _print_json({"function": function, **asdict(rescored)})
    else:
        print(table(rescored, function))


async def retrain(
    path: Path, changes: Mapping[str, Any], *, checkpoint: str, url: str, as_json: bool
) -> None:
    """Prints each step beside the logged one, and whether the weights are the run's."""
    from flash.replay.retrain import Compared, Step, plan, retrain

    def tell(told: Step | Compared) -> None:
        if as_json:
            where = {"checkpoint": str(told.checkpoint)} if isinstance(told, Compared) else {}
            _print_json(asdict(told) | where)
        elif isinstance(told, Step):
            print(_row(told.number, told.metrics, told.logged), flush=True)
        elif told.equal:
            print(f"weights equal to the last bit to those of {told.checkpoint}")
        else:
            print(f"weights differ by up to {told.difference:.3g} from those of {told.checkpoint}")

    with open_run(path, url=url) as run:
        planned = plan(run, changes, checkpoint=checkpoint)
        if not as_json:
            print(planned.describe())
            print(_heads())
        await retrain(run, planned, tell)


def export(path: Path, *, url: str, format: str, episodes: str, out: Path | None) -> None:
    """Writes the file, and says where."""
    from flash.replay.export import export

    with open_run(path, url=url) as run:
        written, count, gone = export(
            run, decoder_of(run), format=format, episodes=episodes, out=out
        )
    left_out = f"; {gone} more are no longer in the log (log.keep)" if gone else ""
    print(f"{written}: {count} {'episode' if count == 1 else 'episodes'}{left_out}")


def _heads() -> str:
    return f"{'step':>6}" + "".join(f"  {head:>10} {'logged':>10}" for head in _TOLD.values())


def _row(number: int, metrics: Mapping[str, Any], logged: Mapping[str, Any]) -> str:
    return f"{number:6}" + "".join(
        f"  {_number(metrics.get(name))} {_number(logged.get(name))}" for name in _TOLD
    )


def _number(value: float | None) -> str:
    return f"{'-':>10}" if value is None else f"{value:10.4g}"


def _print_json(data: Mapping[str, Any]) -> None:
    print(json.dumps(plain(data)), flush=True)
