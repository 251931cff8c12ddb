"""Runs whose explorers are processes: killed, asked to leave, left alone; all parts real."""

import asyncio
import signal
from collections import Counter

import pytest

from flash.envs.frozen_lake import FrozenLakeTextEnv
from flash.rollout.committed import INTERRUPTED
from flash.telemetry.folder import read_lines
from flash.telemetry.status import Status
from flash.warm_start.small_policy import create
from tests.commands import flash
from tests.tiny_runs import OUTCOMES, run, tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

CLUSTER = {"explorers.expected": 2, "engine.workers": 0, "explorers.lease_s": 6}


async def steps(folder, count, *unless):
    """Waits for so many steps of the run."""
    path = folder / "metrics.jsonl"
    while max((line["step"] for line in read_lines(path)), default=0) < count:
        for task in unless:
            assert not task.done(), task
        await asyncio.sleep(0.1)


def check(folder, *, alpha=1):
    """What always holds of a run that has ended."""
    lines = read_lines(folder / "metrics.jsonl")
    for line in lines[1:]:
        assert line["staleness/max"] <= alpha
        counts = {name: line[f"episodes/{name}"] for name in OUTCOMES}
        assert counts.pop("admitted") == sum(counts.values())
    records = read_lines(folder / "episodes.jsonl")
    trained = [record["episode"] for record in records if record["outcome"] == "trained"]
    assert len(trained) == len(set(trained)) == 16 * lines[-1]["step"] > 0
    return records


async def has_weights(folder, explorer: str, running: asyncio.Task) -> None:
    """Waits until that explorer plays with weights that the run has trained."""
    while not any(role.role == f"explorer {explorer}" and role.version for role in roles(folder)):
        assert not running.done()
        await asyncio.sleep(0.1)


async def test_a_killed_explorers_episodes_are_played_by_another_and_one_that_leaves_costs_none(
    tmp_path,
):
    folder = tmp_path / "r"
    async with flash("explore", folder, "--name", "a") as a, flash("explore", folder) as b:
        config = tiny("frozen_lake", tmp_path, name="r", **CLUSTER, steps=1000, eval_every=0)
        stop = asyncio.Event()
        running = asyncio.create_task(run(config, stop))
        await steps(folder, 2, running)
        await has_weights(folder, "a", running)
        a.send_signal(signal.SIGKILL)
        async with flash("explore", folder, "--name", "c") as c:
            await has_weights(folder, "c", running)
            b.send_signal(signal.SIGTERM)
            out, _ = await b.communicate()
            assert b.returncode == 0, out
            await steps(folder, 2 + Status.read(folder).step, running)
            stop.set()
            await running
            c.send_signal(signal.SIGTERM)
            out, _ = await c.communicate()
            assert c.returncode == 0, out
            assert b"the run has stopped" in out
    records = check(folder)
    lost = [record for record in records if record["reason"] == INTERRUPTED]
    assert {record["outcome"] for record in lost} == {"cancelled"}
    assert Status.read(folder).ended


async def test_a_controller_that_is_killed_finds_its_explorers_and_what_they_finished(tmp_path):
    folder = tmp_path / "r"
    async with flash("explore", folder, "--name", "a") as a:
        words = [word for name, value in CLUSTER.items() for word in (f"--{name}", value)]
        words += ["--runs_dir", tmp_path, "--name", "r", "--eval_every", 0]
        words += ["--steps", 40, "--batch_size", 16, "--group_size", 4, "--eval.tasks", 8]
        words += ["--policy.layers", 1, "--policy.hidden_size", 32, "--warm_start.steps", 3]
        words += ["--warm_start.demonstrations", 12]
        async with flash("train", "frozen_lake", *words) as train:
            await steps(folder, 3)
            train.kill()
            await train.wait()
        before = max(line["step"] for line in read_lines(folder / "metrics.jsonl"))
        assert before < 40
        assert a.returncode is None
        async with flash(
            "train", folder / "config.yaml", "--steps", before + 3, "--resume"
        ) as again:
            out, _ = await again.communicate()
            assert again.returncode == 0, out.decode()
        out, _ = await a.communicate()
        assert a.returncode == 0, out.decode()
        assert out.count(b"plays for run r as a") == 1  # it has gone on with the workers it had
    assert not (folder / "explorers.json").exists()  # whoever was away finds that it is over
    check(folder)


def roles(folder):
    try:
        return Status.read(folder).roles
    except ValueError:
        return []


async def test_a_task_set_is_played_by_who_brings_it_and_waited_for_until_it_is_there(
    tmp_path, capsys
):
    words = FrozenLakeTextEnv().vocabulary()
    model = create(tmp_path / "model", words, layers=1, hidden_size=32, heads=2, max_tokens=512)
    options = {
        "model": str(model), "eval_every": 0, "task_sets.own.weight": 1,
        "task_sets.wide.brought": True, "task_sets.wide.group_size": 2,
    }  # fmt: skip
    folder = tmp_path / "r"
    config = tiny("frozen_lake", tmp_path, name="r", **CLUSTER, **options)
    tasks, other = tmp_path / "tasks.yaml", tmp_path / "other.yaml"
    for path, size in ((tasks, 5), (other, 6)):
        path.write_text(f"wide: {{env: {{name: frozen_lake, options: {{size: {size}}}}}}}\n")
    bring = ("explore", folder, "--tasks-only", "--tasks")
    async with flash("explore", folder, "--name", "a") as a:
        running = asyncio.create_task(run(config))
        said = ""
        while "waits for an explorer that brings task set wide: flash explore --tasks" not in said:
            assert not running.done(), running
            await asyncio.sleep(0.1)
            said += capsys.readouterr().out
        assert Status.read(folder).task_sets["wide"].brought_by == []
        async with flash(*bring, tasks, "--name", "b") as b:
            while Status.read(folder).task_sets["wide"].brought_by != ["b"]:
                assert not running.done(), running
                await asyncio.sleep(0.1)
            async with flash(*bring, other) as c:
                out, _ = await c.communicate()
                assert c.returncode == 2
                assert b"env.options.size 5 \xe2\x86\x92 6: bring the same" in out
            await running
            out, _ = await b.communicate()
            assert b.returncode == 0, out.decode()
            assert b"plays for run r as b, and brings wide" in out
        out, _ = await a.communicate()
        assert a.returncode == 0, out.decode()
    sets = Counter(r["task_set"] for r in check(folder) if r["outcome"] == "trained")
    assert sets == {"own": 8 * 3, "wide": 8 * 3}
    last = read_lines(folder / "metrics.jsonl")[-1]
    assert {"success_rate/wide", "eval/success_rate/wide", "staleness/mean/wide"} <= set(last)
