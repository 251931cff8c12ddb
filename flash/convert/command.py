"""`flash convert`, once its words are understood."""

import json
import reprlib
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from flash.convert.conversion import OUTCOMES, SYSTEMS, Converted, convert, recognised
from flash.convert.counterparts import run_name
from flash.convert.source import read
from flash.plain import plain

_WIDEST = 200  # of a table for others than people, who have a terminal's width
_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = 60


def run(path: Path, *, of: str | None, out: Path | None, as_json: bool) -> None:
    """Writes what it becomes, to `out` or stdout, and tells on stderr what became of each key.

    ValueError for a file that holds no configuration of a known system, or `of` the one named.
    """
    if out is not None and out.exists():
        raise ValueError(f"--out {out} is there already: give another name")
    source = read(path)
    system = SYSTEMS[of] if of is not None else recognised(source)
    converted = convert(source, system, name=run_name(path.stem))
    if as_json:
        _write(json.dumps(plain(_as_data(converted)), indent=1) + "\n", out)
    else:
        _write(_as_yaml(converted, path), out)
        _tell(converted)


def _write(text: str, out: Path | None) -> None:
    if out is None:
        sys.stdout.write(text)
    else:
        out.write_text(text, encoding="utf-8")


def _as_yaml(converted: Converted, path: Path) -> str:
    """The file, which begins with what must be decided before a run."""
    lines = [f"Made of {path.name}, of {converted.system.title}, by flash convert."]
    lines += [f"To decide: {what}." for what in converted.decide]
    values = yaml.safe_dump(plain(converted.nested()), sort_keys=False, allow_unicode=True)
    return "".join(f"# {line}\n" for line in lines) + values


def _as_data(converted: Converted) -> dict[str, Any]:
    return {
        "system": converted.system.name,
        "config": converted.nested(),
        "counts": converted.counts(),
        "keys": [asdict(row) for row in converted.rows],
        "added": [asdict(one) for one in converted.added],
        "decide": list(converted.decide),
    }


def _tell(converted: Converted) -> None:
    width = None if Console(stderr=True).is_terminal else _WIDEST
    console = Console(stderr=True, highlight=False, markup=False, width=width)
    for outcome in OUTCOMES:
        rows = [row for row in converted.rows if row.outcome == outcome]
        if rows:
            told = ((row.key, row.value, row.fields, row.note) for row in rows)
            console.print(_table(f"{outcome}: {len(rows)}", told))
    if converted.added:
        told = (("", "", {one.field: one.value}, one.why) for one in converted.added)
        console.print(_table(f"set without a key: {len(converted.added)}", told))
    for what in converted.decide:
        console.print(f"to decide: {what}", soft_wrap=True)


def _table(title: str, rows: Iterable[tuple[str, Any, Mapping[str, Any], str]]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in ("key", "value", "here", "why, or what is counted"):
        table.add_column(column, overflow="fold")
    for key, value, fields, note in rows:
        here = ", ".join(f"{name}={_SHOWN.repr(one)}" for name, one in fields.items())
        table.add_row(key, _SHOWN.repr(value) if key else "", here, note)
    return table
