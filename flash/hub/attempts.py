"""One request at one worker: its id, its deadline, what is heard of it meanwhile, its abort."""

import asyncio
import itertools
import logging
import uuid
from collections.abc import Sequence

from flash.deadline import Deadline
from flash.hub.queue import RequestQueue
from flash.hub.response import PartialCompletion
from flash.hub.slot import Slot
from flash.hub.worker import BadRequest, WorkerFailure
from flash.types import Completion, SamplingParams

logger = logging.getLogger(__name__)

_ABORT_TIMEOUT_S = 10.0


class Attempts:
    """Asks one worker for one completion; whether to try again elsewhere is the caller's to say.

    Args:
        queue: once it is closed, nothing is aborted any more.
        tasks: where aborts run.
        request_timeout_s: for one answer.
    """

    def __init__(
        self, queue: RequestQueue, tasks: asyncio.TaskGroup, *, request_timeout_s: float
    ) -> None:
        self._queue = queue
        self._tasks = tasks
        self._request_timeout_s = request_timeout_s
        self._hub_id = uuid.uuid4().hex[:8]
        self._numbers = itertools.count()

    async def ask(
        self,
        slot: Slot,
        prompt: Sequence[int],
        sampling: SamplingParams,
        partial: PartialCompletion,
    ) -> Completion:
        """What the worker answers; `partial` has what it told until then.

        Raises WorkerFailure and BadRequest as workers do; WorkerFailure also if the answer takes
        too long, or the worker is excluded meanwhile. A request that nobody waits for any more is
        aborted.
        """
        clock = asyncio.get_running_loop().time

        def on_tokens(token_ids: Sequence[int], logprobs: Sequence[float]) -> None:
            slot.streams = True
            slot.progress_at = clock()
            partial.count(len(token_ids))
            if slot.version == partial.version and not slot.updating:
                partial.token_ids += token_ids
                partial.logprobs += logprobs

        request_id = f"{self._hub_id}-{next(self._numbers)}"
        answered = False
        try:
            with Deadline(self._request_timeout_s) as deadline:
                slot.deadlines[request_id] = deadline
                completion = await slot.worker.generate(request_id, prompt, sampling, on_tokens)
                slot.progress_at = clock()
                answered = True
                return completion
        except TimeoutError as error:
            if not slot.healthy:
                raise WorkerFailure(f"{slot.worker.name} was excluded meanwhile") from error
            raise WorkerFailure(
                f"{slot.worker.name} took longer than request_timeout_s="
                f"{self._request_timeout_s:g} for an answer"
            ) from error
        except (WorkerFailure, BadRequest):
            answered = True
            raise
        finally:
            del slot.deadlines[request_id]
            if not answered and not slot.lost and self._queue.failure is None:
                # Never in the way of the cancellation: its own task, with its own deadline.
                self._tasks.create_task(self._abort(slot, request_id), name=f"abort {request_id}")

    async def _abort(self, slot: Slot, request_id: str) -> None:
        try:
            async with asyncio.timeout(_ABORT_TIMEOUT_S):
                await slot.worker.abort(request_id)
        except (TimeoutError, WorkerFailure, BadRequest) as error:
            if slot.healthy:  # of one that is out, all of whose requests end, enough was said
                logger.warning("could not abort %s at %s: %s", request_id, slot.worker.name, error)
