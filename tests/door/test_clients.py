"""Agents of other people's frameworks, unmodified, each in an environment of its own: `make
test-clients`."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from flash.agents.external import ExternalAgent
from flash.door.command import CommandAgent
from flash.rollout.episode import Episode
from flash.types import Task

SCRIPTS = Path(__file__).parent / "clients"
END = "<|im_end|>"


def call(name: str, **arguments: str) -> str:
    """A call as the house's model writes it."""
    told = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>{told}</tool_call>{END}"


LOOK = call("look", at="desk")
FOUND = f"It is on the desk.{END}"


@dataclass(frozen=True)
class Client:
    """A script, what the policy says to it, and what the door must overlook for it.

    `samples`: sequences that its episode becomes.
    """

    script: str
    speaks: str
    says: tuple[str, ...] = (LOOK, FOUND)
    ignore: tuple[str, ...] = ()
    samples: int = 1


CLIENTS = [
    Client("openai_chat", "chat/completions"),
    Client("anthropic_tools", "messages"),
    Client("openai_agents", "responses", ignore=("strict",)),
    Client("litellm_chat", "chat/completions"),
    Client("langgraph_agent", "chat/completions"),
    Client("langchain_anthropic_agent", "messages"),
    Client("pydantic_ai_agent", "chat/completions", ignore=("strict",)),
    Client(
        "smolagents_calls",
        "chat/completions",
        says=(LOOK, call("final_answer", answer="on the desk")),
        ignore=("tool_choice",),
        samples=2,  # it writes the history anew: a call becomes a text
    ),
    Client(
        "dspy_predict",
        "chat/completions",
        says=(f"[[ ## answer ## ]]\nIt is on the desk.\n\n[[ ## completed ## ]]{END}",),
    ),
    Client(
        "mini_swe_agent",
        "chat/completions",
        says=(
            call("bash", command="echo on the desk"),
            call("bash", command="echo COMPLETE_TASK_AND_SUBMIT_FINAL_OUTPUT; echo on the desk"),
        ),
    ),
]


@pytest.mark.clients
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.script)
async def test_an_episode_of_it_is_one_sample(enter, tmp_path, client):
    async with enter(ignore={"model", *client.ignore}) as house:
        house.says = list(client.says)
        answers = []

        async def act(**given):
            uv = str(Path(sys.executable).parent / "uv")
            script = str(SCRIPTS / f"{client.script}.py")
            python = f"{sys.version_info.major}.{sys.version_info.minor}"
            command = [uv, "run", "--quiet", "--no-project", "--python", python, "--script", script]
            answers.append(await CommandAgent(command, log_dir=tmp_path)(**given))
            return answers[0]

        agent = ExternalAgent(
            door=house.door,
            act=act,
            max_tokens=400,
            episode_timeout_s=500,
            max_sequence_tokens=20_000,
        )
        trajectory = await agent.play(Episode(1, Task(1), hub=house.hub))
    assert "desk" in answers[0]["said"]
    said = [house.text(ids) for s in trajectory.sequences for is_said, ids in s.runs() if is_said]
    assert said == list(client.says)
    assert len(trajectory.sequences) == client.samples


def test_the_docs_tell_what_each_needs():
    text = (Path(__file__).parents[2] / "docs/agents.md").read_text()
    table = text.partition("### Clients that were tried")[2].partition("##")[0]
    lines = [line for line in table.splitlines() if line.startswith("| ")][1:]
    told = [
        (speaks.strip(), ignore.strip(), samples.strip().partition(":")[0])
        for _, _, speaks, ignore, samples, _ in (line.split("|") for line in lines)
    ]
    assert told == [
        (f"`{each.speaks}`", ", ".join(f"`{name}`" for name in each.ignore), str(each.samples))
        for each in CLIENTS
    ]
