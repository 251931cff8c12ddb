"""A run with adapters: a stop and a resume, an evaluation, an export; all parts real."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from flash.cli import main as cli
from flash.evaluate import evaluate
from flash.evaluate import plan as plan_evaluation
from flash.replay.logged_run import open_run
from flash.replay.retrain import Compared, plan, retrain
from flash.system.machine import has_vllm
from tests.tiny_runs import run, tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

OPTIONS = {
    "trainer.lora.rank": 4,
    "trainer.lora.targets": "q_proj,down_proj",
    "trainer.learning_rate": 0.01,
    "trainer.warmup_steps": 0,
    "trainer.kl.coefficient": 0.01,
    "reward": {"name": "process", "run": "tests.replay.rewards:spread"},
    "rollout.filters": "",
    "alpha": 0,
    "eval_every": 0,
    "name": "r",
}


async def test_a_run_with_adapters_goes_on_from_them_and_is_evaluated_merged_and_retrained(
    tmp_path,
):
    folder = tmp_path / "r"
    await run(tiny("frozen_lake", tmp_path, **{**OPTIONS, "steps": 2}))
    more = {"steps": 4, "checkpoint.resume": True}
    await run(tiny("frozen_lake", tmp_path, **{**OPTIONS, **more}))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "kl_reference" in line]
    # Workers have what the trainer has: as it began, merged, and merged again after the resume.
    assert [step["mismatch/kl_fresh"] for step in steps] == pytest.approx([0] * 4, abs=1e-5)
    assert steps[0]["kl_reference"] == 0 < steps[1]["kl_reference"] < steps[3]["kl_reference"]

    report = await evaluate(plan_evaluation(str(folder / "checkpoints" / "step_000002"), {}))
    assert [found.played for found in report.environments.values()] == [8]
    again = {**OPTIONS, "checkpoint.resume": True, "trainer.lora.rank": 8}
    with pytest.raises(ValueError, match=r"lora\.rank=8 with checkpoint\.resume: the run began wi"):
        await run(tiny("frozen_lake", tmp_path, **again))

    told = []
    with open_run(folder) as opened:
        await retrain(opened, plan(opened, {}, checkpoint="step_000002"), told.append)
    (compared,) = (each for each in told if isinstance(each, Compared))
    assert (compared.checkpoint.name, compared.equal) == ("step_000004", True)

    saved, out = str(folder / "checkpoints" / "step_000004"), tmp_path / "merged"
    assert cli.run(["export", saved, "--out", str(out)]) == 0
    assert AutoTokenizer.from_pretrained(out)("up")
    assert "peft" not in repr(type(AutoModelForCausalLM.from_pretrained(out)))


@pytest.mark.skipif(not has_vllm(), reason="vLLM is not installed: make setup-vllm")
async def test_a_run_on_vllm_publishes_adapters_alone_is_resumed_and_evaluated(tmp_path):
    options = {
        **OPTIONS,
        "engine.kind": "vllm",
        "engine.start_timeout_s": 300,
        "policy.heads": 1,
        "trainer.lora.publish": "adapters",
    }
    await run(tiny("frozen_lake", tmp_path, **{**options, "steps": 2}))
    await run(tiny("frozen_lake", tmp_path, **{**options, "steps": 3, "checkpoint.resume": True}))
    lines = (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()
    steps = [each for each in map(json.loads, lines) if "kl_reference" in each]
    assert [each["mismatch/kl_fresh"] for each in steps] == pytest.approx([0] * 3, abs=1e-5)
    assert steps[2]["kl_reference"] > 0
    report = await evaluate(
        plan_evaluation(str(tmp_path / "r"), {})
    )  # by a server of the merged model
    assert [found.played for found in report.environments.values()] == [8]
