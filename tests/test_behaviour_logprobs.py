"""What a run trains on is what its weights said, token by token; all parts real."""

import asyncio
import itertools
import json
import math
import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flash.agents import EnvironmentAgent, PlainStyle
from flash.environments.inline import InlineEnvs
from flash.envs.frozen_lake import FrozenLakeTextEnv
from flash.hub.embedded_pool import EmbeddedPool
from flash.hub.hub import InferenceHub
from flash.rollout.loop import RolloutLoop
from flash.trainer.advantages import per_group
from flash.trainer.config import TrainerConfig
from flash.trainer.trainer import Trainer
from flash.types import Task
from flash.warm_start.small_policy import create

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ALPHA, STEPS, TEMPERATURE = 2, 4, 0.7


async def run(folder: Path):
    """A run with `keep` updates in mid-response; its batches and metrics, with all weights kept."""
    words = FrozenLakeTextEnv().vocabulary()
    model = create(folder / "model", words, layers=2, hidden_size=64)
    # What a model's publisher recommends must not change what is sampled here.
    recommended = {"top_p": 0.5, "top_k": 3, "repetition_penalty": 1.5, "do_sample": True}
    (model / "generation_config.json").write_text(json.dumps(recommended))
    pool = EmbeddedPool(
        str(model), size=1, max_running=8, cache_tokens=8192, threads=1, dtype="float32",
        version=0, seed=0, log_dir=folder, start_timeout_s=120,
    )  # fmt: skip
    style = PlainStyle(AutoTokenizer.from_pretrained(model))
    style.stop_token_ids = ()  # responses as long as may be, so that weights change within them
    config = TrainerConfig(threads=1, learning_rate=1e-2, warmup_steps=0, objective="tis")
    batches, metrics = [], []
    async with (
        Trainer(model=model, config=config, run_dir=folder) as trainer,
        InferenceHub(pool, update_mode="keep") as hub,
        RolloutLoop(
            hub,
            agent=lambda: EnvironmentAgent(
                envs=InlineEnvs(FrozenLakeTextEnv), style=style, max_tokens=160, max_turns=3,
                temperature=TEMPERATURE,
            ),
            tasks=(Task(seed) for seed in itertools.count()),
            batch_size=8, group_size=2, alpha=ALPHA,
            # It wins nothing yet, and has to change all the same.
            advantages=per_group(lambda rewards: np.resize([1.0, -1.0], len(rewards))),
        ) as rollouts,
    ):  # fmt: skip
        shutil.copytree((await trainer.export_weights()).path, folder / "0")
        for version in range(1, STEPS + 1):
            batches.append(await rollouts.next_batch())
            metrics.append(await trainer.step(batches[-1]))
            weights = await trainer.export_weights()
            shutil.copytree(weights.path, folder / str(version))
            await rollouts.publish(weights)
    return batches, metrics


def logprobs(model, token_ids):
    with torch.no_grad():
        logits_TV = model(torch.tensor([token_ids.tolist()])).logits[0, :-1].double()
    logprobs_TV = (logits_TV / TEMPERATURE).log_softmax(-1)
    chosen_T = logprobs_TV[range(len(logprobs_TV)), token_ids[1:].tolist()]
    return np.concatenate([[math.nan], chosen_T.numpy()])


def test_each_tokens_logprob_is_that_of_the_weights_it_says_it_came_from(tmp_path):
    batches, metrics = asyncio.run(run(tmp_path))
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / str(v)) for v in range(STEPS)]
    gaps = defaultdict(list)  # by age
    distances = []  # to the other versions
    changed_within = 0
    for batch in batches:
        for sample in batch.samples:
            of_versions = np.stack([logprobs(model, sample.token_ids) for model in models])
            for t in np.flatnonzero(sample.loss_mask):
                version = sample.versions[t]
                differences = np.abs(of_versions[:, t] - sample.logprobs[t])
                gaps[batch.version - version].append(differences[version])
                distances.append(np.delete(differences, version).mean())
            for turn in range(sample.turns.max() + 1):
                changed_within += len(set(sample.versions[sample.turns == turn])) > 1
    assert sorted(gaps) == [0, 1, 2], "tokens of every age that alpha allows"
    assert changed_within > 0, "weights changed in mid-response"
    assert {age: max(of_age) for age, of_age in gaps.items()} == pytest.approx(
        dict.fromkeys(gaps, 0.0), abs=1e-3
    )
    assert np.mean(distances) > 0.1, "the versions differ, so that the wrong one would show"
    # What the trainer makes of it: fresh tokens are the engine's exactly, older ones are not.
    assert max(line["mismatch/kl_fresh"] for line in metrics if "mismatch/kl_fresh" in line) < 1e-6
    assert max(line["logprob_gap/max"] for line in metrics if "logprob_gap/max" in line) < 1e-3
    assert metrics[-1]["mismatch/kl_stale"] > 1e-3
