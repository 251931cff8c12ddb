"""What tasks are made from, and what is said of it when it has changed."""

import os

import pytest

from flash.config import load
from flash.config.task_source import changed_source, source_of


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def source(**options):
    env = load("frozen_lake").env.model_copy(update={"options": options})
    return source_of(load("frozen_lake").model_copy(update={"env": env}))


def test_the_same_settings_and_files_are_the_same_source(here):
    (here / "q.jsonl").write_text("one\n")
    first = source(path="q.jsonl", more={"deep": [1, 2.5, None, True]})
    os.utime("q.jsonl", (0, 0))
    assert source(path="q.jsonl", more={"deep": [1, 2.5, None, True]}) == first
    assert not changed_source(first, first)


def test_a_file_that_was_moved_is_the_same_source(here):
    (here / "q.jsonl").write_text("one\n")
    before = source(path="q.jsonl")
    (here / "q.jsonl").rename(here / "other.jsonl")
    assert not changed_source(before, source(path="other.jsonl"))


def test_what_changed_is_told_in_words(here):
    (here / "q.jsonl").write_text("one\n")
    before = source(path="q.jsonl", size=4, split="train")
    (here / "q.jsonl").write_text("two\n")
    assert changed_source(before, source(path="q.jsonl", size=4, split="train")) == (
        "env.options.path: q.jsonl has other content of the same size"
    )
    (here / "q.jsonl").write_text("one\ntwo\n")
    assert changed_source(before, source(path="q.jsonl", size=5, more=[1])) == (
        "env.options.path: q.jsonl has 8 bytes, and had 4 bytes, env.options.size 4 → 5, "
        "env.options.split train → null, env.options.more.0 null → 1"
    )
    (here / "q.jsonl").unlink()
    gone = source(path="q.jsonl", size=4, split="train")
    assert changed_source(before, gone) == "env.options.path: q.jsonl is not there any more"
    assert changed_source(gone, before) == "env.options.path: q.jsonl is new there"


def test_another_environment_or_agent_is_another_source(here):
    (here / "agent.py").write_text("1")
    lake = load("frozen_lake")
    other = source_of(load("frozen_lake", {"env": "reasoning_gym"}))
    assert changed_source(source_of(lake), other).startswith("env.name frozen_lake → reasoning_gym")
    agent = load("frozen_lake", {"agent.run": ["python", "agent.py"]})
    before = source_of(agent)
    assert changed_source(source_of(lake), before) == (
        "agent.run.0 null → python, agent.run.1: agent.py is new there"
    )
    (here / "agent.py").write_text("2")
    said = "agent.run.1: agent.py has other content of the same size"
    assert changed_source(before, source_of(agent)) == said


def test_what_has_no_part_in_tasks_is_no_part_of_their_source():
    changes = {"trainer.learning_rate": 1, "env.hosts": 2, "steps": 7, "env.eval_options": {}}
    assert source_of(load("frozen_lake", changes)) == source_of(load("frozen_lake"))


def test_of_a_folder_names_and_sizes_count_and_hidden_files_do_not(here):
    for name in ("a/game", "b/game"):
        (here / "games" / name).mkdir(parents=True)
        (here / "games" / name / "game.tw-pddl").write_text(name)
    before = source(games="games")
    (here / "games" / ".DS_Store").write_text("x")
    assert not changed_source(before, source(games="games"))
    (here / "games" / "c").write_text("123")
    assert changed_source(before, source(games="games")) == (
        "env.options.games: games has 3 files of 15 bytes, and had 2 files of 12 bytes"
    )
    (here / "games" / "c").unlink()
    (here / "games" / "b" / "link").symlink_to("nowhere")
    before = source(games="games")
    (here / "games" / "a").rename(here / "games" / "d")
    said = "env.options.games: games has other content of the same size"
    assert changed_source(before, source(games="games")) == said


def test_of_a_large_file_a_change_at_either_end_is_seen(here):
    size = 200 << 20  # of holes, for the most part
    seen = set()
    for place in (None, 0, size - 1):
        with (here / "large").open("wb") as file:
            file.truncate(size)
            if place is not None:
                file.seek(place)
                file.write(b"x")
        seen.add(source(path="large"))
    assert len(seen) == 3


@pytest.mark.parametrize("text", ["x" * 5000, "a\0b", "~nobody_of_that_name/x", "", "/dev/zero"])
def test_a_text_that_can_name_no_file_is_a_text(text):
    assert '"contents":{}' in source(text=text)


def test_what_is_no_source_is_refused():
    with pytest.raises(ValueError, match="JSON"):
        changed_source("what?", source())
