import os
import subprocess
import sys

from flash.trainer.scratch import Scratch


def test_what_a_killed_controller_left_goes_when_the_next_begins(tmp_path):
    code = f"""
import os, signal
from pathlib import Path
from flash.trainer.scratch import Scratch
(Scratch(Path({str(tmp_path)!r})).path / "version_1").mkdir()
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    (left,) = tmp_path.iterdir()
    os.utime(left, (2**32, 2**32))  # a clock that was set back since
    scratch = Scratch(tmp_path)
    assert list(tmp_path.iterdir()) == [scratch.path]


def test_the_folder_of_a_run_that_goes_on_is_left_alone_and_so_is_a_new_one(tmp_path):
    others = Scratch(tmp_path)
    (others.path / "version_1").mkdir()
    unlocked_yet = tmp_path / "flash-new-1"
    unlocked_yet.mkdir()
    mine = Scratch(tmp_path)
    assert set(tmp_path.iterdir()) == {others.path, unlocked_yet, mine.path}
    mine.remove()
    assert set(tmp_path.iterdir()) == {others.path, unlocked_yet}


async def test_what_ranks_that_died_have_left_goes_and_whole_exports_stay(tmp_path):
    scratch = Scratch(tmp_path)
    exports = []
    for version in range(3):
        exports.append(scratch.new_export(version))
        exports[-1].mkdir()
        await scratch.keep(exports[-1])
    (scratch.path / "version_3_3.partial").mkdir()
    (scratch.path / "rendezvous").touch()
    await scratch.sweep()
    assert set(scratch.path.iterdir()) == set(exports[1:])
    scratch.remove()
