"""A batch whose training fails each time: a resume alone does not help, and that is said."""

from collections.abc import Awaitable, Callable

import pytest

from flash.errors import TrainerFailure
from flash.types import Batch
from tests.test_checkpoints import training
from tests.tiny_runs import run, tiny

FAILING_LOSS = """
def loss(batch):
    raise RuntimeError("no memory is left")
"""


class FailingTrainer:
    async def step(self, batch: Batch) -> dict[str, float]:
        raise TrainerFailure("trainer rank 0 was killed")

    add = step


async def notes_of(call: Callable[[Batch], Awaitable[object]], version: int) -> list[str]:
    """Of the failure over that batch, or over a part of it."""
    with pytest.raises(TrainerFailure) as caught:
        await call(Batch(samples=[], version=version))
    return getattr(caught.value, "__notes__", [])


async def test_only_where_starts_ended_before_is_it_said():
    resumed = training(trainer=FailingTrainer(), began_at=7, ended_there=2)
    for call in (resumed.step, resumed.add):
        (note,) = await notes_of(call, 7)
        assert note.startswith("the batch of version 7 is where 3 starts in a row have ended, this")
        assert "change what it fails for, as trainer.tokens_per_micro_batch" in note
        assert await notes_of(call, 8) == []
    first = training(trainer=FailingTrainer(), began_at=7, ended_there=0)
    assert await notes_of(first.step, 7) == []


@pytest.mark.slow
async def test_a_batch_that_fails_again_at_each_resume_is_named_and_other_settings_train_it(
    tmp_path, monkeypatch
):
    (tmp_path / "failing_loss.py").write_text(FAILING_LOSS)
    monkeypatch.syspath_prepend(tmp_path)  # here
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # in the ranks

    def config(**changes):
        return tiny(
            "frozen_lake", tmp_path, name="run", steps=1, eval_every=100,
            **{"trainer.max_restarts": 0, **changes},
        )  # fmt: skip

    failing = {"trainer.objective": {"name": "function", "run": "failing_loss:loss"}}
    notes = []
    for resume in (False, True):
        with pytest.raises(TrainerFailure, match="no memory is left") as caught:
            await run(config(**failing, **{"checkpoint.resume": resume}))
        notes.append([n for n in getattr(caught.value, "__notes__", []) if "in a row" in n])
    assert [len(of_run) for of_run in notes] == [0, 1]
    assert "version 0 is where 2 starts in a row" in notes[1][0]
    summary = await run(config(**{"checkpoint.resume": True}))
    assert summary["steps"] == 1
