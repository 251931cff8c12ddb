"""The examples do what they say, with real parts: a worker, a trainer, a run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from gymnasium.utils.env_checker import check_env
from transformers import AutoTokenizer

from examples import attach_to_vllm, embed_the_loop, openai_agent
from examples.own_environment.lamps import LampsEnv
from examples.own_loss import discounted_by_age
from flash import Door, HttpWorker, InferenceHub, RolloutLoop, Task, TokenBatch
from flash.agents import ExternalAgent
from flash.config import load
from flash.envs.frozen_lake import FrozenLakeTextEnv
from flash.fakes import FakeWorker
from flash.hub.embedded_pool import EmbeddedPool
from flash.parts.agents import Playing, open_agents
from flash.parts.model import make_style
from flash.rollout.episode import Episode
from flash.telemetry.folder import read_lines
from flash.warm_start.small_policy import create
from tests.sandboxes import needs_sandbox
from tests.tools.templates import TEMPLATES, tokenizer_of
from tests.wheels import build_wheel

EXAMPLES = Path(__file__).parents[1] / "examples"

slow = pytest.mark.slow
together = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A small policy that has learned nothing."""
    words = [*FrozenLakeTextEnv().vocabulary(), *map(str, range(19)), "what", "is", "+"]
    return create(tmp_path_factory.mktemp("model"), words, layers=1, hidden_size=32, heads=2)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(model, tmp_path_factory):
    """URL and key of an embedded worker."""
    pool = EmbeddedPool(
        str(model), size=1, max_running=16, cache_tokens=8192, threads=1, dtype="float32",
        version=0, seed=0, log_dir=tmp_path_factory.mktemp("logs"), start_timeout_s=120,
    )  # fmt: skip
    (worker,) = await pool.start(lambda worker, why, final: None, lambda worker: None)
    assert isinstance(worker, HttpWorker)
    yield worker.name, worker.headers["Authorization"].removeprefix("Bearer ")
    await pool.stop()


@slow
@together
async def test_the_loop_is_embedded_in_a_script(model, server, tmp_path, capsys):
    url, key = server
    worker = HttpWorker(url, api_key=key)
    evaluation = await embed_the_loop.main(
        str(model), [worker], steps=2, run_dir=tmp_path, held_out=8
    )
    assert (evaluation.episodes, evaluation.versions) == (8, (2,))
    told = capsys.readouterr().out
    assert "version 2: success" in told
    assert "'trained': 64" in told


@slow
@together
async def test_servers_that_run_are_attached_and_a_response_may_outlive_its_weights(model, server):
    url, key = server
    answers = await attach_to_vllm.main(model, [url], api_key=key)
    assert [len(answer.token_ids) for answer in answers] == [40 * n for n in range(1, 9)]
    assert set(answers[0].versions) == {0}
    assert answers[-1].versions == sorted(answers[-1].versions)
    assert set(answers[-1].versions) == {0, 1}


@slow
@together
async def test_an_agent_that_knows_the_official_client_only_is_played_through_the_door(
    model, server
):
    url, key = server
    tokenizer = AutoTokenizer.from_pretrained(model)
    async with (
        InferenceHub([HttpWorker(url, api_key=key)]) as hub,
        Door(hub, tokenizer=tokenizer, model="policy") as door,
        RolloutLoop(
            hub,
            agent=lambda: ExternalAgent(door=door, act=openai_agent.act, max_tokens=2),
            tasks=map(Task, range(34, 36)),
            batch_size=8,
            group_size=4,
        ) as rollouts,
    ):
        batch = await rollouts.next_batch()
    assert len(batch.samples) == 8
    for sample in batch.samples:
        said = tokenizer.decode(sample.token_ids[sample.loss_mask > 0], skip_special_tokens=True)
        assert sample.reward == (said.strip() == str(7 + sample.group)), said  # 3 + 4, 3 + 5


def test_the_own_environment_is_one_for_gymnasium_and_its_expert_arrives_sometimes():
    lamps = LampsEnv()
    check_env(lamps, skip_render_check=True)
    demonstrations = [lamps.demonstrate(Task(seed)) for seed in range(200)]
    solved = sum(len(turns) < 6 for turns in demonstrations)
    assert 40 < solved < 160
    words = set(lamps.vocabulary())
    for turns in demonstrations:
        assert all({*turn.observation.text.split(), turn.action} <= words for turn in turns)


def test_the_own_loss_is_that_of_its_docstring():
    batch = TokenBatch(
        logprobs_T=torch.log(torch.tensor([0.5, 0.5, 0.9], requires_grad=True)),
        behaviour_logprobs_T=torch.log(torch.tensor([0.5, 0.25, 0.1])),
        proximal_logprobs_T=torch.zeros(3),
        advantages_T=torch.tensor([1.0, -1.0, 2.0]),
        rewards_T=torch.zeros(3),
        ages_T=torch.tensor([0, 1, 2]),
        sequences_T=torch.tensor([0, 0, 0]),
        num_sequences=1,
    )
    loss = discounted_by_age(batch)
    assert loss.weight_T.tolist() == pytest.approx([1.0, 0.7 * 2.0, 0.49 * 2.0])
    assert loss.capped_T.tolist() == [False, False, True]
    logprobs = [-0.693147, -0.693147, -0.105361]
    expected = [-1.0 * logprobs[0], 1.4 * logprobs[1], -0.98 * 2 * logprobs[2]]
    assert loss.loss_T.tolist() == pytest.approx(expected, rel=1e-5)


TINY = {
    "steps": 2,
    "batch_size": 16,
    "group_size": 4,
    "eval.tasks": 8,
    "policy.layers": 1,
    "policy.hidden_size": 32,
    "warm_start.steps": 3,
    "warm_start.demonstrations": 12,
    "name": "tiny",
}


@slow
def test_a_package_with_an_environment_is_installed_and_trained_with_a_loss_of_ones_own(tmp_path):
    (tmp_path / "source").mkdir()
    wheel = build_wheel(
        EXAMPLES / "own_environment", ("pyproject.toml", "lamps.py"), tmp_path / "source"
    )
    wheel.extractall(tmp_path / "site")
    changes = {
        "env": "lamps",
        "env.eval_options": "{}",
        "trainer.objective": "{name: function, run: 'own_loss:discounted_by_age'}",
        "runs_dir": tmp_path,
        **TINY,
    }
    words = [str(word) for name, value in changes.items() for word in (f"--{name}", value)]
    subprocess.run(
        [Path(sys.executable).with_name("flash"), "train", "frozen_lake", *words],
        cwd=EXAMPLES,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
        check=True,
    )
    _, *steps = read_lines(tmp_path / "tiny" / "metrics.jsonl")
    assert [line["step"] for line in steps] == [1, 2]
    assert all(line["tokens/trained"] > 0 for line in steps)


@slow
@pytest.mark.parametrize("sandbox", ["none", pytest.param("local", marks=needs_sandbox)])
async def test_a_policy_calls_a_function_and_an_mcp_server(tmp_path, monkeypatch, sandbox):
    """As a run opens them: the function in a process, the server of the episode alone."""
    monkeypatch.chdir(EXAMPLES.parent)
    (tmp_path / "q.jsonl").write_text('{"question": "What is (2 + 3) * 4?", "answer": 20}\n')
    server = {"command": [sys.executable, "examples/tools/notes_server.py"], "each": "episode"}
    config = load(
        "gsm8k",
        {
            "env.options": {"path": str(tmp_path / "q.jsonl")},
            "agent.tools": "examples.tools.calculator:calculate",
            "agent.mcp": [server],
            "agent.sandbox": sandbox,
            "agent.style": "chat",
            "agent.style_options": {},
            "agent.max_turns": 4,
            "agent.max_sequence_tokens": 8192,
        },
    )
    tokenizer = tokenizer_of(*TEMPLATES["hermes"])
    call = '<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>'
    calculate = call % ("calculate", '{"expression": "(2 + 3) * 4"}')
    said = iter(
        [
            calculate + "\n" + call % ("write", '{"note": "brackets first"}') + "<|im_end|>",
            call % ("read", '{"number": 1}') + "<|im_end|>",
            call % ("calculate", '{"expression": "print(1)"}') + "<|im_end|>",
            "It is 20.<|im_end|>",
        ]
    )
    worker = FakeWorker(
        "w", token_s=(0, 0),
        script=lambda prompt, _: tokenizer.encode(next(said), add_special_tokens=False),
    )  # fmt: skip
    playing = Playing(
        config=config, style=make_style(config, tokenizer), reward=None, log_dir=tmp_path
    )
    async with (
        InferenceHub([worker]) as hub,
        open_agents({"": playing}, door=None, hub=hub) as agents,
    ):
        trajectory = await agents.make[""]().play(Episode(1, Task(0), hub=hub))
    in_processes = (tmp_path / "tool_0.log").exists()
    assert in_processes == (sandbox == "none")
    assert trajectory.turn_states[1:] == [
        "20\nnote 1",
        "brackets first",
        "Error: ValueError: print(1) is no arithmetic",
    ]
    assert (trajectory.turns, trajectory.reward) == (4, 1.0)
