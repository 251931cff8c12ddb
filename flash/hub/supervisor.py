"""Workers that fail, hang or die are taken out of the pool, and brought back once they are well."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from flash.errors import InferenceFailure
from flash.hub.queue import RequestQueue
from flash.hub.slot import Slot
from flash.hub.worker import BadRequest, Pool, Worker, WorkerBroken, WorkerFailure

logger = logging.getLogger(__name__)

_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 0.5, 8.0
_HEALTH_TIMEOUT_S = 10.0
_UNWELL_UNTIL_RESTART = 3  # health checks that fail in a row


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
        self._last_hope: asyncio.TimerHandle | None = None  # runs while no worker is healthy

    async def greet(self, slot: Slot) -> None:
        """Tells a worker its version at the start of the hub."""
        try:
            async with slot.control(self._control_timeout_s):
                await self._catch_up(slot)
        except WorkerFailure as failure:
            self.take_out(slot, failure)
        except BadRequest as error:
            self.take_out(slot, WorkerFailure(str(error)))

    def take_out(self, slot: Slot, cause: WorkerFailure) -> None:
        """No more requests for this worker, and those it has go elsewhere, until it is healthy."""
        if not slot.healthy and not slot.gone:
            return  # it is known, and being looked after
        was_healthy, slot.healthy = slot.healthy, False
        if slot.lent is not None:  # what comes back has other weights
            slot.lent.end(str(cause))
        slot.send_away()
        if self._queue.failure is not None:
            return
        if isinstance(cause, WorkerBroken):
            self._restart(slot)
        if was_healthy:
            logger.warning("worker taken out: %s", cause)
        if all(other.gone for other in self._slots):
            self._fail(cause)
            return
        if self._last_hope is None and not any(other.healthy for other in self._slots):
            self._last_hope = asyncio.get_running_loop().call_later(
                self.recovery_timeout_s, self._fail, cause
            )
        if was_healthy:
            recovery = self._tasks.create_task(
                self._recover(slot), name=f"recover {slot.worker.name}"
            )
            self._recoveries.add(recovery)
            recovery.add_done_callback(self._recoveries.discard)

    async def _recover(self, slot: Slot) -> None:
        """Asks for its health until it is well, then gives it the present weights."""
        unwell = 0
        told = ""
        while self._queue.failure is None:
            await slot.up.wait()
            if slot.gone:
                return
            # A worker that fails again before it has answered anything waits longer.
            await asyncio.sleep(min(_FIRST_BACKOFF_S * 2**slot.failures, _LONGEST_BACKOFF_S))
            slot.failures = min(slot.failures + 1, 10)
            try:
                async with slot.control(_HEALTH_TIMEOUT_S):
                    await slot.worker.check_health()
                async with slot.control(self._control_timeout_s):
                    await self._catch_up(slot)
                    well = slot.up.is_set() and not slot.gone
                    slot.healthy = well and self._queue.failure is None
            except (WorkerFailure, BadRequest) as error:
                if str(error) != told:  # once for each reason, not for each look
                    logger.warning("%s is not well yet: %s", slot.worker.name, error)
                told = str(error)
                unwell += 1
                if unwell % _UNWELL_UNTIL_RESTART == 0:
                    self._restart(slot)
            if slot.healthy:
                logger.warning("worker %s is back", slot.worker.name)
                self._cancel_last_hope()
                self._queue.dispatch()
                return

    def _restart(self, slot: Slot) -> None:
        """If it is ours to do."""
        if self._pool is not None and slot.up.is_set() and not slot.gone:
            logger.warning("worker %s is started anew", slot.worker.name)
            slot.up.clear()
            self._pool.restart(slot.worker)

    def on_exit(self, worker: Worker, why: str, final: bool) -> None:
        """A worker's process died; unless that was final, the pool starts it anew."""
        for slot in self._slots:
            if slot.worker is worker:
                slot.gone = final
                if final:
                    slot.up.set()  # nobody need wait for it any more
                else:
                    slot.up.clear()
                self.take_out(slot, WorkerFailure(why))

    def on_ready(self, worker: Worker) -> None:
        """A worker's process lives again, with its first weights."""
        for slot in self._slots:
            if slot.worker is worker:
                slot.up.set()

    def watch(self, slot: Slot) -> None:
        """Sees to it that a worker with requests which streams tokens goes on bringing some."""
        if slot.progress_timer is None:
            due = slot.progress_at + self.progress_timeout_s
            slot.progress_timer = asyncio.get_running_loop().call_at(due, self._look, slot)

    def _look(self, slot: Slot) -> None:
        slot.progress_timer = None
        if slot.running == 0 or not slot.healthy:
            return  # the next request looks again
        now = asyncio.get_running_loop().time()
        if slot.updating or not slot.streams:
            slot.progress_at = now  # a freeze has a deadline of its own
        if now < slot.progress_at + self.progress_timeout_s:
            self.watch(slot)
            return
        hangs = WorkerBroken(
            f"{slot.worker.name} hangs: {slot.running} requests and no token for "
            f"progress_timeout_s={self.progress_timeout_s:g}"
        )
        self.take_out(slot, hangs)

    def _fail(self, cause: WorkerFailure) -> None:
        """The pool has nobody left."""
        failure = InferenceFailure(f"no inference worker is left; the last one: {cause}")
        failure.__cause__ = cause
        self._cancel_last_hope()
        self._queue.close(failure)

    def _cancel_last_hope(self) -> None:
        if self._last_hope is not None:
            self._last_hope.cancel()
            self._last_hope = None

    def stop(self) -> None:
        """Nobody is looked after any more; the requests under way end."""
        self._cancel_last_hope()
        for slot in self._slots:
            slot.send_away()
            if slot.progress_timer is not None:
                slot.progress_timer.cancel()
        for recovery in self._recoveries:
            recovery.cancel()
