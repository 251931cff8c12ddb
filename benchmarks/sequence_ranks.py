"""The memory that ranks need which share a pass: one sample of ever more tokens, on more of them.

    python benchmarks/sequence_ranks.py [--tokens 8192,16384] [--ranks 1,2,4] [--layers 2]

A model of random weights, 64 wide, with 8 heads of 16 and 2 of keys, on CPUs, its activations
recomputed. Told are seconds of the step, the most memory that a rank had in it beyond a step of
1,024 tokens, and the gradient's norm, which is the same however many ranks share it.
"""

import argparse
import asyncio
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from flash.fakes import fake_sample
from flash.trainer.config import TrainerConfig
from flash.trainer.trainer import Trainer
from flash.types import Batch, Sample

WARM = 1024  # tokens
SCORED = 1024  # at the end: what logits take is no matter of the sequence's length
VOCABULARY = 512


def saved_model(folder: Path, *, layers: int, positions: int) -> Path:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=192, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=2, head_dim=16,
        max_position_embeddings=positions, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model_class: Any = AutoModelForCausalLM  # its types are not published
    model_class.from_config(config).save_pretrained(folder)
    return folder


def sample(tokens: int, version: int) -> Sample:
    mask = (np.arange(tokens) >= tokens - SCORED).astype(np.float32)
    return fake_sample(
        np.random.default_rng(0).integers(0, VOCABULARY, tokens),
        mask,
        logprobs=-6.0 * mask,
        versions=np.where(mask > 0, version, -1),
        advantage=1.0,
        episode=version,
    )


def peaks_mb(ranks: int) -> list[float]:
    """The most memory that each rank's process had so far."""
    kilobytes = []
    for process in psutil.Process().children(recursive=True):
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
        kilobytes += [int(line.split()[1]) for line in status.splitlines() if "VmHWM" in line]
    return [each / 1024 for each in sorted(kilobytes)[-ranks:]]  # the others are their guards


async def measure(model: Path, run_dir: Path, ranks: int, tokens: int) -> None:
    config = TrainerConfig(
        ranks=ranks, sequence_ranks=ranks, threads=1, warmup_steps=0, gradient_checkpointing=True,
        step_timeout_s=7200,
    )  # fmt: skip
    async with Trainer(model=model, config=config, run_dir=run_dir) as trainer:
        await trainer.step(Batch(samples=[sample(WARM, 0)], version=0))
        before = peaks_mb(ranks)
        metrics = await trainer.step(Batch(samples=[sample(tokens, 1)], version=1))
        most = max(after - was for after, was in zip(peaks_mb(ranks), before, strict=True))
    print(
        f"{tokens:8,} {ranks:6} {metrics['time/train_s']:10.1f} {most:12.0f} "
        f"{metrics['grad_norm']:14.6f}",
        flush=True,
    )


def main() -> None:
    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=numbers, default=[8192, 16_384])
    parser.add_argument("--ranks", type=numbers, default=[1, 2, 4])
    parser.add_argument("--layers", type=int, default=2)
    asked = parser.parse_args()
    print("  tokens  ranks     step s  MB a rank  gradient norm")
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        model = saved_model(directory / "model", layers=asked.layers, positions=max(asked.tokens))
        for tokens in asked.tokens:
            for ranks in asked.ranks:
                asyncio.run(measure(model, directory / f"{tokens}_{ranks}", ranks, tokens))


if __name__ == "__main__":
    main()
