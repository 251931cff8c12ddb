"""Keeps transformers' progress bars out of other people's terminals and logs."""

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """No bar is drawn in the block; what the process wants elsewhere stays as it was."""
    from transformers.utils import logging as untyped_logging  # noqa: PLC0415  (seconds to import)

    bars: Any = untyped_logging
    wanted = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if wanted:
            bars.enable_progress_bar()
