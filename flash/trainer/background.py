"""A rank's part of a checkpoint, written by a thread while training goes on.

    step ─► copied to host memory ─► step ─► step ─► …
                        └─► a thread of each rank: files ─► rank 0: all have written ─► manifest

What ranks tell each other meanwhile goes by a group of its own, so that it never mixes with a step.
"""

import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import save

# Memory that is pinned would be kept from one checkpoint to the next, as much as is copied.
_STAGING = StagingOptions(
    use_pinned_memory=False,
    use_shared_memory=False,
    use_async_staging=False,
    use_non_blocking_copy=False,
)


class BackgroundWriter:
    """Of one rank, among all; it is made by all of them, one checkpoint at a time."""

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def begin(self, shards: Mapping[Path, Mapping[str, Any]], finish: Callable[[], None]) -> None:
        """Copies what this rank holds, and has it written: each folder's part, on all ranks.

        `finish` is called by the thread when all ranks have written all of theirs. What was begun
        before is waited for, though nobody else may: there is memory for one copy.
        """
        if self._writing is not None:
            wait((self._writing,))
        stager = DefaultStager(_STAGING)
        copied = {folder: stager.stage(dict(state)) for folder, state in shards.items()}
        stager.close()
        self._writing = self._thread.submit(self._write, copied, finish)
        self._writing.add_done_callback(_let_go)

    def _write(self, copied: Mapping[Path, Any], finish: Callable[[], None]) -> None:
        for folder, state in copied.items():
            # Nothing of it is on a GPU, whose stream the writer would wait for by itself.
            writer = FileSystemWriter(folder, per_thread_copy_ahead=0)
            save(state, storage_writer=writer, process_group=self._group)
        finish()

    def written(self) -> "Future[None]":
        """Of what was begun last; its error is what this rank or another met."""
        assert self._writing is not None
        return self._writing


def _let_go(writing: "Future[None]") -> None:
    """Of the copies: an error that is kept would keep them, in what it passed through."""
    if (error := writing.exception()) is not None:
        traceback.clear_frames(error.__traceback__)
