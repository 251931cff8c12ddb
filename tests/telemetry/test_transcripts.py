"""What was said in a run: kept for a bounded share of episodes, and printed to be read."""

import json
from types import SimpleNamespace

import pytest

from flash.cli import main as cli
from flash.config import load
from flash.conversation import TokenSequence
from flash.rollout.record import EpisodeRecord
from flash.telemetry.folder import RunFolder
from flash.telemetry.transcripts import Transcripts
from flash.types import Completion, Task, Trajectory


def decode(token_ids):
    return "".join(map(chr, token_ids))


def conversation(*texts):
    """What was read and said, in turns."""
    tokens = TokenSequence([])
    for number, text in enumerate(texts):
        ids = [ord(letter) for letter in text]
        if number % 2:
            none = [0.0] * len(ids)
            tokens.add_sampled(
                Completion(
                    token_ids=ids, logprobs=none, versions=[0] * len(ids), temperature=1.0,
                    finish_reason="stop",
                )
            )  # fmt: skip
        else:
            tokens.add_prompt(ids)
    return tokens.snapshot()


def ended(transcripts, number, *sequences, group=0, version=0, turn_rewards=(), outcome="trained"):
    reward = float(sum(turn_rewards))
    trajectory = Trajectory(
        sequences=list(sequences), reward=reward, turns=len(turn_rewards), success=reward > 0,
        turn_rewards=turn_rewards,
    )  # fmt: skip
    record = EpisodeRecord(
        episode=number, seed=7, group=group, attempt=1, outcome=outcome, reason="", reward=reward,
        success=reward > 0, turns=2, prompt_tokens=1, generated_tokens=1, version_min=0,
        version_max=0, trained_at_version=version if outcome == "trained" else None,
        admitted_s=0.0, ended_s=1.0, stages_s={},
    )  # fmt: skip
    transcripts.ended(SimpleNamespace(trajectory=trajectory, task=Task(7)), record)


def kept(per_step=2, steps=10):
    lines = []
    return Transcripts(lines.append, decode=decode, per_step=per_step, steps=steps), lines


def test_a_transcript_tells_what_was_read_and_said_turn_by_turn():
    transcripts, lines = kept()
    sequence = conversation("A room.>", "go north|", "A garden.>", "look|")
    ended(transcripts, 17, sequence, group=4, version=2, turn_rewards=[0.0, 0.5])
    (line,) = json.loads(json.dumps(lines))
    assert line == {
        "step": 3, "episode": 17, "group": 4, "task_set": "", "seed": 7, "options": {},
        "reward": 0.5,
        "success": True,
        "turns": [
            {"read": "A room.>", "said": "go north|", "reward": 0.0},
            {"read": "A garden.>", "said": "look|", "reward": 0.5},
        ],
    }  # fmt: skip


def test_samples_of_turns_repeat_nothing():
    transcripts, lines = kept()
    second = conversation("A>b|C>", "d|")
    ended(transcripts, 1, conversation("A>", "b|"), second, conversation("other>", "e|"))
    texts = [(turn["read"], turn["said"], turn["reward"]) for turn in lines[0]["turns"]]
    assert texts == [("A>", "b|", None), ("C>", "d|", None), ("other>", "e|", None)]


def test_of_a_step_the_first_trained_episodes_of_different_groups_are_kept():
    transcripts, lines = kept(per_step=2)
    said = conversation("?", "!")
    ended(transcripts, 0, said, outcome="dropped")
    for version in (0, 1):
        for number in range(1, 9):
            ended(transcripts, number + 10 * version, said, group=number // 4, version=version)
    assert [(line["step"], line["episode"]) for line in lines] == [(1, 1), (1, 4), (2, 11), (2, 14)]
    none, lines = kept(per_step=0)
    ended(none, 1, said)
    assert lines == []


def test_a_long_run_and_a_long_episode_are_bounded():
    transcripts, lines = kept(per_step=2, steps=100_000)
    said = conversation("?", "!")
    for version in range(1000):
        for group in (0, 1):
            ended(transcripts, 0, said, group=group, version=version)
    assert len(lines) == 20, "2000 in 100,000 steps"
    for texts in (["r" * 10_000, "s" * 50_000], ["r", "s"] * 30_000, ["r" * 30, "s" * 30] * 100):
        transcripts, lines = kept()
        ended(transcripts, 0, conversation(*texts))
        assert len(json.dumps(lines)) < 500_000
    transcripts, lines = kept()
    ended(transcripts, 0, conversation("a" + "r" * 5000 + "b", "c" + "s" * 5000 + "d"))
    (turn,) = lines[0]["turns"]
    for text, first, last in ((turn["read"], "a", "b"), (turn["said"], "c", "d")):
        assert (text[0], text[-1]) == (first, last)
        assert "[…3002 tokens…]" in text


@pytest.fixture
def run(tmp_path):
    with RunFolder(load("frozen_lake", {"runs_dir": str(tmp_path)})) as folder:
        folder.measured({"step": 1, "time_s": 1.0})
        transcripts = Transcripts(folder.transcript, decode=decode, per_step=1, steps=3)
        for version, text in enumerate(["hidden\x1b[2K\x07\u202e", "blue\twhale\n"]):
            sequence = conversation(f"Q{version}", text)
            ended(transcripts, 5, sequence, version=version, turn_rewards=[1.0])
    return folder.path


def test_flash_show_prints_the_last_step_or_the_one_that_is_asked_for(run, capsys):
    assert cli.run(["show", str(run)]) == 0
    assert capsys.readouterr().out == (
        "═══ step 2, episode 5 of group 0, seed 7: reward 1, success\n"
        "─── turn 1, read\nQ1\n─── turn 1, said, reward 1\nblue\twhale\n\n"
    )
    assert cli.run(["show", str(run), "--step", "1"]) == 0
    shown = capsys.readouterr().out
    assert "Q0" in shown
    assert r"hidden\x1b[2K\x07\u202e" in shown, "nothing that was said drives the terminal"


def test_what_flash_show_can_not_show_is_told_in_a_line(run, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "transcripts.jsonl").write_text("")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "transcripts.jsonl").write_text('{"step": "x", "turns": 3}\n')
    for words, line in (
        ([], "flash show what? Give a run's folder: runs/NAME"),
        ([str(run), "more"], "'more' is one word too many"),
        ([str(run), "--step", "9"], "--step 9: "),
        ([str(run), "--stp", "9"], "--stp is unknown: did you mean --step?"),
        ([str(run), "--step", "x"], "--step: invalid int value: 'x'; see flash show --help"),
        ([str(empty)], "has no transcript yet (transcripts=0 keeps none)"),
        ([str(foreign)], "transcripts.jsonl is not as a run writes it"),
        ([str(tmp_path)], "transcripts.jsonl is not there: give the folder of a run, runs/NAME"),
    ):
        assert cli.run(["show", *words]) == 2
        error = capsys.readouterr().err
        assert line in error
        assert error.count("\n") == 1
