"""The catalogue of wrong inputs: each ends in its one line, and nothing is started for it."""

import importlib
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from flash.cli import main as cli

TABLE = Path(__file__).with_name("wrong_inputs.yaml")
ROWS: list[dict[str, Any]] = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
USERS_MODULE = "mine"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder that the command is run in; a module in it is imported anew each time."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    importlib.invalidate_caches()
    yield tmp_path
    sys.modules.pop(USERS_MODULE, None)


def written(folder: Path, files: dict[str, str | bytes]) -> set[Path]:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return set(folder.rglob("*"))


def pattern(line: str) -> str:
    return ".*".join(map(re.escape, line.split("…")))


@pytest.mark.timeout(30)  # what is not refused would train
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["flash"])
def test_a_wrong_input_ends_in_its_one_line_and_nothing_is_started(row, here, capsys):
    files = written(here, row.get("files", {}))
    assert cli.run(shlex.split(row["flash"])) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(f"flash: {pattern(row['says'])}\n", error), error
    started = {path for path in here.rglob("*") if "__pycache__" not in path.parts}
    assert started == files


def test_the_catalogue_is_of_at_least_150_kinds_and_has_each_once():
    rows = {(row["flash"], str(row.get("files"))) for row in ROWS}
    assert len(rows) == len(ROWS) >= 150
