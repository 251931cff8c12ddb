"""Workers that fail, hang or die are excluded, and brought back once they are healthy."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from flash.errors import InferenceFailure
from flash.hub.queue import RequestQueue
from flash.hub.slot import Slot
from flash.hub.worker import BadRequest, Pool, WeightsGone, Worker, WorkerBroken, WorkerFailure

logger = logging.getLogger(__name__)

_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 0.5, 8.0
_HEALTH_TIMEOUT_S = 10.0
_FAILED_CHECKS_UNTIL_RESTART = 3


class Supervisor:
    """Decides which of `slots` are healthy, and closes the queue when none can be again.

    Args:
        slots: the hub's own list, which it fills at its start.
        tasks: where recoveries run.
        pool: who starts workers anew; None if nobody here does.
        catch_up: gives a worker the present weights and version, and leaves it going.
        control_timeout_s, recovery_timeout_s, progress_timeout_s: as for the hub.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        queue: RequestQueue,
        tasks: asyncio.TaskGroup,
        *,
        pool: Pool | None,
        catch_up: Callable[[Slot], Awaitable[None]],
        control_timeout_s: float,
        recovery_timeout_s: float,
        progress_timeout_s: float,
    ) -> None:
        self.recovery_timeout_s = recovery_timeout_s
        self.progress_timeout_s = progress_timeout_s
        self._slots = slots
        self._queue = queue
        self._tasks = tasks
        self._pool = pool
        self._catch_up = catch_up
        self._control_timeout_s = control_timeout_s
        self._recoveries: set[asyncio.Task[None]] = set()
        self._at_work = asyncio.Event()  # clear while workers sleep
        self._at_work.set()
        self._last_cause = WorkerFailure("no worker has failed")
        # Runs while no worker is healthy.
        self._recovery_deadline: asyncio.TimerHandle | None = None

    async def introduce(self, slot: Slot) -> None:
        """Gives a worker its version at the start of the hub."""
        try:
            async with slot.control(self._control_timeout_s):
                await self._catch_up(slot)
        except WorkerFailure as failure:
            self.exclude(slot, failure)
        except BadRequest as error:
            self.exclude(slot, WorkerFailure(str(error)))

    def exclude(self, slot: Slot, cause: WorkerFailure) -> None:
        """No more requests for this worker, and those it has go elsewhere, until it is healthy."""
        if not slot.healthy and not slot.lost:
            return  # it is known, and being looked after
        was_healthy, slot.healthy = slot.healthy, False
        if slot.lent is not None:  # what comes back has other weights
            slot.lent.end(str(cause))
        slot.expire_calls()
        if self._queue.failure is not None:
            return
        if isinstance(cause, WorkerBroken) or slot.asleep:
            self._restart(slot)
        if was_healthy:
            logger.warning("worker excluded: %s", cause)
        if all(other.lost for other in self._slots):
            self._fail(cause)
            return
        self._last_cause = cause
        self._set_recovery_deadline()
        if was_healthy:
            recovery = self._tasks.create_task(
                self._recover(slot), name=f"recover {slot.worker.name}"
            )
            self._recoveries.add(recovery)
            recovery.add_done_callback(self._recoveries.discard)

    async def _recover(self, slot: Slot) -> None:
        """Asks for its health until that is good, then gives it the present weights."""
        failed_checks = 0
        reason = ""
        while self._queue.failure is None:
            await slot.started.wait()
            if slot.lost:
                return
            # A worker that fails again before it has answered anything waits longer.
            await asyncio.sleep(min(_FIRST_BACKOFF_S * 2**slot.failures, _LONGEST_BACKOFF_S))
            slot.failures = min(slot.failures + 1, 10)
            await self._at_work.wait()
            try:
                async with slot.control(_HEALTH_TIMEOUT_S):
                    await slot.worker.check_health()
                async with slot.control(self._control_timeout_s):
                    await self._catch_up(slot)
                    running = slot.started.is_set() and not slot.lost
                    slot.healthy = running and self._queue.failure is None
            except (WorkerFailure, BadRequest) as error:
                if str(error) != reason:  # once for each reason, not for each check
                    logger.warning("%s is not healthy yet: %s", slot.worker.name, error)
                reason = str(error)
                if not isinstance(error, WeightsGone):
                    failed_checks += 1
                    if failed_checks % _FAILED_CHECKS_UNTIL_RESTART == 0:
                        self._restart(slot)
            if slot.healthy:
                logger.warning("worker %s is back", slot.worker.name)
                self._cancel_recovery_deadline()
                self._queue.accepts(slot)
                return

    async def recovered(self, timeout_s: float) -> None:
        """Waits until none of those that are out now is to be waited for, or so long."""
        if self._recoveries:
            await asyncio.wait(self._recoveries.copy(), timeout=timeout_s)

    def rest(self) -> None:
        """Nobody is brought back until `go_on`."""
        self._at_work.clear()
        self._cancel_recovery_deadline()
        if self._pool is not None:
            self._pool.hold()
        for slot in self._slots:
            if not slot.healthy:
                slot.expire_calls()

    def end_those_out(self) -> None:
        """Those that are not healthy have no process until `go_on`; it could be of any kind."""
        for slot in self._slots:
            if self._pool is not None and not slot.healthy and not slot.lost:
                slot.started.clear()
                self._pool.restart(slot.worker)

    def go_on(self) -> None:
        """After `rest`."""
        self._at_work.set()
        if self._pool is not None:
            self._pool.release()
        self._set_recovery_deadline()

    def _restart(self, slot: Slot) -> None:
        """If it is ours to do."""
        if self._pool is not None and slot.started.is_set() and not slot.lost:
            logger.warning("worker %s is started anew", slot.worker.name)
            slot.started.clear()
            self._pool.restart(slot.worker)

    def on_exit(self, worker: Worker, why: str, final: bool) -> None:
        """A worker's process died; unless that was final, the pool starts it anew."""
        for slot in self._slots:
            if slot.worker is worker:
                slot.lost = final
                if final:
                    slot.started.set()  # nobody need wait for it any more
                else:
                    slot.started.clear()
                self.exclude(slot, WorkerFailure(why))

    def on_ready(self, worker: Worker) -> None:
        """A worker's process lives again, with its first weights."""
        for slot in self._slots:
            if slot.worker is worker:
                slot.started.set()

    def watch_progress(self, slot: Slot) -> None:
        """Sees to it that a worker with requests which streams tokens goes on bringing some."""
        if slot.progress_timer is None:
            due = slot.progress_at + self.progress_timeout_s
            slot.progress_timer = asyncio.get_running_loop().call_at(
                due, self._check_progress, slot
            )

    def _check_progress(self, slot: Slot) -> None:
        slot.progress_timer = None
        if slot.running == 0 or not slot.healthy:
            return  # the next request looks again
        now = asyncio.get_running_loop().time()
        if slot.updating or slot.asleep or not slot.streams:
            slot.progress_at = now  # a freeze has a deadline of its own
        if now < slot.progress_at + self.progress_timeout_s:
            self.watch_progress(slot)
            return
        hangs = WorkerBroken(
            f"{slot.worker.name} hangs: {slot.running} requests and no token for "
            f"progress_timeout_s={self.progress_timeout_s:g}"
        )
        self.exclude(slot, hangs)

    def _fail(self, cause: WorkerFailure) -> None:
        """The pool has nobody left."""
        failure = InferenceFailure(f"no inference worker is left; the last one: {cause}")
        failure.__cause__ = cause
        self._cancel_recovery_deadline()
        self._queue.close(failure)

    def _set_recovery_deadline(self) -> None:
        """It runs while nobody is healthy, in the workers' turn."""
        if any(slot.healthy for slot in self._slots) or not self._at_work.is_set():
            return
        if self._recovery_deadline is None:
            self._recovery_deadline = asyncio.get_running_loop().call_later(
                self.recovery_timeout_s, self._fail, self._last_cause
            )

    def _cancel_recovery_deadline(self) -> None:
        if self._recovery_deadline is not None:
            self._recovery_deadline.cancel()
            self._recovery_deadline = None

    def stop(self) -> None:
        """Nobody is looked after any more; the requests under way end."""
        self._cancel_recovery_deadline()
        for slot in self._slots:
            slot.expire_calls()
            if slot.progress_timer is not None:
                slot.progress_timer.cancel()
        for recovery in self._recoveries:
            recovery.cancel()
