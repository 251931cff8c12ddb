"""Which experts the tokens of requests were routed to, in the steps of transformers' manager.

    a step's routers ─► rows of each request's new tokens ─┬─► its own, in order
                                                           └─► of the cache's blocks they lie in
    a request that shares blocks ─► the rows of these ───────► its own, in order

Of tokens that are computed anew, as after new weights, what they were sampled with stays.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from flash.trainer.router_replay import Routers
from flash.types import Experts


class RoutedExperts:
    """Listens to a model that a manager steps. ValueError if the model has no routers."""

    def __init__(self, model: Any, manager: Any) -> None:
        self._routers = Routers(model)
        self._manager = manager
        self._of_requests: dict[str, list[Experts]] = {}
        self._of_blocks: dict[int, Experts] = {}
        model.register_forward_hook(self._after_pass, with_kwargs=True)

    def begin(self, request_id: str) -> None:
        """Keeps what comes of that request."""
        self._of_requests[request_id] = []

    def end(self, request_id: str) -> None:
        """Forgets the request."""
        del self._of_requests[request_id]

    def of(self, request_id: str, start: int, end: int) -> Experts | None:
        """Of the tokens from `start` to before `end`, as far as they were computed; None if none
        was."""
        rows = tuple(self._of_requests[request_id])  # another thread adds some
        return np.concatenate(rows)[start:end] if rows else None

    def _after_pass(self, model: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if kwargs.get("cache") is None:  # no step of the manager's
            return
        chosen_NR = self._routers.chosen().cpu().numpy()
        processor = self._manager.batch_processor
        end = 0
        for step in processor.inputs_and_outputs.requests_in_batch:
            start, end = end, end + step.query_length
            past = step.state.position_offset - step.query_length
            self._add(step.state.request_id, past, chosen_NR[start:end], processor.cache)

    def _add(self, request_id: str, past: int, new: Experts, cache: Any) -> None:
        """Of the new tokens of a request, which come after `past` ones."""
        rows, blocks, size = self._of_requests.get(request_id), [], 0
        if cache.use_prefix_sharing:
            (allocator,) = cache.cache_allocators.values()
            blocks, size = allocator.block_table.get(request_id, []), allocator.tokens_per_page
            self._note_blocks(blocks, size, past, new)
        if rows is None:
            return
        known = sum(map(len, rows))
        if past > known:  # it shares the blocks of these tokens
            shared = [self._of_blocks[block] for block in blocks[: past // size]]
            rows.append(np.concatenate(shared)[known:])
            known = past
        if past + len(new) > known:
            rows.append(new[known - past :])

    def _note_blocks(self, blocks: Sequence[int], size: int, past: int, new: Experts) -> None:
        """Keeps what lies in a request's blocks, with `size` tokens in each."""
        for number in range(past // size, min(len(blocks), -(-(past + len(new)) // size))):
            begin = number * size
            first, last = max(past, begin), min(past + len(new), begin + size)
            if blocks[number] not in self._of_blocks:
                self._of_blocks[blocks[number]] = np.zeros((size, *new.shape[1:]), np.int16)
            block = self._of_blocks[blocks[number]]
            block[first - begin : last - begin] = new[first - past : last - past]
