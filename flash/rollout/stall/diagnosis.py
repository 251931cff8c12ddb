"""Why nothing moves: one cause in words, of all that the loop, its hub and its caller show.

publish under way  ─► a worker, or the probe                     publish_stuck
no call under way  ─► the caller, or the trainer that it awaits  trainer_dead, trainer_hangs,
                                                                 nobody_collects
a batch awaited    ─► the log can't be written                   log_blocked
                   ─► episodes end, and all of them stale        all_stale
                   ─► none runs                                  publish_missing, nothing_runs
                   ─► given up, and still there                  cancellation_ignored
                   ─► most of them wait in one stage:
                      generate   workers_out, worker_hangs, lost_answer, queue_stuck
                      env        env_asleep
                      reward     reward_hangs
                      any other  agent_waits
"""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from flash.errors import RolloutStall
from flash.hub.reports import HubStats, WorkerStats
from flash.rollout.episode import Episode
from flash.rollout.ledger import Ledger
from flash.rollout.stall.activity import Activity, Call
from flash.rollout.stall.stacks import culprit, waiting_stack
from flash.types import TrainerState

_EPISODES_NAMED = 8
# So many capacities' worth of episodes grew stale: it is no accident.
_FRUITLESS = 2
_SAME_TIME_S = 1e-3


class InspectedHub(Protocol):
    """What a diagnosis asks of the hub."""

    def stats(self) -> HubStats: ...

    def whereabouts(self, session: str) -> str: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionState:
    """Whether the loop may start episodes: not, if what they sampled could not be trained."""

    next_version: int
    fresh: bool
    due: int
    unpublished: int  # samples handed over
    log: str  # why the log lets nothing begin


class InspectedLoop(Protocol):
    """What a diagnosis looks at of the RolloutLoop."""

    @property
    def activity(self) -> Activity: ...
    @property
    def hub(self) -> InspectedHub: ...
    @property
    def ledger(self) -> Ledger: ...
    @property
    def capacity(self) -> int: ...
    @property
    def alpha(self) -> float: ...

    def under_way(self) -> list[Episode]: ...

    def admission_state(self) -> AdmissionState: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """The one cause: its name, a sentence, and whom to cancel or start anew, if anybody."""

    name: str
    words: str
    episodes: Sequence[Episode] = ()
    worker: str = ""


def fruitless(loop: InspectedLoop) -> bool:
    """Whether episodes grow stale and are begun again, and the next batch comes no nearer.

    Of those that fail or are filtered the loop itself bears so many only.
    """
    return _stale(loop.activity.ended_since_gain) >= _FRUITLESS * loop.capacity


def _stale(ended: Counter[str]) -> int:
    return ended["cancelled(stale)"] + ended["dropped(stale)"]


def find_cause(loop: InspectedLoop, call: Call | None, trainer: TrainerState | None) -> Cause:
    """Why `call` does not return; without one, why the loop's caller makes none."""
    if call is None:
        return _of_the_caller(loop, trainer)
    if call.name == "publish":
        return _of_the_publish(loop.hub.stats())
    return _of_the_episodes(loop)


def _of_the_caller(loop: InspectedLoop, trainer: TrainerState | None) -> Cause:
    if trainer is not None and trainer.dead:
        return Cause(name="trainer_dead", words=f"the trainer is dead: {trainer.dead}")
    if trainer is not None and trainer.doing:
        for_s = _now() - trainer.since
        words = f"the trainer hangs: it has been in '{trainer.doing}' for {for_s:.1f} s"
        return Cause(name="trainer_hangs", words=words)
    for_s = _now() - loop.activity.idle_since
    if trainer is None and loop.admission_state().unpublished:
        words = (
            f"the trainer hangs: whoever took the last batch has had it for {for_s:.1f} s and "
            f"published nothing"
        )
        return Cause(name="trainer_hangs", words=words)
    words = (
        f"nobody collects: {loop.ledger.ready} episodes are ready for a batch, and the caller "
        f"has neither asked for one nor published for {for_s:.1f} s"
    )
    return Cause(name="nobody_collects", words=words)


def _of_the_publish(stats: HubStats) -> Cause:
    for worker in stats.workers:
        if worker.updating or worker.asleep:
            words = f"the publish is stuck: worker {worker.name} does not take the new weights"
            return Cause(name="publish_stuck", words=words, worker=worker.name)
    words = "the publish is stuck: the workers have the weights, and the probe of them has no end"
    return Cause(name="publish_stuck", words=words)


def _of_the_episodes(loop: InspectedLoop) -> Cause:
    if log := loop.admission_state().log:
        return Cause(name="log_blocked", words=f"nothing counts that is not on disk: {log}")
    if fruitless(loop):
        return _of_what_ended(loop)
    if running := loop.under_way():
        return _of_running(loop.hub, running)
    return _of_admission(loop)


def _of_running(hub: InspectedHub, episodes: Sequence[Episode]) -> Cause:
    running = _longest_first(episodes)
    if ignoring := [episode for episode in running if episode.cancel_reason is not None]:
        words = (
            f"{_agents(ignoring)} ignored the cancellation, for '{ignoring[0].cancel_reason}', "
            f"and goes on{_where(ignoring[0])}"
        )
        return Cause(name="cancellation_ignored", words=words, episodes=ignoring)
    stages = Counter(episode.stage_name for episode in running)
    stage = max(stages, key=lambda name: stages[name])
    blocking = [episode for episode in running if episode.stage_name == stage]
    if stage == "generate":
        return _of_generation(hub, blocking)
    first = blocking[0]
    name, words = {
        "env": ("env_asleep", f"the environment is asleep in {_episodes(blocking)}"),
        "reward": ("reward_hangs", f"the reward hangs in {_episodes(blocking)}"),
    }.get(stage, ("agent_waits", f"{_agents(blocking)} waits for something of its own"))
    return Cause(name=name, words=words + _where(first), episodes=blocking)


def _of_what_ended(loop: InspectedLoop) -> Cause:
    ended = loop.activity.ended_since_gain
    words = (
        f"everything grows stale: {_stale(ended)} of the last {ended.total()} episodes that ended, "
        f"and no batch came nearer. Weights are published faster than groups are whole: publish "
        f"less often, raise alpha={loop.alpha:g}, or make episodes shorter"
    )
    return Cause(name="all_stale", words=words)


def _of_admission(loop: InspectedLoop) -> Cause:
    admission = loop.admission_state()
    if not admission.fresh or admission.unpublished:
        words = (
            f"a publish is missing: {admission.unpublished} samples were handed over, and with "
            f"alpha={loop.alpha:g} nothing more is started until version "
            f"{admission.next_version} is published"
        )
        return Cause(name="publish_missing", words=words)
    words = (
        f"no episode runs: {loop.ledger.ready} are ready, but make up no batch, and "
        f"{admission.due} wait for a slot"
    )
    return Cause(name="nothing_runs", words=words)


def _of_generation(hub: InspectedHub, blocking: Sequence[Episode]) -> Cause:
    stats = hub.stats()
    healthy = [worker for worker in stats.workers if worker.healthy]
    if not healthy:
        words = (
            f"all {len(stats.workers)} workers are out, and {_episodes(blocking)} ask for tokens"
        )
        return Cause(name="workers_out", words=words, episodes=blocking)
    places = Counter(hub.whereabouts(episode.session) for episode in blocking)
    place = max(places, key=lambda name: places[name])
    worker = next((worker for worker in healthy if worker.name == place), None)
    if worker is None:  # in the queue, where they wait for whoever is full and does nothing
        worker = max(healthy, key=lambda worker: worker.quiet_s)
    if any(each.updating for each in healthy):
        return _of_the_publish(stats)
    if worker.running:
        return _of_worker(worker, blocking)
    words = f"the hub's queue is stuck: {stats.queued} requests wait beside workers with room"
    return Cause(name="queue_stuck", words=words, episodes=blocking)


def _of_worker(worker: WorkerStats, blocking: Sequence[Episode]) -> Cause:
    if worker.quiet_s < worker.newest_s - _SAME_TIME_S:  # it answered others that came later
        words = (
            f"an answer is lost: worker {worker.name} has had a request for "
            f"{worker.oldest_s:.1f} s and answered others since"
        )
        return Cause(name="lost_answer", words=words, episodes=blocking, worker=worker.name)
    words = (
        f"worker {worker.name} hangs: it has {worker.running} requests, and gave no sign for "
        f"{worker.quiet_s:.1f} s"
    )
    return Cause(name="worker_hangs", words=words, episodes=blocking, worker=worker.name)


# ── the report ───────────────────────────────────────────────────────────────────────────────


def write_report(
    loop: InspectedLoop,
    cause: Cause,
    *,
    since: float,
    trainer: TrainerState | None,
    caller: asyncio.Task[object] | None,
) -> str:
    """All that is known of a stall, the cause first."""
    admission = loop.admission_state()
    lines = _tell_of_episodes(cause, loop.under_way(), for_s=_now() - since)
    lines.append(
        f"loop: {loop.ledger.running} run, {loop.ledger.ready} are ready, {admission.due} wait "
        f"for a slot of {loop.capacity}, {admission.unpublished} are handed over and not "
        f"published; the next batch is trained at version {admission.next_version}"
    )
    if ended := loop.activity.ended_since_gain:
        told = ", ".join(f"{count} {reason}" for reason, count in ended.most_common())
        lines.append(f"ended since the last gain: {told}")
    lines += _tell_of_hub(loop.hub.stats())
    lines.append(f"trainer: {_describe_trainer(trainer)}")
    calls = [f"{call.name} for {_now() - call.since:.1f} s" for call in loop.activity.calls]
    idle = f"none, for {_now() - loop.activity.idle_since:.1f} s"
    lines.append(f"calls of the loop: {', '.join(calls) or idle}")
    if caller is not None and not caller.done():
        lines += [f"      {line}" for line in waiting_stack(caller)]
    return "\n".join(lines)


def stall_of(
    what: str, hub: InspectedHub, episodes: Sequence[Episode], *, for_s: float
) -> RolloutStall:
    """That of episodes which are not the loop's: an evaluation's."""
    cause = _of_running(hub, episodes)
    lines = _tell_of_episodes(cause, episodes, for_s=for_s) + _tell_of_hub(hub.stats())
    return RolloutStall(cause.name, f"{what}: " + "\n".join(lines))


def _tell_of_episodes(cause: Cause, running: Sequence[Episode], *, for_s: float) -> list[str]:
    named = [*cause.episodes, *(e for e in _longest_first(running) if e not in cause.episodes)]
    lines = [
        f"no progress for {for_s:.1f} s: {cause.words} [{cause.name}]",
        f"{len(cause.episodes)} episodes block, of {len(running)} that run:",
    ]
    for episode in named[:_EPISODES_NAMED]:
        blocks = "" if episode in cause.episodes else " (blocks nobody)"
        lines.append(f"  {episode.describe()}{blocks}")
        lines += [f"      {line}" for line in _stack(episode)]
    if len(named) > _EPISODES_NAMED:
        lines.append(f"  … and {len(named) - _EPISODES_NAMED} more")
    return lines


def _tell_of_hub(stats: HubStats) -> list[str]:
    return [
        f"hub: version {stats.version}, {stats.queued} queued, {stats.running} at workers, "
        f"{stats.retries} retries",
        *(f"  {_describe_worker(worker)}" for worker in stats.workers),
    ]


def _longest_first(episodes: Sequence[Episode]) -> list[Episode]:
    return sorted(episodes, key=lambda episode: episode.stage_since)


def _describe_worker(worker: WorkerStats) -> str:
    health = "healthy" if worker.healthy else "out"
    updating = ", takes new weights" if worker.updating else ""
    updating += ", sleeps" if worker.asleep else ""
    signs = f", last sign {worker.quiet_s:.1f} s ago, oldest request {worker.oldest_s:.1f} s"
    return (
        f"worker {worker.name}: {health}{updating}, version {worker.version}, {worker.running} "
        f"requests{signs if worker.running else ''}"
    )


def _describe_trainer(trainer: TrainerState | None) -> str:
    if trainer is None:
        return "not known"
    if trainer.dead:
        return f"dead: {trainer.dead}"
    return f"in '{trainer.doing}' for {_now() - trainer.since:.1f} s" if trainer.doing else "idle"


def _episodes(episodes: Sequence[Episode]) -> str:
    for_s = _now() - episodes[0].stage_since
    count = f"{len(episodes)} episodes" if len(episodes) > 1 else "1 episode"
    return f"{count} (episode {episodes[0].id} for {for_s:.1f} s)"


def _agents(episodes: Sequence[Episode]) -> str:
    return f"the agent of {_episodes(episodes)}"


def _where(episode: Episode) -> str:
    stack = _stack(episode)
    return f", at {culprit(stack)}" if stack else ""


def _stack(episode: Episode) -> list[str]:
    """An agent's task has its episode's name."""
    for task in asyncio.all_tasks():
        if task.get_name() == episode.session:
            return waiting_stack(task)
    return []


def _now() -> float:
    return asyncio.get_running_loop().time()
