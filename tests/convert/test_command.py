"""flash convert: a file to take, a table on stderr, and the same as data."""

import json

import pytest
import yaml

from flash.cli import main as cli
from flash.config import load

ROLL = """
exp_name: sums
rollout_batch_size: 16
num_return_sequences_in_group: 4
async_generation_ratio: 1
pretrain: org/model
actor_infer: {generating_args: {top_p: 0.9, temperature: 0.8}}
logging_steps: 1
rolout_typo: 3
"""


@pytest.fixture
def roll(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "roll.yaml").write_text(ROLL)
    return tmp_path


def test_yaml_goes_to_stdout_and_what_became_of_each_key_to_stderr(roll, capsys):
    assert cli.run(["convert", "roll.yaml"]) == 0
    out, told = capsys.readouterr()
    assert yaml.safe_load(out)["batch_size"] == 64
    assert out.startswith("# Made of roll.yaml, of ROLL, by flash convert.\n# To decide: ")
    for line, parts in {
        "mapped: 6": ["rollout_batch_size", "batch_size=64", "prompts"],
        "no meaning here: 1": ["logging_steps", "every step is logged"],
        "missing here: 1": ["actor_infer.generating_args.top_p", "refused"],
        "unknown: 1": ["rolout_typo", "spelt"],
        "set without a key: ": ["trainer.aggregation='sequence_mean'"],
        "to decide: no key names an environment": [],
    }.items():
        assert line in told
        assert all(part in told for part in parts)


def test_the_file_that_is_made_loads_as_any_other(roll):
    assert cli.run(["convert", "roll.yaml", "--out", "mine.yaml"]) == 0
    config = load("mine.yaml")
    assert (config.name, config.alpha, config.batch_size, config.group_size) == ("sums", 1, 64, 4)
    assert (config.model, config.agent.temperature) == ("org/model", 0.8)


def test_json_has_the_configuration_and_each_key(roll, capsys):
    assert cli.run(["convert", "roll.yaml", "--json"]) == 0
    out, told = capsys.readouterr()
    data = json.loads(out)
    assert data["system"] == "roll"
    assert data["config"]["batch_size"] == 64
    assert data["counts"] == {
        "mapped": 6,
        "no meaning here": 1,
        "missing here": 1,
        "unknown": 1,
    }
    assert [row["key"] for row in data["keys"]][-1] == "rolout_typo"
    assert told == ""


def test_a_system_that_is_named_is_taken_at_its_word(roll, capsys):
    assert cli.run(["convert", "roll.yaml", "--from", "verl", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["system"] == "verl"
    assert data["counts"]["unknown"] == len(data["keys"])


def test_a_file_that_is_there_already_is_not_written_over(roll, capsys):
    assert cli.run(["convert", "roll.yaml", "--out", "roll.yaml"]) == 2
    assert "--out roll.yaml is there already: give another name" in capsys.readouterr().err
    assert (roll / "roll.yaml").read_text() == ROLL
