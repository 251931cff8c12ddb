"""What becomes of episodes that a crash cuts off, and of those that go on in their places."""

from pathlib import Path

import pytest

from flash.config import load
from flash.log.past import Past, take_over
from flash.log.schema import COMPLETIONS, EPISODES, GROUPS, OBSERVATIONS
from flash.log.store import Change, Store, sqlite_url
from flash.rollout.restored import DueEpisode


class Run:
    """A run of one group of two episodes, which is killed again and again."""

    def __init__(self, folder: Path) -> None:
        self._url = sqlite_url(folder)
        self._starts = 0
        self.start(resume=False)

    def start(self, *, resume: bool = True) -> Past:
        self._starts += 1
        self.store = Store(self._url, run="a" * 32, name="run")
        return take_over(
            self.store,
            checkpoint=0 if resume else None,
            config=load("frozen_lake", {"group_size": 2, "batch_size": 2}),
        )

    def resume(self) -> tuple[DueEpisode, ...]:
        """The episodes that are due then."""
        self.store.close()
        (group,) = self.start().restored.groups
        return tuple(group.due)

    def begin(self, episode: int, *, continues: int | None = None) -> None:
        if episode == 0:
            self.insert(GROUPS, group=0, start=1, seed=7, options={}, begun_at=0.0)
        self.insert(
            EPISODES, episode=episode, group=0, attempt=1, start=self._starts, seed=7,
            continues=continues, admitted_at=0.0,
        )  # fmt: skip

    def say(self, episode: int, *texts: str) -> None:
        """What the environment answers, and what the policy then."""
        for number, text in enumerate(texts):
            self.insert(
                OBSERVATIONS, episode=episode, step=2 * number, at=0.0, text=text, reward=0.0,
                terminated=False, truncated=False, info={},
            )  # fmt: skip
            self.insert(
                COMPLETIONS, episode=episode, step=2 * number + 1, at=0.0, prompt_sum=number,
                token_ids=[1], logprobs=[0.0], versions=[0], temperature=1.0,
                finish_reason="stop", worker="a",
            )  # fmt: skip

    def insert(self, table, **values) -> None:
        self.store.commit([Change("insert", table, values)])


@pytest.fixture
def run(tmp_path):
    killed = Run(tmp_path)
    killed.begin(0)
    killed.begin(1)
    killed.say(0, "a", "b", "c")
    yield killed
    killed.store.close()


def test_an_episode_that_was_cut_off_goes_on_from_what_was_said(run):
    first, second = run.resume()
    assert (first.episode, len(first.history)) == (0, 6)
    assert (second.episode, len(second.history)) == (1, 0)


def test_a_start_that_is_killed_before_an_episode_goes_on_loses_nothing_of_it(run):
    due = run.resume()
    assert run.resume() == due
    assert run.resume() == due


def test_an_episode_that_is_cut_off_before_it_came_to_where_it_was_goes_on_from_there(run):
    run.resume()
    run.begin(2, continues=0)
    run.begin(3, continues=1)
    run.say(2, "a", "b")
    first, second = run.resume()
    assert (first.episode, len(first.history)) == (2, 6)
    assert (second.episode, len(second.history)) == (3, 0)
    run.begin(4, continues=2)
    assert [len(due.history) for due in run.resume()] == [0, 6]  # 3 comes before 4


def test_an_episode_that_started_over_goes_on_from_what_was_said_then(run):
    run.resume()
    run.begin(2, continues=0)
    run.say(2, "a", "x")
    first, second = run.resume()
    assert (first.episode, len(first.history)) == (1, 0)
    assert [step.text for step in second.history[::2]] == ["a", "x"]


def test_what_was_interrupted_has_its_record_at_once(run):
    run.store.close()
    past = run.start()
    assert [(r.episode, r.outcome, r.reason) for r in past.records] == [
        (0, "cancelled", "interrupted"),
        (1, "cancelled", "interrupted"),
    ]


def test_an_episode_that_failed_is_due_as_another_attempt(run):
    failed = {"episode": 0, "ended_at": 1.0, "outcome": "failed", "reason": "env"}
    run.store.commit([Change("update", EPISODES, failed)])
    assert [(due.attempt, due.episode) for due in run.resume()] == [(1, 1), (2, None)]


def test_no_more_episodes_are_due_than_a_group_needs(run):
    """One was given up, and is not gone yet; another has begun in its place."""
    run.begin(2)
    assert [due.episode for due in run.resume()] == [1, 2]
