"""Child processes that answer calls: what they answer, how they die, what they leave."""

import asyncio
import os
import signal
import subprocess
import sys

import pytest

from flash.errors import ProcessFailure
from flash.system import guarded, process
from flash.system.process import PARENT_PID_VARIABLE, Child, log_report
from tests.processes import Watch

HANDLER = """
import os, signal, subprocess, sys, time
from concurrent.futures import Future
from flash.system.process import serve

class Only:  # exists in the child's __main__ alone
    pass

class Handler:
    def add(self, a, b):
        return a + b

    def fail(self):
        raise KeyError("a bug in the child")

    def sleep(self, seconds):
        time.sleep(seconds)

    def leave(self):
        sys.exit("by the back door")

    def exit(self):
        print("last words", flush=True)
        os._exit(7)

    def pid(self):
        return os.getpid()

    def detach(self):
        return subprocess.Popen(["sleep", "1000"], start_new_session=True).pid

    def stop_guard(self):
        os.kill(os.getppid(), signal.SIGSTOP)
        return self.detach()

    def order(self, number):
        self.seen = getattr(self, "seen", []) + [number]
        return self.seen

    def later(self):
        self.answer = Future()
        return self.answer

    def now(self, error):
        if error:
            self.answer.set_exception(OSError("the disk is full"))
        else:
            self.answer.set_result(3)

    def unpicklable(self):
        return lambda: None

    def unreadable(self):
        return Only()

if __name__ == "__main__":
    serve(Handler())
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    (tmp_path / "handler_of_test.py").write_text(HANDLER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    async def start_child():
        log = tmp_path / "logs" / "child.log"
        return await Child.start("handler_of_test", name="the child", log_path=log)

    return start_child


async def test_calls_are_answered_each_with_its_own_result(start):
    child = await start()
    answers = await asyncio.gather(*(child.call("add", n, 1) for n in range(50)))
    assert answers == list(range(1, 51))
    await child.stop()
    assert not child.alive


async def test_calls_are_served_in_the_order_in_which_they_were_made(start):
    child = await start()
    calls = [asyncio.ensure_future(child.call("order", n)) for n in range(20)]
    assert await calls[-1] == list(range(20))
    assert await calls[9] == list(range(10))
    await child.stop()


async def test_a_future_is_answered_when_it_is_done_and_other_calls_meanwhile(start):
    child = await start()
    for error in (False, True):
        later = asyncio.ensure_future(child.call("later"))
        assert await child.call("add", 1, 1) == 2
        assert not later.done()
        assert await child.call("now", error) is None
        if error:
            with pytest.raises(ProcessFailure, match="the child raised:(?s:.)*the disk is full"):
                await later
        else:
            assert await later == 3
    await child.stop()


async def test_a_method_that_there_is_not_is_an_error_of_that_call_alone(start):
    child = await start()
    with pytest.raises(ProcessFailure, match="the child raised:(?s:.)*has no attribute 'unknown'"):
        await child.call("unknown")
    assert await child.call("add", 1, 1) == 2
    await child.stop()


async def test_a_result_that_cannot_be_sent_is_an_error_of_that_call_alone(start):
    child = await start()
    with pytest.raises(ProcessFailure, match="the child raised:(?s:.)*pickle"):
        await child.call("unpicklable")
    assert await child.call("add", 1, 1) == 2
    await child.stop()


async def test_an_answer_that_cannot_be_read_ends_the_child_and_leaves_nobody_waiting(start):
    child = await start()
    unreadable = asyncio.ensure_future(child.call("unreadable"))
    other = asyncio.ensure_future(child.call("sleep", 3600))
    for call in (unreadable, other):
        with pytest.raises(ProcessFailure, match="can't be read here(?s:.)*'Only'"):
            await call
    assert not child.alive


async def test_a_killed_child_fails_its_calls(start):
    child = await start()
    await child.call("pid")
    call = asyncio.ensure_future(child.call("sleep", 3600))
    await asyncio.sleep(0)
    child.kill()
    with pytest.raises(ProcessFailure, match=f"exit code {128 + signal.SIGKILL}"):
        await call
    await child.stop()
    child.kill()  # again, and it is gone: nothing happens


async def test_an_error_in_the_child_comes_with_its_traceback_and_the_child_lives_on(start):
    child = await start()
    with pytest.raises(ProcessFailure, match="the child raised:(?s:.)*a bug in the child"):
        await child.call("fail")
    assert await child.call("add", 1, 1) == 2
    await child.stop()


async def test_a_child_whose_code_calls_sys_exit_says_so_and_lives_on(start):
    child = await start()
    with pytest.raises(ProcessFailure, match="raised:(?s:.)*SystemExit: by the back door"):
        await child.call("leave")
    assert await child.call("add", 1, 1) == 2
    await child.stop()


async def test_a_child_that_dies_fails_every_call_with_its_last_words(start):
    child = await start()
    dying = asyncio.ensure_future(child.call("exit"))
    waiting = asyncio.ensure_future(child.call("add", 1, 1))
    for call in (dying, waiting):
        with pytest.raises(ProcessFailure, match="exit code 7(?s:.)*last words"):
            await call
    with pytest.raises(ProcessFailure, match="exit code 7"):
        await child.call("add", 1, 1)
    assert "exit code 7" in str(await child.wait_dead())


async def test_a_late_answer_is_a_timeout_and_disturbs_no_later_call(start):
    child = await start()
    with pytest.raises(TimeoutError):
        await child.call("sleep", 0.5, timeout_s=0.05)
    assert await child.call("add", 2, 2) == 4
    await child.stop()


async def test_stop_kills_a_child_that_does_not_end(start):
    child = await start()
    pid = await child.call("pid")
    busy = asyncio.ensure_future(child.call("sleep", 3600))
    await asyncio.sleep(0)
    async with asyncio.timeout(4):  # less than a child has that closed its socket by itself
        await child.stop(grace_s=0.1)
    with pytest.raises(ProcessFailure):
        await busy
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_a_guard_that_its_child_has_stopped_holds_nobody_up_and_nothing_is_left(
    start, monkeypatch
):
    for module, grace in ((process, "_EXIT_GRACE_S"), (guarded, "_END_GRACE_S")):
        monkeypatch.setattr(module, grace, 0.1)
    child = await start()
    family = Watch([await child.call("stop_guard"), await child.call("pid"), child.pid])
    async with asyncio.timeout(20):
        await child.stop(grace_s=0.1)
    assert not await asyncio.to_thread(family.left)


@pytest.mark.parametrize("how", ["kill", "stop", "exit"])
async def test_what_a_child_started_in_a_session_of_its_own_ends_with_it(start, how):
    child = await start()
    detached = Watch([await child.call("detach")])
    if how == "kill":
        child.kill()
    elif how == "exit":
        with pytest.raises(ProcessFailure):
            await child.call("exit")
    await child.stop()
    assert not detached.left()


def killed_parent(tmp_path, then: str) -> None:
    """A process that starts a child and does something with it, until it is killed."""
    (tmp_path / "handler_of_test.py").write_text(HANDLER)
    parent = f"""
import asyncio
from pathlib import Path
from flash.system.process import Child

async def main():
    child = await Child.start("handler_of_test", name="c", log_path=Path({str(tmp_path)!r}) / "l")
    {then}

asyncio.run(main())
"""
    process = subprocess.Popen(
        [sys.executable, "-c", parent],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert process.stdout is not None
    children = Watch(map(int, process.stdout.readline().split()))
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not children.left()


def test_a_child_dies_with_its_parent_and_all_that_it_started_does(tmp_path):
    say = 'print(await child.call("pid"), await child.call("detach"), flush=True)'
    killed_parent(tmp_path, f'{say}; await child.call("sleep", 3600)')


def test_a_child_that_is_still_importing_dies_with_its_parent(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "flash_imports_of_test.py").write_text(
        f"import os\nopen({str(tmp_path / 'fifo')!r}, 'w').write(str(os.getpid()))\n"
        "while True: pass  # an import that takes for ever, and heeds nobody\n"
    )
    start = (
        'child = await Child.start("flash_imports_of_test", name="i", log_path=Path("/dev/null"))'
    )
    say = f"print(open({str(tmp_path / 'fifo')!r}).read(), flush=True)"
    killed_parent(tmp_path, f"{start}; {say}; await child.wait_dead()")


def test_a_child_whose_parent_died_before_it_looked_ends_itself():
    code = "from flash.system.process import die_with_parent; die_with_parent(); print('alive')"
    for parent, output in ((os.getpid(), "alive\n"), (os.getpid() + 1, "")):
        result = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, PARENT_PID_VARIABLE: str(parent)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.stdout == output
        assert result.returncode == (0 if output else -signal.SIGKILL)


def test_a_long_log_is_told_by_its_first_error_and_its_end(tmp_path):
    log = tmp_path / "log"
    before = b"OSError: of an earlier process\n"
    cause = b"(Worker pid=7) ERROR [x.py:1] RuntimeError: head_dim=16 is not supported\n"
    log.write_bytes(before + cause + b"shutting down\n" * 1000 + b"KeyError: later\nbye\n")
    told = log_report(log, since=len(before)).splitlines()
    assert told[0] == "RuntimeError: head_dim=16 is not supported"
    assert told[-1] == "bye"
    log.write_bytes(b"ValueError: at the end\n")
    assert log_report(log) == "ValueError: at the end"
    assert log_report(tmp_path / "none") == "(no log)"


def test_what_is_made_to_last_is_not_searched_for_garbage_and_what_comes_after_is():
    code = """
import gc
from flash.system.process import lasting

try:
    with lasting():
        assert not gc.isenabled()
        kept = [[]]
        raise ImportError
except ImportError:
    later = [[]]
assert gc.isenabled()
searched = {id(thing) for thing in gc.get_objects()}
assert id(kept) not in searched
assert id(later) in searched
"""
    subprocess.run([sys.executable, "-c", code], check=True)
