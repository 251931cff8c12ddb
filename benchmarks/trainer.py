"""What the trainer's steps cost: packed against padded, logits in chunks against whole, balance.

    python benchmarks/trainer.py [--size small|0.5b|1.5b] [--samples 64] [--repeats 5]
    python benchmarks/trainer.py --checkpoint

Episodes as of ALFWorld: lengths are lognormal with sigma 0.7, a quarter of the tokens sampled, in
runs of four. On a CPU the model is small and seconds are those that its one thread computed, so
that what else the machine does counts little; on a GPU it has 0.5 or 1.5 billion random parameters,
seconds are the clock's, and a share of the GPU's peak is told. Packed and padded are the same
model, loss and optimizer, in turns, and must come to the same loss. Padded are rows in the order
they came, as many as fit the budget with their padding, and attention without any mask: nothing
that is trained looks at what is right of it.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from flash.fakes import fake_sample
from flash.simulate.hardware import GPUS
from flash.trainer.attention import PACKED_ATTENTION
from flash.trainer.config import TrainerConfig
from flash.trainer.micro_batch import MicroBatch, pack
from flash.trainer.objectives.aggregation import scales
from flash.trainer.objectives.choose import make_objective
from flash.trainer.packing import plan
from flash.trainer.scorer import TokenScorer
from flash.trainer.sharding import shard
from flash.trainer.trainer import Trainer
from flash.types import Batch, Sample

RESULTS = Path(__file__).parent / "results" / "trainer.json"
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SIGMA = 0.7
PHASES = ("forward", "loss", "backward", "optimizer")
CHECKPOINTED = LlamaConfig(
    vocab_size=32_000, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
    num_attention_heads=12, num_key_value_heads=12, tie_word_embeddings=True,
)  # fmt: skip
KEPT_LOGITS = {"in chunks": 32 * 1024 * 1024, "whole": 1 << 62}


@dataclass(frozen=True, slots=True)
class Size:
    """A model, and lengths and budget that go with it, in tokens."""

    config: Any
    median: int
    longest: int
    budget: int


def _qwen(
    hidden: int, layers: int, heads: int, inner: int, *, kv_heads: int = 2, tied: bool = True
) -> Any:
    return Qwen2Config(
        vocab_size=151_936, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=32_768,
        tie_word_embeddings=tied,
    )  # fmt: skip


SIZES: dict[str, Callable[[], Size]] = {
    "small": lambda: Size(
        LlamaConfig(
            vocab_size=1024, hidden_size=256, intermediate_size=1024, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True,
        ), median=220, longest=2048, budget=4096,
    ),
    "0.5b": lambda: Size(_qwen(896, 24, 14, 4864), median=2000, longest=16_384, budget=32_768),
    "1.5b": lambda: Size(_qwen(1536, 28, 12, 8960), median=2000, longest=16_384, budget=16_384),
    "7.6b": lambda: Size(
        _qwen(3584, 28, 28, 18_944, kv_heads=4, tied=False),
        median=2000, longest=16_384, budget=16_384,
    ),
}  # fmt: skip


def random_model(config: Any, **settings: Any) -> Any:
    model_class: Any = AutoModelForCausalLM  # its types are not published
    return model_class.from_config(config, **settings)


def episodes(count: int, size: Size, seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    drawn = np.exp(rng.normal(np.log(size.median), SIGMA, count)).astype(int)
    samples = []
    for episode, length in enumerate(drawn.clip(32, size.longest)):
        mask = (np.arange(length) % 16 >= 12).astype(np.float32)
        samples.append(
            fake_sample(
                rng.integers(4, size.config.vocab_size, length),
                mask,
                logprobs=(-np.log(size.config.vocab_size) * mask).astype(np.float32),
                advantage=float(rng.normal()),
                episode=episode,
            )
        )
    return samples


# ── packed and padded ────────────────────────────────────────────────────────────────────────


class PaddedScorer(TokenScorer):
    """As TokenScorer, by rows that are filled up to the longest."""

    def forward(self, token_ids_N: Tensor, lengths: Any, scored_T: Tensor, **_: Any) -> Tensor:
        rows_BL = pad_sequence(list(torch.split(token_ids_N, list(lengths))), batch_first=True)
        longest = rows_BL.shape[1]
        starts = torch.tensor([0, *lengths[:-1]], device=scored_T.device).cumsum(0)
        row_T = torch.searchsorted(starts, scored_T, right=True) - 1
        hidden_BLD = self.model.base_model(input_ids=rows_BL, use_cache=False).last_hidden_state
        places_T = row_T * longest + scored_T - starts[row_T] - 1
        return self._in_chunks(
            hidden_BLD.flatten(0, 1)[places_T], token_ids_N[scored_T], None, None
        )


def load_model(folder: Path | str, attention: str) -> Any:
    """In float32."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    )


class Variant:
    """A model with its optimizer, and micro-batches that it takes."""

    def __init__(self, model_dir: str, micros: Sequence[MicroBatch], *, padded: bool) -> None:
        model = load_model(model_dir, "sdpa" if padded else PACKED_ATTENTION)
        self.scorer = (PaddedScorer if padded else TokenScorer)(model).to(DEVICE)
        shard(self.scorer, model, ranks=1, half=CUDA)
        self.optimizer = torch.optim.AdamW(self.scorer.parameters(), lr=1e-5, fused=True)
        self.objective = make_objective(TrainerConfig().objective)
        self.micros = micros
        self.seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}

    def step(self) -> float:
        """One optimizer step, as a rank takes it; its seconds by phase are kept."""
        seconds = dict.fromkeys(PHASES, 0.0)
        total = 0.0
        for micro in self.micros:
            marks = [now()]
            logprobs_T = self.scorer(micro.token_ids_N, micro.lengths, micro.trained_T)
            marks.append(now())
            batch = micro.with_logprobs(logprobs_T, None, 0.0)
            loss: Any = (self.objective(batch).loss_T * micro.loss_weights_T).sum()
            marks.append(now())
            loss.backward()
            marks.append(now())
            for phase, spent in zip(PHASES, np.diff(marks), strict=False):
                seconds[phase] += float(spent)
            total += float(loss.detach())
        started = now()
        torch.nn.utils.clip_grad_norm_(self.scorer.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        seconds["optimizer"] = now() - started
        for phase, spent in seconds.items():
            self.seconds[phase].append(spent)
        return total

    def row(self) -> dict[str, Any]:
        medians = {phase: statistics.median(s[1:]) for phase, s in self.seconds.items()}
        tokens = sum(sum(micro.lengths) for micro in self.micros)
        return {
            "passes": len(self.micros),
            **{f"{phase}_s": spent for phase, spent in medians.items()},
            "step_s": sum(medians.values()),
            "tokens_per_s": tokens / sum(medians.values()),
        }


def now() -> float:
    if CUDA:
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def padded_rows(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Rows in order, as many to a pass as fit with their padding."""
    passes: list[list[int]] = [[]]
    for index, length in enumerate(lengths):
        longest = max([length, *(lengths[i] for i in passes[-1])])
        if passes[-1] and longest * (len(passes[-1]) + 1) > budget:
            passes.append([])
        passes[-1].append(index)
    return passes


def packing(model_dir: str, samples: list[Sample], size: Size, repeats: int) -> dict[str, Any]:
    lengths = [sample.num_tokens for sample in samples]
    scale = scales(samples, "token_mean")

    def packed(passes: Sequence[Sequence[int]]) -> list[MicroBatch]:
        return [
            pack([samples[i] for i in one], [scale[i] for i in one], version=0, device=DEVICE)
            for one in passes
        ]

    def planned(budget: int) -> list[list[int]]:
        return plan(lengths, mini_batches=1, ranks=1, tokens_per_micro_batch=budget)[0][0]

    everything = padded_rows(lengths, 1 << 60)
    rows = padded_rows(lengths, size.budget)
    variants = {
        "packed": Variant(model_dir, packed(planned(size.budget)), padded=False),
        "padded in each pass": Variant(model_dir, packed(rows), padded=True),
    }
    losses: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats + 1):  # the first warms up
        for name, variant in variants.items():
            losses[name].append(variant.step())
    first, second = losses.values()
    np.testing.assert_allclose(first, second, rtol=0.05 if CUDA else 1e-3, atol=1e-3)
    found: dict[str, Any] = {name: variant.row() for name, variant in variants.items()}
    filled = {
        "packed": 1.0,
        "padded in each pass": sum(lengths)
        / sum(len(p) * max(lengths[i] for i in p) for p in rows),
    }
    for name, share in filled.items():
        found[name]["tokens_not_padding"] = share
    found["padded to the longest of all"] = {
        "tokens_not_padding": sum(lengths) / (len(everything[0]) * max(lengths))
    }
    for part in (4, 2):
        budget = size.budget // part
        variants["packed"].micros = packed(planned(budget))
        variants["packed"].seconds = {phase: [] for phase in PHASES}
        for _ in range(repeats + 1):
            variants["packed"].step()
        found[f"packed, {budget} tokens a pass"] = variants["packed"].row()
    ratio = found["packed"]["tokens_per_s"] / found["padded in each pass"]["tokens_per_s"]
    if (peak := peak_flops()) is not None:
        mfu = flops(samples, size.config) / found["packed"]["step_s"] / peak
        found["packed"]["mfu"] = mfu
    return {"packed_over_padded": ratio, "rows": found}


def peak_flops() -> float | None:
    """Of the card, dense bfloat16, a second; None without a card, or for one that is not known."""
    return of_card(torch.cuda.get_device_name()) if CUDA else None


def of_card(name: str) -> float | None:
    known = [kind for kind in GPUS if kind in name.lower()]
    return GPUS[max(known, key=len)].flops if known else None  # h20 is in the name of an h200


def flops(samples: Sequence[Sample], config: Any) -> float:
    """Of forward and backward: each weight 6 times a token, the head for trained tokens only,
    and causal attention."""
    heads_share = config.num_key_value_heads / config.num_attention_heads
    of_attention = config.hidden_size**2 * (2 + 2 * heads_share)
    of_layer = of_attention + 3 * config.hidden_size * config.intermediate_size
    tokens = sum(sample.num_tokens for sample in samples)
    trained = sum(float(sample.loss_mask[1:].sum()) for sample in samples)
    looks = sum(sample.num_tokens**2 / 2 for sample in samples)
    of_layers = config.num_hidden_layers * (of_layer * tokens + 2 * config.hidden_size * looks)
    of_head = config.vocab_size * config.hidden_size * trained
    return 6.0 * float(of_layers + of_head)


# ── logits in chunks and whole ───────────────────────────────────────────────────────────────


def logits_apart(how: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--logits", how]
    told: dict[str, float] = json.loads(subprocess.check_output(command, text=True))
    return told


def logits(how: str) -> None:
    """Forward and backward of a head of 32,000 words (151,936 on a GPU) over 4,096 tokens."""
    config = LlamaConfig(
        vocab_size=151_936 if CUDA else 32_000, hidden_size=128, intermediate_size=256,
        num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        random_model(config).save_pretrained(folder)
        model = load_model(folder, PACKED_ATTENTION)
    scorer = TokenScorer(model, kept_logits=KEPT_LOGITS[how]).to(DEVICE)
    tokens = torch.randint(config.vocab_size, (4097,), device=DEVICE)
    scored = torch.arange(1, 4097, device=DEVICE)
    scorer(tokens[:9], (9,), scored[:8]).sum().backward()
    before, started = memory(reset=True), now()
    logprobs = scorer(tokens, (4097,), scored)
    logprobs.sum().backward()
    print(
        json.dumps(
            {
                "peak_mb": (memory() - before) / 1e6,
                "logits_mb": 4096 * config.vocab_size * 4 / 1e6,
                "seconds": now() - started,
                "mean_logprob": float(logprobs.detach().mean()),
            }
        )
    )


def memory(*, reset: bool = False) -> int:
    """The most that the process held at a time, in bytes, since it was last reset."""
    if CUDA:
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


# ── balance, and the whole trainer ───────────────────────────────────────────────────────────


def balance(lengths: Sequence[int], budget: int) -> dict[str, dict[str, float]]:
    """The busiest rank's tokens over the mean: ours, and samples dealt out in turn."""
    found = {}
    for ranks in (2, 4, 8):
        (ours,) = plan(lengths, mini_batches=1, ranks=ranks, tokens_per_micro_batch=budget)
        loads = {
            "balanced": [sum(lengths[i] for micro in rank for i in micro) for rank in ours],
            "round_robin": [sum(lengths[rank::ranks]) for rank in range(ranks)],
        }
        found[f"{ranks} ranks"] = {
            name: max(of) / statistics.fmean(of) for name, of in loads.items()
        }
    return found


async def whole(
    model_dir: str, samples: list[Sample], size: Size, repeats: int
) -> dict[str, float]:
    """A rank in its process: what its start and a step take by the clock."""
    config = TrainerConfig(threads=0 if CUDA else 1, tokens_per_micro_batch=size.budget)
    with tempfile.TemporaryDirectory() as run_dir:
        started = time.perf_counter()
        async with Trainer(model=model_dir, config=config, run_dir=Path(run_dir)) as trainer:
            start_s = time.perf_counter() - started
            times = []
            for _ in range(repeats + 1):
                batch = Batch(samples=samples, version=trainer.version)
                times.append((await trainer.step(batch))["time/train_s"])
    return {"start_s": start_s, "step_s": statistics.median(times[1:])}


async def checkpoint(model_dir: str, sample: Sample, repeats: int) -> dict[str, float]:
    """How long a checkpoint stops the trainer, and how long it takes to be whole, by the clock."""
    config = TrainerConfig(threads=0 if CUDA else 1)
    with tempfile.TemporaryDirectory() as run_dir:
        async with Trainer(model=model_dir, config=config, run_dir=Path(run_dir)) as trainer:
            await trainer.step(Batch(samples=[sample], version=0))
            times = []
            for number in range(repeats):
                started = time.perf_counter()
                await trainer.begin_checkpoint(Path(run_dir) / f"{number}")
                stopped_s = time.perf_counter() - started
                await trainer.written()
                times.append((stopped_s, time.perf_counter() - started))
    stopped, whole = (statistics.median(of) for of in zip(*times, strict=True))
    return {"stopped_s": stopped, "whole_s": whole}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="0.5b" if CUDA else "small")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--checkpoint", action="store_true", help="that alone")
    parser.add_argument("--logits", choices=KEPT_LOGITS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.logits:
        logits(options.logits)
    elif options.checkpoint:
        print_checkpoint(measure_checkpoint(options.repeats))
    else:
        measure(options)


def measure_checkpoint(repeats: int) -> dict[str, float]:
    """Of a model that is large enough for files to count."""
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(CHECKPOINTED)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        model.save_pretrained(folder)
        del model
        sample = fake_sample(range(4, 36), [0.0] * 16 + [1.0] * 16)
        return {"parameters": parameters, **asyncio.run(checkpoint(folder, sample, repeats))}


def print_checkpoint(row: dict[str, float]) -> None:
    print(
        "checkpoint of {parameters:.3g} parameters: the trainer stands still for {stopped_s:.2f} s "
        "of the {whole_s:.2f} s that it takes".format(**row)
    )


def measure(options: argparse.Namespace) -> None:
    size = SIZES[options.size]()
    samples = episodes(options.samples, size)
    lengths = [sample.num_tokens for sample in samples]
    spread = {f"p{p}": float(np.percentile(lengths, p)) for p in (0, 50, 90, 100)}
    print(f"{len(samples)} episodes, {sum(lengths)} tokens; lengths {spread}; {size.budget} a pass")
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if CUDA else "one CPU thread", "size": options.size,
        "episodes": len(samples), "tokens": sum(lengths), "lengths": spread, "sigma": SIGMA,
    }  # fmt: skip
    if not CUDA:
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model_dir = str(Path(folder) / "model")
        random_model(size.config).save_pretrained(model_dir)
        dist.init_process_group(
            "nccl" if CUDA else "gloo", init_method=f"file://{folder}/rendezvous", rank=0,
            world_size=1,
        )  # fmt: skip
        results["packing"] = packing(model_dir, samples, size, options.repeats)
        dist.destroy_process_group()
        torch.cuda.empty_cache()  # for the processes that follow
        results["trainer"] = asyncio.run(whole(model_dir, samples, size, options.repeats))
    results["logits"] = {how: logits_apart(how) for how in KEPT_LOGITS}
    results["balance"] = balance(lengths, size.budget)
    results["checkpoint"] = measure_checkpoint(options.repeats)
    print_tables(results)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written to {os.path.relpath(RESULTS)}")


def print_tables(results: dict[str, Any]) -> None:
    heads = ("passes", *(f"{phase}_s" for phase in PHASES), "step_s", "tokens_per_s")
    print(f"\n{'':32}{'no padding':>11}" + "".join(f"{head:>13}" for head in heads))
    for name, row in results["packing"]["rows"].items():
        share = f"{row['tokens_not_padding']:.0%}" if "tokens_not_padding" in row else "100%"
        cells = "".join(f"{row[head]:>13.4g}" if head in row else f"{'–':>13}" for head in heads)
        print(f"{name:32}{share:>11}{cells}")
    print(f"packed is {results['packing']['packed_over_padded']:.2f} times as fast as padded")
    if (mfu := results["packing"]["rows"]["packed"].get("mfu")) is not None:
        print(f"model flops utilisation, packed: {mfu:.0%}")
    print(
        "a rank in its process: start {start_s:.1f} s, step {step_s:.3f} s".format(
            **results["trainer"]
        )
    )
    print(f"\n{'logits':12}{'peak MB':>9}{'of logits':>11}{'seconds':>9}")
    for how, row in results["logits"].items():
        told = f"{row['peak_mb']:>9.0f}{row['logits_mb']:>11.0f}{row['seconds']:>9.2f}"
        print(f"{how:12}{told}")
    print(f"\n{'busiest rank / mean':22}{'balanced':>9}{'round robin':>13}")
    for ranks, row in results["balance"].items():
        print(f"{ranks:22}{row['balanced']:>9.3f}{row['round_robin']:>13.3f}")
    print_checkpoint(results["checkpoint"])


if __name__ == "__main__":
    main()
