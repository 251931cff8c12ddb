"""A resume with other settings: what is redone with which, and what begins anew."""

from pathlib import Path
from typing import Any

from sqlalchemy import select

from flash.config import load
from flash.log.past import Past, take_over
from flash.log.schema import BATCHES, EPISODES, GROUPS, STEPS
from flash.log.store import Change, Store, sqlite_url

SLOW = {"trainer.learning_rate": 1e-6}


class Run:
    """A run on FrozenLake, which is killed whenever it starts again."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self._url = sqlite_url(folder)
        self._starts = 0
        self.start(resume=False, **settings)

    def start(self, *, resume: bool = True, **changes: Any) -> Past:
        self._starts += 1
        self._store = Store(self._url, run="a" * 32, name="run")
        config = load("frozen_lake", changes)
        return take_over(self._store, checkpoint=0 if resume else None, config=config)

    def insert(self, table: Any, **values: Any) -> None:
        self._store.commit([Change("insert", table, values)])

    def batch(self, version: int, *, done: bool = True) -> None:
        self.insert(
            BATCHES, version=version, part=0, start=self._starts, at=0.0, last=True, metrics={}
        )
        if done:
            self.step(version + 1)

    def step(self, number: int) -> None:
        self.insert(STEPS, step=number, start=self._starts, at=0.0, metrics={"step": number})

    def ready(self, group: int, *, version: int, task_set: str = "") -> None:
        """An episode of a group on its way."""
        self.insert(
            GROUPS, group=group, task_set=task_set, start=1, seed=group, options={}, begun_at=0.0
        )
        self.insert(
            EPISODES, episode=group, task_set=task_set, group=group, attempt=1, start=1,
            seed=group, admitted_at=0.0, played_at=1.0, reward=0.0, success=False, turns=1,
            prompt_tokens=1, generated_tokens=1, version_min=version, version_max=version,
            turn_rewards=[], turn_states=[],
        )  # fmt: skip

    def reasons(self) -> dict[int, str]:
        """Why groups ended, of those that did."""
        query = select(GROUPS.c.group, GROUPS.c.reason).where(GROUPS.c.outcome.is_not(None))
        with self._store.transaction() as connection:
            return {row.group: row.reason for row in connection.execute(query)}


def redone(past: Past) -> list[tuple[int, float]]:
    """Until which version, and with which learning rate."""
    return [(until, settings["learning_rate"]) for until, settings in past.with_other_settings]


def test_batches_are_redone_with_the_settings_of_the_start_that_trained_them(tmp_path):
    run = Run(tmp_path)
    run.batch(0)
    run.batch(1)
    usual = load("frozen_lake").trainer.learning_rate
    assert redone(run.start()) == []
    assert redone(run.start(**SLOW)) == [(2, usual)]
    assert redone(run.start(**SLOW)) == [(2, usual)], "also after a kill before that was saved"
    run.batch(2)
    past = run.start()
    assert redone(past) == [(2, usual), (3, 1e-6)]
    assert past.redo == [0, 1, 2]
    assert redone(run.start(**SLOW)) == [(2, usual)], "the last has the present ones"


def test_a_batch_that_lay_ready_at_a_kill_is_redone_as_the_next_start_trained_it(tmp_path):
    run = Run(tmp_path)
    run.batch(0, done=False)
    run.start(**SLOW)
    run.step(1)
    assert redone(run.start(**SLOW)) == []
    assert redone(run.start()) == [(1, 1e-6)]


def test_what_weights_sampled_that_will_not_be_again_begins_anew(tmp_path):
    run = Run(tmp_path)
    run.batch(0)
    run.batch(1, done=False)  # its step is done anew
    run.ready(5, version=1)
    run.ready(6, version=2)
    same = run.start()
    assert [group.group for group in same.restored.groups] == [5, 6]
    other = run.start(**SLOW)
    assert [group.group for group in other.restored.groups] == [5]
    assert run.reasons() == {6: "abandoned"}
    assert other.again == {"": [6]}


def test_of_a_start_before_the_last_what_was_done_anew_since_is_not_known(tmp_path):
    run = Run(tmp_path)
    run.batch(0)
    run.batch(1, done=False)  # its version 2 was perhaps given out, and not logged
    second = run.start(**SLOW)
    assert (second.known_of(0), second.known_of(1)) == (0, 1)
    run.step(2)
    run.batch(2)
    third = run.start(**SLOW)
    assert [third.known_of(start) for start in (0, 1, 2)] == [0, 1, 3]
    assert [run.start().known_of(start) for start in (1, 2, 3)] == [1, 3, 3]


def test_groups_that_can_not_go_on_begin_anew_once(tmp_path):
    run = Run(tmp_path)
    run.ready(5, version=0)
    past = run.start(group_size=4)
    assert not past.restored.groups
    assert (past.again, past.dispatched) == ({"": [5]}, {"": [5]})
    assert run.reasons() == {5: "settings_changed"}
    run.insert(GROUPS, group=6, start=2, seed=5, options={}, begun_at=0.0)
    past = run.start(group_size=4)
    assert [group.group for group in past.restored.groups] == [6]
    assert past.again == {}


def test_tasks_of_another_source_begin_anew_and_that_is_said(tmp_path, caplog):
    run = Run(tmp_path)
    run.ready(5, version=0)
    past = run.start(**{"env.options.size": 5})
    assert past.again == {"": [5]}
    assert run.reasons() == {5: "source_changed"}
    assert (
        "tasks are other ones than before, and groups begin anew: env.options.size" in caplog.text
    )


def test_only_the_groups_of_the_set_that_is_otherwise_begin_anew(tmp_path, caplog):
    sets = {"task_sets.a.weight": 1, "task_sets.b.weight": 1, "task_sets.c.weight": 2}
    run = Run(tmp_path, **sets)
    for group, name in enumerate("abc", start=5):
        run.ready(group, version=0, task_set=name)
    otherwise = {name: value for name, value in sets.items() if ".c." not in name}
    otherwise |= {"task_sets.b.env.name": "frozen_lake", "task_sets.b.env.options.size": 5}
    past = run.start(**otherwise)
    assert [group.group for group in past.restored.groups] == [5]
    assert run.reasons() == {6: "source_changed", 7: "settings_changed"}
    assert past.again == {"b": [6], "c": [7]}
    assert "task_sets.b.env.options.size" in caplog.text


def test_how_many_starts_in_a_row_ended_at_a_batch_is_known(tmp_path):
    run = Run(tmp_path)
    run.batch(0)
    assert run.start().ended_here == 0
    run.batch(1, done=False)
    assert [run.start().ended_here for _ in range(3)] == [1, 2, 3]
    run.step(2)
    assert run.start().ended_here == 0
    run.batch(2, done=False)
    assert run.start().ended_here == 1
