"""A short form of `make crash`: each part of a run is killed once; nothing is lost or doubled."""

import json
import random
import sqlite3

import pytest

from tests.crash.account import Books, compare, violations, weights
from tests.crash.kills import CHILDREN, ENDS_RUN, KilledRun
from tests.crash.plans import draw
from tests.postgres import postgres


def killed(plan, folder, roles, database=None) -> KilledRun:
    run = KilledRun(plan, folder, roles=iter(roles), database=database)
    run.play(kills=len(roles))
    return run


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_each_part_of_a_run_may_be_killed_and_nothing_is_lost_or_comes_twice(tmp_path):
    roles = [*ENDS_RUN, *CHILDREN]
    random.Random(0).shuffle(roles)
    plan = draw(11, steps=30, postgres=False)
    result = killed(plan, tmp_path, roles).result
    assert (result.lost, result.doubled, result.broken, result.unequal) == ([], [], [], [])
    assert [kill.role for kill in result.kills if not kill.resumed] == []
    assert len(result.kills) == len(roles)
    assert result.compared > 0
    _what_is_taken_from_the_log_is_missed(plan, tmp_path)


def _what_is_taken_from_the_log_is_missed(plan, folder):
    """So that the harness can fail."""
    run = folder / "run"
    before = Books("", run).snapshot()
    connection = sqlite3.connect(run / "log.sqlite")
    with connection:
        connection.execute("DELETE FROM samples WHERE version = 3 AND position = 0")
        connection.execute("UPDATE batches SET last = 0 WHERE version = 5")
    connection.close()
    books = Books("", run)
    lost = compare(before, books).lost
    assert lost == [f"the batch of version {v} is not what it was" for v in (3, 5)]
    found = list(violations(books, run, plan.settings))
    assert any("version 3: group" in what for what in found)
    assert any(what.startswith("lost: ") for what in found)
    path = folder / "weights.jsonl"
    exported = json.loads(path.read_text().splitlines()[-1])
    with path.open("a") as file:
        file.write(json.dumps(exported | {"start": 99, "sum": "another"}) + "\n")
    _, unequal = weights(path)
    assert len(unequal) == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_postgresql_may_be_killed_and_the_run_goes_on_when_it_is_back(tmp_path):
    with postgres(tmp_path) as database:
        run = killed(
            draw(3, steps=14, postgres=True),
            tmp_path / "killed",
            ["postgres", "controller"],
            database,
        )
    result = run.result
    assert (result.lost, result.doubled, result.broken, result.unequal) == ([], [], [], [])
    assert all(kill.resumed for kill in result.kills)
