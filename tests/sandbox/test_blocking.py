"""Sandboxes for code that is not async, and the folders that they may have."""

import threading

import psutil
import pytest

from flash.errors import EnvFailure
from flash.sandbox import FileFailure, open_sandbox
from flash.sandbox.blocking import BlockingSandbox
from tests.processes import Watch
from tests.sandboxes import needs_sandbox

pytestmark = [pytest.mark.slow, needs_sandbox]


async def test_it_works_in_a_running_event_loop_too_and_leaves_nothing(tmp_path):
    (tmp_path / "a").write_text("a")
    before = threading.active_count()
    sandbox = BlockingSandbox(open_sandbox())
    watch = Watch([child.pid for child in psutil.Process().children(recursive=True)])
    sandbox.copy_in(tmp_path, "/work/in")
    sandbox.write("b", b"b")
    assert sandbox.read("/work/in/a") == b"a"
    outcome = sandbox.run(["sh", "-c", "cat b; cat; pwd"], stdin=b"c", cwd="/work")
    assert outcome.stdout == b"bc/work\n"
    sandbox.close()
    assert not watch.left()
    assert threading.active_count() == before


class Closed(type(open_sandbox())):
    async def __aenter__(self):
        raise EnvFailure("it can't be opened")


def test_one_that_can_not_be_opened_leaves_no_thread():
    before = threading.active_count()
    with pytest.raises(EnvFailure, match="can't be opened"):
        BlockingSandbox(Closed(open_sandbox().limits))
    assert threading.active_count() == before


def test_folders_at_the_root_may_be_written_to_and_have_room_together():
    sandbox = BlockingSandbox(open_sandbox(writable=["/app", "/tests", "/tmp"]))
    try:
        sandbox.write("/app/deep/a", b"a")
        sandbox.write("/tests/b", b"b")
        assert sandbox.read("/app/deep/a") + sandbox.read("/tests/b") == b"ab"
        with pytest.raises(FileFailure, match="/other"):
            sandbox.write("/other/c", b"c")
        sizes = sandbox.run(["sh", "-c", "stat -fc %i /app /tests /work /tmp"]).stdout.split()
        assert len(sizes) == 4
        assert len(set(sizes)) == 1, "they are one file system"
    finally:
        sandbox.close()
