"""What runs in a sandbox: commands, their streams and files, and their end."""

import asyncio
import os
import signal
import sys
import tempfile
from pathlib import Path

import psutil
import pytest

from flash.errors import EnvFailure
from flash.sandbox import FileFailure, SandboxUnavailable, check_sandbox, open_sandbox
from tests.processes import Watch
from tests.sandboxes import MARK, marked, needs_sandbox

pytestmark = [pytest.mark.slow, needs_sandbox]


async def test_a_command_is_given_and_told_everything():
    async with open_sandbox() as sandbox:
        await sandbox.run(["mkdir", "sub"])
        outcome = await sandbox.run(
            ["sh", "-c", 'pwd; echo "$A $HOME"; cat; echo wrong >&2; exit 3'],
            stdin=b"given " * 100_000,
            env={"A": "a b"},
            cwd="/work/sub",
        )
        assert outcome.stdout == b"/work/sub\na b /tmp\n" + b"given " * 100_000
        assert (outcome.stderr, outcome.returncode, outcome.cut) == (b"wrong\n", 3, False)
        assert (await sandbox.run(["sh", "-c", "kill -SEGV $$"])).returncode == -signal.SIGSEGV


@pytest.mark.parametrize(
    ("argv", "cwd", "why"),
    [
        (["no-such-command"], "/work", b"'no-such-command' in '/work' can't be run: "),
        (["true"], "/work/none", b"No such file or directory: '/work/none'"),
        (["nu\0l"], "/work", b"embedded null"),
        (["sur\ud800rogate"], "/work", b"surrogates not allowed"),
    ],
)
async def test_a_command_that_can_not_be_run_is_told_as_a_shell_does(argv, cwd, why):
    async with open_sandbox() as sandbox:
        outcome = await sandbox.run(argv, cwd=cwd)
    assert outcome.returncode == 127
    assert why in outcome.stderr


async def test_commands_see_the_same_files_and_not_each_other(tmp_path):
    (tmp_path / "tree/deep").mkdir(parents=True)
    (tmp_path / "tree/deep/tool").write_text("#!/bin/sh\necho tool\n")
    (tmp_path / "tree/deep/tool").chmod(0o755)
    async with open_sandbox() as sandbox, open_sandbox() as other:
        await sandbox.write("a/b", b"one")
        assert (await sandbox.run(["cat", "/work/a/b"])).stdout == b"one"
        await sandbox.write("-", b"no option")
        assert await sandbox.read("-") == b"no option"
        await sandbox.run(["sh", "-c", "printf two > /tmp/c"])
        assert await sandbox.read("/tmp/c") == b"two"
        await sandbox.copy_in(tmp_path / "tree", "t")
        assert (await sandbox.run(["t/deep/tool"])).stdout == b"tool\n"
        with pytest.raises(FileFailure, match=r"'/work/a/b' in the sandbox: .*No such file"):
            await other.read("/work/a/b")
        await sandbox.start(["sleep", "99"])
        seen = await sandbox.run(["sh", "-c", "cat /proc/[0-9]*/comm"])
        assert seen.stdout == b"python\nsh\n"


async def test_commands_run_side_by_side():
    async with open_sandbox() as sandbox:
        await sandbox.run(["mkfifo", "a", "b"])
        outcomes = await asyncio.gather(
            sandbox.run(["sh", "-c", "echo first > a; cat b"]),
            sandbox.run(["sh", "-c", "cat a; echo second > b"]),
        )
    assert [outcome.stdout for outcome in outcomes] == [b"second\n", b"first\n"]


async def test_the_python_of_this_process_runs_with_its_packages():
    async with open_sandbox() as sandbox:
        outcome = await sandbox.run(["python", "-c", "import numpy, sys; print(sys.prefix)"])
    assert outcome.stdout.decode().strip() == sys.prefix


async def test_a_command_that_goes_on_is_spoken_with():
    async with open_sandbox() as sandbox:
        shell = await sandbox.start(["sh"], env={"A": "a"}, cwd="/tmp")
        for said, answer in ((b"echo $A", b"a\n"), (b"B=b; pwd", b"/tmp\n"), (b"echo $B", b"b\n")):
            shell.stdin.write(said + b"\n")
            assert await shell.stdout.readline() == answer
        shell.stdin.write(b"echo no >&2; exit 5\n")
        assert (await shell.stderr.read(), await shell.wait()) == (b"no\n", 5)
        killed = await sandbox.start(["sh", "-c", "setsid sleep 99"])
        killed.kill()
        assert await killed.wait() is None
        assert await killed.stdout.read() == b""


async def begun(sandbox, command="echo begun > f; sleep 99"):
    """A task that runs the command, which has begun, with a daemon."""
    listener = await sandbox.start(["sh", "-c", "mkfifo f; echo listens; cat f"])
    assert await listener.stdout.readline() == b"listens\n"
    daemon = f"setsid sh -c 'sleep 99' {MARK} &"
    running = asyncio.create_task(
        sandbox.run(["sh", "-c", f"{daemon} {command}", MARK], seconds=600)
    )
    assert await listener.stdout.readline() == b"begun\n"
    return running


async def test_a_command_that_is_given_up_is_killed():
    async with open_sandbox() as sandbox:
        running = await begun(sandbox)
        watch = Watch(marked())
        assert len(watch) >= 2
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert not await asyncio.to_thread(watch.left)
        assert (await sandbox.run(["true"])).returncode == 0


async def test_nothing_outlives_a_sandbox_that_is_closed():
    async with open_sandbox() as sandbox:
        running = await begun(sandbox)
        shell = await sandbox.start(["sh", "-c", "echo up; sleep 99", MARK])
        assert await shell.stdout.readline() == b"up\n"
        assert len(marked()) >= 3
    assert not marked()
    with pytest.raises(EnvFailure, match="the sandbox was lost"):
        await running
    with pytest.raises(EnvFailure, match="the sandbox was lost"):
        await sandbox.run(["true"])
    assert await shell.stdout.read() == b""


HOST = """
import asyncio
from flash.sandbox import open_sandbox
from tests.sandbox.test_sandbox import begun

async def main():
    async with open_sandbox() as sandbox:
        await begun(sandbox)
        print("begun", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_nothing_outlives_a_process_that_is_killed():
    host = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HOST, stdout=asyncio.subprocess.PIPE
    )
    assert await host.stdout.readline() == b"begun\n"
    watch = Watch(marked())
    assert len(watch) >= 2
    host.kill()
    await host.wait()
    assert not watch.left()


async def test_a_sandbox_that_dies_is_told():
    async with open_sandbox() as sandbox:
        running = await begun(sandbox)
        (bwrap,) = {child.pid for child in psutil.Process().children() if child.name() == "bwrap"}
        os.kill(bwrap, signal.SIGKILL)
        with pytest.raises(EnvFailure, match="the sandbox was lost"):
            await running


def test_what_a_machine_lacks_is_told_with_the_remedy(monkeypatch):
    check_sandbox("local")
    with tempfile.TemporaryDirectory() as folder:
        failing = Path(folder, "bwrap")
        failing.write_text("#!/bin/sh\necho no namespaces for you >&2; exit 1\n")
        for path in (Path(folder), failing):
            path.chmod(0o755)
        monkeypatch.setenv("PATH", folder, prepend=os.pathsep)
        with pytest.raises(SandboxUnavailable, match="no namespaces for you: allow user namespac"):
            check_sandbox("local")
    monkeypatch.setenv("PATH", folder)
    with pytest.raises(SandboxUnavailable, match=r"'bwrap', which is not .*apt-get install bubble"):
        check_sandbox("local")
