"""Workers take turns with the trainer on the GPUs that they share.

    workers' turn    they sample; the trainer has made room
         │ sleep       those that are being started come back first; requests stay where they are
    trainer's turn   nobody samples, nobody is started; no time passes for requests
         │ wake        room is made; all have memory for weights, and load them from the trainer's
         │             memory, or else from files; then they take the rest
    workers' turn    requests go on: what they had is computed anew, by the weights there are now

A worker that does not fall asleep or does not wake is started anew, in the workers' turn.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import replace

from flash.errors import PublishFailure
from flash.hub.policy import Policy
from flash.hub.queue import RequestQueue
from flash.hub.slot import Slot
from flash.hub.supervisor import Supervisor
from flash.hub.waves import each
from flash.hub.worker import BadRequest, WorkerBroken, WorkerFailure
from flash.types import UpdateMode, Weights

MakeRoom = Callable[[], Awaitable[None]]


class Turns:
    """Whose turn it is: at first the workers'.

    Args:
        slots: the hub's own list, which it fills at its start.
        queue: it is told when a worker takes requests again.
        policy: whose weights workers get as they wake.
        make_room: has the trainer give its GPUs to the workers.
        update_mode, control_timeout_s, request_timeout_s: as for the hub.
    """

    def __init__(
        self,
        slots: Sequence[Slot],
        queue: RequestQueue,
        policy: Policy,
        supervisor: Supervisor,
        *,
        make_room: MakeRoom,
        update_mode: UpdateMode,
        control_timeout_s: float,
        request_timeout_s: float,
    ) -> None:
        self.asleep = False
        self._slots = slots
        self._queue = queue
        self._policy = policy
        self._supervisor = supervisor
        self._make_room = make_room
        self._update_mode = update_mode
        self._control_timeout_s = control_timeout_s
        self._request_timeout_s = request_timeout_s

    async def sleep(self) -> bool:
        """No worker has memory of a GPU afterwards; no if they slept already, or have ended."""
        if self.asleep or self._queue.failure is not None:
            return False
        if self._policy.weights is None:
            raise ValueError(
                "workers that sleep lose their weights: give the hub those that they start with"
            )
        if any(slot.lent is not None for slot in self._slots):
            raise ValueError("lent workers can't sleep: end the loan first")
        await self._supervisor.recovered(self._supervisor.recovery_timeout_s)
        self.asleep = True
        self._supervisor.rest()
        await each([slot for slot in self._slots if slot.healthy], self._put_to_sleep)
        self._supervisor.end_those_out()
        return True

    async def wake(self) -> dict[Slot, float]:
        """Workers have the present weights, and go on; how long each took. Nothing if none sleeps.

        PublishFailure if the weights don't fit.
        """
        if not self.asleep or self._queue.failure is not None:
            return {}
        await self._make_room()
        clock = asyncio.get_running_loop().time
        began = clock()
        weights = self._policy.weights
        assert weights is not None
        sleeping = [slot for slot in self._slots if slot.healthy]
        try:
            async with _shared(weights) as shared:
                await each(sleeping, lambda slot: self._load(slot, shared))
            # Not before all have loaded: what the trainer shares takes of their memory.
            await each([slot for slot in sleeping if slot.healthy], self._wake)
            return dict.fromkeys(sleeping, clock() - began)
        finally:
            for slot in self._slots:
                if slot.asleep and slot.healthy:
                    self._give_up(slot, "it was not woken")
                slot.asleep = False  # those that are out have lost their requests
            self.asleep = False
            self._supervisor.go_on()

    async def _put_to_sleep(self, slot: Slot) -> None:
        timeout_s = self._control_timeout_s
        if self._update_mode == "wait":
            timeout_s += self._request_timeout_s
        slot.updating = True
        try:
            async with slot.control(timeout_s):
                await slot.worker.sleep(self._update_mode)
        except (WorkerFailure, BadRequest) as failure:
            self._give_up(slot, f"it did not fall asleep: {failure}")
        except asyncio.CancelledError:
            self._give_up(slot, "it was cancelled as it fell asleep")
            raise
        finally:
            slot.updating = False
            if slot.healthy:
                slot.fall_asleep()

    async def _load(self, slot: Slot, weights: Weights) -> None:
        async with self._waking(slot):
            await slot.worker.wake_weights()
            await slot.worker.load_weights(weights)
            await slot.worker.recompute()
            await slot.worker.set_version(weights.version)
            slot.version = weights.version

    async def _wake(self, slot: Slot) -> None:
        async with self._waking(slot):
            await slot.worker.wake_rest()
        if slot.healthy:
            slot.awake()
            self._queue.accepts(slot)

    @contextlib.asynccontextmanager
    async def _waking(self, slot: Slot) -> AsyncIterator[None]:
        """One that fails in the block is given up."""
        try:
            async with slot.control(self._control_timeout_s):
                yield
        except WorkerFailure as failure:
            self._give_up(slot, f"it did not wake: {failure}")
        except BadRequest as error:
            self._give_up(slot, str(error))
            raise PublishFailure(str(error)) from error
        except asyncio.CancelledError:
            self._give_up(slot, "it was cancelled as it woke")
            raise

    def _give_up(self, slot: Slot, why: str) -> None:
        self._supervisor.exclude(slot, WorkerBroken(f"{slot.worker.name}: {why}"))


@contextlib.asynccontextmanager
async def _shared(weights: Weights) -> AsyncIterator[Weights]:
    """The weights, in the trainer's memory too if it has them there."""
    if weights.share is None:
        yield weights
        return
    async with weights.share() as directory:
        yield replace(weights, shared=directory)
