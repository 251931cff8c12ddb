"""What a resume may change, field by field, and what it says of it."""

import logging

import pytest
import yaml

from flash.config import fields, load
from flash.config.resumed import (
    KINDS,
    check_resumed,
    differences,
    groups_begin_anew,
    shown,
    told,
    training_settings_differ,
)
from flash.log.past import Past
from flash.log.run_log import ID_FILE
from flash.telemetry.folder import RunFolder

NAMES = [name for name, _ in fields()]
LEAVES = [name for name in NAMES if not any(other.startswith(f"{name}.") for other in NAMES)]


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A model's folder, with no more than a configuration."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text("{}")
    return str(folder)


def kept(**changes):
    """What config.yaml holds of a run."""
    config = load("frozen_lake", changes)
    return yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))


def changed(now, before=None, **same):
    found = differences(kept(**same, **(before or {})), load("frozen_lake", {**same, **now}))
    return {field: (was, is_now, kind) for field, was, is_now, kind in found}


@pytest.mark.parametrize("field", LEAVES)
def test_each_field_is_of_one_kind(field):
    owners = [name for name in KINDS if f"{field}.".startswith(f"{name}.")]
    assert len(owners) == 1, "say in flash/config/resumed.py whether a resume may change it"


def test_no_kind_is_of_a_field_that_is_not_there():
    assert KINDS.keys() <= set(NAMES)


def test_what_was_kept_of_a_configuration_does_not_differ_from_it(model):
    more = {"model": model, "reward": {"name": "judge"}, "trainer.advantages": "gae",
            "rollout.filters": "equal_rewards", "agent.max_turns": 3}  # fmt: skip
    assert not changed({})
    assert not changed({}, **more)


@pytest.mark.parametrize(
    ("now", "kind"),
    [
        ({"seed": 3}, "fixed"),
        ({"policy.layers": 5}, "fixed"),
        ({"warm_start.steps": 1}, "fixed"),
        ({"env.options.size": 5}, "fixed"),
        ({"env.options.ice": 2}, "fixed"),
        ({"trainer.learning_rate": 1e-6}, "told"),
        ({"trainer.betas": [0.8, 0.9]}, "told"),
        ({"alpha": 0}, "told"),
        ({"eval.tasks": 8}, "told"),
        ({"rollout.adaptive_alpha.min_ess": 0.5}, "told"),
        ({"steps": 9}, "free"),
        ({"stream": True}, "free"),
        ({"trainer.ranks": 2}, "free"),
        ({"checkpoint.every": 2}, "free"),
    ],
)
def test_a_field_that_was_changed_is_found_with_both_values(now, kind):
    ((field, value),) = now.items()
    was = kept()
    for name in field.split("."):
        was = was.get(name)
    assert changed(now) == {field: (was, value, kind)}


def test_of_another_objective_all_settings_are_told_at_once():
    ((field, (was, now, kind)),) = changed({"trainer.objective": "tis"}).items()
    assert (field, kind) == ("trainer.objective", "told")
    assert (was["name"], now) == ("decoupled_ppo", {"name": "tis", "cap": 2.0})
    assert changed({"trainer.objective": {"name": "tis", "cap": 3}}, {"trainer.objective": "tis"})
    ((field, found),) = changed({"reward": "judge"}).items()
    assert (field, found[2]) == ("reward", "told")


def test_with_a_model_of_ones_own_the_environment_may_change_and_the_small_policy_is_nobodys(model):
    now = {"env.options.size": 5, "policy.layers": 5, "warm_start.steps": 1}
    found = changed(now, model=model)
    assert {field: kind for field, (*_, kind) in found.items()} == {
        "env.options.size": "told",
        "policy.layers": "free",
        "warm_start.steps": "free",
    }
    found = changed({"env": "reasoning_gym"}, model=model)
    assert found["env.name"] == ("frozen_lake", "reasoning_gym", "told")


def test_what_an_older_version_did_not_have_had_its_default():
    before = kept()
    del before["seed"], before["trainer"]["betas"], before["trainer"]["objective"], before["eval"]
    assert not differences(before, load("frozen_lake", {"eval.tasks": 64}))
    now = load("frozen_lake", {"seed": 3, "eval.tasks": 7, "trainer.objective": "tis"})
    assert [str(one) for one in differences(before, now)] == [
        "seed 0 → 3",
        "trainer.objective decoupled_ppo (clip_low 0.2, clip_high 0.28, max_behaviour_weight 2.0, "
        "proximal recomputed) → tis (cap 2.0)",
        "eval.tasks 64 → 7",
    ]


def test_what_this_version_does_not_have_any_more_is_told():
    before = kept()
    before["magic"], before["trainer"]["sparkle"] = 3, {"much": True}
    found = differences(before, load("frozen_lake"))
    assert [(one.field, one.now, one.kind) for one in found] == [
        ("trainer.sparkle", None, "told"),
        ("magic", None, "told"),
    ]


@pytest.mark.parametrize("spoiled", [3, None, ["x"], "text"])
def test_a_section_that_somebody_spoiled_counts_as_its_defaults(spoiled):
    before = {**kept(), "trainer": spoiled}
    assert differences(before, load("frozen_lake", {"trainer.ranks": 2}))


def test_a_section_by_its_bare_value_is_read_as_such():
    before = {**kept(), "reward": "env", "engine": "auto"}
    found = differences(before, load("frozen_lake", {"engine": {"kind": "embedded"}}))
    assert [str(one) for one in found] == ["engine.kind auto → embedded"]


def test_a_line_tells_what_is_new_from_which_step_on_and_nothing_of_no_consequence():
    now = load("frozen_lake", {"trainer.learning_rate": 1e-6, "agent.max_turns": 3, "steps": 77})
    line = told(differences(kept(), now), first_step=5)
    assert line == (
        "settings that are new from step 5 on: agent.max_turns null → 3, "
        "trainer.learning_rate 0.001 → 1e-06"
    )
    assert not told(differences(kept(), load("frozen_lake", {"steps": 77})), first_step=5)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        ("", "''"),
        ("a\nb", "a b"),
        ("x" * 90, "x" * 80 + "…"),
        ({"name": "env"}, "env"),
        ({"name": "tis", "cap": 2.0}, "tis (cap 2.0)"),
        ({"size": 4}, "{'size': 4}"),
    ],
)
def test_values_are_shown_in_few_words(value, text):
    assert shown(value) == text


@pytest.mark.parametrize(
    ("now", "differ"),
    [
        ({"trainer.learning_rate": 1e-6}, True),
        ({"trainer.kl.coefficient": 0.1}, True),
        ({"trainer.objective": "tis"}, True),
        ({"trainer.mini_batches": 2}, True),
        ({"trainer.ranks": 2, "trainer.step_timeout_s": 9, "batch_size": 32, "alpha": 0}, False),
        ({}, False),
    ],
)
def test_a_redo_can_tell_whether_the_settings_of_the_trainer_are_others(now, differ):
    assert training_settings_differ(differences(kept(), load("frozen_lake", now))) == differ


@pytest.mark.parametrize(
    ("now", "anew"),
    [
        ({"group_size": 4}, True),
        ({"reward": "judge"}, True),
        ({"env.options.size": 5}, True),
        ({"agent.style_options": {}, "agent.samples": "turns"}, True),
        ({"batch_size": 32, "trainer.learning_rate": 1e-6, "env.hosts": 1}, False),
    ],
)
def test_groups_under_way_begin_anew_where_their_episodes_would_not_be_alike(now, anew):
    assert groups_begin_anew(differences(kept(), load("frozen_lake", now))) == anew


def test_what_is_fixed_is_refused_by_its_name_with_the_remedy():
    check_resumed(differences(kept(), load("frozen_lake", {"alpha": 0, "steps": 7})))
    for now, said in (
        ({"seed": 2}, r"seed=2 with checkpoint.resume: the run began with 0, which decides the or"),
        ({"env.options.size": 5}, r"env.options.size=5 .* what its small policy was made from: l"),
    ):
        with pytest.raises(ValueError, match=said):
            check_resumed(differences(kept(), load("frozen_lake", now)))


def test_a_resume_says_what_is_new_from_the_step_after_those_that_are_redone(tmp_path, caplog):
    runs = {"runs_dir": str(tmp_path)}
    with RunFolder(load("frozen_lake", runs)) as folder:
        folder.measured({"step": 0, "time_s": 0.0})
        (folder.path / ID_FILE).write_text("0" * 32)
    past = Past(checkpoint=3, redo=[3])
    resume = {**runs, "checkpoint.resume": True}
    with caplog.at_level(logging.WARNING), RunFolder(load("frozen_lake", resume)) as same:
        same.go_on(past)
    assert not same.changed
    assert not caplog.messages
    new = load("frozen_lake", {**resume, "trainer.learning_rate": 1e-6, "steps": 7})
    with caplog.at_level(logging.WARNING), RunFolder(new) as folder:
        folder.go_on(past)
    assert [one.field for one in folder.changed] == ["steps", "trainer.learning_rate"]
    (line,) = caplog.messages
    assert line == "settings that are new from step 5 on: trainer.learning_rate 0.001 → 1e-06"


def test_a_log_stays_where_it_is_whatever_the_variable_that_names_it_is_called(monkeypatch):
    monkeypatch.setenv("PG", "postgresql://host/one")
    before = kept()
    with pytest.raises(ValueError, match=r"log.url='\$PG' .* where its log is: leave log.url as"):
        check_resumed(differences(before, load("frozen_lake", {"log.url": "$PG"})))
    before["log"]["url"] = "(not kept)"
    check_resumed(differences(before, load("frozen_lake", {"log.url": "$PG"})))
    with pytest.raises(ValueError, match="where its log is"):
        check_resumed(differences(before, load("frozen_lake")))
