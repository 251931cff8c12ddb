"""Environments of verifiers, played by the package itself in a Python of its own."""

import asyncio
import contextlib
import itertools
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from flash.agents import verifiers
from flash.agents.external import ExternalAgent
from flash.agents.verifiers import Verifiers
from flash.door import Door
from flash.door.kept import kept_environment
from flash.errors import EnvFailure
from flash.fakes import FakeWorker
from flash.hub.hub import InferenceHub
from flash.rollout.episode import Episode
from flash.rollout.loop import RolloutLoop
from flash.system.process import Child
from flash.types import Task
from tests.door.conftest import enter, tokenizer
from tests.environments import lamps

__all__ = ["enter", "tokenizer"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

PLAYER = Path(verifiers.__file__).with_name("verifiers_player.py")
END = "<|im_end|>"
TOOLS = {"model", "strict"}  # what the door must overlook for verifiers' tools


@pytest.fixture(scope="session")
def python():
    return lamps.python()


@pytest.fixture
def opened(python, tmp_path):
    """Opens the lamps, with these arguments."""

    def opened(**args):
        start = partial(
            Child.of_command, log_path=tmp_path / "agent_0.log", env=kept_environment(())
        )
        return Verifiers(id="vf-lamps", python=python, args=args).opened(start)

    return opened


def look(at):
    return f'<tool_call>{{"name": "look", "arguments": {{"at": "{at}"}}}}</tool_call>{END}'


SAYS = [look("desk"), f"It is there.{END}", f"Yes, on the desk.{END}"]


async def played(house, act, seed=3, says=SAYS, **limits):
    house.says = list(says)
    agent = ExternalAgent(
        door=house.door, act=act, max_tokens=400, **{"max_sequence_tokens": 20_000, **limits}
    )
    return await agent.play(Episode(seed, Task(seed), hub=house.hub))


def log(tmp_path):
    return (tmp_path / "agent_0.log").read_text()


async def test_several_turns_with_a_tool_are_one_sample_and_the_rubric_rewards_it(
    enter, opened, tmp_path
):
    async with enter(ignore=TOOLS) as house, opened() as act:
        trajectory = await played(house, act, 3)
        other = await played(house, act, 4)
    (sequence,) = trajectory.sequences
    assert [house.text(ids) for is_said, ids in sequence.runs() if is_said] == SAYS
    read = "".join(house.text(ids) for is_said, ids in sequence.runs() if not is_said)
    for told in ("Find the lamp.", "Where is lamp 0?", "desk: a lamp, perhaps", "Are you sure?"):
        assert told in read
    assert (trajectory.reward, trajectory.success, trajectory.turns) == (1.0, True, 3)
    assert (other.reward, other.success) == (0.0, False), "lamp 1 is on the shelf"
    scored = [json.loads(line) for line in log(tmp_path).splitlines() if line[:7] == '{"seed"']
    assert [(each["seed"], each["metrics"]["found"]) for each in scored] == [(3, 1.0), (4, 0.0)]
    assert scored[0]["metrics"]["look_calls"] == 1


async def test_episodes_of_a_group_are_of_one_row_and_are_compared(tokenizer, opened):
    answers = itertools.cycle(["on the desk", "nowhere"])

    def says(prompt, sampling):
        is_last = tokenizer.decode(list(prompt)).count("Are you sure?") == 2
        said = next(answers) if is_last else "Hm."
        return tokenizer.encode(f"{said}{END}", add_special_tokens=False)

    async with (
        InferenceHub([FakeWorker("w", token_s=(0, 0), script=says)]) as hub,
        Door(hub, tokenizer=tokenizer, model="policy", ignore=TOOLS) as door,
        opened() as act,
        RolloutLoop(
            hub,
            agent=lambda: ExternalAgent(door=door, act=act, max_tokens=99),
            tasks=map(Task, itertools.count(3, 3)),
            batch_size=4,
            group_size=2,
            alpha=0,
        ) as loop,
    ):
        batch = await loop.next_batch()
    groups = {sample.group for sample in batch.samples}
    assert len(groups) == 2
    rewards = [(sample.reward, sample.advantage > 0) for sample in batch.samples]
    assert sorted(rewards) == [(0.0, False)] * 2 + [(1.0, True)] * 2


async def test_what_it_asks_for_is_taken_or_refused_by_name(enter, opened):
    sampling = {"logprobs": True, "top_p": 0.5, "extra_body": {"return_token_ids": True}}
    async with opened(sampling=sampling) as act:
        async with enter(ignore={*TOOLS, "return_token_ids"}) as house:
            with pytest.raises(EnvFailure, match=r"vf-lamps: .*row 0: .*top_p=0.5: .*leave it out"):
                await played(house, act)
        async with enter(ignore={*TOOLS, "top_p"}) as house:
            with pytest.raises(EnvFailure, match="return_token_ids=true: .*does not know the fiel"):
                await played(house, act)
        async with enter(ignore={*TOOLS, "return_token_ids", "top_p"}) as house:
            assert (await played(house, act)).reward == 1.0


async def test_a_conversation_without_room_ends_with_the_reward_it_has(enter, opened):
    async with enter(ignore=TOOLS) as house, opened() as act:
        await played(house, act)
        room = len(house.prompts[1])  # of its second turn, which can have no answer
        trajectory = await played(house, act, max_sequence_tokens=room)
    assert (trajectory.reward, trajectory.turns) == (0.0, 1)


async def test_a_given_up_episode_ends_alone_unless_it_blocks_the_process(
    enter, opened, tmp_path, monkeypatch
):
    monkeypatch.setattr(verifiers, "_GIVE_UP_S", 0.5)
    async with enter(ignore=TOOLS) as house, opened() as act:
        house.worker.lose_next(1)
        waiting = asyncio.create_task(played(house, act))
        while not house.worker.running:
            await asyncio.sleep(0.02)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert (await played(house, act)).reward == 1.0
        assert log(tmp_path).count("loads lamps") == 1

        blocked = asyncio.create_task(played(house, act, says=[look("clock")]))
        while "looks at the clock" not in log(tmp_path):
            await asyncio.sleep(0.02)
        beside = asyncio.create_task(played(house, act))
        blocked.cancel()
        with pytest.raises(EnvFailure, match="ended with exit code"):
            await beside
        assert (await played(house, act)).reward == 1.0
    assert log(tmp_path).count("loads lamps") == 2
    with contextlib.suppress(asyncio.CancelledError):
        await blocked


LOADS = """
import json, runpy, sys
player = runpy.run_path(sys.argv[1])
for options in json.loads(sys.argv[2]):
    try:
        player["load"](**options)
    except player["Refused"] as refused:
        print("!", refused)
"""


def test_what_can_not_be_played_is_told_with_the_remedy(python):
    wrong = {
        "id='vf-nowhere': .* has no package vf_nowhere: install": {"id": "vf-nowhere"},
        "no_such.* of id='vf-lamps': got an unexpected": {"args": {"no_such": 1}},
        r"comparing episodes of a group \(compared\)": {"args": {"grouped": True}},
        "no evaluation set.*eval_options": {"args": {"held_out": False}, "split": "heldout"},
        "args={'sampling': 3}: .*'int' object has no": {"args": {"sampling": 3}},
    }
    options = [{"id": "vf-lamps", "args": {}, "split": "train", **each} for each in wrong.values()]
    done = subprocess.run(
        [python, "-P", "-c", LOADS, str(PLAYER), json.dumps(options)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    told = [line for line in done.stdout.splitlines() if line.startswith("!")]
    assert len(told) == len(wrong)
    for line, expected in zip(told, wrong, strict=True):
        assert re.search(expected, line), line


def test_a_python_without_the_package_is_told_before_a_run():
    with pytest.raises(ValueError, match="has no verifiers: run uv pip install --python .* verif"):
        Verifiers(id="vf-lamps", python=sys.executable).check(kept_environment(()))
