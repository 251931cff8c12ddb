"""benchmarks/gpu.py: what it leaves out, and what it makes of a run's numbers."""

import argparse
import json
import math
import sys
from pathlib import Path

import gpu
import pytest
import trainer

from flash.trainer.passes import Room


def test_parts_that_no_time_is_left_for_are_in_the_table_all_the_same(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--parts", "publish,trainer", "--limit", "0"])
    gpu.main()
    table = capsys.readouterr().out.splitlines()
    left_out = [line.split()[0] for line in table if "left out 0 s were left" in line]
    assert left_out == ["trainer", "publish"]  # by their worth
    assert list(json.loads((tmp_path / "gpu.json").read_text())) == left_out


def test_a_part_that_fails_says_why_and_keeps_what_it_had(tmp_path: Path) -> None:
    def half(_):
        yield "a", {"s": 1.0}
        raise OSError("no card")

    rows = tmp_path / "rows.jsonl"
    part = gpu.Part(half, least_s=0, most_s=1)
    with pytest.raises(OSError, match="no card"):
        gpu.run_here("half", part, argparse.Namespace(rows=rows))
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert found == [
        {"what": "a", "figures": {"s": 1.0}},
        {"what": "", "figures": {"failed": "OSError: no card"}},
    ]


def test_a_run_is_told_by_its_steps_whichever_numbers_they_lack() -> None:
    def line(step: int, **more: float) -> dict[str, float]:
        return {
            "step": step, "time_s": 10.0 + 2 * step, "time/train_s": 1.5, "time/publish_s": 0.2,
            "time/wait_batch_s": 0.3, "tokens_per_s": 100.0, "tokens/trained": 50,
            "success_rate": step / 10, **more,
        }  # fmt: skip

    rows = [
        {"step": 0, "time_s": 9.0, "eval/success_rate": 0.2},
        line(1, **{"logprob_gap/max": 0.5, "logprob_gap/logits": 0.7}),
        line(2, **{"logprob_gap/max": math.nan}),
        line(
            3,
            **{
                "logprob_gap/max": 0.1,
                "logprob_gap/p90": 0.05,
                "logprob_gap/kl": 1e-3,
                "logprob_gap/logits": 0.2,
                "mismatch/kl_fresh": 0.01,
            },
        ),
        {**line(4), "eval/success_rate": 0.6},
    ]
    told = dict(gpu.of_run(rows))
    assert told["a step, median"]["s"] == 2.0
    assert told["logprobs, worker against trainer"] == {
        "median of steps' largest": 0.1, "largest": 0.5, "probe, 90%": 0.05, "probe, kl": 1e-3,
        "probe, 90% of logits": 0.7, "kl of fresh tokens": 0.01,
    }  # fmt: skip
    assert told["learning"] == {
        "success, first third": 0.1, "last third": 0.4, "held out after 0": 0.2,
        "held out after 4": 0.6,
    }  # fmt: skip


def test_what_a_card_has_room_for_is_told_with_what_is_chosen() -> None:
    class OnCard:
        def room(self):
            return Room(8_192, 90_112)

    class OnCpu:
        def room(self):
            return None

    assert gpu.room(OnCard()) == {
        "kept": 8_192, "recomputed": 90_112, "tokens a pass": 32_768, "recompute": True,
    }  # fmt: skip
    assert gpu.room(OnCpu()) == {"tokens a pass": 4096}


def test_the_peak_of_a_card_is_its_own_and_not_that_of_one_whose_name_its_begins_with() -> None:
    assert trainer.of_card("NVIDIA H200") == trainer.of_card("NVIDIA H100 80GB HBM3") == 989e12
    assert trainer.of_card("NVIDIA H20") == 148e12
    assert trainer.of_card("Tesla T4") is None
