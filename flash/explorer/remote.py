"""An episode that is played elsewhere, as its controller knows it."""

from flash.errors import EpisodeFailure
from flash.explorer.messages import Anew, Began, Ended, Said, Step, Told, history_of
from flash.rollout.episode import Cancelled, Episode, EpisodeEnd, Stage
from flash.rollout.history import History


class RemoteFailure(EpisodeFailure):
    """What an episode failed of, where it was played."""

    def __init__(self, kind: str, words: str) -> None:
        super().__init__(words)
        self.kind = kind


class RemoteEpisode(Episode):
    """Its stage, clocks and counts follow what is told of it, in `steps`, as far as is known."""

    def follow(self, step: Step) -> EpisodeEnd | None:
        """One more step of it; the last one is its end."""
        match step:
            case Told():
                if self._witness is not None:
                    self._witness.observed(self, step.observation())
            case Said():
                self._follow_answer(step)
            case Began():
                self._note_version(step.version)
            case Anew():
                self._reset_counts()
                if self._witness is not None:
                    self._witness.begun_anew(self)
            case Ended():
                return self._follow_end(step)
        return None

    def _follow_answer(self, said: Said) -> None:
        completion = said.step.completion
        self.turns += 1
        self.generated_tokens += len(completion.token_ids)
        if completion.versions:
            self._note_versions(completion)
        if self._witness is not None:
            self._witness.sampled(self, said.step)

    def _follow_end(self, ended: Ended) -> EpisodeEnd:
        self.prompt_tokens = ended.prompt_tokens
        self.generated_tokens = ended.generated_tokens
        self.turns = ended.turns
        self.seconds = dict(ended.seconds)
        self.tool_uses = dict(ended.tool_uses)
        self.is_at("start")  # from here on nothing is timed but how long it waits
        if ended.trajectory is not None:
            return ended.trajectory
        return RemoteFailure(ended.failure, ended.words) if ended.failure else Cancelled()

    def is_at(self, stage: str) -> None:
        """Where it is played, it is at that stage."""
        if stage != self.stage_name:
            self._stages = [Stage(stage)]
            self.stage_since = self.clock()


def cut_off(steps: list[Step], before: History) -> Cancelled:
    """The end of an episode whose explorer is gone: of what it went on from, or has come to."""
    history = history_of(steps)
    return Cancelled(history if len(history) >= len(before) else before)
