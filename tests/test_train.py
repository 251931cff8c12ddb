"""Whole runs, small: a stop and a resume, killed servers, the README's snippet; all parts real."""

import asyncio
import itertools
import os
import re
import shutil
import sys
from collections import Counter
from pathlib import Path

import psutil
import pytest

from flash.cli.main import run as flash
from flash.errors import RolloutFailure
from flash.evaluate import evaluate, plan
from flash.fakes import FakeRanks
from flash.hub.embedded_pool import EmbeddedPool
from flash.hub.hub import InferenceHub
from flash.parts.model import prepared_model
from flash.parts.roles import Earlier
from flash.replay.logged_run import open_run
from flash.seeds import first_task
from flash.system.machine import has_vllm
from flash.telemetry.folder import read_lines
from flash.train import train
from flash.trainer.config import TrainerConfig
from flash.trainer.passes import Room
from flash.trainer.trainer import Trainer
from flash.types import Batch
from flash.warm_start.small_policy import create
from tests.processes import Watch
from tests.tiny_runs import OUTCOMES, run, tiny
from tests.trainer.test_lasting import ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.mark.timeout(900)
@pytest.mark.skipif(not has_vllm(), reason="vLLM is not installed: make setup-vllm")
async def test_a_run_on_vllm_servers_goes_on_when_one_is_killed(tmp_path):
    changes = {"engine": {"kind": "vllm", "workers": 2, "max_running": 8}, "steps": 4}
    changes["policy.hidden_size"] = 64  # heads of 32, the least that vLLM takes on a CPU
    config = tiny("frozen_lake", tmp_path, name="r", eval_every=0, **changes)
    running = asyncio.create_task(run(config))
    metrics = tmp_path / "r" / "metrics.jsonl"
    while not (metrics.exists() and len(read_lines(metrics)) > 2):  # two publishes
        assert not running.done()
        await asyncio.sleep(0.05)
    processes = psutil.Process().children(recursive=True)
    lines = {p: " ".join(p.cmdline()) for p in processes}
    servers = [p for p, line in lines.items() if "vllm_server" in line and "watched" not in line]
    assert len(servers) == 2
    watch = Watch(p.pid for p in processes)
    servers[0].kill()
    summary = await running
    assert summary["steps"] == 4
    for line in read_lines(metrics)[1:]:
        assert line["staleness/max"] <= 1
        assert line["logprob_gap/max"] < 1e-3
        counts = {name: line[f"episodes/{name}"] for name in OUTCOMES}
        assert counts.pop("admitted") == sum(counts.values())
    assert not await asyncio.to_thread(watch.left)


@pytest.mark.timeout(900)
@pytest.mark.skipif(not has_vllm(), reason="vLLM is not installed: make setup-vllm")
async def test_a_run_whose_servers_take_turns_with_the_trainer(tmp_path, monkeypatch):
    """Without a GPU they give no memory away, but are as silent as with one."""
    asleep: list[bytes] = []
    step = Trainer.step

    async def watched(self, batch):
        for hub in hubs:  # there is none yet at the warm start
            for slot in hub._slots:
                asleep.append(await slot.worker._call("GET", "/is_sleeping"))
        return await step(self, batch)

    hubs: list[InferenceHub] = []
    enter = InferenceHub.__aenter__
    monkeypatch.setattr(InferenceHub, "__aenter__", lambda hub: hubs.append(hub) or enter(hub))
    monkeypatch.setattr(Trainer, "step", watched)
    engine = {"kind": "vllm", "max_running": 16, "colocated": True}
    changes = {"policy.hidden_size": 64, "publish_every": 2, "alpha": 1, "checkpoint.every": 1}
    config = tiny("frozen_lake", tmp_path, name="r", engine=engine, **changes)
    summary = await run(config)
    assert summary["steps"] == 3
    assert asleep == [b'{"is_sleeping":true}'] * 3
    for line in read_lines(tmp_path / "r" / "metrics.jsonl")[1:]:
        assert line["staleness/max"] <= 1
        counts = {name: line[f"episodes/{name}"] for name in OUTCOMES}
        assert counts.pop("admitted") == sum(counts.values())
        assert line["episodes/failed"] == 0


class SetAtWait(asyncio.Event):
    """Set by itself when it is waited for the nth time: the run's nth long wait."""

    def __init__(self, nth: int) -> None:
        super().__init__()
        self.left = nth

    async def wait(self):
        self.left -= 1
        if self.left == 0:
            self.set()
        return await super().wait()


async def test_a_run_that_is_stopped_before_any_episode_has_nothing_to_go_on_with(tmp_path):
    config = tiny("frozen_lake", tmp_path, untaught=True, name="r")
    assert await run(config, SetAtWait(1)) is None  # the warm start
    assert not list(tmp_path.glob(".small_policies/*")), "nothing half-taught is left"
    with pytest.raises(ValueError, match="resume"):
        await run(tiny("frozen_lake", tmp_path, name="r", **{"checkpoint.resume": True}))


async def test_a_run_that_is_stopped_while_its_parts_start_leaves_no_checkpoint(tmp_path):
    assert await run(tiny("frozen_lake", tmp_path, name="r"), SetAtWait(2)) is None
    assert not list(tmp_path.glob("r/checkpoints/*"))


async def test_a_run_that_is_stopped_in_its_first_evaluation_goes_on_with_its_episodes(tmp_path):
    assert await run(tiny("frozen_lake", tmp_path, name="r"), SetAtWait(3)) is None
    assert not list(tmp_path.glob("r/checkpoints/*"))
    summary = await run(tiny("frozen_lake", tmp_path, name="r", **{"checkpoint.resume": True}))
    assert summary["steps"] == 3
    lines = read_lines(tmp_path / "r" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    episodes = read_lines(tmp_path / "r" / "episodes.jsonl")
    ids = [episode["episode"] for episode in episodes]
    assert sorted(ids) == list(range(len(ids))), "each has its one outcome"
    trained = Counter(e["seed"] for e in episodes if e["outcome"] == "trained")
    assert sorted(trained) == list(range(12)), "in their order, none skipped"


async def test_a_run_that_is_stopped_saves_and_goes_on_where_it_stopped(tmp_path):
    stop = SetAtWait(4)  # the first batch
    options = {"name": "r", "alpha": 1, "steps": 2}
    first = await run(tiny("frozen_lake", tmp_path, **options), stop)
    assert first["stopped"]
    assert first["steps"] < 2
    options["steps"] = 4
    second = await run(tiny("frozen_lake", tmp_path, **options, **{"checkpoint.resume": True}))
    assert (second["folder"], second["steps"]) == (first["folder"], 4)
    folder = Path(second["folder"])
    lines = read_lines(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert [line["time_s"] for line in lines] == sorted(line["time_s"] for line in lines)
    assert all(line.get("staleness/max", 0) <= 1 for line in lines), "also after a resume"
    episodes = read_lines(folder / "episodes.jsonl")
    trained = Counter(e["seed"] for e in episodes if e["outcome"] == "trained")
    assert set(trained.values()) == {4}, "no task is trained twice"
    assert sorted(trained) == list(range(min(trained), max(trained) + 1)), "and none is skipped"
    ids = [episode["episode"] for episode in episodes]
    assert len(set(ids)) == len(ids), "and ids go on"
    kept = Counter(t["step"] for t in read_lines(folder / "transcripts.jsonl"))
    assert set(kept) == {1, 2, 3, 4}, "what was said in each step"
    assert max(kept.values()) <= 2, "and no step is kept twice"
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    report = await evaluate(plan(str(folder), {"eval.tasks": 4}))
    assert report.environments["frozen_lake"].played == 4
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == files


async def test_a_resume_trains_again_with_the_old_settings_for_workers_that_run_already(
    tmp_path, capsys, caplog
):
    options = {"name": "r", "eval_every": 0, "trainer.threads": 1, "trainer.warmup_steps": 0}
    await run(tiny("frozen_lake", tmp_path, **options, steps=2))
    checkpoint = tmp_path / "r" / "checkpoints" / "step_000002"
    end = (checkpoint / "policy" / "__0_0.distcp").read_bytes()
    shutil.rmtree(checkpoint.parent)
    policy = await prepared_model(tiny("frozen_lake", tmp_path), lambda *_: None)
    worker = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "flash.worker", f"--model={policy}",
        stdout=asyncio.subprocess.PIPE, env=os.environ | {"FLASH_WORKER_API_KEY": "sesame"},
    )  # fmt: skip
    try:
        ready, url = (await worker.stdout.readline()).decode().split()
        assert ready == "ready"
        options |= {"steps": 3, "trainer.learning_rate": 1e-6, "checkpoint.resume": True}
        options |= {"engine.urls": url, "engine.api_key": "sesame"}
        summary = await run(tiny("frozen_lake", tmp_path, **options))
    finally:
        worker.kill()
        await worker.wait()
    assert summary["steps"] == 3
    assert "redone 2 steps, numbers as logged\n" in capsys.readouterr().out
    assert "trained again" not in caplog.text
    assert (checkpoint / "policy" / "__0_0.distcp").read_bytes() == end
    lines = read_lines(tmp_path / "r" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert lines[3]["learning_rate"] == 1e-6 != lines[2]["learning_rate"]
    line = lines[3]  # of tokens that were sampled with the weights of the redone steps
    assert 0 <= line["logprob_gap/median"] <= line["logprob_gap/p90"] <= line["logprob_gap/max"]
    assert line["logprob_gap/max"] < 1e-3
    assert 0 <= line["logprob_gap/kl"] < 1e-6
    assert 0 <= line["logprob_gap/logits"] < 1e-3
    assert line["policy_version"] == 3


async def test_a_run_that_fails_is_saved_and_goes_on_from_there(tmp_path, monkeypatch):
    (tmp_path / "failing_filter.py").write_text(FILTER)
    monkeypatch.syspath_prepend(tmp_path)
    options = {"name": "r", "eval_every": 0}
    failing = tiny("frozen_lake", tmp_path, **options, **{"rollout.filters": "failing_filter:drop"})
    with pytest.raises(RolloutFailure, match="no more of this") as caught:
        await run(failing)
    steps = read_lines(tmp_path / "r" / "metrics.jsonl")[-1]["step"]
    assert steps > 0
    assert f"all {steps} steps are in" in caught.value.__notes__[0]
    summary = await run(tiny("frozen_lake", tmp_path, **options, **{"checkpoint.resume": True}))
    assert summary["steps"] == 3
    lines = read_lines(tmp_path / "r" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3], "none was trained twice"


async def test_a_rank_that_dies_where_no_checkpoint_is_whole_is_replaced_from_the_first_model(
    tmp_path, monkeypatch, caplog
):
    train = Trainer.step
    damaged = []

    async def step(trainer: Trainer, batch: Batch) -> dict[str, float]:
        checkpoints = [*(tmp_path / "r" / "checkpoints").glob("step_*")]
        if len(checkpoints) == 2 and not damaged:
            await trainer.written()
            damaged.extend(path / "policy" / ".metadata" for path in checkpoints)
            for path in damaged:
                path.write_bytes(b"")
            ranks()[0].kill()
        return await train(trainer, batch)

    monkeypatch.setattr(Trainer, "step", step)
    options = {"name": "r", "eval_every": 0, "checkpoint.every": 1}
    summary = await run(tiny("frozen_lake", tmp_path, **options))
    assert (len(damaged), summary["steps"]) == (2, 3)
    assert "from the first model, batches to train again: 2" in caplog.text
    lines = read_lines(tmp_path / "r" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]


FILTER = """
groups = 0

def drop(group):
    global groups
    groups += 1
    if groups > 9:
        raise ValueError("no more of this")
    return False
"""


async def test_a_synchronous_run_of_two_workers_and_ranks_trains_no_token_of_another_version(
    tmp_path,
):
    options = {"env.hosts": 2, "engine.workers": 2, "trainer.ranks": 2}
    summary = await run(tiny("frozen_lake", tmp_path, alpha=0, stream=True, **options))
    steps = read_lines(Path(summary["folder"]) / "metrics.jsonl")[1:]
    assert [line["staleness/max"] for line in steps] == [0, 0, 0]
    assert all(0 <= line["idle/env_hosts"] <= 1 for line in steps)
    assert all(line["logprob_gap/max"] < 1e-3 for line in steps)


AGENT = """
import json, os, sys, urllib.request

task = json.loads(os.environ["FLASH_TASK"])
print("playing", task["seed"], file=sys.stderr)
body = {"model": "any", "messages": [{"role": "user", "content": "at row 1 column 1"}]}
request = urllib.request.Request(
    os.environ["OPENAI_BASE_URL"] + "/chat/completions",
    data=json.dumps(body).encode(),
    headers={
        "Authorization": "Bearer " + os.environ["OPENAI_API_KEY"],
        "Content-Type": "application/json",
    },
)
with urllib.request.urlopen(request) as answer:
    said = json.load(answer)["choices"][0]["message"]["content"]
held_out = task["options"].get("split") == "heldout"
print(json.dumps({"reward": len(said.split()) / 4, "success": held_out}))
"""


async def test_a_command_that_knows_a_base_url_only_is_trained_and_evaluated(tmp_path):
    (tmp_path / "agent.py").write_text(AGENT)
    command = [sys.executable, "-IS", str(tmp_path / "agent.py")]
    options = {"agent.run": command, "steps": 2, "agent.temperature": 1.0}
    summary = await run(tiny("frozen_lake", tmp_path, **options))
    folder = Path(summary["folder"])
    start, *steps = read_lines(folder / "metrics.jsonl")
    assert start["eval/success_rate"] == 1.0, "it was told that the task is held out"
    assert [line["success_rate"] for line in steps] == [0.0, 0.0]
    assert all(line["time/agent_s"] > 0 for line in steps)
    assert summary["outcomes"].keys() <= {"trained", "dropped(shutdown)", "cancelled(shutdown)"}
    told = [log.read_text() for log in (folder / "logs").glob("agent_*.log")]
    assert told
    assert all(line.startswith("playing") for log in told for line in log.splitlines())
    assert len(told) <= 32, "as many as run together"
    report = await evaluate(plan(str(folder), {"eval.tasks": 4}))
    found = report.environments["frozen_lake"]
    assert (found.played, found.success.mean) == (4, 1.0)


async def test_the_policy_plays_against_what_it_was_some_steps_ago(tmp_path, monkeypatch):
    published = []
    publish = Earlier.publish

    async def watched(self, weights):
        await publish(self, weights)
        published.append({every: hub.version for every, hub in self.hubs.items()})

    monkeypatch.setattr(Earlier, "publish", watched)
    play = {
        "agent.run": "examples.self_play:act",
        "agent.roles": {"player": {}, "rival": {"earlier": 2}},
        "env.eval_options": {},
    }
    await run(tiny("frozen_lake_openai", tmp_path, **play))
    folder = tmp_path / "frozen_lake_openai"
    assert published == [{2: 0}, {2: 2}, {2: 2}]
    assert (folder / "logs" / "earlier_2" / "worker_0.log").exists()
    with open_run(folder) as logged, logged.reading() as reader:
        trained = reader.page("trained", after=-1, most=100)
    assert len(trained) == 3 * 16
    for episode in trained:
        assert {sequence.role for sequence in episode.sequences} == {"player"}
        assert len(episode.turns) == 3
    await run(tiny("frozen_lake_openai", tmp_path, **play, steps=4, **{"checkpoint.resume": True}))
    assert published[3:] == [{2: 3}, {2: 4}], "after a resume it is the policy from then on"


async def test_two_task_sets_are_one_run_and_go_on_in_their_own_order_after_a_resume(tmp_path):
    sets = {
        "task_sets.small": {"group_size": 2},
        "task_sets.large": {
            "env": {"name": "frozen_lake", "options": {"size": 5}, "hosts": 1},
            "agent": {"temperature": 1.3},
        },
    }
    await run(tiny("frozen_lake", tmp_path, steps=2, **sets))
    again = {"steps": 3, "checkpoint.resume": True}
    summary = await run(tiny("frozen_lake", tmp_path, **again, **sets))
    folder = tmp_path / "frozen_lake"
    assert summary["eval_tasks"] == 2 * 8
    episodes = read_lines(folder / "episodes.jsonl")
    trained = [line for line in episodes if line["outcome"] == "trained"]
    for version in range(3):
        of_batch = [line for line in trained if line["trained_at_version"] == version]
        groups = {(line["task_set"], line["group"]) for line in of_batch}
        assert Counter(name for name, _ in groups) == {"small": 4, "large": 2}
        assert Counter(line["task_set"] for line in of_batch) == {"small": 8, "large": 8}
    for name in ("small", "large"):
        seeds = {line["group"]: line["seed"] for line in trained if line["task_set"] == name}
        assert list(seeds.values()) == list(
            range(first_task(0, name), first_task(0, name) + len(seeds))
        )
    for line in read_lines(folder / "metrics.jsonl")[1:]:
        assert line["reward/mean"] == (line["reward/mean/small"] + line["reward/mean/large"]) / 2
        assert line["share/small"] + line["share/large"] == pytest.approx(1)
    assert {"eval/success_rate/small", "eval/reward_mean/large"} <= line.keys()
    assert (folder / "logs" / "large" / "env_host_0.log").exists()
    with open_run(folder) as logged, logged.reading() as reader:
        temperatures = {
            (episode.task.task_set, round(float(temperature), 3))
            for episode in reader.page("trained", after=-1, most=100)
            for sequence in episode.sequences
            for temperature in sequence.temperatures[sequence.loss_mask > 0]
        }
    assert temperatures == {("small", 1.0), ("large", 1.3)}


def test_the_readmes_snippet_runs_against_a_worker(tmp_path):
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    snippet = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[0]
    assert len(snippet.splitlines()) < 20
    names: dict[str, object] = {}
    exec(compile(snippet, "README.md", "exec"), names)

    async def main():
        words = names["FrozenLakeTextEnv"]().vocabulary()
        model = create(tmp_path / "model", words, layers=1, hidden_size=32)
        pool = EmbeddedPool(
            str(model), size=1, max_running=16, cache_tokens=8192, threads=1, dtype="float32",
            version=0, seed=0, log_dir=tmp_path, start_timeout_s=120,
        )  # fmt: skip
        (worker,) = await pool.start(lambda worker, why, final: None, lambda worker: None)
        config = TrainerConfig(threads=1)
        async with Trainer(model=model, config=config, run_dir=tmp_path) as trainer:
            versions = []

            async def train_on(batch):
                versions.append(batch.version)
                await trainer.step(batch)
                return (await trainer.export_weights()).path

            await names["main"]([worker], str(model), train_on, steps=3)
        await pool.stop()
        assert versions == [0, 1, 2]

    asyncio.run(main())


def test_a_mistake_on_the_command_line_starts_nothing(tmp_path, capsys):
    assert flash(["train", "frozen_lake", "--runs_dir", str(tmp_path), "--alpha", "-1"]) == 2
    assert "alpha=-1" in capsys.readouterr().err
    assert not list(itertools.chain(tmp_path.iterdir()))


async def test_a_run_whose_samples_a_gpu_has_no_room_for_is_refused_with_what_fits(tmp_path):
    starter = FakeRanks({"start": "", "room": Room(64, 256)})
    config = tiny("frozen_lake", tmp_path, **{"agent.max_sequence_tokens": 257})
    with pytest.raises(ValueError, match="agent.max_sequence_tokens=257: .* set it to 256 or less"):
        await train(config, stop=asyncio.Event(), starter=starter)
    assert [method for rank in starter.started for method, _ in rank.calls] == ["start", "room"]
