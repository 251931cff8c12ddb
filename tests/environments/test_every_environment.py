"""What holds for every environment that has a name, adapters of packages among them.

A new one joins by a row.
"""

import contextlib
import dataclasses
import functools
import json
import random

import msgspec
import numpy as np
import pytest

from flash import registry
from flash.agents import EnvironmentAgent
from flash.config import try_environment
from flash.environments.config import EnvConfig
from flash.environments.hosts import EnvHosts
from flash.environments.inline import InlineEnvs
from flash.errors import EnvFailure
from flash.fakes import FakeStyle, FakeWorker
from flash.hub.hub import InferenceHub
from flash.rollout.episode import Episode
from flash.types import Task
from flash.virtual_time import in_virtual_time
from tests import openenv, task_folders
from tests.sandboxes import needs_sandbox


@dataclasses.dataclass(frozen=True)
class Row:
    """An environment: the actions that it is tried with, and whether seeds change what is seen."""

    name: str
    options: dict[str, object]
    action: str
    needs: str = "gymnasium"
    seeds_differ: bool = True


ROWS = [
    Row("frozen_lake", {}, "right"),
    Row("reasoning_gym", {"dataset": "chain_sum"}, "4", "reasoning_gym"),
    Row("textarena", {"id": "Sudoku-v0-easy"}, "[1 1 1]", "textarena"),
    Row("textarena", {"id": "FrozenLake-v0-random"}, "[right]", "textarena"),
    Row("textarena", {"id": "TowerOfHanoi-v0"}, "A B", "textarena", seeds_differ=False),
    Row("gem", {"id": "game:GuessTheNumber-v0-random"}, r"\boxed{2}", "gem"),
    Row("gem", {"id": "game:Minesweeper-v0-random"}, r"\boxed{reveal 0 0}", "gem"),
    Row("alfworld", {}, "look", "alfworld"),
    Row("sokoban", {}, "Up"),
    Row("webshop", {"products": 50}, "search[shoes]", "bm25s"),
    Row("gymnasium", {"id": "flash.envs.frozen_lake:flash/FrozenLakeText-v0"}, "right"),
]
ODD = [
    "",
    " ",
    "x" * 100_000,
    "\x00\x01\x7f",
    "ü 漢 🙂 \u202e",
    "[",
    "[[]]",
    r"\boxed{",
    "{'a': 1}",
]
ODD += ["[99999999999999999999 0]", r"\boxed{99999999999999999999}", "[-1 -1 -1]", "<tool_call>"]

OF_QUESTIONS = Row("questions", {}, "4", "datasets")
OF_A_SERVER = Row("openenv", {"observation": "text"}, "3", "websockets")
OF_FOLDERS = Row("harbor", {"without": ["image"]}, "```bash\ncat log.txt\n```")
OF_A_FILE = Row("code", {"split": "all"}, "def f(x): return x + 1", "datasets")
OF_SANDBOXES = [OF_A_FILE, Row("formulas", {}, "def f(x, y, z): return x + y")]

each = pytest.mark.parametrize(
    "row",
    [
        *ROWS,
        OF_QUESTIONS,
        pytest.param(OF_A_SERVER, marks=pytest.mark.slow),
        pytest.param(OF_FOLDERS, marks=[pytest.mark.slow, needs_sandbox]),
        *(pytest.param(row, marks=[pytest.mark.slow, needs_sandbox]) for row in OF_SANDBOXES),
    ],
    ids=lambda row: f"{row.name} {row.options}",
    indirect=True,
)


@pytest.fixture(scope="module")
def openenv_url():
    with openenv.server() as url:
        yield f"{url}/numbers"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("tasks")
    for number in range(5):
        logged = {"environment/log.txt": "a line\n" * number}
        task_folders.harbor(path / f"task-{number}", **logged)
    return path


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    path = tmp_path_factory.mktemp("code") / "problems.jsonl"
    rows = ({"text": f"Add {n}.", "test_list": [f"assert f(0) == {n}"]} for n in range(12))
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    path = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    rows = ({"question": f"What is {n} + 1?", "answer": n + 1} for n in range(50))
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture
def row(request):
    match request.param:
        case Row(name="openenv", needs=package):
            pytest.importorskip(package)
            own = {"url": request.getfixturevalue("openenv_url")}
        case Row(name="harbor"):
            own = {"path": str(request.getfixturevalue("folders"))}
        case Row(name="questions"):
            own = {"path": request.getfixturevalue("questions")}
        case Row(name="code"):
            own = {"path": request.getfixturevalue("problems")}
        case _:
            own = {}
    return dataclasses.replace(request.param, options=request.param.options | own)


@pytest.fixture
def envs(row):
    """What opens such environments in the loop; they are closed after the test."""
    pytest.importorskip(row.needs)
    make = functools.partial(registry.environment(row.name), **row.options)
    with contextlib.ExitStack() as opened:
        yield InlineEnvs(lambda: opened.enter_context(contextlib.closing(make())))


async def played(env, seed, action, turns=3):
    """All that it answers, as plain data."""
    seen = [await env.reset(Task(seed))]
    while len(seen) <= turns and not seen[-1].done:
        seen.append(await env.step(action))
    return [msgspec.to_builtins(one) for one in seen]


@each
async def test_a_seed_decides_what_is_seen_in_each_instance_and_each_time(row, envs):
    one, other = await envs.open(), await envs.open()
    first = await played(one, 5, row.action)
    assert await played(other, 5, row.action) == first
    assert await played(one, 5, row.action) == first
    assert first[0]["text"]
    others = [await played(other, seed, row.action) for seed in range(6, 12)]
    assert any(seen != first for seen in others) == row.seeds_differ


@each
async def test_episodes_that_take_turns_are_as_they_are_alone(row, envs):
    one, other = await envs.open(), await envs.open()
    alone = {seed: await played(one, seed, row.action) for seed in (5, 9)}
    both = {5: one, 9: other}
    seen = {seed: [await env.reset(Task(seed))] for seed, env in both.items()}
    for _ in range(3):
        for seed, env in both.items():
            if not seen[seed][-1].done:
                seen[seed].append(await env.step(row.action))
    assert {seed: [msgspec.to_builtins(o) for o in told] for seed, told in seen.items()} == alone


@each
async def test_the_process_s_random_numbers_are_neither_used_nor_changed(row, envs):
    env = await envs.open()
    random.seed(1)
    np.random.seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist()
    first = await played(env, 5, row.action)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before
    random.seed(2)
    np.random.seed(2)
    assert await played(env, 5, row.action) == first


@each
async def test_odd_actions_are_answered_or_blamed_on_the_environment(row, envs, capfd):
    env = await envs.open()
    for action in ODD:
        await env.reset(Task(5))
        with contextlib.suppress(EnvFailure):
            seen = await env.step(action)
            assert isinstance(seen.text, str)
            assert np.isfinite(seen.reward)
    env.close()
    assert capfd.readouterr().out == ""


@each
def test_a_mistaken_option_is_named_before_anything_starts(row):
    pytest.importorskip(row.needs)
    with pytest.raises(ValueError, match="no_such"):
        try_environment(EnvConfig(name=row.name, options=row.options | {"no_such": 1}))


@pytest.mark.slow
@each
async def test_in_a_host_process_it_is_the_same(row, envs, tmp_path):
    here = await played(await envs.open(), 5, row.action)
    async with EnvHosts(
        row.name, row.options, hosts=1, call_timeout_s=60.0, log_dir=tmp_path
    ) as hosts:
        assert await played(await hosts.open(), 5, row.action) == here


@each
async def test_a_step_before_any_reset_is_blamed_on_the_environment_or_answered(row, envs):
    env = await envs.open()
    with contextlib.suppress(EnvFailure):
        assert isinstance((await env.step(row.action)).text, str)


class Says(FakeStyle):
    """Whatever is sampled, it says that."""

    def __init__(self, action):
        self._action = action

    def action(self, sampled):
        return self._action


@each
@in_virtual_time
async def test_an_agent_plays_an_episode_in_it(row, envs):
    agent = EnvironmentAgent(
        envs=envs, style=Says(row.action), max_turns=3, max_tokens=3, max_sequence_tokens=100
    )
    async with InferenceHub([FakeWorker("w", token_s=(0, 0))]) as hub:
        trajectory = await agent.play(Episode(1, Task(5), hub=hub))
    assert 1 <= trajectory.turns <= 3
    assert np.isfinite(trajectory.reward)
