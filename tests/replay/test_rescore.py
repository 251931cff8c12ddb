"""Another reward on logged episodes: what would have changed, against numbers worked by hand."""

import json

import pytest

from flash.cli import main as cli
from flash.config.task_sets import PlayedWith
from flash.config.task_source import source_of_brought
from flash.explorer.brought import Brought
from tests.replay.logged import Logged

MODULE = "tests.replay.rewards"


def rescored(capsys, logged, function: str, *words: str) -> str:
    assert cli.run(["replay", str(logged.path), "--rescore", f"{MODULE}:{function}", *words]) == 0
    return capsys.readouterr().out


@pytest.fixture
def played(logged):
    """Three groups: a spread that goes, one that comes, one that stays; and what has no reward."""
    logged.play(0, ("a room", "go north"), reward=0.0, group=0)
    logged.play(1, ("a room", "go south"), reward=2.0, group=0)
    logged.play(2, ("a room", "go north"), reward=1.0, group=1)
    logged.play(3, ("a room", "go south"), reward=1.0, group=1, outcome="dropped", reason="stale")
    logged.play(4, ("a room", "go south"), reward=0.5, group=2)
    logged.play(5, ("a room", "go south"), reward=1.5, group=2)
    logged.play(6, ("a room", "go south"), reward=0.25, group=3)
    logged.begin(7, group=3)
    logged.end(7, "failed", "env")
    return logged


def test_a_table_tells_what_would_have_changed(played, capsys):
    assert rescored(capsys, played, "of_north") == (
        f"{MODULE}:of_north on 7 episodes, trained or not\n"
        "mean reward             0.8929 → 1.464\n"
        "episodes changed        2 of 7\n"
        "groups that lost spread 1 of 3: 0\n"
        "groups that gained it   1 of 3: 1\n"
        "\n"
        " episode    group     before      after     change\n"
        "       0        0          0          2         +2\n"
        "       2        1          1          3         +2\n"
    )


def test_as_data_it_is_the_same(played, capsys):
    told = json.loads(rescored(capsys, played, "of_north", "--json"))
    assert (told["episodes"], told["changed"], told["groups"], told["failed"]) == (7, 2, 3, 0)
    assert (told["lost"], told["gained"]) == ([0], [1])
    assert told["mean_before"] == pytest.approx(6.25 / 7)
    assert told["mean_after"] == pytest.approx(10.25 / 7)
    assert told["largest"][0] == {"episode": 0, "group": 0, "before": 0.0, "after": 2.0}


def test_more_episodes_than_are_read_at_a_time_are_all_scored_and_the_largest_told(logged, capsys):
    for episode in range(40):
        logged.play(episode, ("a room", "go north"), reward=float(episode), group=episode // 4)
    told = json.loads(rescored(capsys, logged, "answers", "--json"))
    assert (told["episodes"], told["groups"], told["lost"]) == (40, 10, list(range(10)))
    assert [change["episode"] for change in told["largest"]] == list(range(39, 29, -1))


def test_an_answer_that_is_no_reward_is_counted_and_never_one_of_0(played, capsys):
    told = json.loads(rescored(capsys, played, "not_of_south", "--json"))
    assert (told["episodes"], told["failed"], told["mean_after"]) == (2, 5, 1.0)
    assert told["why_failed"].startswith("episode 1: the reward answered 'good': it must be a ")
    assert "failed, and left out    5, the first: episode 1: the reward answered" in rescored(
        capsys, played, "not_of_south"
    )


def test_a_reward_that_fails_of_each_is_a_failure_with_its_line(played, capsys):
    assert cli.run(["replay", str(played.path), "--rescore", f"{MODULE}:never"]) == 1
    error = capsys.readouterr().err
    assert "RewardFailure: the reward failed for each of 7 episodes: episode 0: " in error
    assert "KeyError(70)" in error
    assert "rewards.py, line" in error


def test_a_log_without_an_ended_episode_has_nothing_to_score(logged, capsys):
    logged.begin(0)
    assert cli.run(["replay", str(logged.path), "--rescore", f"{MODULE}:answers"]) == 2
    assert "has no episode that came to its end: nothing to score" in capsys.readouterr().err


def test_a_reward_sees_what_the_environment_gave_and_not_what_a_stage_made_of_it(tmp_path, capsys):
    logged = Logged(tmp_path, reward={"name": "process", "run": "gone:reward"})
    logged.play(0, ("a room", "go north"), reward=0.5)
    logged.end(0, "trained", reward=9.0, success=False)  # by the stage
    told = json.loads(rescored(capsys, logged, "told", "--json"))
    assert (told["mean_before"], told["mean_after"]) == (9.0, 7000 + 5 + 1)
    logged.store.close()


def test_the_reward_of_a_task_set_that_explorers_brought_is_known_from_what_was_begun(
    tmp_path, capsys
):
    logged = Logged(tmp_path, task_sets={"": {"brought": True}})
    brought = PlayedWith.model_validate({"reward": {"name": "function", "run": f"{MODULE}:told"}})
    Brought([""], folder=logged.path).begin("", source_of_brought(brought))
    logged.play(0, ("a room", "go north"), reward=0.5)
    logged.end(0, "trained", reward=9.0, success=False)  # by the stage
    told = json.loads(rescored(capsys, logged, "told", "--json"))
    assert (told["mean_before"], told["mean_after"]) == (9.0, 7000 + 5 + 1)
    logged.store.close()


@pytest.mark.slow
def test_a_plain_function_is_called_in_processes(played, capsys):
    told = json.loads(rescored(capsys, played, "spread", "--json"))
    assert told["mean_after"] == pytest.approx(len("a room go north") % 7 / 7)
