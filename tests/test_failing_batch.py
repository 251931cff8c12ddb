"""A batch whose training fails each time: a resume alone does not help, and that is said."""

import pytest

from flash.errors import TrainerFailure
from flash.parts.training import Training
from tests.test_checkpoints import training
from tests.tiny_runs import run, tiny

FAILING_LOSS = """
def loss(batch):
    raise RuntimeError("no memory is left")
"""


def fails(resumed: Training, version: int) -> list[str]:
    """The notes of a failure over that batch."""
    with pytest.raises(TrainerFailure) as caught, resumed.training_on(version):
        raise TrainerFailure("trainer rank 0 was killed")
    return getattr(caught.value, "__notes__", [])


def test_only_where_starts_ended_before_is_it_said():
    resumed = training(began_at=7, ended_there=2)
    (note,) = fails(resumed, 7)
    assert note.startswith("the batch of version 7 is where 3 starts in a row have ended, this one")
    assert "change what it fails for, as trainer.tokens_per_micro_batch" in note
    assert fails(resumed, 8) == []
    assert fails(training(began_at=7, ended_there=0), 7) == []


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
    for resume in (False, True, True):
        with pytest.raises(TrainerFailure, match="no memory is left") as caught:
            await run(config(**failing, **{"checkpoint.resume": resume}))
        notes.append([n for n in getattr(caught.value, "__notes__", []) if "in a row" in n])
    assert [len(of_run) for of_run in notes] == [0, 1, 1]
    assert "version 0 is where 2 starts in a row" in notes[1][0]
    assert "version 0 is where 3 starts in a row" in notes[2][0]
    summary = await run(config(**{"checkpoint.resume": True}))
    assert summary["steps"] == 1
