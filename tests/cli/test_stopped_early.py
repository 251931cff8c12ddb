"""A command that is stopped before a step of its own says what there is."""

import pytest

import flash.train
from flash.cli import main as cli


@pytest.fixture
def stopped(tmp_path, monkeypatch, capsys):
    """What `flash train` says that is stopped while it starts."""
    monkeypatch.chdir(tmp_path)

    async def train(config, *, stop, opened, starter):
        return None

    monkeypatch.setattr(flash.train, "train", train)

    def say(*words: str) -> str:
        assert not cli.run(["train", "frozen_lake", "--name", "run", *words])
        return capsys.readouterr().out

    return say


def test_of_a_run_that_begins_nothing_was_trained(stopped):
    assert stopped() == "stopped before the first step: nothing was trained\n"


@pytest.mark.parametrize(
    ("lines", "where"),
    [
        ("", "has no step yet"),
        ('{"step": 0}\n', "has no step yet"),
        ('{"step": 0}\n{"step": 1}\n{"step": 12}\n{"st', "stands at step 12"),
    ],
)
def test_of_a_resume_the_run_stands_where_it_was(stopped, tmp_path, lines, where):
    (tmp_path / "runs/run").mkdir(parents=True)
    (tmp_path / "runs/run/metrics.jsonl").write_text(lines)
    assert stopped("--resume") == (
        f"stopped before it went on: runs/run {where}, as before; --resume goes on from there\n"
    )
