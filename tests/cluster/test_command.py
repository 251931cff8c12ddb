"""Commands of a role: what they say, how they end."""

import asyncio
import os
import sys

from flash.cluster.command import Command

SAYS = "import sys; print('one'); print('two', file=sys.stderr); print('no end', end='')"
STAYS = """
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: (print('leaving'), sys.exit(5)))
print('here', flush=True)
while True:
    signal.pause()
"""


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


async def test_each_line_of_a_command_is_told_before_its_exit_code():
    told = []
    command = Command(lambda stream, line: told.append((stream, line)))
    assert await command.run(python(SAYS), env=os.environ, cwd=None) == 0
    assert sorted(told) == [("err", "two"), ("out", "no end"), ("out", "one")]


async def test_a_command_that_is_asked_to_end_may_take_its_time():
    told = []

    def tell(stream, line):
        told.append(line)
        if line == "here":
            command.terminate()

    command = Command(tell)
    assert await command.run(python(STAYS), env=os.environ, cwd=None) == 5
    assert told == ["here", "leaving"]
    command.terminate()  # of none


async def test_a_command_that_nobody_waits_for_any_more_is_killed():
    here = asyncio.Event()
    pids = []

    def tell(stream, line):
        pids.append(int(line))
        here.set()

    command = Command(tell)
    code = "import os, signal; print(os.getpid(), flush=True); signal.pause()"
    running = asyncio.create_task(command.run(python(code), env=os.environ, cwd=None))
    await here.wait()
    ended = os.pidfd_open(pids[0])
    running.cancel()
    await asyncio.wait((running,))
    assert running.cancelled()
    loop, gone = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(ended, gone.set)
    await gone.wait()
    loop.remove_reader(ended)
    os.close(ended)


async def test_a_command_runs_where_it_shall(tmp_path):
    told = []
    command = Command(lambda stream, line: told.append(line))
    await command.run(python("import os; print(os.getcwd())"), env=os.environ, cwd=str(tmp_path))
    assert told == [str(tmp_path)]
