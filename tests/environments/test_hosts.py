"""Environments in this process and in hosts: a host that hangs or dies is replaced."""

import asyncio
import os
import signal

import gymnasium
import pytest

from flash.environments.hosts import EnvHosts
from flash.environments.inline import InlineEnvs
from flash.errors import EnvFailure
from flash.types import Task

SCRIPTED_ENV = """
import os, time
import gymnasium

class ScriptedEnv(gymnasium.Env):
    '''Does what its actions say.'''

    def __init__(self, greeting="hello"):
        self.greeting = greeting

    def reset(self, *, seed=None, options=None):
        self.steps = 0
        return f"{self.greeting} {seed} {options}", {"goal": "g"}

    def step(self, action):
        self.steps += 1
        if action == "raise":
            raise RuntimeError("a bug in the environment")
        if action == "hang":
            time.sleep(3600)
        if action == "die":
            os._exit(3)
        return f"{os.getpid()} {self.steps}", 0.5, action == "end", False, {"success": True}
"""


@pytest.fixture
def hosts(tmp_path, monkeypatch):
    (tmp_path / "scripted_env.py").write_text(SCRIPTED_ENV)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def make(count=1, call_timeout_s=30.0):
        return EnvHosts(
            "scripted_env:ScriptedEnv", {"greeting": "hi"}, hosts=count,
            call_timeout_s=call_timeout_s, log_dir=tmp_path / "logs",
        )  # fmt: skip

    return make


async def test_a_hosted_environment_answers_like_the_environment_itself(hosts):
    async with hosts() as envs:
        env = await envs.open()
        first = await env.reset(Task(7, {"a": 1}))
        assert (first.text, first.info["goal"]) == ("hi 7 {'a': 1}", "g")
        last = await env.step("end")
        assert (last.reward, last.terminated, last.done) == (0.5, True, True)
        assert envs.busy_s > 0


async def test_environments_spread_over_hosts_and_keep_their_state_apart(hosts):
    async with hosts(count=2) as envs:
        opened = [await envs.open() for _ in range(4)]
        for env in opened:
            await env.reset(Task(0))
        texts = [(await env.step("go")).text.split() for env in opened]
        pids = [pid for pid, _ in texts]
        assert len(set(pids)) == 2
        assert {pids.count(pid) for pid in pids} == {2}
        assert {steps for _, steps in texts} == {"1"}


async def test_an_environment_that_raises_fails_its_episode_only(hosts):
    async with hosts() as envs:
        bad, good = await envs.open(), await envs.open()
        await bad.reset(Task(0))
        await good.reset(Task(0))
        with pytest.raises(EnvFailure, match="a bug in the environment"):
            await bad.step("raise")
        assert (await good.step("go")).text.endswith(" 1")
        assert envs.replaced == 0


async def test_a_hung_host_is_killed_and_replaced(hosts):
    async with hosts(call_timeout_s=2.0) as envs:
        hung, beside = await envs.open(), await envs.open()
        await hung.reset(Task(0))
        await beside.reset(Task(0))
        (pid,) = envs.pids
        with pytest.raises(EnvFailure, match="hung: step took longer than 2 s"):
            await hung.step("hang")
        with pytest.raises(EnvFailure, match="was lost"):
            await beside.step("go")
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        again = await envs.open()
        assert (await again.reset(Task(1))).text.startswith("hi 1")
        assert envs.replaced == 1


@pytest.mark.parametrize("how", ["exit", "kill"])
async def test_a_host_that_dies_is_replaced(hosts, how):
    async with hosts() as envs:
        env = await envs.open()
        await env.reset(Task(0))
        if how == "kill":
            step = asyncio.ensure_future(env.step("hang"))
            (pid,) = envs.pids
            os.kill(pid, signal.SIGKILL)
        else:
            step = asyncio.ensure_future(env.step("die"))
        with pytest.raises(EnvFailure, match="ended with exit code"):
            await step
        again = await envs.open()
        assert (await again.reset(Task(1))).text.startswith("hi 1")


async def test_a_call_nobody_waits_for_is_not_made(hosts):
    async with hosts() as envs:
        env = await envs.open()
        await env.reset(Task(0))
        first = asyncio.ensure_future(env.step("go"))
        given_up = asyncio.ensure_future(env.step("hang"))
        await asyncio.sleep(0)  # both are queued
        given_up.cancel()
        assert (await first).text.endswith(" 1")
        assert (await env.step("go")).text.endswith(" 2")


async def test_no_host_outlives_the_pool(hosts):
    async with hosts(count=2) as envs:
        for _ in range(2):
            await envs.open()
        pids = envs.pids
        assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


async def test_an_inline_environment_that_raises_is_an_environment_failure():
    class Broken(gymnasium.Env):
        def reset(self, *, seed=None, options=None):
            return "here", {}

        def step(self, action):
            raise KeyError("door")

    env = await InlineEnvs(Broken).open()
    assert (await env.reset(Task(0))).text == "here"
    with pytest.raises(EnvFailure, match=r"step\('open door'\) raised KeyError\('door'\)"):
        await env.step("open door")
