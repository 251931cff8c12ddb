"""Steps that are trained again: their numbers are held against the logged ones."""

import asyncio
import shutil

import pytest

from flash.log.schema import STEPS
from flash.log.store import Change, Store, sqlite_url
from flash.telemetry.redone import RedoneSteps
from flash.train import train
from tests.tiny_runs import tiny

LINES = [
    {"step": 0, "policy_version": 0},
    {"step": 1, "loss": 0.5, "grad_norm": 1.0, "entropy": None, "time/train_s": 3.0},
    {"step": 2, "loss": -0.25, "grad_norm": 2.0, "trainer/restarts": 0, "logprob_gap/max": 0.1},
]


def said(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_equal_numbers_are_said_to_be(caplog):
    steps = RedoneSteps(LINES, exact=True)
    assert steps.describe() == ""
    steps.redone(1, {"loss": 0.5, "grad_norm": 1.0, "entropy": float("nan"), "time/train_s": 9.0})
    assert steps.describe() == "redone 1 step, numbers as logged"
    steps.redone(2, {"loss": -0.25, "grad_norm": 2.0, "trainer/restarts": 4, "logprob_gap/max": 0})
    assert steps.describe() == "redone 2 steps, numbers as logged"
    assert not said(caplog)


@pytest.mark.parametrize("now", [0.5000001, float("nan")])
def test_the_first_difference_is_told_once_with_both_numbers(now, caplog):
    steps = RedoneSteps(LINES, exact=True)
    steps.redone(1, {"grad_norm": 1.0, "loss": now})
    steps.redone(2, {"loss": 7.0})
    (line,) = said(caplog)
    assert line.startswith(f"step 1, trained again, has loss {now!r}, and 0.5 was logged: ")
    assert "Another machine, torch or transformers, other trainer.threads" in line
    assert steps.describe() == "redone 2 steps, with other numbers than logged from step 1 on"


@pytest.mark.parametrize(
    ("before", "now", "differ"),
    [(2.0, 2.019, False), (2.0, 2.021, True), (1e-5, -9e-4, False), (1e-5, 2e-3, True)],
)
def test_where_rounding_differs_so_may_numbers_by_a_hundredth_or_a_thousandth(
    before, now, differ, caplog
):
    RedoneSteps([{"step": 4, "loss": before}], exact=False).redone(4, {"loss": now})
    assert bool(said(caplog)) == differ


def test_steps_of_this_start_are_known_too_and_one_that_never_came_to_its_end_is_not(caplog):
    steps = RedoneSteps(LINES, exact=True)
    steps.measured({"step": 3, "loss": 1.0})
    steps.redone(3, {"loss": 2.0})
    steps.redone(4, {"loss": 2.0})
    assert len(said(caplog)) == 1
    assert steps.describe() == "redone 1 step, with other numbers than logged from step 3 on"


@pytest.mark.slow
async def test_a_resume_says_where_what_it_redoes_comes_to_other_numbers(tmp_path, caplog, capsys):
    async def run(steps: int, *, resume: bool) -> str:
        shutil.rmtree(tmp_path / "run/checkpoints", ignore_errors=True)
        config = tiny(
            "frozen_lake", tmp_path, name="run", steps=steps, eval_every=100,
            **{"checkpoint.resume": resume},
        )  # fmt: skip
        await train(config, stop=asyncio.Event())
        return capsys.readouterr().out

    await run(2, resume=False)
    folder = tmp_path / "run"
    store = Store(sqlite_url(folder), run=(folder / "log.id").read_text(), name="run")
    store.own()
    store.commit([Change("update", STEPS, {"step": 2, "metrics": {"step": 2, "loss": 9.0}})])
    store.close()
    out = await run(3, resume=True)
    assert "redone 2 steps, with other numbers than logged from step 2 on\n" in out
    assert caplog.text.count("step 2, trained again, has loss") == 1
    assert "and 9.0 was logged" in caplog.text
