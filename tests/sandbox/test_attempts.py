"""Attempts to get out of a sandbox, to use more than its share, or to outlive it: each fails."""

import re
import socket
import sys
from pathlib import Path

import pytest

from flash.sandbox import FileFailure, Limits, open_sandbox
from flash.sandbox.memory import MemoryGroup
from tests.sandboxes import MARK, marked, needs_sandbox

pytestmark = [pytest.mark.slow, needs_sandbox]

LIMITS = Limits(seconds=10, memory_mb=256, processes=20, disk_mb=16, output_bytes=1000)

# Python of the attempt, and what is said of it.
DENIED = {
    "write to the system": ("open('/usr/bin/attempt', 'w')", "Read-only file system"),
    "write beside the system": ("open('/attempt', 'w')", "Read-only file system"),
    "write to /dev": ("open('/dev/attempt', 'w')", "Read-only file system"),
    "change Python's packages": (
        "open(sys.prefix + '/attempt.pth', 'w')",
        "Read-only file system",
    ),
    "read passwords": ("open('/etc/shadow')", "No such file"),
    "see the kernel's devices": ("os.listdir('/sys')", "No such file"),
    "read a disk": ("[open('/dev/' + name) for name in ('vda', 'sda', 'mem')]", "No such file"),
    "make a device": ("os.mknod('disk', 0o60660, os.makedev(8, 0))", "not permitted"),
    "become root": ("os.setuid(0)", "Invalid argument"),
    "mount": ("call(libc.mount(b'x', b'/tmp', b'tmpfs', 0, None))", "not permitted"),
    "uncover what is under a mount": ("call(libc.umount2(b'/proc', 2))", "not permitted"),
    "change the root": ("os.chroot('/tmp')", "not permitted"),
    "be root of a namespace of its own": ("call(libc.unshare(0x10000000))", "No space left"),
    "trace its init": ("call(libc.ptrace(16, 1, 0, 0))", "not permitted"),
    "read its init's memory": ("open('/proc/1/mem')", "Permission denied"),
    "set a setting of the kernel": ("open('/proc/sys/kernel/hostname', 'w')", "denied|Read-only"),
    "have the kernel run a program": (
        "open('/proc/sys/kernel/core_pattern', 'w')",
        "denied|Read-only",
    ),
    "rename the host": ("call(libc.sethostname(b'x', 1))", "not permitted"),
    "set the clock": ("time.clock_settime(time.CLOCK_REALTIME, 0)", "not permitted"),
    "type into a terminal": ("open('/dev/tty')", "No such device"),
    "read keys of the kernel": (
        "call(libc.syscall(KEYCTL, 10, -3, b'user', b'k', 0))",
        "not permitted",
    ),
    "call it as another machine does": (
        "call(libc.syscall(KEYCTL | 0x40000000, 0, -3, 0))",
        "permitted|not implemented",
    ),
    "lift a limit": ("resource.setrlimit(resource.RLIMIT_NPROC, (999, 999))", "not allowed"),
    "ask the internet": ("socket.create_connection(('1.1.1.1', 53), 5)", "unreachable"),
    "start threads without end": (
        "[threading.Thread(target=time.sleep, args=(9,), daemon=True).start() for _ in range(999)]",
        "can't start new thread",
    ),
    "write a huge file": ("open('f', 'wb').write(bytes(32 << 20))", "File too large|No space"),
    "pretend a huge file": ("open('f', 'wb').truncate(1 << 40)", "File too large"),
    "write many files": (
        "[open(f'{n}', 'wb').write(bytes(4 << 20)) for n in range(5)]",
        "No space left",
    ),
    "write to every folder it may": (
        "[open(f'{f}/f', 'wb').write(bytes(9 << 20)) for f in ('/work', '/tmp', '/dev/shm')]",
        "No space left",
    ),
    "make files without end": ("[open(f'{n}', 'w') and 0 for n in range(9999)]", "No space left"),
}  # fmt: skip
PRELUDE = """
import contextlib, ctypes, os, resource, socket, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
KEYCTL = {"x86_64": 250, "aarch64": 219}[os.uname().machine]
def call(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
"""


async def python(sandbox, code, **options):
    return await sandbox.run([sys.executable, "-c", PRELUDE + code, MARK], **options)


@pytest.mark.parametrize("attempt", DENIED)
async def test_it_is_denied(attempt):
    code, why = DENIED[attempt]
    async with open_sandbox(limits=LIMITS) as sandbox:
        outcome = await python(sandbox, code)
        assert outcome.returncode == 1
        assert re.search(why, outcome.stderr.decode())
        again = await sandbox.run(["echo", "unharmed"])
    assert again.stdout == b"unharmed\n"


def test_the_table_tells_of_every_attempt():
    told = (Path(__file__).parents[2] / "docs/sandbox.md").read_text()
    assert [attempt for attempt in DENIED if attempt not in told] == []


async def test_what_is_beside_the_system_is_not_seen(tmp_path):
    (tmp_path / "secret").write_text("hush")
    shown = tmp_path / "shown"
    shown.write_text("look")
    async with open_sandbox(limits=LIMITS, readable=[shown]) as sandbox:
        for path in (tmp_path / "secret", Path.home() / ".bashrc", Path(__file__)):
            with pytest.raises(FileFailure, match="No such file"):
                await sandbox.read(str(path))
        assert await sandbox.read(str(shown)) == b"look"
        with pytest.raises(FileFailure, match="Read-only"):
            await sandbox.write(str(shown), b"changed")


async def test_no_environment_of_ours_is_seen(monkeypatch):
    monkeypatch.setenv("API_KEY", "hush-hush")
    async with open_sandbox(limits=LIMITS) as sandbox:
        outcome = await python(sandbox, "print(dict(os.environ)); open('/proc/1/environ')")
    assert b"hush" not in outcome.stdout
    assert b"'HOME': '/tmp'" in outcome.stdout
    assert b"Permission denied: '/proc/1/environ'" in outcome.stderr


async def test_no_server_of_this_machine_is_reached():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as named:
        named.bind("\0flash-attempt")
        named.listen()
        async with open_sandbox(limits=LIMITS) as sandbox:
            code = f"socket.create_connection({server.getsockname()!r})"
            assert b"Connection refused" in (await python(sandbox, code)).stderr
            code = "socket.socket(socket.AF_UNIX).connect('\\0flash-attempt')"
            assert b"Connection refused" in (await python(sandbox, code)).stderr


async def test_nothing_is_inherited_but_the_standard_streams():
    code = "import os; print(sorted(map(int, os.listdir('/proc/self/fd'))))"
    async with open_sandbox(limits=LIMITS) as sandbox:
        outcome = await sandbox.run([sys.executable, "-c", code])
        started = await sandbox.start([sys.executable, "-c", code])
        told = await started.stdout.read()
    assert outcome.stdout == told == b"[0, 1, 2, 3]\n"  # 3: the folder that is listed


async def test_its_init_can_not_be_killed_nor_anybody_elses_process():
    async with open_sandbox(limits=LIMITS) as sandbox:
        beside = await sandbox.start(["cat"])
        outcome = await python(
            sandbox,
            "\nfor n in (2, 15, 9):\n  for p in (1, -1):\n    with contextlib.suppress("
            "ProcessLookupError): os.kill(p, n)\nprint('in vain')",
        )
        assert outcome.stdout == b"in vain\n"
        beside.stdin.write(b"alive")
        beside.stdin.close()
        assert await beside.stdout.read() == b"alive"


async def test_a_fork_bomb_ends_at_the_limit_and_at_the_deadline():
    async with open_sandbox(limits=LIMITS) as sandbox:
        outcome = await python(
            sandbox,
            "\nwhile True:\n  try: os.fork()\n  except BlockingIOError: os.write(1, b'full ')",
            seconds=1,
        )
        assert (outcome.ended, outcome.stdout[:4]) == ("deadline", b"full")
        assert (await sandbox.run(["echo", "unharmed"])).stdout == b"unharmed\n"
    assert not marked()


async def test_memory_ends_at_the_limit():
    async with open_sandbox(limits=LIMITS) as sandbox:
        outcome = await python(sandbox, "bytearray(1 << 30)")
        assert outcome.ended == "memory" or b"MemoryError" in outcome.stderr
        assert (await sandbox.run(["echo", "unharmed"])).stdout == b"unharmed\n"


@pytest.mark.parametrize(
    "code",
    [
        "[os.fork() or (bytearray(60 << 20), time.sleep(9)) for _ in range(9)]; os.wait()",
        "[m.write(bytes(60 << 20)) for m in [mmap.mmap(-1, 60 << 20) for _ in range(9)]]",
    ],
)
async def test_memory_is_limited_for_all_processes_together(code):
    group = MemoryGroup.make(1 << 20)
    if group is None:
        pytest.skip("no control group can be made here: run as root, or under systemd")
    await group.remove()
    async with open_sandbox(limits=LIMITS) as sandbox:
        assert (await python(sandbox, f"import mmap\n{code}")).ended == "memory"
        assert (await sandbox.run(["echo", "unharmed"])).stdout == b"unharmed\n"


async def test_output_without_end_is_cut_and_kept_nowhere():
    async with open_sandbox(limits=LIMITS) as sandbox:
        outcome = await sandbox.run(["sh", "-c", "yes & yes >&2"], seconds=1)
        assert (outcome.ended, outcome.cut) == ("deadline", True)
        assert outcome.stdout == b"y\n" * 500 == outcome.stderr


@pytest.mark.parametrize(
    "code",
    [
        "signal.signal(15, signal.SIG_IGN); time.sleep(99)",
        "os.kill(os.getpid(), signal.SIGSTOP)",
        "os.read(os.pipe()[0], 1)",
        "\nwhile True: pass",
    ],
)
async def test_the_deadline_is_kept_whatever_is_done_against_it(code):
    async with open_sandbox(limits=LIMITS) as sandbox:
        outcome = await python(
            sandbox,
            f"import signal; print('here', flush=True); {code}".replace("; \n", "\n"),
            seconds=0.5,
        )
    assert (outcome.ended, outcome.returncode, outcome.stdout) == ("deadline", None, b"here\n")
    assert not marked()


DAEMON = """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        print("daemon", flush=True)
        time.sleep(99)
    os._exit(0)
os.wait()
"""


async def test_a_daemon_ends_with_its_command_and_what_it_holds_open_is_not_waited_for():
    async with open_sandbox(limits=LIMITS) as sandbox:
        outcome = await python(sandbox, DAEMON + "time.sleep(0.1)")
        assert not marked()
    assert (outcome.ended, outcome.returncode) == ("exited", 0)


async def test_what_is_not_read_of_stdin_is_not_waited_for():
    async with open_sandbox(limits=LIMITS) as sandbox:
        assert (await sandbox.run(["true"], stdin=bytes(8 << 20))).returncode == 0
        late = await sandbox.run(["sleep", "99"], stdin=bytes(8 << 20), seconds=0.2)
    assert late.ended == "deadline"


async def test_links_lead_nowhere_but_in_the_sandbox(tmp_path):
    (tmp_path / "secret").write_text("hush")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/file").write_text("new")
    async with open_sandbox(limits=LIMITS) as sandbox:
        await sandbox.run(["ln", "-s", str(tmp_path / "secret"), "out"])
        await sandbox.run(["ln", "-s", "/usr/bin", "folder"])
        for path in ("out", "../../.." + str(tmp_path / "secret"), "/proc/1/root/work/out"):
            with pytest.raises(FileFailure, match="No such file|Permission denied"):
                await sandbox.read(path)
        for path in ("folder/file", "../usr/file", "/usr/file"):
            with pytest.raises(FileFailure, match="Read-only file system"):
                await sandbox.write(path, b"changed")
        with pytest.raises(FileFailure, match="Read-only file system"):
            await sandbox.copy_in(tmp_path / "in", "folder")
        await sandbox.run(["ln", "-s", "/usr/bin/env", "file"])
        await sandbox.copy_in(tmp_path / "in")
        assert await sandbox.read("file") == b"new"
    assert (tmp_path / "secret").read_text() == "hush"


async def test_files_that_never_end_are_not_read():
    async with open_sandbox(limits=Limits(seconds=0.5, disk_mb=16)) as sandbox:
        await sandbox.run(["mkfifo", "pipe"])
        for path, why in (("/dev/zero", "too large"), ("pipe", "deadline")):
            with pytest.raises(FileFailure, match=why):
                await sandbox.read(path)
        with pytest.raises(FileFailure, match="deadline"):
            await sandbox.write("pipe", b"into nothing")


async def test_a_stream_handed_to_another_command_keeps_nobody_waiting():
    take = """
server = socket.socket(socket.AF_UNIX)
server.bind("/tmp/socket")
server.listen()
print("listens", flush=True)
_, (stream,), _, _ = socket.recv_fds(server.accept()[0], 1, 1)
print("has it", flush=True)
while True: os.write(stream, b"x" * 65536)
"""
    give = """
with socket.socket(socket.AF_UNIX) as to:
    to.connect("/tmp/socket")
    socket.send_fds(to, [b"f"], [1])
    to.recv(1)
"""
    async with open_sandbox(limits=LIMITS) as sandbox:
        taker = await sandbox.start([sys.executable, "-c", PRELUDE + take])
        assert await taker.stdout.readline() == b"listens\n"
        outcome = await sandbox.run([sys.executable, "-c", PRELUDE + give], seconds=2)
        assert await taker.stdout.readline() == b"has it\n"
    assert outcome.cut
