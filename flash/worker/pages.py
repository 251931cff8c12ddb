"""Every step of transformers' manager by block tables, on a GPU as CUDA graphs.

By itself it has tables in steps of one token a request only, and with flash-attn's kernels only. In
any other step it lists where each token of the cache is: a step in which one request begins while
64 go on took twice as long as one in which all go on, and with agents most begin something.
"""

from typing import Any

import numpy as np
import torch
from transformers.generation.continuous_batching.requests import RequestStatus
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING, FIFOScheduler
from transformers.generation.continuous_batching.utils import (
    create_warmup_future_states,
    pad_to_interval,
    pad_to_pow2,
)

_SCHEDULER = "by_pages"
# A graph is made for each multiple; on a GPU 256 tokens take as long as 64.
_TOKENS_OF_A_GRAPH = 256


class _Scheduler(FIFOScheduler):
    """Who is in the next step, which goes by tables."""

    one_each = False  # whether each of them has one new token

    def schedule_batch(self, token_budget: int, cache_budget: int) -> Any:
        requests, _, tokens, read = super().schedule_batch(token_budget, cache_budget)
        self.one_each = requests is not None and tokens == len(requests)
        return requests, True, tokens, read


def step_by_pages(manager: Any, *, longest: int, graphs: bool) -> None:
    """Make the manager's steps so, before it is started.

    `longest` is the most tokens that a request may have. The tokens of a step are as many as its
    requests only if each has one.
    """
    SCHEDULER_MAPPING[_SCHEDULER] = _Scheduler
    settings = manager.continuous_batching_config
    settings.scheduler_type = _SCHEDULER
    settings.max_blocks_per_request = -(-longest // settings.page_size)
    settings.use_cuda_graph = (False, graphs)
    manager.batch_processor = processor = manager._create_batch_processor()
    inputs, runner = processor.inputs_and_outputs, processor.model_runner
    tables = _Tables(processor.cache, inputs)
    most = settings.max_requests_per_batch

    def padded(tokens: int, _read: int, _by_tables: bool) -> tuple[int, int]:
        if not runner.pad_inputs:
            return tokens, 0
        if processor.scheduler.one_each:
            return pad_to_pow2(tokens, most), 0
        least = max(tokens, most + 1)
        return pad_to_interval(least, _TOKENS_OF_A_GRAPH, processor.max_batch_tokens), 0

    inputs.prepare_batch_tensors = tables.prepare_batch_tensors
    processor.cache.fill_block_table = tables.fill_block_table
    runner.maybe_pad_inputs = padded
    if graphs:
        _make_graphs(manager.model, processor, most, longest=longest)


def _make_graphs(model: Any, processor: Any, most: int, *, longest: int) -> None:
    """Those of the largest step, so that others find room in its memory, and of one token each."""
    cache = processor.cache
    one_each = [1]
    while one_each[-1] < most:
        one_each.append(pad_to_pow2(one_each[-1] + 1, most))
    largest = processor.max_batch_tokens
    steps = [(1, RequestStatus.PREFILLING, min(largest, longest), largest)]
    steps += [(n, RequestStatus.DECODING, 1, n) for n in reversed(one_each)]
    for requests, status, tokens, padded in steps:
        processor.inputs_and_outputs.prepare_batch_tensors(
            requests_in_batch=create_warmup_future_states(requests, status, tokens, 0, cache),
            logits_processors=processor.logit_processor,
            use_decode_fast_path=True,
            num_q_tokens=padded,
            max_kv_read=0,
            use_padding=True,
        )
        processor._generation_step(model)
        cache.reset()


class _Tables:
    """Block tables that are put together on the host, and copied at once.

    Request by request, as transformers does it, takes 2 ms a step at 64 requests.
    """

    def __init__(self, cache: Any, inputs: Any) -> None:
        (self._allocator,) = cache.cache_allocators.values()
        self._pages_of_block = (
            self._allocator.block_physical_stride // self._allocator.tokens_per_page
        )
        self._inputs = inputs
        self._prepare = inputs.prepare_batch_tensors
        self._rows: list[list[int]] = []

    def fill_block_table(self, request_id: str, *_: Any) -> None:
        """In place of the cache's: the next row is this request's."""
        self._rows.append(self._allocator.block_table[request_id])

    def prepare_batch_tensors(self, *step: Any, **settings: Any) -> None:
        """In place of the inputs'."""
        self._rows.clear()
        self._prepare(*step, **settings)
        blocks = np.zeros((len(self._rows), max(map(len, self._rows))), np.int32)
        for row, known in zip(blocks, self._rows, strict=True):
            row[: len(known)] = known
        blocks *= self._pages_of_block
        table = self._inputs.block_table[0, : blocks.shape[0], : blocks.shape[1]]
        table.copy_(torch.from_numpy(blocks))
