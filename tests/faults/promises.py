"""What must hold of a start of a run that is killed now and then, while its disk goes wrong.

Schedule ─► Promises ─► Start
            checks      lives
"""

import asyncio
import contextlib
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np

from flash.config.task_source import source_of
from flash.log import schema
from flash.log.past import Past
from flash.rollout.episode import Episode
from flash.rollout.history import Sampled
from flash.rollout.observer import Observer
from flash.rollout.record import EpisodeRecord
from flash.types import Batch
from tests.faults.disk import LONGEST_S
from tests.faults.schedule import Schedule


class Promises(Schedule):
    """A Schedule with a log. Who makes it a start of a run gives it `of_run`, `disk`, `looks`, a
    connection of its own to the log, and `_books`, the log as it was when it was taken over."""

    reuses = 0.0  # a token is trained once here; see tests/log/test_reused.py

    def _check_past(self, past: Past) -> None:
        """What it goes on with is what was committed."""
        run, before = self.of_run, self._books.snapshot()
        run.snapshots.append(before)
        self.say("past", past.describe(), sorted(before.ready))
        restored = past.restored
        done = max([past.checkpoint, *(row.step for row in self._books.of(schema.STEPS))])
        whole = [version for version in before.batches if version >= past.checkpoint]
        assert list(past.redo) == [version for version in whole if version < done]
        last = [part.version for part in restored.batches if part.last]
        assert last == [version for version in whole if version >= done]
        assert past.logged_version == past.checkpoint + len(whole)
        assert max(run.weights) <= past.logged_version, "trained, and not committed"

        starts = self._books.of(schema.STARTS)
        assert past.start == len(starts) + 1
        was = starts[-1].config if starts else self.config.model_dump(mode="json")
        newest = past.logged_version
        not_done = [row.start for row in self._books.of(schema.BATCHES) if row.version >= done]
        since = min(not_done, default=len(starts))
        rates = {row.config["trainer"]["learning_rate"] for row in starts[since - 1 :]}
        if rates - {self.rate}:
            newest = min(newest, done)
            for version in [version for version in run.weights if version > newest]:
                del run.weights[version]
        for token, version in list(run.trained_at.items()):
            if version >= past.logged_version:  # of parts of a batch whose last part never came
                del run.trained_at[token]

        for completion in self._books.of(schema.COMPLETIONS):
            self._said[completion.episode].append(completion)
        self._continues = {row.episode: row.continues for row in self._books.of(schema.EPISODES)}

        ready = {ready.episode for group in restored.groups for ready in group.ready}
        assert ready <= before.ready
        begins_anew = (
            was["agent"]["samples"] != self.samples
            or (starts and starts[-1].source != source_of(self.config))
        )  # fmt: skip
        episodes = {row.episode: row for row in self._books.of(schema.EPISODES)}
        if begins_anew:
            assert not restored.groups
        else:
            for episode in before.ready - ready:
                of_group = [
                    row for row in episodes.values() if row.group == episodes[episode].group
                ]
                newest_token = max(self._newest_version(row) for row in of_group)
                assert newest_token > newest, f"episode {episode} was ready, and is not"
        for group in restored.groups:
            rows = [row for row in episodes.values() if row.group == group.group]
            _, wanted = self.sets[group.task.task_set]
            most = wanted + self.settings.get("redundant_episodes", 0)
            lost = any(row.outcome == "failed" and row.attempt == 3 for row in rows)
            assert lost or len(group.ready) + len(group.due) >= wanted, "an episode is not due"
            assert len(group.ready) + len(group.due) <= most, "an episode is due twice"
        first_episode, first_group = restored.first_ids
        assert first_episode == max(before.episodes, default=-1) + 1
        assert first_group == max(before.groups, default=-1) + 1
        begun: dict[str, list[int]] = {}
        for row in sorted(self._books.of(schema.GROUPS), key=lambda row: row.group):
            self._set_of[row.group] = row.task_set
            begun.setdefault(row.task_set, []).append(row.seed)
        assert past.dispatched == begun

    def _newest_version(self, row: Any) -> int:
        said = [
            version
            for completion in self._books.of(schema.COMPLETIONS)
            if completion.episode == row.episode
            for version in completion.versions.tolist()
        ]
        return max([-1 if row.version_max is None else row.version_max, *said])

    def _on_part(self, part: Batch) -> None:
        """All that the trainer is given is committed."""
        if self._is_over:
            told_at = self._told.get((part.version, len(part.samples)), 0.0)
            assert told_at <= self.taken_over_at, "handed over by a process that owns nothing"
            return
        with self._reading():
            of_episode = dict(
                self.looks.execute(
                    "SELECT episode, count(*) FROM samples WHERE version = ? GROUP BY episode",
                    (part.version,),
                )
            )
            wanted = Counter(sample.episode for sample in part.samples)
            for episode, count in wanted.items():
                assert of_episode.get(episode) == count, "handed over, and not committed"
                (sequences,) = self.looks.execute(
                    "SELECT count(*) FROM sequences WHERE episode = ?", (episode,)
                ).fetchone()
                assert sequences == count, "handed over without its tokens"
            (last,) = self.looks.execute(
                "SELECT max(last) FROM batches WHERE version = ?", (part.version,)
            ).fetchone()
            assert last or not part.last, "handed over, and not committed"

    def _check_batch(self, batch: Batch) -> None:
        self._batch = batch
        if self._is_over:
            return
        if batch.version < self._logged_version:
            self.say("again", batch.version)
        else:
            super()._check_batch(batch)
        known = self.of_run.batches.get(batch.version)
        content = sum_of(batch)
        if batch.version < self._logged_version and known is not None:
            assert known == content, f"the batch of version {batch.version} is another one"
        self.of_run.batches[batch.version] = content
        self.of_run.trained_at |= {
            int(token): batch.version
            for sample in batch.samples
            for token in sample.token_ids[np.flatnonzero(sample.loss_mask)]
        }

    def _handed_over(self) -> list[set[int]]:
        """Those too whose commit nobody lived to see."""
        episodes: dict[int, set[int]] = defaultdict(set)
        for part in self._told_of:
            episodes[part.version] |= {sample.episode for sample in part.samples}
        whole = {part.version for part in self._told_of if part.last}
        return [of for version, of in episodes.items() if version in whole]

    def _waits_for_the_slow(self) -> bool:
        same = self.settings["alpha"] == self.of_run.most_alpha
        return same and super()._waits_for_the_slow()

    def _expected_version(self) -> int:
        return self.trainer.version

    def _take_truth(self, token: int, batch: Batch) -> tuple[np.float32, int, int] | None:
        run = self.of_run
        before = run.trained_at.get(token)
        assert before is None, f"a token is trained at {before}, and at {batch.version} again"
        true = run.truth.tokens.get(token)
        if true is not None:
            _, version, _ = true
            sampled_by = run.published[run.sampled_in[token], version]
            assert sampled_by == run.weights[version], "sampled in a future that was given up"
        return true

    async def _monitor(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(super()._monitor(), name="monitor of the loop")
            while True:
                self._check_ready()
                trying = self.disk.trying_since
                if trying is not None and not self._is_over and not self.log_gave_up:
                    tried_s = asyncio.get_running_loop().time() - trying
                    assert tried_s < self.log_config.timeout_s + 3 * LONGEST_S, "nobody gives up"
                await asyncio.sleep(0.5)

    def _check_ready(self) -> None:
        """What counts as ready is committed."""
        if self._is_over:
            return
        ready = {episode.id for episode in self.rollouts.episodes() if episode.ready}
        if ready - self._known:
            with self._reading():
                rows = self.looks.execute(
                    "SELECT episode FROM episodes WHERE played_at IS NOT NULL"
                )
                self._known = {episode for (episode,) in rows}
        assert ready <= self._known, "an episode counts as ready that is not committed"

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        finally:
            self.looks.rollback()

    def check_admission(self, episode: Episode) -> None:
        """Nothing begins while the disk fails, or while it lags."""
        now = asyncio.get_running_loop().time()
        trying, failed = self.disk.trying_since, self.disk.failed_at
        assert failed is None or now <= failed, "an episode begins while the disk fails"
        lag_s = 0.0 if trying is None else now - trying
        assert lag_s <= self.log_config.max_lag_s, f"an episode begins at a lag of {lag_s:.0f} s"

    def check_task(self, episode: Episode) -> None:
        """What is to begin anew does so before all others, in its order."""
        if episode.group == self._first_group:
            self._first_group += 1
            if again := self.again.get(episode.task.task_set):
                assert episode.task.seed == again.popleft(), "it is not its turn"

    def expect_history(self, episode: Episode) -> None:
        """What had been said in the episode that it continues, or in one before that."""
        self._continues[episode.id] = episode.continues
        before, longest = episode.continues, []
        while before is not None:
            longest = max(longest, self._said[before], key=len)
            before = self._continues.get(before)
        versions = [int(version) for said in longest for version in said.versions]
        opened = hasattr(self, "rollouts")
        next_version = self.rollouts._next_version if opened else self._logged_version
        fresh = next_version - min(versions, default=0) <= self.settings["alpha"]
        if self.deterministic and versions and fresh:
            self._kept[episode.id] = [int(token) for said in longest for token in said.token_ids]

    def check_history(self, episode: Episode) -> None:
        """None of that was sampled again."""
        kept = self._kept.pop(episode.id, [])
        if episode.trajectory is None:
            return
        sampled = [
            int(token)
            for sequence in episode.trajectory.sequences
            for token in sequence.token_ids[np.flatnonzero(sequence.loss_mask)]
        ]
        assert sampled[: len(kept)] == kept, "what had been said is sampled again"


class Heard(Observer):
    """Tells a start what its loop does."""

    def __init__(self, start: Promises) -> None:
        self._start = start

    def admitted(self, episode: Episode) -> None:
        self._start.check_admission(episode)
        self._start.check_task(episode)
        self._start.expect_history(episode)

    def sampled(self, episode: Episode, step: Sampled) -> None:
        self._start._said[episode.id].append(step.completion)

    def begun_anew(self, episode: Episode) -> None:
        raise AssertionError(f"episode {episode.id} starts over in a deterministic environment")

    def played(self, episode: Episode) -> None:
        self._start.check_history(episode)

    def handed_over(self, batch: Batch) -> None:
        now = asyncio.get_running_loop().time()
        self._start._told[batch.version, len(batch.samples)] = now
        if batch.version >= self._start._logged_version:
            self._start._told_of.append(batch)

    def ended(self, episode: Episode, record: EpisodeRecord) -> None:
        self._start._on_episode(record)


def sum_of(*parts: Batch) -> str:
    """Over all bits of what is trained."""
    total = hashlib.sha256()
    for part in parts:
        for sample in part.samples:
            for name in ("token_ids", "loss_mask", "logprobs", "versions", "temperatures", "turns"):
                array = getattr(sample, name)
                total.update(f"{array.dtype} {array.shape}".encode() + array.tobytes())
            rest = sample.advantage, sample.reward, list(sample.turn_rewards)
            total.update(repr((*rest, sample.group, sample.episode)).encode())
    return total.hexdigest()[:16]
