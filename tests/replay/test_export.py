"""A run's episodes as a dataset."""

import json
import sys

import pytest
from pyarrow import parquet

from flash.cli import main as cli
from flash.replay import export as export_module

ROW = {
    "episode": 3,
    "group": 1,
    "attempt": 1,
    "task_set": "",
    "seed": 71,
    "options": '{"size": 4}',
    "outcome": "trained",
    "reason": "",
    "reward": 1.0,
    "success": True,
    "turn_rewards": [0.0, 1.0],
    "role_rewards": "{}",
    "version_min": 2,
    "version_max": 2,
    "trained_at_version": 2,
    "turns": [
        {"role": "", "read": "a room", "said": "go north stop", "reward": 0.0},
        {"role": "", "read": "garden", "said": "go south", "reward": 1.0},
    ],
    "messages": [
        {"role": "user", "content": "a room"},
        {"role": "assistant", "content": "go north"},
        {"role": "user", "content": "garden"},
        {"role": "assistant", "content": "go south"},
    ],
    "sequences": [
        {
            "token_ids": [3, 4, 0, 1, 6, 5, 0, 2],
            "logprobs": pytest.approx([0, 0, -0.05, -0.5, -5.0, 0, -0.05, -0.5]),
            "versions": [-1, -1, 2, 2, 2, -1, 2, 2],
            "loss_mask": [0, 0, 1, 1, 1, 0, 1, 1],
            "role": "",
        }
    ],
}


@pytest.fixture
def played(logged):
    logged.play(3, ("a room", "go north stop"), ("garden", "go south"), group=1, reward=1.0)
    logged.play(4, ("a room", "go"), outcome="dropped", reason="stale")
    logged.begin(5)
    logged.observe(5, 0, "a room")
    logged.sample(5, 1, "go north")
    logged.end(5, "cancelled", "interrupted")
    logged.begin(6)
    return logged


def exported(capsys, logged, format: str, *words: str) -> str:
    assert cli.run(["export", str(logged.path), "--format", format, *words]) == 0
    return capsys.readouterr().out


def read(path) -> list[dict]:
    if path.suffix == ".parquet":
        return parquet.read_table(path).to_pylist()
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_a_row_is_an_episode_with_all_that_it_takes_to_train_on_it(played, format, capsys):
    path = played.path / f"dataset_trained.{format}"
    assert exported(capsys, played, format) == f"{path}: 1 episode\n"
    assert read(path) == [ROW]


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_of_several_who_played_it_says_who_said_what_and_what_that_was_worth(
    logged, format, capsys
):
    logged.play(
        3, ("a room", "go north"), ("garden", "go south"), ("a garden", "stop"),
        roles=("asks", "answers"), role_rewards={"answers": -2.0}, reward=1.0,
    )  # fmt: skip
    exported(capsys, logged, format)
    (row,) = read(logged.path / f"dataset_trained.{format}")
    assert (row["reward"], json.loads(row["role_rewards"])) == (1.0, {"answers": -2.0})
    assert [(turn["role"], turn["said"]) for turn in row["turns"]] == [
        ("asks", "go north"), ("answers", "go south"), ("asks", "stop"),
    ]  # fmt: skip
    sampled = [(each["role"], sum(each["loss_mask"])) for each in row["sequences"]]
    assert sampled == [("asks", 3), ("answers", 2)]


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_all_are_those_that_ended_in_any_way(played, format, tmp_path, capsys):
    path = tmp_path / f"all.{format}"
    exported(capsys, played, format, "--episodes", "all", "--out", str(path))
    rows = read(path)
    assert [(row["episode"], row["outcome"], row["reason"]) for row in rows] == [
        (3, "trained", ""), (4, "dropped", "stale"), (5, "cancelled", "interrupted"),
    ]  # fmt: skip
    assert rows[2]["turns"] == [{"role": "", "read": None, "said": "go north", "reward": None}]
    assert (rows[2]["sequences"], rows[2]["reward"]) == ([], None)


def test_many_episodes_go_through_in_pages_and_lie_in_row_groups(logged, monkeypatch, capsys):
    monkeypatch.setattr(export_module, "_PAGE", 3)
    monkeypatch.setattr(export_module, "_ROW_GROUP_TOKENS", 20)  # five episodes of four
    for episode in range(20):
        logged.play(episode, ("a room", "go north"))
    exported(capsys, logged, "parquet")
    file = parquet.ParquetFile(logged.path / "dataset_trained.parquet")
    sizes = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]
    assert sizes == [6, 6, 6, 2]  # of pages of three
    assert file.read(columns=["episode"])["episode"].to_pylist() == list(range(20))


def test_without_pyarrow_the_remedy_is_told(played, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert cli.run(["export", str(played.path), "--format", "parquet"]) == 2
    error = capsys.readouterr().err
    assert "--format parquet needs pyarrow, which is not installed" in error
    assert "run `make setup`, or use --format jsonl" in error
    assert not list(played.path.glob("*dataset*"))


def test_a_file_is_whole_or_as_it_was(played, monkeypatch, capsys):
    path = played.path / "dataset_trained.jsonl"
    exported(capsys, played, "jsonl")
    before = path.read_text()

    def fail(episode, decode):
        raise OSError("no space left on device")

    monkeypatch.setattr(export_module, "_row", fail)
    assert cli.run(["export", str(played.path), "--format", "jsonl"]) == 1
    assert path.read_text() == before
    assert list(played.path.glob(".*partial*")) == []


def test_nothing_that_was_trained_is_no_dataset(logged, capsys):
    logged.begin(0)
    assert cli.run(["export", str(logged.path), "--format", "jsonl"]) == 2
    assert "has no episode that was trained yet: nothing to export" in capsys.readouterr().err
    assert not list(logged.path.glob("*dataset*"))


@pytest.mark.parametrize("name", ["log.sqlite", "config.yaml"])
def test_a_file_of_the_run_itself_is_not_written_over(played, name, capsys):
    path = played.path / name
    assert cli.run(["export", str(played.path), "--format", "jsonl", "--out", str(path)]) == 2
    assert "that is a file of the run itself: name another, or leave it out" in (
        capsys.readouterr().err
    )
