"""A mixture of experts from its workers' routers to the trainer's; all parts real."""

import asyncio
import itertools
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

from flash.agents import EnvironmentAgent, PlainStyle
from flash.environments.inline import InlineEnvs
from flash.envs.frozen_lake import FrozenLakeTextEnv
from flash.hub.embedded_pool import EmbeddedPool
from flash.hub.hub import InferenceHub
from flash.rollout.loop import RolloutLoop
from flash.trainer.config import TrainerConfig
from flash.trainer.trainer import Trainer
from flash.types import UNKNOWN_EXPERT, Batch, Task
from flash.warm_start.small_policy import create

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

LAYERS, EXPERTS, CHOSEN = 2, 16, 4


def save_mixture(folder: Path) -> Path:
    """With the words of the environment; far from uniform, so that another expert shows."""
    create(folder, FrozenLakeTextEnv().vocabulary(), layers=1, hidden_size=32)
    words = len(AutoTokenizer.from_pretrained(folder))
    torch.manual_seed(1)
    config = MixtralConfig(
        vocab_size=words, hidden_size=64, intermediate_size=64, num_hidden_layers=LAYERS,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=EXPERTS,
        num_experts_per_tok=CHOSEN, max_position_embeddings=4096, initializer_range=0.2,
        sliding_window=None,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(folder)
    return folder


async def sampled(model: Path, folder: Path) -> Batch:
    """By a worker in bfloat16, before any step."""
    pool = EmbeddedPool(
        str(model), size=1, max_running=8, cache_tokens=8192, threads=1, dtype="bfloat16",
        version=0, seed=0, routed_experts=True, log_dir=folder, start_timeout_s=120,
    )  # fmt: skip
    style = PlainStyle(AutoTokenizer.from_pretrained(model))
    async with (
        InferenceHub(pool) as hub,
        RolloutLoop(
            hub,
            agent=lambda: EnvironmentAgent(
                envs=InlineEnvs(FrozenLakeTextEnv), style=style, max_tokens=16, max_turns=3,
                experts=True,
            ),
            tasks=(Task(seed) for seed in itertools.count()), batch_size=8, group_size=2,
        ) as rollouts,
    ):  # fmt: skip
        return await rollouts.next_batch()


async def told_of(batch: Batch, model: Path, folder: Path, *, replays: bool) -> Mapping[str, float]:
    """By a trainer in float32 with the same weights."""
    config = TrainerConfig(threads=1, dtype="float32", router_replay=replays)
    async with Trainer(model=model, config=config, run_dir=folder) as trainer:
        return await trainer.step(batch)


def test_workers_tell_their_experts_and_the_trainer_is_nearer_to_them_for_it(tmp_path):
    model = save_mixture(tmp_path / "model")
    batch = asyncio.run(sampled(model, tmp_path))
    for sample in batch.samples:
        experts = sample.experts.reshape(sample.num_tokens, LAYERS, CHOSEN)
        assert (experts[:-1] >= 0).all() and experts.max() < EXPERTS
        assert (experts[-1] == UNKNOWN_EXPERT).all()
    replayed = asyncio.run(told_of(batch, model, tmp_path / "with", replays=True))
    alone = asyncio.run(told_of(batch, model, tmp_path / "without", replays=False))
    assert 0 < replayed["mismatch/experts"] < 0.2
    assert "mismatch/experts" not in alone
    assert replayed["mismatch/kl_fresh"] < alone["mismatch/kl_fresh"] / 1.5
