"""Episodes as the log has them, chosen by number, by group, by reward or by what became of them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from sqlalchemy import Row, Select, func, select

from flash.command_line import nearest
from flash.conversation import SpokenTurn, spoken_turns
from flash.log.reading import Reader
from flash.log.schema import EPISODES
from flash.rollout.history import Sampled
from flash.types import Observation, Outcome, SampledSequence, Task, Trajectory

Which = Literal["trained", "ended", "played"]

# Columns of EPISODES that are taken as they are.
_OF_ROW = (
    *("episode", "group", "attempt", "start", "continues", "admitted_at", "played_at", "ended_at"),
    *("reward", "success", "prompt_tokens", "generated_tokens"),
    *("version_min", "version_max", "trained_at_version"),
)


@dataclass(frozen=True, slots=True)
class Seen:
    """What an environment answered, and when."""

    at: float
    observation: Observation


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedTurn:
    """A response. `before` and `after` say which observations of the episode were around it, where
    that is known. Of an episode that came to no end `spoken.read` is not known: it is empty."""

    spoken: SpokenTurn
    reward: float | None = None
    before: int | None = None
    after: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedEpisode:
    """An episode, however far it came. Times are seconds since 1970; `outcome` is empty while it
    has none. `sequences` are there once it came to its end, unless they have gone since."""

    episode: int
    group: int
    attempt: int
    start: int
    continues: int | None
    task: Task
    admitted_at: float
    played_at: float | None
    ended_at: float | None
    outcome: str
    reason: str
    reward: float | None
    success: bool | None
    prompt_tokens: int | None
    generated_tokens: int | None
    version_min: int | None
    version_max: int | None
    trained_at_version: int | None
    stages_s: Mapping[str, float]
    turn_rewards: Sequence[float]
    role_rewards: Mapping[str, float]
    sequences: Sequence[SampledSequence]
    turns: Sequence[LoggedTurn]
    seen: Sequence[Seen]

    def took_s(self, turn: LoggedTurn) -> float | None:
        """From the observation before a turn to the one after it."""
        if turn.before is None or turn.after is None:
            return None
        return self.seen[turn.after].at - self.seen[turn.before].at

    @property
    def is_gone(self) -> bool:
        """Whether all that was said and observed in it has gone from the log (`log.keep`)."""
        return bool(self.generated_tokens) and not (self.sequences or self.turns or self.seen)

    @property
    def trajectory(self) -> Trajectory | None:
        """What it was worth; None if it came to no end."""
        if self.reward is None:
            return None
        return Trajectory(
            sequences=list(self.sequences),
            reward=self.reward,
            turns=len(self.turns),
            success=bool(self.success),
            turn_rewards=self.turn_rewards,
            role_rewards=self.role_rewards,
        )


class EpisodeReader(Reader):
    """A reader that also looks episodes up."""

    _task_set: str | None = None  # of which it chooses

    def episode(self, number: int) -> list[LoggedEpisode]:
        """ValueError if there is none of that number."""
        return self._found(
            select(EPISODES).where(EPISODES.c.episode == number),
            f"--episode {number}: the log has no such episode",
            EPISODES.c.episode,
        )

    def group(self, number: int) -> list[LoggedEpisode]:
        """Its episodes, in the order in which they began. ValueError if there is none."""
        return self._found(
            select(EPISODES).where(EPISODES.c.group == number).order_by(EPISODES.c.episode),
            f"--group {number}: the log has no such group",
            EPISODES.c.group,
        )

    def of_set(self, task_set: str) -> Self:
        """Chooses among the episodes of that task set only. ValueError if there are none."""
        names = [row.task_set for row in self._rows(select(EPISODES.c.task_set).distinct())]
        if task_set not in names:
            known = ", ".join(sorted(filter(None, names)))
            raise ValueError(
                f"--task-set {task_set}: the log has no episode of it: "
                + (f"there are {known}" if known else "the run has no task sets")
            )
        self._task_set = task_set
        return self

    def _ended(self, outcome: Outcome) -> Select[Any]:
        query = select(EPISODES).where(EPISODES.c.outcome == outcome)
        return (
            query if self._task_set is None else query.where(EPISODES.c.task_set == self._task_set)
        )

    def newest_trained(self) -> list[LoggedEpisode]:
        """ValueError if none was trained yet."""
        newest = self._ended("trained").order_by(
            EPISODES.c.trained_at_version.desc(), EPISODES.c.ended_at.desc(), _NEWEST
        )
        return self._first(newest) or self._nothing_trained()

    def worst_trained(self) -> list[LoggedEpisode]:
        """That of the lowest reward; of several the newest. ValueError if none was trained yet."""
        worst = self._ended("trained").where(EPISODES.c.reward.is_not(None))
        return self._first(worst.order_by(EPISODES.c.reward, _NEWEST)) or self._nothing_trained()

    def newest_dropped(self, reason: str) -> list[LoggedEpisode]:
        """Of those that were dropped for that reason, or for any. ValueError if there is none."""
        dropped = self._ended("dropped")
        chosen = dropped.where(EPISODES.c.reason == reason) if reason else dropped
        if found := self._first(chosen.order_by(EPISODES.c.ended_at.desc(), _NEWEST)):
            return found
        reasons = Counter(
            row.reason for row in self._rows(dropped.with_only_columns(EPISODES.c.reason))
        )
        if not reasons:
            raise ValueError("--dropped: no episode was dropped: leave it out")
        there_are = ", ".join(f"{name} ({count})" for name, count in reasons.most_common())
        raise ValueError(
            f"--dropped {reason}: no episode was dropped for that: "
            f"{nearest(reason, reasons, f'there are {there_are}')}"
        )

    def page(self, which: Which, *, after: int, most: int) -> list[LoggedEpisode]:
        """The next ones, by their numbers: those that were trained, that have an outcome, or that
        have a reward."""
        query = select(EPISODES).where(EPISODES.c.episode > after)
        match which:
            case "trained":
                query = query.where(EPISODES.c.outcome == "trained")
            case "ended":
                query = query.where(EPISODES.c.outcome.is_not(None))
            case "played":
                query = query.where(EPISODES.c.reward.is_not(None))
        return self._whole(self._rows(query.order_by(EPISODES.c.episode).limit(most)))

    def worth(self, episodes: Sequence[int]) -> dict[int, Trajectory]:
        """What each of these episodes was worth, without what was said in it."""
        columns = EPISODES.c
        query = select(
            columns.episode, columns.reward, columns.turns, columns.turn_rewards,
            columns.turn_states, columns.role_rewards,
        )  # fmt: skip
        return {
            row.episode: Trajectory(
                sequences=[],
                reward=row.reward,
                turns=row.turns,
                turn_rewards=row.turn_rewards,
                turn_states=row.turn_states or (),
                role_rewards=row.role_rewards or {},
            )
            for row in self._in(query, columns.episode, episodes)
        }

    def _first(self, query: Select[Any]) -> list[LoggedEpisode]:
        return self._whole(self._rows(query.limit(1)))

    def _found(self, query: Select[Any], missing: str, column: Any) -> list[LoggedEpisode]:
        if found := self._whole(self._rows(query)):
            return found
        first, last = tuple(self._rows(select(func.min(column), func.max(column)))[0])
        known = "it is empty so far" if first is None else f"it has {first} to {last}"
        raise ValueError(f"{missing}: {known}")

    def _nothing_trained(self) -> list[LoggedEpisode]:
        raise ValueError(
            "no episode was trained yet: give --episode N, --group N or --dropped, or wait for a "
            "step"
        )

    def _whole(self, rows: Sequence[Row[Any]]) -> list[LoggedEpisode]:
        numbers = [row.episode for row in rows]
        tasks = self.tasks(sorted({row.group for row in rows}))
        sequences, histories = self.sequences(numbers), self.timed_histories(numbers)
        return [
            _episode(
                row,
                tasks[row.group],
                sequences.get(row.episode, []),
                histories.get(row.episode, []),
            )
            for row in rows
        ]


_NEWEST = EPISODES.c.episode.desc()


def _episode(
    row: Row[Any],
    task: Task,
    sequences: Sequence[SampledSequence],
    history: Sequence[tuple[float, Observation | Sampled]],
) -> LoggedEpisode:
    seen = [Seen(at, said) for at, said in history if isinstance(said, Observation)]
    turn_rewards = row.turn_rewards or ()
    if sequences:
        turns = _turns(spoken_turns(sequences), seen, turn_rewards)
    else:
        turns = _turns_cut_off(history)
    return LoggedEpisode(
        **{name: getattr(row, name) for name in _OF_ROW},
        outcome=row.outcome or "",
        reason=row.reason or "",
        task=task,
        stages_s=row.stages_s or {},
        turn_rewards=turn_rewards,
        role_rewards=row.role_rewards or {},
        sequences=sequences,
        turns=turns,
        seen=seen,
    )


def _turns(
    spoken: Sequence[SpokenTurn], seen: Sequence[Seen], rewards: Sequence[float]
) -> list[LoggedTurn]:
    """Rewards and observations are put to turns where there are as many as turns have."""
    fits = len(seen) == len(spoken) + 1
    return [
        LoggedTurn(
            spoken=turn,
            reward=rewards[number] if len(rewards) == len(spoken) else None,
            before=number if fits else None,
            after=number + 1 if fits else None,
        )
        for number, turn in enumerate(spoken)
    ]


def _turns_cut_off(history: Sequence[tuple[float, Observation | Sampled]]) -> list[LoggedTurn]:
    turns: list[LoggedTurn] = []
    observed = 0  # so far
    for _, said in history:
        if isinstance(said, Observation):
            if turns and turns[-1].after is None:
                turns[-1] = replace(turns[-1], after=observed, reward=said.reward)
            observed += 1
            continue
        completion = said.completion
        turns.append(
            LoggedTurn(
                spoken=SpokenTurn(
                    read=[],
                    said=completion.token_ids,
                    logprobs=completion.logprobs,
                    versions=completion.versions,
                ),
                before=observed - 1 if observed else None,
            )
        )
    return turns
