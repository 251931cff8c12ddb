"""What every agent here shares: a mailbox, one episode at a time, a deadline, one report each."""

import asyncio
from collections.abc import Awaitable, Callable

from flash.deadline import Deadline
from flash.errors import AgentFailure, DeadlineFailure, EpisodeFailure, HistoryDiverged
from flash.rollout.episode import Abort, Cancelled, Episode, EpisodeEnd, Message, Start, Stop
from flash.types import Trajectory

RewardStage = Callable[[Episode, Trajectory], Awaitable[Trajectory]]


class Actor:
    """One coroutine, one mailbox; a subclass says in `play` how an episode is lived.

    Args:
        episode_timeout_s: past it the episode fails (deadline).
        reward_stage: gives what `play` returns another reward.
    """

    def __init__(
        self, *, episode_timeout_s: float, reward_stage: RewardStage | None = None
    ) -> None:
        # Bound: at most one Start, one Abort and one Stop are ever under way.
        self.mailbox: asyncio.Queue[Message] = asyncio.Queue(maxsize=4)
        self._episode_timeout_s = episode_timeout_s
        self._reward_stage = reward_stage

    async def play(self, episode: Episode) -> Trajectory:
        """One whole episode. EpisodeFailure ends it, HistoryDiverged has it played again from the
        beginning, any other error ends the agent."""
        raise NotImplementedError

    async def run(self, report: Callable[[Episode, EpisodeEnd], None]) -> None:
        """Reads the mailbox until Stop; an error that `play` did not foresee ends the agent."""
        async with asyncio.TaskGroup() as tasks:
            life: tuple[Episode, asyncio.Task[None]] | None = None
            while True:
                message = await self.mailbox.get()
                match message:
                    case Start(episode):
                        coroutine = self._live(episode, report)
                        life = episode, tasks.create_task(coroutine, name=episode.session)
                        # A task that is cancelled before its first turn has none, and no report.
                        await asyncio.sleep(0)
                    case Abort(episode):
                        if life is not None and life[0] is episode:
                            life[1].cancel()
                    case Stop():
                        if life is not None:
                            life[1].cancel()
                        return

    async def _live(self, episode: Episode, report: Callable[[Episode, EpisodeEnd], None]) -> None:
        end: EpisodeEnd
        try:
            with Deadline(self._episode_timeout_s) as deadline:
                try:
                    end = await self.play(episode)
                except HistoryDiverged as difference:
                    episode.begin_anew(difference)
                    end = await self.play(episode)
                if self._reward_stage is not None:
                    end = await self._reward_stage(episode, end)
        except EpisodeFailure as failure:
            end = failure
        except TimeoutError:
            if not deadline.expired:
                raise
            end = DeadlineFailure(
                f"episode_timeout_s={self._episode_timeout_s:g} passed after {episode.turns} turns"
            )
        except asyncio.CancelledError:
            life = asyncio.current_task()
            if life is None or life.cancelling():
                report(episode, Cancelled())
                raise
            end = AgentFailure("the episode was cancelled by what it called, and by nobody else")
        report(episode, end)
