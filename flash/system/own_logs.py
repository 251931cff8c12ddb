"""A folder for the logs of processes that are no run's."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def own_logs(prefix: str) -> Iterator[Path]:
    """None of a run's, which may be going on; kept if an error may name what is in there."""
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    failed = False
    try:
        yield folder
    except Exception:
        failed = True
        raise
    finally:
        if not failed:
            shutil.rmtree(folder)
