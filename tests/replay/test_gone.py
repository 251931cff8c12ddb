"""Episodes of which the log has no tokens any more: that is said, and nothing is made of them."""

import json

import pytest

from flash.cli import main as cli
from flash.log.keeping import Keeping
from flash.log.schema import GROUPS
from flash.log.store import Change
from tests.log.test_keeping import bites


@pytest.fixture
def kept_trained(logged):
    """Episodes 0 and 1 were trained; of 2, which was dropped, the tokens are gone."""
    logged.play(0, ("a room", "go north"), reward=1.0)
    logged.play(1, ("a room", "go south"))
    logged.play(2, ("a room", "go"), group=1, outcome="dropped", reason="stale", reward=0.5)
    ended = {"group": 1, "outcome": "dropped", "reason": "stale"}
    logged.store.commit([Change("update", GROUPS, ended)])
    list(bites(Keeping(logged.store, "trained", needed_from=lambda: 0), logged.store))
    return logged


@pytest.fixture
def all_gone(kept_trained):
    kept_trained.batch(0, [0, 1])
    keeping = Keeping(kept_trained.store, "0.001 MB", needed_from=lambda: 1)
    list(bites(keeping, kept_trained.store))
    return kept_trained


def told(capsys, *words: str) -> str:
    assert cli.run(list(words)) == 0
    return capsys.readouterr().out


def refused(capsys, *words: str) -> str:
    assert cli.run(list(words)) == 2
    return capsys.readouterr().err


def test_an_episode_tells_how_it_ended_and_that_the_rest_is_gone(kept_trained, capsys):
    run = str(kept_trained.path)
    page = told(capsys, "replay", run, "--episode", "2")
    assert "dropped (stale), reward 0.5, success" in page
    assert page.endswith("what was read and said is no longer in the log (log.keep)\n")
    data = json.loads(told(capsys, "replay", run, "--episode", "2", "--json"))
    assert (data["gone"], data["turns"], data["reward"]) == (True, [], 0.5)
    assert not json.loads(told(capsys, "replay", run, "--episode", "1", "--json"))["gone"]


def test_an_export_leaves_it_out_and_says_so(kept_trained, capsys):
    run = str(kept_trained.path)
    words = ("export", run, "--format", "jsonl")
    out = told(capsys, *words, "--episodes", "all")
    assert out.endswith("2 episodes; 1 more are no longer in the log (log.keep)\n")
    lines = (kept_trained.path / "dataset_all.jsonl").read_text().splitlines()
    assert [json.loads(line)["episode"] for line in lines] == [0, 1]
    assert told(capsys, *words).endswith("dataset_trained.jsonl: 2 episodes\n")


def test_another_reward_is_not_asked_of_it(kept_trained, capsys):
    words = ("replay", str(kept_trained.path), "--rescore", "tests.replay.rewards:answers")
    assert "no longer in the log    1, and left out (log.keep)" in told(capsys, *words)
    data = json.loads(told(capsys, *words, "--json"))
    assert (data["episodes"], data["gone"], data["failed"]) == (2, 1, 0)


def test_where_all_are_gone_there_is_nothing_to_do(all_gone, capsys):
    run = str(all_gone.path)
    said = refused(capsys, "export", run, "--format", "jsonl")
    assert (
        f"the tokens of all 2 episodes of {run} are no longer in the log (log.keep): nothing"
        in said
    )
    assert not list(all_gone.path.glob("*.jsonl*"))
    said = refused(capsys, "replay", run, "--rescore", "tests.replay.rewards:answers")
    assert "of all 3 episodes" in said and "nothing to score" in said
    all_gone.started(1)
    said = refused(capsys, "replay", run, "--retrain")
    assert "the samples of version 0 no longer: begin at a later checkpoint" in said
