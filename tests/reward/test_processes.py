"""Rewards in processes that are killed when they hang; with real processes."""

import asyncio
import os

import pytest

from flash.errors import RewardFailure
from flash.reward.processes import RewardProcesses
from flash.types import Task, Transcript

pytestmark = pytest.mark.slow

SCORING = """
import os, pickle, socket, struct, sys, time
import numpy as np

class Evil:
    def __reduce__(self):
        return open, ("forged", "w")

def send(payload):
    connection = socket.socket(fileno=os.dup(int(os.environ["FLASH_CHILD_FD"])))
    connection.sendall(struct.pack("!Q", len(payload)) + payload)

def score(transcript):
    if transcript.text == "hang":
        time.sleep(1e6)
    if transcript.text == "die":
        os._exit(3)
    if transcript.text == "raise":
        raise KeyError("no such answer")
    if transcript.text == "pid":
        return os.getpid()
    if transcript.text == "exit":
        sys.exit("enough")
    if transcript.text == "evil":
        return Evil()
    if transcript.text == "forge":
        send(pickle.dumps((6, True, Evil())))
    if transcript.text == "numpy":
        return {"reward": np.float32(0.5), "success": np.True_, "why": object()}
    return {"reward": len(transcript.responses), "success": True}
"""

# The second process finds the first one's mark, tells of both, and never gets further.
SLOW_IMPORT = """
import os, pathlib, time

try:
    pathlib.Path("first").symlink_to(str(os.getpid()))
except FileExistsError:
    pathlib.Path("pids").write_text(f"{os.readlink('first')} {os.getpid()}")
    time.sleep(1e6)

def score(transcript):
    return 0
"""


def transcript(text):
    return Transcript(task=Task(0), text=text, responses=("a", "b"), reward=0.0, success=False)


async def test_a_function_that_hangs_dies_or_raises_costs_its_own_episode_only(
    tmp_path, monkeypatch
):
    (tmp_path / "my_scoring.py").write_text(SCORING)
    monkeypatch.chdir(tmp_path)
    async with RewardProcesses("my_scoring:score", processes=1, log_dir=tmp_path) as score:
        assert await score(transcript(""), timeout_s=60) == {"reward": 2, "success": True}
        first = await score(transcript("pid"), timeout_s=60)
        with pytest.raises(
            RewardFailure,
            match=r"the reward raised KeyError\('no such answer'\) in .*my_scoring.py",
        ):
            await score(transcript("raise"), timeout_s=60)
        assert await score(transcript("pid"), timeout_s=60) == first, "an exception kills nobody"

        with pytest.raises(TimeoutError):
            await score(transcript("hang"), timeout_s=0.5)
        second = await score(transcript("pid"), timeout_s=60)
        assert second != first
        with pytest.raises(ProcessLookupError):
            os.kill(int(first["reward"]), 0)

        given_up = asyncio.create_task(score(transcript("hang"), timeout_s=1e6))
        await asyncio.sleep(0)
        given_up.cancel()
        with pytest.raises(RewardFailure, match="exit code 3"):
            await score(transcript("die"), timeout_s=60)
        third = await score(transcript("pid"), timeout_s=60)
        assert len({told["reward"] for told in (first, second, third)}) == 3
    with pytest.raises(ProcessLookupError):
        os.kill(int(third["reward"]), 0)


async def test_what_a_process_answers_is_data(tmp_path, monkeypatch):
    (tmp_path / "my_scoring.py").write_text(SCORING)
    monkeypatch.chdir(tmp_path)
    async with RewardProcesses("my_scoring:score", processes=1, log_dir=tmp_path) as score:
        told = await score(transcript("numpy"), timeout_s=60)
        assert told == {"reward": 0.5, "success": True}
        first = await score(transcript("pid"), timeout_s=60)
        with pytest.raises(RewardFailure, match="the reward answered .*Evil"):
            await score(transcript("evil"), timeout_s=60)
        with pytest.raises(RewardFailure, match=r"the reward raised SystemExit\('enough'\)"):
            await score(transcript("exit"), timeout_s=60)
        assert await score(transcript("pid"), timeout_s=60) == first, "neither kills it"
        with pytest.raises(RewardFailure, match="reward 0(?s:.)*can't be read here"):
            await score(transcript("forge"), timeout_s=60)
        assert await score(transcript("pid"), timeout_s=60) != first
    assert not (tmp_path / "forged").exists()


async def test_a_start_that_is_given_up_leaves_no_process(tmp_path, monkeypatch):
    """Neither the one that is ready nor the one whose import has no end."""
    (tmp_path / "my_slow_import.py").write_text(SLOW_IMPORT)
    os.mkfifo(tmp_path / "pids")
    monkeypatch.chdir(tmp_path)
    processes = RewardProcesses("my_slow_import:score", processes=2, log_dir=tmp_path)
    start = asyncio.create_task(processes.__aenter__())
    pids = (await asyncio.to_thread((tmp_path / "pids").read_text)).split()
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


async def test_a_function_that_can_not_be_imported_there_is_told_at_the_start(tmp_path):
    with pytest.raises(ValueError, match=r"reward\.run='no_such_module:score'.*No module named"):
        async with RewardProcesses("no_such_module:score", processes=1, log_dir=tmp_path):
            pass
