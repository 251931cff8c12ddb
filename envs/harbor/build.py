"""A task's files and folders in a sandbox without images, where what its Dockerfile says is done.

A sandbox that has images is opened with the Dockerfile, and needs none of this.
"""

import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from flash.sandbox.blocking import BlockingSandbox
from flash.sandbox.sandbox import Outcome

from .dockerfile import Copy, Run, root_folder
from .folder import TaskFolder

HOME = "/root"
TESTS = "/tests"
LOGS = "/logs"
_CUSTOMARY = ("/app", "/data", "/home", "/mnt", "/opt", "/srv", "/var", "/workspace")
_TAIL_CHARS = 1_000


def writable_folders(task: TaskFolder) -> list[str]:
    """What a sandbox of the task must let it write to, beside its own."""
    copies = [step.folder for step in task.recipe.steps if isinstance(step, Copy)]
    named = map(root_folder, (task.folder, task.recipe.folder, *copies))
    return sorted({HOME, TESTS, LOGS, *_CUSTOMARY, *named})


def build(sandbox: BlockingSandbox, task: TaskFolder) -> None:
    """RuntimeError names the line that failed, and what it said."""
    ends = time.monotonic() + task.build_s
    made = Run("its folders", ("mkdir", "-p", task.folder, f"{LOGS}/verifier"), "/", {})
    for step in (made, *task.recipe.steps):
        if isinstance(step, Copy):
            with staged(step.sources, step.name) as folder:
                sandbox.copy_in(folder, step.folder)
            continue
        outcome = sandbox.run(
            step.argv,
            env={"HOME": HOME, **step.env},
            cwd=step.folder,
            seconds=max(0.0, ends - time.monotonic()),
        )
        if outcome.returncode != 0:
            raise RuntimeError(f"{task.name}: {step.where} {how_it_ended(outcome)}")


@contextlib.contextmanager
def staged(sources: Iterable[Path], name: str | None = None) -> Iterator[Path]:
    """A folder with copies of the sources, or of what they hold if they are folders themselves.

    name: of the only source, a file, there. Links are copied as links.
    """
    with tempfile.TemporaryDirectory(prefix="flash-task-") as folder:
        place = Path(folder, "staged")
        place.mkdir(mode=0o755)
        for source in sources:
            if source.is_dir():
                shutil.copytree(source, place, symlinks=True, dirs_exist_ok=True)
            else:
                shutil.copy2(source, place / (name or source.name))
        yield place


def how_it_ended(outcome: Outcome) -> str:
    """In words, with the last that it said."""
    how = {
        "exited": f"ended with exit status {outcome.returncode}",
        "deadline": "took too long",
        "memory": "ran out of memory",
        "killed": "was killed",
    }[outcome.ended]
    said = (outcome.stdout + outcome.stderr).decode(errors="replace").strip()
    return f"{how}: {said[-_TAIL_CHARS:]}" if said else how
