"""A log that is taken away while it is written, or before a resume."""

import shutil

import numpy as np
import pytest

from flash.config import load
from flash.errors import LogFailure
from flash.log.past import take_over
from flash.log.schema import BATCHES, GROUPS, SAMPLES
from flash.log.store import Change, Store, sqlite_url


def group(number: int) -> Change:
    values = {"group": number, "start": 1, "seed": 7, "options": {}, "begun_at": 0.0}
    return Change("insert", GROUPS, values)


def remove(run):
    shutil.rmtree(run)


def put_another_there(run):
    copy = run / "copy"
    shutil.copy(run / "log.sqlite", copy)
    copy.replace(run / "log.sqlite")


@pytest.mark.parametrize("take_away", [remove, put_another_there])
def test_a_log_that_is_taken_away_ends_the_run_for_sqlite_would_go_on_for_nobody(
    tmp_path, take_away
):
    run = tmp_path / "run"
    run.mkdir()
    store = Store(sqlite_url(run), run="a" * 32, name="run")
    store.own()
    store.commit([group(0)])
    take_away(run)
    with pytest.raises(LogFailure, match="was removed"):
        store.commit([group(1)])
    store.close()


def log_without_samples(folder, *, batches: int) -> Store:
    """Of a run of so many steps, of whose last batch the samples are gone."""
    store = Store(sqlite_url(folder), run="a" * 32, name="run")
    store.own()
    for version in range(batches):
        values = {"version": version, "part": 0, "start": 1, "at": 0.0, "last": True}
        store.commit([Change("insert", BATCHES, {**values, "metrics": {}})])
    sample = {"version": batches - 1, "part": 0, "position": 0, "episode": 1, "number": 0}
    sample |= {"group": 0, "advantage": np.zeros(1), "reward": 0.0}
    store.commit([Change("insert", SAMPLES, sample)])
    return store


TOLD = {"config": load("frozen_lake", {"group_size": 2, "batch_size": 2})}


def test_steps_whose_samples_are_gone_are_done_anew_and_that_is_said(tmp_path, caplog):
    store = log_without_samples(tmp_path, batches=3)
    assert take_over(store, checkpoint=1, **TOLD).logged_version == 2
    assert "the samples of version 2 no longer: the steps from 3 to 3 are done anew" in caplog.text
    store.close()


def test_nothing_is_given_up_when_that_would_be_the_whole_run(tmp_path):
    store = log_without_samples(tmp_path, batches=1)
    with pytest.raises(ValueError, match="no whole checkpoint: start anew"):
        take_over(store, checkpoint=0, **TOLD)
    store.close()


def test_a_checkpoint_without_the_log_of_its_batches_is_refused(tmp_path):
    store = Store(sqlite_url(tmp_path), run="a" * 32, name="run")
    with pytest.raises(ValueError, match="knows batches up to version 0 only"):
        take_over(store, checkpoint=3, **TOLD)
    store.close()
