"""What the log holds of a run, as the records it was made of; every call blocks."""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sqlalchemy import Connection, Row, Select, func, select
from sqlalchemy.sql.elements import ColumnElement

from flash.log.schema import (
    BATCHES,
    CHECKPOINTS,
    COMPLETIONS,
    EPISODES,
    EVALUATIONS,
    EXPERT,
    EXPERT_SAMPLES,
    GROUPS,
    OBSERVATIONS,
    PUBLISHES,
    SAMPLES,
    SEQUENCES,
    STARTS,
    STEPS,
)
from flash.rollout.committed import INTERRUPTED
from flash.rollout.history import History, Sampled
from flash.rollout.restored import DueEpisode, OpenGroup, ReadyEpisode, UsedGroup
from flash.types import (
    Batch,
    Completion,
    ExpertSequence,
    ExpertShare,
    Observation,
    Sample,
    SampledSequence,
    Task,
    Trajectory,
)

# Episodes that ended so have a successor: they were no failures, nor did their group need no more.
_BEGUN_AGAIN = ("stale", "stall", INTERRUPTED)

# Reasons of groups whose tasks begin anew.
ABANDONED = "abandoned"
SOURCE_CHANGED = "source_changed"
SETTINGS_CHANGED = "settings_changed"
_ANEW = (ABANDONED, SOURCE_CHANGED, SETTINGS_CHANGED)

MANY = 500  # values in one query


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One start of the run: with which configuration, from which version."""

    start: int
    version: int
    config: Mapping[str, Any]
    source: str  # what its tasks are made from: `flash.config.task_source`


class Reader:
    """Reads what is logged of one run, over an open connection."""

    def __init__(self, connection: Connection, run: int) -> None:
        self._connection = connection
        self._run = run

    def _rows(self, query: Select[Any]) -> Sequence[Row[Any]]:
        """Of a query of one table, those of the run."""
        (table,) = query.get_final_froms()
        return self._connection.execute(query.where(table.c.run == self._run)).all()

    def _value(self, query: Select[Any]) -> Any:
        (row,) = self._rows(query)
        return row[0]

    # ── the run ──────────────────────────────────────────────────────────────────────────────

    def starts(self) -> list[Start]:
        """In their order."""
        return [
            Start(start=row.start, version=row.version, config=row.config, source=row.source)
            for row in self._rows(select(STARTS).order_by(STARTS.c.start))
        ]

    def first_ids(self) -> tuple[int, int]:
        """Of an episode and of a group, which none has."""
        episode = self._value(select(func.max(EPISODES.c.episode)))
        group = self._value(select(func.max(GROUPS.c.group)))
        return _after(episode), _after(group)

    def first_numbers(self) -> tuple[int, int, int]:
        """Of a publish, an evaluation and a checkpoint, which none has."""
        publish, evaluation, checkpoint = (
            _after(self._value(select(func.max(table.c.number))))
            for table in (PUBLISHES, EVALUATIONS, CHECKPOINTS)
        )
        return publish, evaluation, checkpoint

    def dispatched(self) -> dict[str, list[int]]:
        """The seeds of all tasks that began, in the order in which they did, by task set."""
        found: dict[str, list[int]] = defaultdict(list)
        query = select(GROUPS.c.task_set, GROUPS.c.seed).order_by(GROUPS.c.group)
        for row in self._rows(query):
            found[row.task_set].append(row.seed)
        return dict(found)

    def to_begin_anew(self) -> dict[str, list[int]]:
        """The seeds of tasks whose group came to nothing, and which have not begun again since; by
        task set."""
        query = select(GROUPS.c.task_set, GROUPS.c.seed, GROUPS.c.reason).order_by(GROUPS.c.group)
        last = {(row.task_set, row.seed): row.reason for row in self._rows(query)}
        found: dict[str, list[int]] = defaultdict(list)
        for (task_set, seed), reason in last.items():
            if reason in _ANEW:
                found[task_set].append(seed)
        return dict(found)

    def groups_trained_from(self, version: int) -> list[int]:
        """Those that were trained at that version or later."""
        query = select(EPISODES.c.group).distinct()
        rows = self._rows(query.where(EPISODES.c.trained_at_version >= version))
        return sorted(row.group for row in rows)

    def open_groups_beyond(self, version: int) -> list[int]:
        """Those on their way that have tokens of a later version."""
        query = select(EPISODES.c.group).distinct()
        query = query.where(EPISODES.c.outcome.is_(None), EPISODES.c.version_max > version)
        running = {row.episode: row.group for row in self.running()}
        found = {row.group for row in self._rows(query)}
        for episode, history in self.histories(list(running)).items():
            said = [step.completion for step in history if isinstance(step, Sampled)]
            if any(max(completion.versions, default=-1) > version for completion in said):
                found.add(running[episode])
        return sorted(found)

    def open_group_ids(self) -> dict[str, list[int]]:
        """By task set."""
        query = select(GROUPS.c.group, GROUPS.c.task_set).where(GROUPS.c.outcome.is_(None))
        found: dict[str, list[int]] = defaultdict(list)
        for row in self._rows(query.order_by(GROUPS.c.group)):
            found[row.task_set].append(row.group)
        return dict(found)

    def steps(self) -> list[Row[Any]]:
        """`step`, `metrics` and `alpha` of each step that was done."""
        return list(self._rows(select(STEPS).order_by(STEPS.c.step)))

    # ── episodes ─────────────────────────────────────────────────────────────────────────────

    def ended(self) -> list[Row[Any]]:
        """The rows of all episodes that have an outcome."""
        query = select(EPISODES).where(EPISODES.c.outcome.is_not(None))
        return list(self._rows(query.order_by(EPISODES.c.ended_at, EPISODES.c.episode)))

    def running(self) -> list[Row[Any]]:
        """The rows of the episodes that neither ended nor were played to their end."""
        query = select(EPISODES).where(EPISODES.c.outcome.is_(None), EPISODES.c.played_at.is_(None))
        return list(self._rows(query.order_by(EPISODES.c.episode)))

    def sequences(self, episodes: Sequence[int]) -> dict[int, list[SampledSequence]]:
        """Of each of these episodes."""
        found: dict[int, list[SampledSequence]] = defaultdict(list)
        query = select(SEQUENCES).order_by(SEQUENCES.c.episode, SEQUENCES.c.number)
        for row in self._in(query, SEQUENCES.c.episode, episodes):
            found[row.episode].append(
                SampledSequence(
                    token_ids=row.token_ids.astype(np.int64),
                    loss_mask=row.loss_mask,
                    logprobs=row.logprobs,
                    versions=row.versions.astype(np.int64),
                    temperatures=row.temperatures,
                    turns=row.turns.astype(np.int64),
                    experts=row.experts,
                    role=row.role,
                )
            )
        return found

    def histories(self, episodes: Sequence[int]) -> dict[int, History]:
        """What had been said in each of these episodes."""
        timed = self.timed_histories(episodes)
        return {episode: [step for _, step in said] for episode, said in timed.items()}

    def timed_histories(
        self, episodes: Sequence[int]
    ) -> dict[int, list[tuple[float, Observation | Sampled]]]:
        """Likewise, and when. What the policy said is kept here of episodes that came to no end
        only: of the others `sequences` has it."""
        steps: dict[int, list[tuple[int, float, Observation | Sampled]]] = defaultdict(list)
        for row in self._in(select(OBSERVATIONS), OBSERVATIONS.c.episode, episodes):
            steps[row.episode].append((row.step, row.at, observation_of(row)))
        for row in self._in(select(COMPLETIONS), COMPLETIONS.c.episode, episodes):
            completion = Completion(
                token_ids=row.token_ids.tolist(),
                logprobs=row.logprobs.tolist(),
                versions=row.versions.tolist(),
                temperature=row.temperature,
                finish_reason=row.finish_reason,
                worker=row.worker,
                experts=row.experts,
            )
            sampled = Sampled(prompt_sum=row.prompt_sum, completion=completion)
            steps[row.episode].append((row.step, row.at, sampled))
        return {
            episode: [(at, step) for _, at, step in sorted(said, key=lambda numbered: numbered[0])]
            for episode, said in steps.items()
        }

    def _in(
        self, query: Select[Any], column: ColumnElement[Any], values: Sequence[Any]
    ) -> Iterator[Row[Any]]:
        """The rows with one of these values; a database takes so many at a time only."""
        for first in range(0, len(values), MANY):
            yield from self._rows(query.where(column.in_(values[first : first + MANY])))

    def tasks(self, groups: Sequence[int]) -> dict[int, Task]:
        """Of each of these groups."""
        rows = self._in(select(GROUPS), GROUPS.c.group, groups)
        return {row.group: _task(row) for row in rows}

    # ── groups on their way ──────────────────────────────────────────────────────────────────

    def open_groups(self, *, episodes: Mapping[str, int], max_attempts: int) -> list[OpenGroup]:
        """Those that ended in no way, oldest first; `episodes` says how many begin of a group of
        each task set."""
        query = select(GROUPS).where(GROUPS.c.outcome.is_(None)).order_by(GROUPS.c.group)
        groups = list(self._rows(query))
        members: dict[int, list[Row[Any]]] = defaultdict(list)
        of_groups = self._in(select(EPISODES), EPISODES.c.group, [row.group for row in groups])
        for row in sorted(of_groups, key=lambda row: row.episode):
            members[row.group].append(row)
        known = [row for of_group in members.values() for row in of_group]
        played = self.sequences([row.episode for row in known if _is_ready(row)])
        histories = self.histories([row.episode for row in known if _was_cut_off(row)])
        return [
            OpenGroup(
                group=group.group,
                task=_task(group),
                ready=[
                    _ready(row, played[row.episode])
                    for row in sorted(members[group.group], key=_played_at)
                    if _is_ready(row)
                ],
                due=_due(
                    members[group.group],
                    histories,
                    episodes=episodes[group.task_set],
                    max_attempts=max_attempts,
                ),
            )
            for group in groups
        ]

    def used_groups(
        self, version: int, *, alpha: float, most_uses: int, since_start: Mapping[str, int]
    ) -> list[UsedGroup]:
        """Those of the batches before that version that may be young enough to be in it too.

        Of groups of these task sets that began in `since_start` or later, and whose tokens the log
        has still.
        """
        # What is young enough still was in no batch before these.
        query = select(SAMPLES.c.version, SAMPLES.c.group, SAMPLES.c.episode, SAMPLES.c.number)
        query = query.where(SAMPLES.c.version >= version - alpha, SAMPLES.c.version < version)
        query = query.order_by(SAMPLES.c.version, SAMPLES.c.part, SAMPLES.c.position)
        batches: dict[int, set[int]] = defaultdict(set)
        numbers: dict[int, set[int]] = defaultdict(set)
        for row in self._rows(query):
            batches[row.group].add(row.version)
            numbers[row.episode].add(row.number)
        few = sorted(group for group, of_group in batches.items() if len(of_group) < most_uses)
        place = {episode: number for number, episode in enumerate(numbers)}
        members: dict[int, list[Row[Any]]] = {group: [] for group in few}
        query = select(EPISODES).where(EPISODES.c.outcome == "trained")
        for row in self._in(query, EPISODES.c.group, few):
            members[row.group].append(row)
        found = []
        for group in self._in(select(GROUPS), GROUPS.c.group, few):
            rows = sorted(members[group.group], key=lambda row: place.get(row.episode, -1))
            if group.start < since_start.get(group.task_set, math.inf):
                continue
            sequences = self.sequences([row.episode for row in rows])
            if all(len(sequences[row.episode]) >= len(numbers[row.episode]) for row in rows):
                found.append(
                    UsedGroup(
                        group=group.group,
                        task=_task(group),
                        episodes=[_ready(row, sequences[row.episode]) for row in rows],
                        uses=len(batches[group.group]),
                    )
                )
        return found

    # ── batches ──────────────────────────────────────────────────────────────────────────────

    def whole_batches(self, version: int) -> dict[int, int]:
        """The versions, from that one on, whose batch was handed over to its last part, in order;
        and the start that first trained each, or else handed it over."""
        query = select(BATCHES.c.version, BATCHES.c.start).order_by(BATCHES.c.version)
        rows = self._rows(query.where(BATCHES.c.last, BATCHES.c.version >= version))
        start_of = {row.version: row.start for row in rows}
        trained_by = {row.step - 1: row.start for row in self.steps()}
        return {number: trained_by.get(number, start) for number, start in start_of.items()}

    def has_samples(self, version: int) -> bool:
        """Whether the log has the tokens and advantages of all samples of that version's batch."""
        of_samples = select(SAMPLES.c.episode, SAMPLES.c.number, SAMPLES.c.advantage)
        samples = self._rows(of_samples.where(SAMPLES.c.version == version))
        if not all(len(row.advantage) for row in samples):
            return False
        wanted = {(row.episode, row.number) for row in samples}
        query = select(SEQUENCES.c.episode, SEQUENCES.c.number)
        episodes = sorted({episode for episode, _ in wanted})
        rows = self._in(query, SEQUENCES.c.episode, episodes)
        if not wanted <= {(row.episode, row.number) for row in rows}:
            return False
        query = select(EXPERT_SAMPLES.c.digest).where(EXPERT_SAMPLES.c.version == version)
        imitated = {row.digest for row in self._rows(query)}
        return imitated <= {*self._expert_sequences(sorted(imitated))}

    def batch(self, version: int) -> list[Batch]:
        """The parts that were handed over for that version; one, unless it was streamed."""
        query = select(SAMPLES).where(SAMPLES.c.version == version)
        samples = self._rows(query.order_by(SAMPLES.c.part, SAMPLES.c.position))
        episodes = sorted({row.episode for row in samples})
        sequences = self.sequences(episodes)
        turn_rewards = {
            row.episode: row.turn_rewards
            for row in self._in(
                select(EPISODES.c.episode, EPISODES.c.turn_rewards), EPISODES.c.episode, episodes
            )
        }
        of_parts: dict[int, list[Sample]] = defaultdict(list)
        for row in samples:
            of_parts[row.part].append(
                Sample.extending(
                    sequences[row.episode][row.number],
                    advantage=_advantage(row.advantage),
                    reward=row.reward,
                    turn_rewards=turn_rewards[row.episode],
                    group=row.group,
                    episode=row.episode,
                )
            )
        expert = self._expert(version)
        parts = select(BATCHES).where(BATCHES.c.version == version).order_by(BATCHES.c.part)
        return [
            Batch(
                samples=of_parts[row.part],
                version=version,
                last=row.last,
                metrics=row.metrics,
                expert=(
                    None
                    if row.expert_weight is None
                    else ExpertShare(sequences=expert[row.part], weight=row.expert_weight)
                ),
            )
            for row in self._rows(parts)
        ]

    def _expert(self, version: int) -> dict[int, list[ExpertSequence]]:
        """What each part of that version's batch imitates."""
        query = select(EXPERT_SAMPLES).where(EXPERT_SAMPLES.c.version == version)
        rows = self._rows(query.order_by(EXPERT_SAMPLES.c.part, EXPERT_SAMPLES.c.position))
        written = self._expert_sequences(sorted({row.digest for row in rows}))
        of_parts: dict[int, list[ExpertSequence]] = defaultdict(list)
        for row in rows:
            of_parts[row.part].append(written[row.digest])
        return of_parts

    def _expert_sequences(self, digests: Sequence[str]) -> dict[str, ExpertSequence]:
        return {
            row.digest: ExpertSequence(
                token_ids=row.token_ids.astype(np.int64),
                loss_mask=row.loss_mask,
                source=row.source,
            )
            for row in self._in(select(EXPERT), EXPERT.c.digest, digests)
        }

    def known_expert(self) -> list[str]:
        """The digests of all that was ever imitated."""
        return [row.digest for row in self._rows(select(EXPERT.c.digest))]


def observation_of(row: Row[Any]) -> Observation:
    """Of a row of OBSERVATIONS."""
    return Observation(
        text=row.text,
        reward=row.reward,
        terminated=row.terminated,
        truncated=row.truncated,
        info=row.info,
    )


def _task(group: Row[Any]) -> Task:
    return Task(group.seed, group.options, group.task_set)


def _after(last: int | None) -> int:
    return 0 if last is None else last + 1


def _played_at(row: Row[Any]) -> float:
    return row.played_at or 0.0


def _is_ready(row: Row[Any]) -> bool:
    return row.outcome is None and row.played_at is not None


def _was_cut_off(row: Row[Any]) -> bool:
    """By the crash now, or by one before, from which another may have gone on."""
    return row.played_at is None and (row.outcome is None or row.reason == INTERRUPTED)


def _said_until(
    row: Row[Any], of_group: Mapping[int, Row[Any]], histories: Mapping[int, History]
) -> History:
    """The history of an episode; of one that was cut off before it came to where the one that it
    continues was, that one's."""
    history = histories.get(row.episode, ())
    before = row.continues
    while before in of_group:
        longer = histories.get(before, ())
        if len(longer) > len(history) and list(longer[: len(history)]) == list(history):
            history = longer
        before = of_group[before].continues
    return history


def _due(
    members: Sequence[Row[Any]],
    histories: Mapping[int, History],
    *,
    episodes: int,
    max_attempts: int,
) -> list[DueEpisode]:
    """What a group lacks still: those that were cut off first.

    Where more are under way than it needs, the first of them had been given up for others.
    """
    due = Counter({1: episodes})
    cut_off: list[DueEpisode] = []
    by_id = {row.episode: row for row in members}
    continued = {row.continues for row in members}
    for row in members:
        due[row.attempt] -= 1
        if _was_cut_off(row) and row.episode not in continued:
            history = _said_until(row, by_id, histories)
            cut_off.append(
                DueEpisode(
                    attempt=row.attempt, episode=row.episode, start=row.start, history=history
                )
            )
        elif row.outcome == "failed" and row.attempt < max_attempts:
            due[row.attempt + 1] += 1
        elif row.outcome in ("cancelled", "dropped") and row.reason in _BEGUN_AGAIN:
            due[row.attempt] += 1
    for attempt, count in due.items():
        for _ in range(count, 0):
            given_up = next((each for each in cut_off if each.attempt == attempt), None)
            if given_up is not None:
                cut_off.remove(given_up)
    others = [DueEpisode(attempt=attempt) for attempt, count in due.items() for _ in range(count)]
    return cut_off + others


def _ready(row: Row[Any], sequences: list[SampledSequence]) -> ReadyEpisode:
    return ReadyEpisode(
        episode=row.episode,
        attempt=row.attempt,
        trajectory=_trajectory(row, sequences),
        prompt_tokens=row.prompt_tokens,
        generated_tokens=row.generated_tokens,
    )


def _trajectory(row: Row[Any], sequences: list[SampledSequence]) -> Trajectory:
    return Trajectory(
        sequences=sequences,
        reward=row.reward,
        turns=row.turns,
        success=row.success,
        turn_rewards=row.turn_rewards,
        turn_states=row.turn_states,
        role_rewards=row.role_rewards or {},
    )


def _advantage(array: np.ndarray[Any, Any]) -> Any:
    """One number, or one for each token."""
    return float(array[0]) if len(array) == 1 else array.astype(np.float32)
