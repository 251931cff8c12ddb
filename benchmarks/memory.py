"""What memory a rank of the trainer takes, under a limit that the kernel enforces.

    python benchmarks/memory.py [--layers 56] [--ranks 2,4]

A random model, written and never held whole, is loaded, trained for two steps, saved and exported
by the trainer's own ranks (gloo, float32). A rank may have no more private memory (RLIMIT_DATA)
than rank_memory.py reckons for the phase, a tenth more, and what a process takes without a
model; an allocation past that fails, and so does this script. Loading, a file of the model counts
too: it is mapped as private memory, which no rank fills. Peaks are of resident anonymous memory
(RssAnon), looked at 100 times a second. Then what the same formula says of models on GPUs. By
default it takes 12 GB.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import resource
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rank_memory import RankMemory, rank_memory, size_of
from safetensors.torch import save_file
from transformers import LlamaConfig, Qwen2Config

from flash.fakes import fake_sample
from flash.system.process import Child
from flash.trainer.config import TrainerConfig
from flash.trainer.model_files import empty_model
from flash.trainer.ranks import LocalRanks, StartedRanks
from flash.trainer.room import LOGIT_BYTES
from flash.trainer.trainer import Trainer
from flash.types import Batch

RESULTS = Path(__file__).parent / "results" / "memory.json"
FILE_BYTES = 1 << 28
EXPORTED_BYTES = 1 << 30  # of a file, at most, which a writer holds until it is full
# Of a rank without a model: private memory that is mapped, stacks and heaps of threads too, and
# what of it is in use.
PROCESS_LIMIT, PROCESS_USED = 700e6, 320e6
SLACK = 1.1
LOOK_S = 0.01
TOKENS = 64


def config_of(*, layers: int, hidden: int = 1024, inner: int = 2048, vocabulary: int = 8192) -> Any:
    return LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inner,
        num_hidden_layers=layers, num_attention_heads=hidden // 128,
        num_key_value_heads=max(1, hidden // 512), tie_word_embeddings=False,
    )  # fmt: skip


def write_model(folder: Path, config: Any) -> None:
    """A random model in bfloat16, of which no more than a file's worth is in memory."""
    model = empty_model(config, torch.bfloat16)
    places: dict[str, str] = {}
    pending: dict[str, torch.Tensor] = {}

    def flush() -> None:
        file = f"model-{len(places):05d}.safetensors"
        save_file(pending, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(pending, file))
        pending.clear()

    folder.mkdir()
    config.save_pretrained(folder)
    for name, empty in model.named_parameters():
        made = torch.empty(empty.shape, dtype=empty.dtype)
        pending[name] = made.fill_(1) if made.dim() == 1 else made.normal_(0, 0.02)
        if sum(tensor.nbytes for tensor in pending.values()) > FILE_BYTES:
            flush()
    flush()
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


# ── ranks under a limit ──────────────────────────────────────────────────────────────────────


class LimitedRanks(LocalRanks):
    """Ranks that may have so many bytes of private memory each, before they load anything."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self._limit = limit
        self._guards: list[int] = []

    async def start(self, ranks: int, logs: Path) -> StartedRanks:
        started = await super().start(ranks, logs)
        self._guards = [child.pid for child in started.ranks if isinstance(child, Child)]
        for pid in self._guards:  # what they have not started yet inherits it
            _limit(pid, self._limit)
        self.limit(self._limit)
        return started

    def limit(self, num_bytes: float) -> None:
        for pid in self._pids():
            _limit(pid, num_bytes)

    async def peak_of(self, work: Awaitable[Any]) -> int:
        """The most anonymous memory that a rank had meanwhile, in bytes."""
        peak = 0
        task = asyncio.ensure_future(work)
        try:
            while not task.done():
                with contextlib.suppress(OSError, IndexError):  # one has ended: the work fails
                    for pid in self._pids():
                        status = Path(f"/proc/{pid}/status").read_text()
                        used = int(status.partition("RssAnon:")[2].split()[0]) * 1024
                        peak = max(peak, used)
                await asyncio.wait([task], timeout=LOOK_S)
            await task
        finally:
            task.cancel()
        return peak

    def _pids(self) -> list[int]:
        """Of the ranks, each the only child of its guard."""
        told = [Path(f"/proc/{pid}/task/{pid}/children").read_text() for pid in self._guards]
        return [int(pid) for pids in told for pid in pids.split()]


def _limit(pid: int, num_bytes: float) -> None:
    resource.prlimit(pid, resource.RLIMIT_DATA, (int(num_bytes), resource.RLIM_INFINITY))


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """What the ranks do, and the bytes of it by the formula."""

    name: str
    work: Callable[[Trainer], Awaitable[Any]]
    reckoned: float


def phases(memory: RankMemory, *, ranks: int, vocabulary: int, checkpoint: Path) -> list[Phase]:
    file_bytes = min(EXPORTED_BYTES, memory.weights)
    rng = np.random.default_rng(0)
    mask = [0.0] * (TOKENS // 2) + [1.0] * (TOKENS // 2)
    samples = [
        fake_sample(rng.integers(0, vocabulary, TOKENS), mask, advantage=1.0, episode=episode)
        for episode in range(ranks)
    ]

    async def steps(trainer: Trainer) -> None:
        for version in range(2):  # from the second on there are moments beside gradients
            await trainer.step(Batch(samples=samples, version=version))

    return [
        Phase(name="load", work=lambda trainer: trainer.__aenter__(), reckoned=memory.load),
        Phase(name="step", work=steps, reckoned=memory.step),
        Phase(
            name="checkpoint",
            work=lambda trainer: trainer.save_checkpoint(checkpoint),
            reckoned=memory.checkpoint,
        ),
        Phase(
            name="export",
            work=lambda trainer: trainer.export_weights(),
            reckoned=memory.exported(file_bytes),
        ),
    ]


async def measure(
    model: Path, config: Any, *, ranks: int, run: Path
) -> AsyncIterator[dict[str, Any]]:
    """A row after each phase; TrainerFailure if a rank needs more than it may have."""
    memory = rank_memory(size_of(empty_model(config, torch.float32)), shards=ranks, half=False)
    todo = phases(memory, ranks=ranks, vocabulary=config.vocab_size, checkpoint=run / "checkpoint")
    limits = [PROCESS_LIMIT + SLACK * phase.reckoned for phase in todo]
    limits[0] += max(file.stat().st_size for file in model.glob("*.safetensors"))
    limits = list(itertools.accumulate(limits, max))  # a heap may keep what was used before
    limited = LimitedRanks(limits[0])
    trainer = Trainer(
        model=model, config=TrainerConfig(ranks=ranks, threads=1, start_timeout_s=1800.0),
        run_dir=run, starter=limited,
    )  # fmt: skip
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_exit(trainer)  # the first phase enters it
        for phase, limit in zip(todo, limits, strict=True):
            limited.limit(limit)
            started = time.perf_counter()
            peak = await limited.peak_of(phase.work(trainer))
            yield {
                "ranks": ranks, "phase": phase.name, "limit": limit, "peak": peak,
                "reckoned": phase.reckoned + PROCESS_USED, "seconds": time.perf_counter() - started,
            }  # fmt: skip


# ── models on GPUs, by the formula ───────────────────────────────────────────────────────────

GPU_MODELS: dict[str, Any] = {
    "7B (Qwen2.5)": Qwen2Config(
        vocab_size=152_064, hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False,
    ),
    "70B (Llama 3)": LlamaConfig(
        vocab_size=128_256, hidden_size=8192, intermediate_size=28_672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8, tie_word_embeddings=False,
    ),
}  # fmt: skip
GPUS = (8, 64)
GPU_TOKENS = 16_384
GPU_LOGITS = 1 << 28  # of a chunk


def activation_bytes(config: Any, tokens: int, *, half: bool, recomputed: bool) -> float:
    """What a forward pass keeps for its backward pass, without fused kernels: a SwiGLU's four
    inner tensors, what projections and norms get, and what norms compute in float32."""
    computed, hidden = 2 if half else 4, int(config.hidden_size)
    layer = computed * (4 * int(config.intermediate_size) + 9 * hidden) + 8 * hidden
    layers = int(config.num_hidden_layers)
    return tokens * (layers * computed * hidden + layer if recomputed else layers * layer)


def on_gpus(config: Any, gpus: int) -> dict[str, float]:
    """Bytes of each of so many GPUs, and of the host for each."""
    size = size_of(empty_model(config, torch.float32))
    memory = rank_memory(size, shards=gpus, half=True)
    kept, recomputed = (
        activation_bytes(config, GPU_TOKENS, half=True, recomputed=each) for each in (False, True)
    )
    logits = LOGIT_BYTES * GPU_LOGITS
    return {
        "weights": memory.weights, "gradients": memory.gradients, "moments": memory.moments,
        "gathered": memory.gathered, "backward": memory.backward, "logits": logits,
        "activations": kept, "recomputed": recomputed, "in all": memory.step + logits + recomputed,
        "host: export": EXPORTED_BYTES + memory.tensor,
        "host: checkpoint": memory.checkpoint / 2,
    }  # fmt: skip


# ── the table ────────────────────────────────────────────────────────────────────────────────


async def measure_all(options: argparse.Namespace) -> dict[str, Any]:
    config = config_of(layers=options.layers)
    parameters = size_of(empty_model(config, torch.float32)).parameters
    print(f"{parameters / 1e6:,.0f} million parameters, in float32 {4 * parameters / 1e9:.2f} GB")
    heads = ("limit", "peak", "reckoned")
    print(
        f"{'ranks':>5} {'phase':12}" + "".join(f"{head + ' GB':>13}" for head in heads) + "      s"
    )
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        write_model(model, config)
        for ranks in options.ranks:
            async for row in measure(model, config, ranks=ranks, run=Path(folder) / f"{ranks}"):
                rows.append(row)
                told = "".join(f"{row[head] / 1e9:>13.2f}" for head in heads)
                print(f"{ranks:>5} {row['phase']:12}{told}{row['seconds']:>7.0f}", flush=True)
    return {"parameters": parameters, "rows": rows}


def print_gpus(found: dict[str, dict[str, float]]) -> None:
    print(f"\n{'GB a GPU':22}" + "".join(f"{name:>20}" for name in found))
    for what in next(iter(found.values())):
        print(f"{what:22}" + "".join(f"{of[what] / 1e9:>20.1f}" for of in found.values()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=56)
    parser.add_argument(
        "--ranks", type=lambda told: [int(each) for each in told.split(",")], default=[2, 4]
    )
    results = asyncio.run(measure_all(parser.parse_args()))
    results["gpus"] = {
        f"{name} on {gpus}": on_gpus(config, gpus)
        for name, config in GPU_MODELS.items()
        for gpus in GPUS
    }
    print_gpus(results["gpus"])
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written to {os.path.relpath(RESULTS)}")


if __name__ == "__main__":
    main()
