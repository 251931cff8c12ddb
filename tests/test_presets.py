"""Every preset, as a whole run of a few small steps."""

import json
from collections import Counter
from pathlib import Path

import pytest

from flash import config as configuration
from flash.telemetry.folder import read_lines
from flash.telemetry.metrics import METRICS
from tests.sandboxes import needs_sandbox
from tests.tiny_runs import OUTCOMES, problems, questions, run, tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


FROM_ELSEWHERE = {"gsm8k": questions, "code": problems}


@pytest.mark.parametrize(
    "preset",
    [
        pytest.param(name, marks=needs_sandbox if name in ("code", "formulas") else ())
        for name in sorted(configuration.presets())
    ],
)
async def test_a_tiny_run_of_each_preset_leaves_a_whole_and_true_folder(preset, tmp_path, capsys):
    brought = FROM_ELSEWHERE[preset](tmp_path) if preset in FROM_ELSEWHERE else {}
    config = tiny(preset, tmp_path, **brought)
    summary = await run(config)
    assert "engine: " in capsys.readouterr().out
    folder = Path(summary["folder"])
    start, *steps = read_lines(folder / "metrics.jsonl")
    assert start["step"] == 0
    assert "eval/success_rate" in start
    assert [line["step"] for line in steps] == [1, 2, 3]
    published = [0 if preset == "trinity" else 1, 2, 3]
    assert [line["policy_version"] for line in steps] == published
    for line in steps:
        assert METRICS.keys() <= line.keys()
        if line["policy_version"]:  # they were published
            assert 0 <= line["publish/changed"] <= 1
        assert line["staleness/max"] <= config.alpha, "invariant 1"
        assert line["logprob_gap/max"] < 1e-3, "invariant 7"
        counts = {name: line[f"episodes/{name}"] for name in OUTCOMES}
        assert counts.pop("admitted") == sum(counts.values()), "invariant 2"
    episodes = read_lines(folder / "episodes.jsonl")
    assert Counter(e["outcome"] for e in episodes)["trained"] == 48
    assert all(
        e["trained_at_version"] - e["version_min"] <= config.alpha
        for e in episodes
        if e["outcome"] == "trained"
    )
    assert (folder / "report.png").stat().st_size > 10_000
    assert list((folder / "checkpoints" / "step_000003" / "policy").glob("*.distcp"))
    assert list(folder.glob("events.out.tfevents.*"))
    assert configuration.load(str(folder / "config.yaml")).batch_size == 16
    assert json.loads((folder / "summary.json").read_text())["steps"] == 3
