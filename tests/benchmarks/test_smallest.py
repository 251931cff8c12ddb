"""What scripts of benchmarks/ measure, at their smallest: that they run, and what can be known."""

import json
import sys
from pathlib import Path

import explorers
import hand_over
import log
import numpy as np
import pool_size
import pytest
import reward
import scale
import sync_vs_async
import torch
import trainer
import worker
from transformers import AutoModelForCausalLM

from flash import virtual_time
from flash.log.config import ALL
from flash.log.store import sqlite_url
from flash.trainer.scorer import TokenScorer
from flash.warm_start.small_policy import create
from tests.packed import load_packed


def test_with_more_workers_out_at_a_time_a_publish_is_over_sooner():
    job = pool_size.job(1, 1, alpha=0, batch_size=64, **{"workers.load_s": 5.0})
    publishes = [result.steps[-1].publish_s for result in pool_size.with_each_share(job)]
    assert publishes[0] - job.trainer.export_s == pytest.approx(24 * 5.0, rel=0.01)
    assert publishes == sorted(publishes, reverse=True)
    assert publishes[0] > publishes[1] > publishes[2] > publishes[3]


async def test_requests_are_dispatched_to_workers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pool_size, "REQUESTS", 100)
    assert await pool_size.dispatch(8) > 0


def test_a_batch_is_rewarded_sooner_beside_rollout_than_after_it():
    after, beside = (
        virtual_time.run(reward.seconds_a_step(alpha=0, beside=here, steps=1, seed=0))
        for here in (False, True)
    )
    assert after > beside > 0


def test_a_batch_is_handed_over():
    whole_ms, longest_ms = virtual_time.run(hand_over.hand_over(16, 160))
    assert whole_ms >= longest_ms > 0


async def test_agents_of_one_process_are_measured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scale, "LEAST_REQUESTS", 100)
    row = await scale.measure(32, instant=True, seconds=0)
    assert row["episodes_per_s"] > 0
    assert row["requests_per_s"] > row["episodes_per_s"]


async def test_a_log_takes_episodes(tmp_path: Path):
    rate, late = await log.measure(sqlite_url(tmp_path), 64, 100, ALL)
    assert rate > 0
    assert late


async def test_agents_are_measured_without_explorers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(explorers, "BATCH", 8)
    row = await explorers.here(0.05)
    assert row["episodes_per_s"] > 0


async def test_a_worker_with_the_attention_of_transformers_is_measured(tmp_path: Path):
    model = create(tmp_path, [f"w{n}" for n in range(worker.WORDS)], layers=1, hidden_size=8)
    row = await worker.measure("masked", model, at_a_time=2, episodes=2, turns=1, prompt=4)
    assert row["requests_per_s"] > 0


def test_padded_and_packed_are_the_same_model(tmp_path: Path):
    torch.manual_seed(0)
    config = trainer.SIZES["small"]().config
    trainer.random_model(config).save_pretrained(tmp_path)
    tokens_N = torch.randint(config.vocab_size, (12,))
    batch = tokens_N, (5, 7), torch.tensor([1, 4, 6, 11])
    packed = TokenScorer(load_packed(tmp_path))
    padded = trainer.PaddedScorer(AutoModelForCausalLM.from_pretrained(tmp_path))
    with torch.no_grad():
        np.testing.assert_allclose(packed(*batch), padded(*batch), rtol=1e-4)


@pytest.mark.slow
def test_a_real_run_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    options = {
        "steps": 1, "alphas": "1", "batch-size": 4, "mean-s": 0.01, "hidden-size": 8,
        "runs-dir": tmp_path / "runs", "results": tmp_path / "results.json",
    }  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["", *(f"--{name}={one}" for name, one in options.items())])
    sync_vs_async.main()
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(row["run"], row["samples"]) for row in rows] == [("alpha1", 4)]
    metrics = tmp_path / "runs" / "sync_vs_async_alpha1" / "metrics.jsonl"
    assert json.loads(metrics.read_text())["step"] == 1
