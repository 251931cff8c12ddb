"""An episode turn by turn, as it is in the log; and which one."""

import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from flash.cli import main as cli
from flash.replay.logged_run import open_run
from flash.replay.page import legend, print_page
from flash.replay.text import Decoder, decoder_of
from tests.replay.logged import RUN_ID, Logged

ROWS = yaml.safe_load(Path(__file__).with_name("wrong_inputs.yaml").read_text(encoding="utf-8"))
HEAD = (
    "═══ episode 3 of group 1, attempt 1, seed 71, options {'size': 4}: trained in step 3, "
    "reward 1, success\n"
)
PAGE = f"""\
{HEAD}\
version 2, 5 tokens sampled, 8 tokens of prompts
admitted 2027-01-15 08:00:00 UTC, played after 1.00 s, ended after 2.03 s
generate 0.50 s, env 0.25 s
─── turn 1, read 2 tokens
a room
─── turn 1, said 3 tokens, version 2, logprob -1.850 a token, 0.50 s, reward 0
go north stop
─── turn 1, observed after 0.50 s
garden
─── turn 2, read 1 token
garden
─── turn 2, said 2 tokens, version 2, logprob -0.275 a token, 0.50 s, reward 1
go south
─── turn 2, observed after 1.00 s, reward 1, terminated
garden
"""


def shown(capsys, *words: str) -> str:
    assert cli.run(["replay", *words]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def pattern(line: str) -> str:
    return ".*".join(map(re.escape, line.split("…")))


def refused(capsys, *words: str) -> str:
    assert cli.run(["replay", *words]) == 2
    return capsys.readouterr().err


def test_an_episode_is_told_turn_by_turn_and_plainly_where_there_is_no_terminal(logged, capsys):
    logged.play(3, ("a room", "go north stop"), ("garden", "go south"), group=1, reward=1.0)
    assert shown(capsys, str(logged.path), "--episode", "3") == PAGE


def test_as_data_it_has_every_token_with_its_logprob_and_version(logged, capsys):
    logged.play(3, ("a room", "go north stop"), ("garden", "go south"), group=1, reward=1.0)
    told = json.loads(shown(capsys, str(logged.path), "--json"))
    first, second = told["turns"]
    assert (first["read"], first["said"], first["token_ids"]) == (
        "a room", "go north stop", [0, 1, 6],
    )  # fmt: skip
    assert first["logprobs"] == pytest.approx([-0.05, -0.5, -5.0])
    assert (first["versions"], first["reward"], first["took_s"]) == ([2, 2, 2], 0.0, 0.5)
    assert told["observations"][first["observation"]]["text"] == "garden"
    assert told["observations"][second["observation"]]["terminated"] is True
    assert (told["seed"], told["options"], told["outcome"]) == (71, {"size": 4}, "trained")
    assert told["stages_s"] == {"generate": 0.5, "env": 0.25}
    assert (told["played_at"] - told["admitted_at"], told["trained_at_version"]) == (1.0, 2)


def test_of_several_who_played_it_is_told_who_said_what_and_what_that_was_worth(logged, capsys):
    logged.play(
        3, ("a room", "go north"), ("garden", "go south"), ("a garden", "stop"),
        roles=("asks", "answers"), role_rewards={"answers": -2.0}, reward=1.0,
    )  # fmt: skip
    page = shown(capsys, str(logged.path), "--episode", "3")
    assert "reward 1, answers -2" in page
    said = [line for line in page.splitlines() if " said " in line]
    assert [line.partition(" said ")[0] for line in said] == [
        "─── turn 1, asks", "─── turn 2, answers", "─── turn 3, asks",
    ]  # fmt: skip
    told = json.loads(shown(capsys, str(logged.path), "--json"))
    assert told["role_rewards"] == {"answers": -2.0}
    assert [turn["role"] for turn in told["turns"]] == ["asks", "answers", "asks"]


def coloured(logged, colour) -> str:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, color_system="standard", width=500)
    with open_run(logged.path) as run, run.reading() as reader:
        (episode,) = reader.newest_trained()
        print_page(episode, decoder_of(run), colour=colour, console=console)
    return text.getvalue()


def test_sampled_tokens_have_the_colour_of_their_probability(logged):
    logged.play(0, ("a room", "go north stop"))  # likely, less so, not at all
    assert "\x1b[32mgo\x1b[0m\x1b[33m north\x1b[0m\x1b[1;31m stop\x1b[0m" in coloured(
        logged, "logprob"
    )


def test_or_that_of_the_version_that_sampled_them(logged):
    logged.play(0, ("a room", "go north"), version=1)
    assert "\x1b[35mgo\x1b[0m\x1b[35m north\x1b[0m" in coloured(logged, "version")


def test_the_legend_says_what_a_colour_is():
    assert legend("logprob").plain == "probability of a token: ≥ 0.9 ≥ 0.5 ≥ 0.1 < 0.1"
    assert legend("version").plain.startswith("a colour for each version, in turn: 0, 6, … 1, 7, …")


def test_of_an_episode_that_was_cut_off_there_is_what_there_is(logged, capsys):
    logged.begin(4, continues=2)
    logged.observe(4, 0, "a room")
    logged.sample(4, 1, "go north", version=1)
    logged.observe(4, 2, "a garden", 0.5)
    logged.sample(4, 3, "go")
    logged.end(4, "cancelled", "interrupted")
    text = shown(capsys, str(logged.path), "--episode", "4")
    assert text.splitlines()[0].endswith("seed 70, options {'size': 4}: cancelled (interrupted)")
    assert "\ngoes on from episode 2\n" in text
    assert text.partition("UTC, ended after 2.04 s\n")[2] == (
        "─── observed after 0.00 s\na room\n"
        "─── turn 1, said 2 tokens, version 1, logprob -0.500 a token, 0.50 s, reward 0.5\n"
        "go north\n"
        "─── turn 1, observed after 0.50 s, reward 0.5\na garden\n"
        "─── turn 2, said 1 token, version 0, logprob -0.500 a token\ngo\n"
    )
    told = json.loads(shown(capsys, str(logged.path), "--episode", "4", "--json"))
    assert [(turn["read"], turn["observation"]) for turn in told["turns"]] == [
        (None, 1),
        (None, None),
    ]


def test_an_episode_that_runs_is_looked_at_while_its_run_goes_on(logged, capsys):
    logged.begin(0)
    logged.observe(0, 0, "a room")
    text = shown(capsys, str(logged.path), "--episode", "0")
    assert ": running\n" in text
    assert text.endswith("─── observed after 0.00 s\na room\n")
    logged.sample(0, 1, "go north")
    assert "go north" in shown(capsys, str(logged.path), "--episode", "0")


def test_nothing_that_was_said_moves_the_cursor(logged, capsys):
    logged.play(0, ("a room", "go \x1b[2J"))
    assert "go \\x1b[2J\n" in shown(capsys, str(logged.path))


# ── which one ────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def several(logged):
    logged.play(0, ("a room", "go"), reward=0.5, version=0)
    logged.play(1, ("a room", "go"), reward=-1.0, version=0)
    logged.play(2, ("a room", "go"), reward=1.0, version=3, group=1)
    logged.play(3, ("a room", "go"), reward=0.0, version=1, group=1)
    logged.play(4, ("a room", "go"), reward=-9.0, group=2, outcome="dropped", reason="stale")
    logged.play(5, ("a room", "go"), group=2, outcome="dropped", reason="equal_rewards")
    return logged


@pytest.mark.parametrize(
    ("words", "episodes"),
    [
        ([], [2]),
        (["--worst"], [1]),
        (["--group", "1"], [2, 3]),
        (["--dropped"], [5]),
        (["--dropped", "stale"], [4]),
        (["--episode", "0"], [0]),
    ],
)
def test_an_episode_is_chosen(several, words, episodes, capsys):
    lines = shown(capsys, str(several.path), "--json", *words).splitlines()
    assert [json.loads(line)["episode"] for line in lines] == episodes


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["flash"])
def test_a_wrong_input_ends_in_its_one_line(row, several, capsys):
    command, *words = shlex.split(row["flash"])
    folder = sorted(several.path.iterdir())
    assert cli.run([command, str(several.path), *words]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(f"flash: {pattern(row['says'])}\n", error), error
    assert sorted(several.path.iterdir()) == folder


def test_a_folder_comes_first_where_a_reason_may_follow(several, capsys):
    assert refused(capsys, "--dropped", str(several.path)) == (
        "flash: flash replay what? Give a run's folder: runs/NAME, and only then --dropped\n"
    )
    assert "flash replay what? Give a run's folder: runs/NAME\n" in refused(capsys)


def test_an_empty_log_has_nothing_to_show(logged, capsys):
    path = str(logged.path)
    assert "no episode was trained yet: give --episode N" in refused(capsys, path)
    assert "no episode was trained yet" in refused(capsys, path, "--worst")
    assert "--dropped: no episode was dropped" in refused(capsys, path, "--dropped")
    assert "it is empty so far" in refused(capsys, path, "--episode", "0")


# ── where the log is ─────────────────────────────────────────────────────────────────────────


def test_a_folder_without_a_run_or_without_its_log_is_named(logged, tmp_path, capsys):
    assert f"{tmp_path} holds no run with a log (log.id): give the folder of a run" in refused(
        capsys, str(tmp_path)
    )
    logged.store.close()
    for file in logged.path.glob("log.sqlite*"):
        file.unlink()
    assert "holds no log (log.sqlite)" in refused(capsys, str(logged.path))
    assert not (logged.path / "log.sqlite").exists(), "to look is not to make one"


def test_a_log_of_other_runs_is_not_added_to(logged, capsys):
    (logged.path / "log.id").write_text("b" * 32)
    assert "has no run run (log.id): give the log.url that the run had" in refused(
        capsys, str(logged.path)
    )
    (logged.path / "log.id").write_text(RUN_ID)
    assert "no episode was trained yet" in refused(capsys, str(logged.path))


def test_a_url_that_the_folder_does_not_keep_is_asked_for(logged, capsys):
    path = logged.path / "config.yaml"
    path.write_text(path.read_text().replace("url: ''", "url: (not kept)"))
    assert "a run's folder keeps no keys: give it again" in refused(capsys, str(logged.path))
    # Where there is such a server, that is the one that is asked.
    url = "postgresql://nobody@127.0.0.1:1/none"
    error = refused(capsys, str(logged.path), "--log.url", url)
    assert "127.0.0.1" in error
    assert "nobody" not in error


def test_a_model_that_is_gone_is_named(logged, tmp_path, capsys):
    logged.play(0, ("a room", "go"))
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    assert "tokenizer.json is no tokenizer that can be read" in refused(capsys, str(logged.path))


def test_a_small_policy_that_is_not_kept_any_more_is_named(tmp_path, capsys):
    small = {"model": "small", "env": {"name": "frozen_lake", "options": {"size": 4}}}
    logged = Logged(tmp_path, **small)
    logged.play(0, ("a room", "go"))
    error = refused(capsys, str(logged.path))
    assert "model=small: the policy that " in error
    assert ".small_policies/frozen_lake-" in error
    kept = tmp_path / ".small_policies" / re.search(r"frozen_lake-\w+", error)[0]
    kept.parent.mkdir()
    (tmp_path / "model").rename(kept)
    assert "go" in shown(capsys, str(logged.path))
    logged.store.close()


@pytest.mark.slow
def test_a_log_in_postgresql_is_read_by_the_url_that_the_folder_keeps(
    tmp_path, database_server, capsys
):
    logged = Logged(tmp_path, url=database_server.new_database())
    logged.play(3, ("a room", "go north stop"), ("garden", "go south"), group=1, reward=1.0)
    assert shown(capsys, str(logged.path)) == PAGE
    logged.store.close()


@pytest.mark.slow
def test_to_look_at_an_episode_imports_nothing_that_trains(logged):
    logged.play(0, ("a room", "go"))
    code = (
        "import sys; from flash.cli import main; main.run(sys.argv[1:]); "
        "print(sorted({'torch', 'transformers', 'aiohttp'} & set(sys.modules)))"
    )
    words = [sys.executable, "-c", code, "replay", str(logged.path), "--episode", "0"]
    seen = subprocess.run(words, capture_output=True, text=True, check=True)
    assert seen.stdout.splitlines()[-1] == "[]"


# ── tokens to text ───────────────────────────────────────────────────────────────────────────


def test_what_tokens_add_to_a_text_makes_the_text_also_where_several_write_one_letter():
    letters = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={letter: n for n, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteDecoder()
    decode = Decoder(tokenizer.decode)
    text = "né 東京 🙂!"
    token_ids = tokenizer.encode(text).ids
    pieces = list(decode.pieces(token_ids))
    assert "".join(pieces) == text
    assert pieces[:4] == ["n", "", "é", " "]
    assert len(pieces) == len(token_ids) == len(text.encode())


def test_a_letter_that_was_never_finished_is_shown_as_such():
    letters = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={letter: n for n, letter in enumerate(letters)}, merges=[]))
    tokenizer.decoder = ByteDecoder()
    cut = [*tokenizer.encode("x").ids, tokenizer.token_to_id("ð")]
    assert list(Decoder(tokenizer.decode).pieces(cut)) == ["x", "\N{REPLACEMENT CHARACTER}"]
