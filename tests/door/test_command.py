"""An agent that is a command: what it is told, what it answers, how it fails, how it ends."""

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from flash.config.agent import GIVEN
from flash.door.command import CommandAgent
from flash.errors import AgentFailure, RewardFailure
from flash.types import Task

TASK = Task(7, {"size": 4})


def run(agent: CommandAgent, task: Task = TASK):
    return agent(base_url="http://127.0.0.1:1/v1", api_key="a key", task=task)


def python(code: str, log_dir: Path) -> CommandAgent:
    return CommandAgent([sys.executable, "-IS", "-c", code], log_dir=log_dir)


def shell(code: str, log_dir: Path) -> CommandAgent:
    return CommandAgent(["sh", "-c", code], log_dir=log_dir)


def is_gone(pid: int) -> bool:
    """Whether it has ended; an orphan that nobody waits for stays as a zombie, and is gone too."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


async def pids_in(path: Path, count: int) -> list[int]:
    """The process ids that a command wrote down, once all of them are there."""
    while not path.exists() or len(path.read_text().split("\n")) <= count:
        await asyncio.sleep(0.02)
    return [int(pid) for pid in path.read_text().split()]


async def test_a_command_is_told_all_and_answers_with_its_last_line(tmp_path):
    code = """
import json, os
print("thinking")
names = ("OPENAI_BASE_URL", "OPENAI_API_KEY", "FLASH_TASK")
print(json.dumps({"reward": 1.0, "told": [os.environ[name] for name in names]}))
print()
"""
    answer = await run(python(code, tmp_path))
    assert answer["reward"] == 1.0
    url, key, task = answer["told"]
    assert (url, key) == ("http://127.0.0.1:1/v1", "a key")
    assert json.loads(task) == {"seed": 7, "options": {"size": 4}}


async def test_a_command_has_of_our_environment_only_what_is_listed(tmp_path, monkeypatch):
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPENAI_ORG_ID", "MINE"):
        monkeypatch.setenv(name, "sesame")
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    code = "import json, os; print(json.dumps(dict(os.environ)))"
    command = [sys.executable, "-IS", "-c", code]
    agent = CommandAgent(command, log_dir=tmp_path, env=["MINE", "DEPTH=3=x"])
    told = await run(agent)
    assert (told["MINE"], told["DEPTH"], told["LC_ALL"]) == ("sesame", "3=x", "C.UTF-8")
    assert told["PATH"] == os.environ["PATH"]
    assert [name for name, value in told.items() if "sesame" in value] == ["MINE"]
    assert set(GIVEN) - told.keys() == {"FLASH_ROLES"}


async def test_a_command_in_which_several_play_finds_the_key_of_each(tmp_path):
    code = "import json, os; print(json.dumps(dict(os.environ)))"
    roles = {"a": {"base_url": "http://x/v1", "api_key": "1"}, "b": {"base_url": "", "api_key": ""}}
    told = await python(code, tmp_path)(roles=roles, task=TASK)
    assert set(GIVEN) & told.keys() == {"FLASH_ROLES", "FLASH_TASK"}
    assert json.loads(told["FLASH_ROLES"]) == roles


async def test_a_long_talk_before_the_answer_does_no_harm(tmp_path):
    code = "print('x' * 3_000_000); print('0.5')"
    assert await run(python(code, tmp_path)) == 0.5


@pytest.mark.parametrize(
    ("code", "last"),
    [
        ("echo done", "'done"),
        ("true", "''"),
        ("echo NaN", "'NaN'"),
        ("printf '[%.0s' $(seq 50000)", r"'\[\[\[.*\.\.\..*\[\[\['$"),
    ],
)
async def test_a_command_without_an_answer_has_no_reward(code, last, tmp_path):
    with pytest.raises(RewardFailure, match=last):
        await run(shell(code, tmp_path))


async def test_an_exit_code_is_a_failure_told_with_the_end_of_its_own_log(tmp_path):
    failing = tmp_path / "fails"
    code = f'echo "note $FLASH_TASK" >&2; echo 1.0; test -e {failing} && exit 3; exit 0'
    agent = shell(code, tmp_path)
    assert await run(agent, Task(1)) == 1.0
    failing.touch()
    with pytest.raises(AgentFailure) as caught:
        await run(agent, Task(2))
    assert "ended with exit code 3" in str(caught.value)
    assert '"seed": 2' in str(caught.value)
    assert '"seed": 1' not in str(caught.value), "that was another episode"
    assert str(tmp_path / "agent_0.log") in str(caught.value)


async def test_a_command_that_a_signal_ends_is_a_failure(tmp_path):
    with pytest.raises(AgentFailure, match=f"exit code {128 + signal.SIGKILL}"):
        await run(shell("echo 1.0; kill -9 $$", tmp_path))


async def test_a_command_that_is_not_there_is_a_failure_that_says_so(tmp_path):
    with pytest.raises(AgentFailure, match="nowhere can't be run: No such file"):
        await run(CommandAgent(["/nowhere"], log_dir=tmp_path))


async def test_commands_that_run_together_have_logs_of_their_own(tmp_path):
    agent = shell("echo $FLASH_TASK >&2; echo 1.0", tmp_path)
    for _ in range(2):
        await asyncio.gather(*(run(agent, Task(seed)) for seed in range(3)))
    logs = sorted(tmp_path.glob("agent_*.log"))
    assert [log.name for log in logs] == ["agent_0.log", "agent_1.log", "agent_2.log"]
    assert all(len(log.read_text().splitlines()) == 2 for log in logs)


async def test_what_a_command_leaves_in_the_background_ends_with_it(tmp_path):
    pids = tmp_path / "pids"
    assert await run(shell(f"sleep 1000 & echo $! > {pids}; echo 1.0", tmp_path)) == 1.0
    (sleeper,) = await pids_in(pids, 1)
    assert is_gone(sleeper)


DETACHES = """
import os, subprocess, sys
pids = open(sys.argv[1], "a")
browser = subprocess.Popen(["sleep", "1000"], start_new_session=True)
if os.fork() == 0:  # a daemon, as they are made: twice forked, nobody's child
    os.setsid()
    daemon = os.fork()
    if daemon == 0:
        os.execvp("sleep", ["sleep", "1000"])
    print(daemon, file=pids, flush=True)
    os._exit(0)
os.waitpid(-1, 0)
print(browser.pid, file=pids, flush=True)
"""


async def test_what_a_command_leaves_in_sessions_of_their_own_ends_with_it(tmp_path):
    pids = tmp_path / "pids"
    for how in ("print(1)", "os.kill(os.getppid(), 15); signal.pause()"):  # ends; ends its guard
        code = f"import os, signal, sys; sys.argv = ['', {str(pids)!r}]\n{DETACHES}\n{how}"
        with contextlib.suppress(AgentFailure):
            assert await run(python(code, tmp_path)) == 1
        assert all(is_gone(pid) for pid in await pids_in(pids, 2))
        pids.unlink()


async def test_a_cancelled_command_ends_with_all_that_it_started(tmp_path):
    pids = tmp_path / "pids"
    code = (
        f"sleep 1000 & echo $! >> {pids}; setsid sh -c 'echo $$ >> {pids}; exec sleep 1000' & "
        f"echo $$ >> {pids}; trap '' TERM INT; wait"
    )
    running = asyncio.create_task(run(shell(code, tmp_path)))
    started = await pids_in(pids, 3)
    assert not any(is_gone(pid) for pid in started)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert all(is_gone(pid) for pid in started)


PARENT = """
import asyncio, sys
from pathlib import Path
from flash.config.agent import GIVEN
from flash.door.command import CommandAgent
from flash.types import Task

agent = CommandAgent(["sh", "-c", sys.argv[1]], log_dir=Path(sys.argv[2]))
asyncio.run(agent(base_url="", api_key="", task=Task(0)))
"""


@pytest.mark.slow
async def test_a_command_whose_parent_is_killed_ends_with_all_that_it_started(tmp_path):
    pids = tmp_path / "pids"
    code = (
        f"sleep 1000 & echo $! >> {pids}; setsid sh -c 'echo $$ >> {pids}; exec sleep 1000' & "
        f"echo $$ >> {pids}; echo $PPID >> {pids}; wait"
    )
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", PARENT, code, str(tmp_path))
    started = await pids_in(pids, 4)
    parent.kill()
    await parent.wait()
    deadline = time.monotonic() + 10
    while not all(is_gone(pid) for pid in started):
        assert time.monotonic() < deadline, "an orphan is left"
        await asyncio.sleep(0.02)
