"""Logged batches through a trainer again: the same weights, or what other settings make of them."""

import asyncio
import json
import logging
import shutil
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flash.cli import main as cli
from flash.replay.logged_run import open_run
from flash.replay.retrain import Compared, Step, _Batches, _compare, plan, retrain
from flash.trainer.advantage_settings import Rloo
from flash.trainer.hugging_face import export_model
from flash.trainer.objectives.settings import Tis
from flash.trainer.redo import redo
from flash.trainer.trainer import Trainer
from tests.saved import fake_checkpoint
from tests.tiny_runs import run, tiny

REWARD = {"name": "process", "run": "tests.replay.rewards:spread"}
SETTINGS = {
    "reward": REWARD,
    "rollout.filters": "",
    "trainer.threads": 1,
    "trainer.learning_rate": 1e-3,
    "trainer.warmup_steps": 1,
}


# ── what is planned ──────────────────────────────────────────────────────────────────────────


@pytest.fixture
def trained(logged):
    logged.started(1, threads=1)
    for episode in range(8):
        logged.play(episode, ("a room", "go north"), group=episode // 2, reward=float(episode))
    logged.batch(0, [0, 1], [2, 3])
    logged.batch(1, [4, 5], [6, 7], done=False)
    return logged


def planned(logged, changes=None, checkpoint=""):
    with open_run(logged.path) as opened:
        return plan(opened, changes or {}, checkpoint=checkpoint)


def batch_of(logged, leg, version):
    with open_run(logged.path) as opened:
        return _Batches(opened, leg)._parts(version)


def test_all_whole_batches_are_trained_from_the_first_model_on_as_they_were(trained):
    found = planned(trained)
    (leg,) = found.legs
    assert (leg.first, leg.until, leg.as_logged, leg.settings.threads) == (0, 2, True, 1)
    assert found.checkpoint is None
    assert (found.model, found.logged) == (str(trained.path.parent / "model"), {1: {"loss": 0.0}})
    parts = batch_of(trained, leg, 0)
    assert [[s.advantage for s in part.samples] for part in parts] == [[9.0, 9.0], [9.0, 9.0]]
    assert [part.last for part in parts] == [False, True]


def test_or_from_a_checkpoint_that_is_named(trained):
    path = fake_checkpoint(trained.path, 1)
    found = planned(trained, checkpoint="step_000001")
    assert (found.legs[0].first, found.checkpoint) == (1, path)
    with pytest.raises(ValueError, match="has that name: did you mean step_000001\\?"):
        planned(trained, checkpoint="step_000010")


def test_a_checkpoint_that_is_damaged_is_no_beginning(trained):
    path = fake_checkpoint(trained.path, 1)
    (path / "policy/.metadata").write_bytes(b"")
    with pytest.raises(ValueError, match="is damaged"):
        planned(trained, checkpoint="step_000001")


def test_each_batch_has_the_settings_of_the_start_that_first_trained_it(logged):
    logged.started(1, learning_rate=1e-3)
    logged.started(2, learning_rate=1e-3, max_restarts=3)
    logged.started(3, learning_rate=1e-5)
    logged.batch(0, [0], start=1)
    logged.batch(1, [1], start=2)
    logged.batch(2, [2], start=2, done=False)  # handed over, and then the run was killed
    logged.step(3, start=3)
    logged.batch(3, [3], start=3, done=False)
    legs = planned(logged).legs
    assert [(leg.first, leg.until, leg.settings.learning_rate) for leg in legs] == [
        (0, 2, 1e-3), (2, 4, 1e-5),
    ]  # fmt: skip
    assert {leg.settings.learning_rate for leg in planned(logged, CHANGED).legs} == {0.5}


CHANGED = {"trainer.learning_rate": 0.5}


def test_another_name_of_a_section_leaves_the_others_fields_behind(trained):
    (leg,) = planned(trained, {"trainer.objective.name": "tis"}).legs
    assert (leg.settings.objective, leg.as_logged) == (Tis(), True)
    (leg,) = planned(trained, {"trainer.objective": "tis", "trainer.threads": 2}).legs
    assert (leg.settings.objective, leg.settings.threads) == (Tis(), 2)
    with pytest.raises(ValueError, match=r"trainer.objective.cap: unknown field"):
        planned(trained, {"trainer.objective.cap": 3})


def test_an_objective_that_is_wrong_for_stale_tokens_is_refused_as_by_a_run(trained):
    with pytest.raises(ValueError, match="trainer.objective.allow_stale=true to study"):
        planned(trained, {"trainer.objective": "vanilla"})
    planned(trained, {"trainer.objective": {"name": "vanilla", "allow_stale": True}})


def test_a_batch_that_the_log_lacks_is_named(logged):
    logged.started(1)
    logged.batch(0, [0])
    logged.batch(2, [1])
    with pytest.raises(ValueError, match="no batch of version 1: give a checkpoint after it"):
        planned(logged)


def test_samples_that_the_log_has_no_longer_are_named(trained):
    (leg,) = planned(trained).legs
    trained.forget_tokens(4)
    assert batch_of(trained, leg, 0)
    with pytest.raises(ValueError, match="the samples of version 1 no longer"):
        batch_of(trained, leg, 1)


# ── advantages ───────────────────────────────────────────────────────────────────────────────


def test_other_advantages_are_computed_from_the_logged_rewards(trained):
    changes = {"trainer.advantages": "rloo"}
    found = planned(trained, changes)
    (leg,) = found.legs
    assert (leg.settings.advantages, leg.as_logged) == (Rloo(), False)
    parts = batch_of(trained, leg, 0)  # rewards 0 and 1, then 2 and 3
    assert [[s.advantage for s in part.samples] for part in parts] == [[-1.0, 1.0], [-1.0, 1.0]]
    assert found.describe().splitlines() == [
        "batches of versions 0 to 1 from the first model, with trainer.advantages rloo",
        "advantages computed again, from rewards and states as logged; batches, rewards and the "
        "engine's logprobs as logged",
    ]


def test_who_has_the_same_role_is_compared_with_each_other_also_where_one_was_silent(logged):
    logged.started(1, threads=1)
    turns = ("a room", "go north"), ("garden", "go south")
    both = ("asks", "answers")
    logged.play(0, *turns, roles=both, role_rewards={"answers": 5.0})
    logged.play(1, *turns, roles=both, role_rewards={"answers": 1.0}, reward=3.0)
    logged.play(2, turns[0], roles=("asks",), reward=6.0)
    logged.batch(0, [0, 1, 2], done=False, sequences={0: 2, 1: 2})
    (leg,) = planned(logged, {"trainer.advantages": "rloo"}).legs
    (part,) = batch_of(logged, leg, 0)
    assert {(s.episode, s.role): s.advantage for s in part.samples} == {
        (0, "asks"): -4.5, (1, "asks"): 0.0, (2, "asks"): 4.5,
        (0, "answers"): 1.5, (1, "answers"): -4.5,
    }  # fmt: skip


def test_what_needs_the_whole_batch_is_given_it_whole(trained):
    (leg,) = planned(trained, {"trainer.advantages": "reinforce"}).legs
    (whole,) = batch_of(trained, leg, 0)
    assert whole.last
    assert [s.advantage for s in whole.samples] == [-1.5, -0.5, 0.5, 1.5]
    (leg,) = planned(trained, {"trainer.advantages": "reinforce_pp"}).legs
    (whole,) = batch_of(trained, leg, 0)
    assert [s.advantage for s in whole.samples] == pytest.approx(
        [a / 1.25**0.5 for a in (-1.5, -0.5, 0.5, 1.5)]
    )
    (leg,) = planned(trained, {"trainer.mini_batches": 2}).legs
    (whole,) = batch_of(trained, leg, 0)
    assert [s.advantage for s in whole.samples] == [9.0] * 4


# ── real trainers ────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("retrain") / "runs"
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def finished(runs):
    """Three steps, with checkpoints after the second and the third."""
    config = tiny("frozen_lake", runs, name="finished", **SETTINGS, **{"checkpoint.every": 2})
    asyncio.run(run(config))
    return runs / "finished"


@pytest.fixture(scope="module")
def changed(finished, runs):
    """Three steps, then one more with another learning rate that imitates nothing, when the
    expert's file is gone; a file of another run's episodes, in batches that came in parts."""
    path = runs / "expert.jsonl"
    cli.run(["export", str(finished), "--format", "jsonl", "--out", str(path)])
    settings = SETTINGS | {
        "stream": True,
        "trainer.advantages": "gigpo",
        "rollout.expert.file": str(path),
        "rollout.expert.episodes": 5,
        "rollout.expert.weight": 0.3,
    }
    asyncio.run(run(tiny("frozen_lake", runs, name="changed", **settings)))
    path.unlink()
    shutil.rmtree(runs / "changed" / "checkpoints")  # so that all is redone
    more = {"steps": 4, "checkpoint.resume": True, "trainer.learning_rate": 5e-3}
    more["rollout.expert.file"] = None
    asyncio.run(run(tiny("frozen_lake", runs, name="changed", **settings | more)))
    return runs / "changed"


async def trained_again(folder, changes=None):
    told = []
    with open_run(folder) as opened:
        await retrain(opened, plan(opened, changes or {}, checkpoint=""), told.append)
    steps = [each for each in told if isinstance(each, Step)]
    (compared,) = [each for each in told if isinstance(each, Compared)]
    return steps, compared


@pytest.mark.slow
async def test_with_nothing_changed_it_comes_to_the_same_weights_and_numbers(finished):
    steps, compared = await trained_again(finished)
    assert compared == Compared(finished / "checkpoints" / "step_000003", True, 0.0)
    assert [step.number for step in steps] == [1, 2, 3]
    for step in steps:
        for name in ("loss", "grad_norm", "kl_behaviour", "weight/ess"):
            assert step.metrics[name] == step.logged[name], name
        assert step.metrics["grad_norm"] > 0


@pytest.mark.slow
async def test_what_was_imitated_and_changed_at_a_resume_is_so_again_whatever_became_of_the_file(
    changed,
):
    with open_run(changed) as opened, opened.reading() as reader:
        legs = plan(opened, {}, checkpoint="").legs
        shares = [reader.batch(version)[-1].expert for version in range(4)]
    assert [(leg.first, leg.until, leg.settings.learning_rate) for leg in legs] == [
        (0, 3, 1e-3), (3, 4, 5e-3),
    ]  # fmt: skip
    assert [share and (len(share.sequences), share.weight) for share in shares] == [
        (5, 0.3), (5, 0.3), (5, 0.3), None,
    ]  # fmt: skip
    # To the same weights as the resume, which redid three of the steps and saved the fourth.
    steps, compared = await trained_again(changed)
    assert compared == Compared(changed / "checkpoints" / "step_000004", True, 0.0)
    for step in steps:
        assert step.metrics.get("expert/loss") == step.logged.get("expert/loss")
        for name in ("loss", "grad_norm"):
            assert step.metrics[name] == step.logged[name], name
    assert ["expert/loss" in step.metrics for step in steps] == [True, True, True, False]
    tokens = [int((s.loss_mask[1:] > 0).sum()) for s in shares[0].sequences]
    assert steps[0].logged["expert/tokens"] == sum(tokens)
    assert all(step.logged["staleness/max"] <= 1 for step in steps)


@pytest.mark.slow
async def test_what_it_exports_then_are_the_weights_of_the_run_s_checkpoint(finished, tmp_path):
    with open_run(finished) as opened:
        found = plan(opened, {}, checkpoint="")
        (leg,) = found.legs
        trainer = Trainer(model=found.model, config=leg.settings, run_dir=tmp_path, seed=found.seed)
        async with trainer:
            first = await trainer.export_weights()
            before = load_file(next(first.path.glob("*.safetensors")))
            await redo(trainer, _Batches(opened, leg), leg.until)
            weights = await trainer.export_weights()
            mine = load_file(next(weights.path.glob("*.safetensors")))
    export_model(finished / "checkpoints/step_000003", tmp_path / "own", dtype="float32")
    theirs = load_file(tmp_path / "own" / "model.safetensors")
    shared = mine.keys() & theirs.keys()  # tied weights are there once only, under either name
    assert len(shared) > 5
    assert {name for name in shared if mine[name].tobytes() != theirs[name].tobytes()} == set()
    assert any(not np.array_equal(before[name], mine[name]) for name in mine), "it has trained"


@pytest.mark.slow
async def test_with_another_learning_rate_it_comes_to_other_weights(finished, caplog):
    steps, compared = await trained_again(finished, {"trainer.learning_rate": 1.0})
    assert max(step.metrics.get("mismatch/kl_fresh", 0) for step in steps) > 0.05
    warned = [record.getMessage() for record in caplog.records if record.levelno > logging.DEBUG]
    assert not warned, "that the engine had other weights is no news"
    assert not compared.equal
    assert compared.difference > 1e-3
    assert steps[0].metrics["loss"] == steps[0].logged["loss"], "it was computed before the step"
    assert steps[2].metrics["loss"] != steps[2].logged["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["finished", "changed"])
def test_advantages_computed_again_with_the_same_settings_are_those_handed_over(name, request):
    with open_run(request.getfixturevalue(name)) as opened:
        for leg in plan(opened, {}, checkpoint="").legs:
            for version in range(leg.first, leg.until):
                logged = _Batches(opened, leg)._parts(version)
                again = _Batches(opened, replace(leg, as_logged=False))._parts(version)
                assert len(again) == len(logged)
                for part, same in zip(logged, again, strict=True):
                    for one, other in zip(part.samples, same.samples, strict=True):
                        assert np.array_equal(one.advantage, other.advantage)
                assert any(np.any(s.advantage) for part in logged for s in part.samples)


@pytest.mark.slow
def test_the_command_prints_each_step_beside_the_logged_one(finished, capsys):
    assert cli.run(["replay", str(finished), "--retrain", "--from", "step_000002"]) == 0
    about, advantages, heads, row, end = capsys.readouterr().out.splitlines()
    assert about == "batch of version 2 from step_000002, with the settings of the run"
    assert advantages.startswith("advantages as they were handed over; batches, rewards and")
    assert heads.split() == (
        ["step", "loss", "logged", "grad", "norm", "logged", "KL", "logged", "ESS", "logged"]
    )
    number, *values = row.split()
    assert number == "3"
    assert values[::2] == values[1::2]
    assert end == f"weights equal to the last bit to those of {finished}/checkpoints/step_000003"


@pytest.mark.slow
def test_and_as_data_all_that_was_measured(finished, capsys):
    words = ["--retrain", "--from", "step_000002", "--json", "--trainer.learning_rate", "1e-2"]
    assert cli.run(["replay", str(finished), *words]) == 0
    step, compared = map(json.loads, capsys.readouterr().out.splitlines())
    assert step["number"] == 3
    assert step["metrics"]["learning_rate"] == 1e-2
    assert step["logged"]["learning_rate"] == 1e-3
    assert (compared["equal"], compared["checkpoint"]) == (
        False, str(finished / "checkpoints" / "step_000003"),
    )  # fmt: skip


def test_weights_are_compared_to_the_last_bit(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    for folder, zero in ((one, 0.0), (other, -0.0)):
        folder.mkdir()
        save_file({"w": np.array([1.0, zero], np.float32)}, folder / "model.safetensors")
    assert _compare(one, one) == (True, 0.0)
    assert _compare(one, other) == (False, 0.0)
    save_file({"w": np.array([1.5, 0.0], np.float32)}, other / "model.safetensors")
    assert _compare(one, other) == (False, 0.5)
    (other / "model.safetensors").rename(other / "another.safetensors")
    assert _compare(one, other)[0] is False
