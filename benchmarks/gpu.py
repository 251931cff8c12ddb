"""What the project does on one GPU, in five minutes; the table comes last.

    python benchmarks/gpu.py [--parts facts,trainer,…] [--limit 300] [--policy DIRECTORY]

Parts, in this order, each in a process of its own; one that no time is left for is left out, and
the table says so:

    facts       the card, the versions, what copies and matrix products reach
    alfworld    the ALFWorld preset with the embedded worker: learning, and where a step's time goes
    trainer     a rank's steps: a model of 0.5 billion random parameters, episodes short and long
    embedded    the embedded worker's decoding, with the same model
    attention   one layer's, by every way there is
    publish     export, load, how many of the weights a step changes, and the bytes of that
    vllm        what a publish pauses a server for, with requests under way, and how much later
                their next tokens come; left out where vLLM is not installed
    recomputed  the trainer's steps with activations recomputed, and what is chosen for this card
    compiled    the same with layers that torch.compile made, and how long that takes at first
    small       seconds a step of the ALFWorld preset on the CPU, and on vLLM if it is installed
    long        a step of one sample of 32,768, 65,536, … tokens, recomputed
    adapters    LoRA of a model of 7.6 billion: loading, steps, and the merged weights' export
    colocated   trainer and a vLLM server in turns on the one card: what a turn costs

All of them take twenty minutes (`--limit 1200`); within five the last are left out.

`--policy` is a small policy that was taught before: after `make train ENV=alfworld` the folder
`runs/.small_policies/alfworld-…`; without it that part is left out. Without a GPU the model is
small, and no figure means anything.
"""

import argparse
import asyncio
import contextlib
import gc
import importlib.metadata
import itertools
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
from engines import lines
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile
from trainer import (
    CUDA,
    DEVICE,
    SIZES,
    Size,
    Variant,
    episodes,
    flops,
    now,
    padded_rows,
    peak_flops,
    random_model,
)

from flash.explorer.changes import apply_changes, write_changes
from flash.fakes import FakeBatchLog
from flash.hub.hub import InferenceHub
from flash.hub.probe import Probe
from flash.hub.vllm_pool import VllmPool
from flash.system.machine import gpus, has_vllm
from flash.system.quiet import no_progress_bars
from flash.trainer.attention import Packing, attend_one_by_one, varlen_kernel
from flash.trainer.config import LoraConfig, TrainerConfig
from flash.trainer.delta import write_delta
from flash.trainer.lasting import LastingTrainer
from flash.trainer.micro_batch import pack
from flash.trainer.objectives.aggregation import scales
from flash.trainer.packing import divide
from flash.trainer.rank import Rank
from flash.trainer.trainer import Trainer
from flash.types import Batch, GenerateRequest, Sample, SamplingParams, UpdateMode, Weights
from flash.warm_start.small_policy import create
from flash.worker.checksum import checksum
from flash.worker.engine import EmbeddedEngine, EngineRequest
from flash.worker.tensors import words_of

RESULTS = Path(__file__).parent / "results"
SIZE, LARGE = ("0.5b", "7.6b") if CUDA else ("small", "small")
DTYPE = torch.bfloat16 if CUDA else torch.float32
HEADS = (14, 2, 64) if CUDA else (4, 2, 16)  # of queries, of keys, and their width
# Median tokens of an episode, and how many there are.
EPISODES = {"short": (220, 256), "long": (2000, 48)} if CUDA else {"short": (40, 16)}
# Tokens a pass; the most may be more than the card has memory for.
BUDGETS, MOST = ((16_384, 8_192), 32_768) if CUDA else ((512,), 1024)
LONG = (32_768, 65_536, 131_072, 262_144) if CUDA else (512, 1024)  # tokens of a sample
REPEATS = 2
VLLM_SHARE = 0.7  # of the card, in its turn
VLLM_ARGUMENTS = ["--enforce-eager"]  # graphs take it a minute more to start, and no pause changes
MOST_REQUESTS = 256 if CUDA else 8
NAMES = itertools.count()  # of requests
END_S = 10  # for a part to end itself, once it is told to

Figures = dict[str, Any]
Row = tuple[str, Figures]  # what was measured, and figures by name and unit


@dataclass(frozen=True, slots=True)
class Part:
    """`run` yields its rows, the most wanted first."""

    run: Callable[[argparse.Namespace], Iterator[Row]]
    least_s: int  # with less time left it is not begun
    most_s: int


# ── the parts ────────────────────────────────────────────────────────────────────────────────


def facts(_: argparse.Namespace) -> Iterator[Row]:
    packages = ("torch", "transformers", "triton", "numpy")
    yield (
        "versions",
        {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in packages if name != "triton" or CUDA},
    )
    if not CUDA:
        yield "card", {"name": "none", "cores": os.cpu_count()}
        return
    card = torch.cuda.get_device_properties(0)
    yield "card", {"name": card.name, "GB": card.total_memory / 1e9, "cuda": torch.version.cuda}
    half: dict[str, Any] = {"device": DEVICE, "dtype": torch.bfloat16}
    source = torch.randn(1 << 31, **half)
    target = torch.empty_like(source)
    copied_s = median_s(partial(target.copy_, source), 10)
    yield "copy", {"GB/s read and written": 2 * source.nbytes / copied_s / 1e9}
    left, right = torch.randn(8192, 8192, **half), torch.randn(8192, 8192, **half)
    multiplied_s = median_s(lambda: left @ right, 10)
    yield "matrix product, bfloat16", {"TFLOP/s": 2 * 8192**3 / multiplied_s / 1e12}


def trainer(_: argparse.Namespace) -> Iterator[Row]:
    samples = {name: of_kind(name) for name in EPISODES}
    with made_model() as model:
        with started(model, TrainerConfig()) as rank:
            yield "room", room(rank)
            for budget, (name, of) in itertools.product(BUDGETS, samples.items()):
                yield f"{name}, {budget} a pass", steps(rank, of, budget)
            for name, of in samples.items() if CUDA else ():
                yield f"{name}, one pass of {BUDGETS[0]}", kernels(rank, of)
            for name, of in samples.items():
                yield f"{name}, {MOST} a pass", steps(rank, of, MOST)
        for name, of in samples.items():
            yield f"{name}, {BUDGETS[0]} a pass, padded", padded(model, of, BUDGETS[0])


def compiled(_: argparse.Namespace) -> Iterator[Row]:
    """The first step's seconds are compiling; the median is of the steps after it."""
    yield from of_settings(TrainerConfig(compile=True), "compiled")
    yield from of_settings(TrainerConfig(compile=True, gradient_checkpointing=True), "both")


def recomputed(_: argparse.Namespace) -> Iterator[Row]:
    yield from of_settings(TrainerConfig(gradient_checkpointing=True), "recomputed")
    with made_model() as model, started(model, TrainerConfig()) as rank:
        yield "room", room(rank)


def of_settings(config: TrainerConfig, told: str) -> Iterator[Row]:
    """Steps of both kinds of episodes, with passes as long as they are chosen at most."""
    with made_model() as model, started(model, config) as rank:
        for name in EPISODES:
            yield f"{name}, {MOST} a pass, {told}", steps(rank, of_kind(name), MOST)


def room(rank: Rank) -> Figures:
    """What a pass has room for, and what is made of it."""
    if (found := rank.room()) is None:
        return {"tokens a pass": TrainerConfig().tokens_of_pass}
    tokens, recompute = found.choose()
    return {
        "kept": found.kept, "recomputed": found.recomputed,
        "tokens a pass": tokens, "recompute": recompute,
    }  # fmt: skip


def long(_: argparse.Namespace) -> Iterator[Row]:
    with made_model() as model, started(model, TrainerConfig(gradient_checkpointing=True)) as rank:
        for length in LONG:
            config = SIZES[SIZE]().config
            sample = Size(config, median=100 * length, longest=length, budget=0)
            yield f"one sample of {length}", steps(rank, episodes(1, sample), length)


def adapters(_: argparse.Namespace) -> Iterator[Row]:
    config = TrainerConfig(lora=LoraConfig(rank=16), gradient_checkpointing=True)
    with made_model(LARGE, DTYPE) as model:
        began = now()
        with started(model, config) as rank:
            yield "loading", {"s": now() - began, **held()}
            samples = of_kind("short", size=LARGE)
            yield f"short, {BUDGETS[0]} a pass, rank 16", steps(rank, samples, BUDGETS[0], LARGE)
            exported = model / "exported"
            export_s = seconds(partial(rank.export, str(exported)))
            size = sum(file.stat().st_size for file in exported.glob("*.safetensors"))
            yield "merged weights", {"GB": size / 1e9, "export s": export_s, **held()}


def held() -> Figures:
    """What the card has kept for tensors, and the most of it since it was asked last."""
    if not CUDA:
        return {}
    figures = {
        "GB held": torch.cuda.memory_allocated() / 1e9,
        "GB at most": torch.cuda.max_memory_allocated() / 1e9,
    }
    torch.cuda.reset_peak_memory_stats()
    return figures


def alfworld(options: argparse.Namespace) -> Iterator[Row]:
    settings = ("--engine=embedded", "--eval.tasks=64")
    yield from trained(options, *settings, steps=options.steps, kept="gpu_alfworld.jsonl")


def small(options: argparse.Namespace) -> Iterator[Row]:
    """Where a small policy is quickest: what `alfworld` has on the card, elsewhere."""
    ways = {"on the CPU": ("--engine=embedded", {"CUDA_VISIBLE_DEVICES": ""})}
    if CUDA and has_vllm():
        ways["on vLLM"] = ("--engine=vllm", {})
    for way, (engine, environment) in ways.items():
        each = argparse.Namespace(**vars(options) | {"limit": options.limit / len(ways)})
        kept = f"gpu_alfworld_{way.split()[-1].lower()}.jsonl"
        for what, figures in trained(each, engine, steps=6, kept=kept, environment=environment):
            if what in ("", "the run", "a step, median"):
                yield f"{what} {way}".strip(), figures


def trained(
    options: argparse.Namespace,
    *settings: str,
    steps: int,
    kept: str,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Row]:
    """What a run of the ALFWorld preset has to say of so many steps, or as many as there is time
    for; its lines are kept among the results."""
    if not options.policy:
        yield "", {"left out": "no --policy"}
        return
    with tempfile.TemporaryDirectory(dir=in_memory()) as folder:
        command = [
            sys.executable, "-c", "from flash.cli.main import main; main()", "train", "alfworld",
            "--name=gpu", f"--runs_dir={folder}", "--eval_every=0", f"--steps={steps}", *settings,
            # Reported here; in a run of its own a larger one than the default ends it.
            "--engine.gap_limit=10", f"--model={options.policy}",
        ]  # fmt: skip
        process = subprocess.Popen(
            command, stdout=sys.stderr, env={**os.environ, **(environment or {})}
        )
        try:
            process.wait(options.limit - 2 * END_S)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_S)
        finally:
            process.kill()
            process.wait()
        metrics = Path(folder) / "gpu" / "metrics.jsonl"
        if not metrics.exists():
            raise RuntimeError(f"the run ended with {process.returncode} before its first step")
        rows = lines(metrics)
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / kept).write_text(metrics.read_text())
    if process.returncode:
        yield "the run", {"ended with": process.returncode}
    yield from of_run(rows)


def of_run(rows: list[Figures]) -> Iterator[Row]:
    done = [row for row in rows if row["step"]]
    if not done:
        raise RuntimeError("no step was done in time")

    def known(name: str, of: list[Figures]) -> list[float]:
        # Not every step has every number: without tokens of age 0 there is no fresh one.
        return [row[name] for row in of if not math.isnan(row.get(name, math.nan))] or [math.nan]

    def middle(name: str) -> float:
        return statistics.median(known(name, done[1:] or done))

    took_s = [after["time_s"] - before["time_s"] for before, after in itertools.pairwise(done)]
    yield "a step, median", {
        "steps": len(done), "s": statistics.median(took_s or [done[0]["time_s"]]),
        "train s": middle("time/train_s"), "publish s": middle("time/publish_s"),
        "wait s": middle("time/wait_batch_s"), "first step s": done[0]["time_s"],
        "sampled tok/s": middle("tokens_per_s"), "trained tok": middle("tokens/trained"),
    }  # fmt: skip
    yield "logprobs, worker against trainer", {
        "median of steps' largest": middle("logprob_gap/max"),
        "largest": max(known("logprob_gap/max", done)),
        "probe, 90%": middle("logprob_gap/p90"), "probe, kl": middle("logprob_gap/kl"),
        "probe, 90% of logits": max(known("logprob_gap/logits", done)),
        "kl of fresh tokens": middle("mismatch/kl_fresh"),
    }  # fmt: skip
    third = max(1, len(done) // 3)
    success = {
        "success, first third": statistics.fmean(known("success_rate", done[:third])),
        "last third": statistics.fmean(known("success_rate", done[-third:])),
    }
    held_out = {
        f"held out after {row['step']}": row["eval/success_rate"]
        for row in rows
        if "eval/success_rate" in row
    }
    yield "learning", success | held_out


def attention(_: argparse.Namespace) -> Iterator[Row]:
    ways: dict[str, Callable[[list[int]], Callable[[], None]]]
    ways = {"padded": in_rows, "one by one": partial(packed, attend_one_by_one)}
    if CUDA:
        ways = {"varlen": partial(packed, varlen_kernel().attend)} | ways
    for (way, prepare), name in itertools.product(ways.items(), EPISODES):
        # One that warms up, and two of other lengths: cuDNN plans anew for each length.
        passes = [first_pass([s.num_tokens for s in of_kind(name, seed)]) for seed in range(3)]
        what = f"{name}, {sum(passes[0])} tokens in {len(passes[0])}, {way}"
        yield what, or_failed(partial(first_and_again, prepare, passes))


def packed(attend: Callable[..., Tensor], lengths: list[int]) -> Callable[[], None]:
    """Forward and backward of one layer's attention."""
    packing = Packing.of(lengths, DEVICE)
    inputs = heads(1, sum(lengths))

    def run() -> None:
        out: Any = attend(*inputs, packing, scaling=None, sliding_window=None)
        out.sum().backward()

    return run


def in_rows(lengths: list[int]) -> Callable[[], None]:
    """As `packed`, of rows filled up to the longest."""
    queries, keys, values = heads(len(lengths), max(lengths))

    def run() -> None:
        out: Any = scaled_dot_product_attention(
            queries, keys, values, is_causal=True, enable_gqa=True
        )
        out.sum().backward()

    return run


def heads(rows: int, length: int) -> list[Tensor]:
    queries, keys, width = HEADS
    return [
        torch.randn(rows, count, length, width, device=DEVICE, dtype=DTYPE).requires_grad_()
        for count in (queries, keys, keys)
    ]


def first_and_again(
    prepare: Callable[[list[int]], Callable[[], None]], passes: list[list[int]]
) -> Figures:
    """What each pass takes when its lengths are new, and when they are not."""
    first_ms, again_ms = [], []
    for lengths in passes:
        attend = prepare(lengths)
        first_ms.append(1e3 * seconds(attend))
        again_ms.append(1e3 * median_s(attend, 3))
    return {
        "new lengths ms": statistics.median(first_ms[1:]),
        "the same again ms": statistics.median(again_ms[1:]),
    }


def embedded(_: argparse.Namespace) -> Iterator[Row]:
    prompt, new = (128, 96) if CUDA else (16, 8)
    with made_model() as model:
        began = time.perf_counter()
        engine = opened_engine(model, max_running=MOST_REQUESTS)
        yield "from start to ready", {"s": time.perf_counter() - began}
        # One loop, because the engine is used from one.
        with asyncio.Runner() as runner:
            try:
                for requests in (1, 64, MOST_REQUESTS):
                    figures = runner.run(decoding(engine, requests, prompt, new))
                    yield f"{requests} at a time, {prompt} tokens and {new} more", figures
                agents = 64 if CUDA else 8
                runner.run(turns(engine, agents))  # warms up
                yield f"{agents} agents of 5 turns", runner.run(turns(engine, agents))
            finally:
                engine.close()


async def decoding(engine: EmbeddedEngine, requests: int, prompt: int, new: int) -> Figures:
    async def ask(tokens: int) -> float:
        prompts = torch.randint(4, SIZES[SIZE]().config.vocab_size, (requests, prompt)).tolist()
        began = time.perf_counter()
        await asyncio.gather(*(sampled(engine, ids, tokens) for ids in prompts))
        return time.perf_counter() - began

    await ask(4)  # warms up
    prompt_s, all_s = await ask(1), await ask(new)
    step_s = (all_s - prompt_s) / (new - 1)
    return {
        "decode ms a step": 1e3 * step_s, "decode tok/s": requests / step_s,
        "tok/s in all": requests * new / all_s, "prompts and a token ms": 1e3 * prompt_s,
    }  # fmt: skip


async def turns(engine: EmbeddedEngine, agents: int) -> Figures:
    """Answers of 12 to 36 tokens, each after 40 of an environment: most steps begin something."""

    async def play(number: int) -> int:
        # Groups of eight begin with the same prompt.
        ids, tokens = [7 + number // 8] * 200, 0
        for turn in range(5):
            new = 12 + (number * 7 + turn * 5) % 25
            ids += await sampled(engine, ids, new) + torch.randint(4, 1000, (40,)).tolist()
            tokens += new
        return tokens

    began = time.perf_counter()
    tokens = sum(await asyncio.gather(*(play(number) for number in range(agents))))
    all_s = time.perf_counter() - began
    return {"tok/s": tokens / all_s, "s": all_s}


async def sampled(engine: EmbeddedEngine, ids: list[int], tokens: int) -> list[int]:
    name = str(next(NAMES))
    request = EngineRequest(request_id=name, token_ids=list(ids), max_tokens=tokens)
    return (await engine.generate(request)).token_ids


def opened_engine(model: Path, *, max_running: int = 64) -> EmbeddedEngine:
    return EmbeddedEngine(
        str(model), device=DEVICE, dtype=str(DTYPE).removeprefix("torch."),
        cache_tokens=131_072 if CUDA else 8192, max_running=max_running,
    )  # fmt: skip


def publish(_: argparse.Namespace) -> Iterator[Row]:
    samples = of_kind("long" if CUDA else "short")[:16]
    with made_model() as model:
        for learning_rate in (1e-6, 1e-5):
            config = TrainerConfig(learning_rate=learning_rate, warmup_steps=0)
            before, after = (model / f"{when} {learning_rate}" for when in ("before", "after"))
            with started(model, config) as rank:
                for _step in range(2):  # the first of Adam's steps are its largest
                    step(rank, samples, config)
                rank.export(str(before))
                step(rank, samples, config)
                export_s = seconds(partial(rank.export, str(after)))
            yield f"one step at {learning_rate:g}", changed(before, after) | sent(before, after)
        size = sum(file.stat().st_size for file in after.glob("*.safetensors"))
        load = asyncio.run(loading(model, after))
        yield "weights on their way", {"GB": size / 1e9, "export s": export_s, **load}


async def loading(model: Path, exported: Path) -> Figures:
    engine = opened_engine(model)
    try:
        request = EngineRequest(request_id="0", token_ids=[5] * 16, max_tokens=2)
        await engine.generate(request)
        began = now()
        await engine.pause("keep")
        pause_s = now() - began
        load_s = seconds(lambda: engine.load_weights(exported))
        await engine.resume()
    finally:
        engine.close()
    return {"pause s": pause_s, "load s": load_s}


def changed(before: Path, after: Path) -> Figures:
    """The share of exported values that are not what they were."""
    from safetensors.torch import load_file  # noqa: PLC0415

    different = total = 0
    for file in sorted(before.glob("*.safetensors")):
        old, new = load_file(file), load_file(after / file.name)
        for name, tensor in old.items():
            different += int((tensor.to(DEVICE) != new[name].to(DEVICE)).sum())
            total += tensor.numel()
    return {"values changed %": 100 * different / total, "of millions": total / 1e6}


def colocated(_: argparse.Namespace) -> Iterator[Row]:
    if not has_vllm():
        yield "", {"left out": "vLLM is not installed: make setup-vllm"}
        return
    with made_model() as model:
        yield from as_they_come(taking_turns(model))


async def taking_turns(model: Path) -> AsyncIterator[Row]:
    """A server with requests under way sleeps, the trainer steps, it wakes with the weights: as
    files, and from the trainer's memory."""
    samples = of_kind("long" if CUDA else "short")[: 16 if CUDA else 2]
    requests, tokens = (64, 512) if CUDA else (4, 64)
    clock = time.perf_counter
    pool = VllmPool(
        str(model), size=1, max_running=requests, max_tokens=2048, cache_tokens=16_384,
        tensor_parallel=1, devices=gpus()[:1], gpu_memory=VLLM_SHARE,
        dtype=str(DTYPE).removeprefix("torch."), threads=0, seed=0, sleeps=True,
        arguments=["--skip-tokenizer-init", *VLLM_ARGUMENTS], log_dir=model, start_timeout_s=300,
    )  # fmt: skip
    async with LastingTrainer(
        Trainer(model=model, config=TrainerConfig(), run_dir=model),
        log=FakeBatchLog(), newest=lambda: None, max_restarts=0,
    ) as trainer:  # fmt: skip
        began = clock()
        async with InferenceHub(
            pool,
            max_running=requests,
            weights=await trainer.export_weights(),
            make_room=partial(trainer.make_room, VLLM_SHARE),
            probe=Probe(gap_limit=10),  # it is reported here
        ) as hub:
            yield "a server from start to ready", {"s": clock() - began}
            for turn, way in enumerate(("files", "files", "memory", "memory")):
                asked = [
                    asyncio.create_task(hub.generate(request_of([7 + number] * 64, tokens)))
                    for number in range(requests)
                ]
                await asyncio.sleep(1.0 if CUDA else 0.3)  # they are under way
                figures = {"free % before": free_percent()}
                began = clock()
                async with hub.asleep():
                    figures |= {"sleep s": clock() - began, "free % of the trainer": free_percent()}
                    told = await trainer.step(Batch(samples=samples, version=turn))
                    began = clock()
                    weights = await trainer.export_weights()
                    figures |= {"train s": told["time/train_s"], "export s": clock() - began}
                    if way == "files":
                        weights = replace(weights, share=None)
                    report = await hub.publish(weights)
                answers = await asyncio.gather(*asked)
                assert {len(answer.token_ids) for answer in answers} == {tokens}
                figures |= {
                    "wake and load s": report.paused_s,
                    "probe, 90% of logits": report.gap.logits if report.gap else math.nan,
                    "answers of two versions": sum(len({*each.versions}) > 1 for each in answers),
                }
                yield f"turn {turn + 1}, weights as {way}", figures


def as_they_come(rows: AsyncIterator[Row]) -> Iterator[Row]:
    """Of a part that runs in an event loop, from another thread, for it is all one task there."""
    found: SimpleQueue[Row | None] = SimpleQueue()

    async def put() -> None:
        try:
            async for row in rows:
                found.put(row)
        finally:
            found.put(None)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(asyncio.run, put())
        while (row := found.get()) is not None:
            yield row
        running.result()


def request_of(token_ids: list[int], tokens: int) -> GenerateRequest:
    return GenerateRequest(token_ids=token_ids, sampling=SamplingParams(max_tokens=tokens))


def free_percent() -> float:
    if not CUDA:
        return math.nan
    free, total = torch.cuda.mem_get_info()
    return 100 * free / total


def sent(before: Path, after: Path) -> Figures:
    """What explorers fetch in place of the whole, and what it costs both sides beside checksums."""
    size = sum(file.stat().st_size for file in after.glob("*.safetensors"))
    changes, made = after / "changes", after / "made"
    began = now()
    few = write_changes(before, after, changes)
    write_s = now() - began
    if not few:
        return {"sent": "whole", "found out s": write_s}
    apply_s = seconds(partial(apply_changes, before, changes, made))
    assert checksum(made) == checksum(after)
    bytes_sent = sum(file.stat().st_size for file in changes.iterdir())
    return {"bytes sent %": 100 * bytes_sent / size, "write s": write_s, "apply s": apply_s}


def vllm(_: argparse.Namespace) -> Iterator[Row]:
    if not has_vllm():
        yield "", {"left out": "vLLM is not installed"}
        return
    size, requests, prompt = ((24, 896, 14), 64, 256) if CUDA else ((2, 64, 2), 8, 128)
    layers, width, count = size
    with tempfile.TemporaryDirectory(dir=in_memory()) as folder:
        words = [f"w{number}" for number in range(1000)]
        models = [
            create(Path(folder) / str(seed), words, layers=layers, hidden_size=width, heads=count,
                   max_tokens=4 * prompt, seed=seed)
            for seed in range(2)
        ]  # fmt: skip
        bytes_of_one = sum(file.stat().st_size for file in models[0].glob("*.safetensors"))
        yield "the model, float32 as files", {"GB": bytes_of_one / 1e9}
        pool = VllmPool(
            str(models[0]), size=1, max_running=requests, max_tokens=4 * prompt,
            cache_tokens=2 * requests * prompt, tensor_parallel=1, devices=gpus(), gpu_memory=0.5,
            dtype=str(DTYPE).removeprefix("torch."), threads=0, seed=0, arguments=VLLM_ARGUMENTS,
            log_dir=Path(folder) / "logs", start_timeout_s=600,
        )  # fmt: skip
        yield from as_they_come(publishes(pool, models, requests, prompt))


async def publishes(
    pool: VllmPool, models: list[Path], requests: int, prompt: int
) -> AsyncIterator[Row]:
    began = time.perf_counter()
    async with InferenceHub(pool, max_running=requests) as hub:
        yield "from start to ready", {"s": time.perf_counter() - began}
        modes: tuple[UpdateMode, ...] = ("keep", "keep", "keep_stale_kv")
        for mode, when in zip(modes, ("first", "then", "then"), strict=True):
            hub._publisher.update_mode = mode
            weights = Weights(version=hub.version + 1, path=models[(hub.version + 1) % len(models)])
            figures = await published(hub, weights, requests, prompt)
            yield f"{requests} requests of {prompt} and more, {mode}, {when}", figures
        if CUDA:  # on a CPU servers take whole weights only
            hub._publisher.update_mode = "keep"
            before = as_exported(models[0], models[0].with_name("before"))
            after = as_exported(models[0], models[0].with_name("after"), change=0.02)
            compare_s = seconds(partial(write_delta, before, after))
            for what, folder in (("all weights", before), ("2% of them", after)):
                weights = Weights(version=hub.version + 1, path=folder)
                figures = await published(hub, weights, requests, prompt)
                yield f"{requests} requests, keep, {what}", figures
            yield "to find the 2%", {"s": compare_s}


def as_exported(model: Path, folder: Path, change: float = 0.0) -> Path:
    """In the dtype of computation, with a share of the values changed by a bit."""
    from safetensors.torch import load_file, save_file  # noqa: PLC0415

    folder.mkdir()
    tensors = {}
    for name, tensor in load_file(model / "model.safetensors").items():
        tensors[name] = tensor.to(DTYPE)
        words = words_of(tensors[name])
        words[torch.randperm(len(words))[: int(change * len(words))]] ^= 1
    save_file(tensors, folder / "model.safetensors")
    return folder


async def published(hub: InferenceHub, weights: Weights, requests: int, prompt: int) -> Figures:
    """The pause, and how much longer than ever the next tokens are in coming, pause included."""
    told: list[list[float]] = [[] for _ in range(requests)]
    half_way = asyncio.Event()

    async def ask(number: int) -> None:
        def on_sampled(tokens: int) -> None:
            told[number].append(time.perf_counter())
            if tokens >= prompt // 2 and number == requests - 1:
                half_way.set()

        sampling = SamplingParams(max_tokens=2 * prompt)
        token_ids = [4 + (number + place) % 990 for place in range(prompt)]
        await hub.generate(
            GenerateRequest(token_ids=token_ids, sampling=sampling), on_sampled=on_sampled
        )

    async with asyncio.TaskGroup() as tasks:
        for number in range(requests):
            tasks.create_task(ask(number))
        await half_way.wait()
        began = time.perf_counter()
        report = await hub.publish(weights)
        ended = time.perf_counter()
    usual: list[float] = []
    across: list[float] = []
    for times in told:
        for before, after in itertools.pairwise(times):
            (across if before < ended and after > began else usual).append(after - before)
    late_s = statistics.median(across) - statistics.median(usual)
    return {
        "pause s": report.paused_s, "load s": report.load_s, "reset s": report.reset_s,
        "next tokens later by s": late_s,
    }  # fmt: skip


# ── what they share ──────────────────────────────────────────────────────────────────────────


def of_kind(name: str, seed: int = 0, size: str = SIZE) -> list[Sample]:
    median, count = EPISODES[name]
    config = SIZES[size]().config
    return episodes(count, Size(config, median=median, longest=16_384, budget=0), seed)


def first_pass(lengths: list[int]) -> list[int]:
    """As many as one pass has room for."""
    taken: list[int] = []
    for length in lengths:
        if sum(taken) + length <= MOST:
            taken.append(length)
    return taken


@contextlib.contextmanager
def made_model(size: str = SIZE, dtype: torch.dtype = torch.float32) -> Iterator[Path]:
    """In float32: between two values of bfloat16 as trained weights are, for `changed`."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(dir=in_memory()) as folder:
        with torch.device(DEVICE), no_progress_bars():
            model = random_model(SIZES[size]().config, dtype=dtype)
            model.save_pretrained(folder)
        del model
        free()
        yield Path(folder)


@contextlib.contextmanager
def started(model: Path, config: TrainerConfig) -> Iterator[Rank]:
    """The trainer's one rank, in this process; nobody may keep it."""
    with no_progress_bars():
        rank = Rank()
        rank.start(str(model), None, config, 0, 1, None, 0)
        try:
            yield rank
        finally:
            rank.__dict__.clear()
            dist.destroy_process_group()
            free()


def step(rank: Rank, samples: list[Sample], config: TrainerConfig) -> float:
    """Seconds of one step."""
    (mini_batches,) = divide(samples, config)
    return seconds(lambda: rank.step(mini_batches, 0))


def steps(rank: Rank, samples: list[Sample], budget: int, size: str = SIZE) -> Figures:
    """What steps with so many tokens a pass come to."""
    config = TrainerConfig(tokens_per_micro_batch=budget)

    def measure() -> Figures:
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        took = [step(rank, samples, config) for _ in range(REPEATS + 1)]
        ((mini_batch,),) = divide(samples, config)
        return {
            **rates(samples, statistics.median(took[1:]), size), "first s": took[0],
            "passes": len(mini_batch.micro_batches),
            "peak GB": torch.cuda.max_memory_allocated() / 1e9 if CUDA else 0.0,
        }  # fmt: skip

    return or_failed(measure)


def padded(model: Path, samples: list[Sample], budget: int) -> Figures:
    """As `steps`, with rows filled up to the longest."""

    def measure() -> Figures:
        rows = padded_rows([s.num_tokens for s in samples], budget)
        scale = scales(samples, "token_mean")
        micros = [
            pack([samples[i] for i in row], [scale[i] for i in row], version=0, device=DEVICE)
            for row in rows
        ]
        variant = Variant(str(model), micros, padded=True)
        took = [seconds(variant.step) for _ in range(2)]
        return {**rates(samples, took[1]), "first s": took[0], "passes": len(rows)}

    figures = or_failed(measure)
    free()
    return figures


def rates(samples: list[Sample], step_s: float, size: str = SIZE) -> Figures:
    tokens = sum(sample.num_tokens for sample in samples)
    figures: Figures = {"tok/s": tokens / step_s, "s": step_s}
    if (peak := peak_flops()) is not None:
        figures["MFU %"] = 100 * flops(samples, SIZES[size]().config) / step_s / peak
    return figures


def kernels(rank: Rank, samples: list[Sample]) -> Figures:
    """What the GPU does in one pass; the most expensive kernels are told as they are found."""
    config = TrainerConfig(tokens_per_micro_batch=BUDGETS[0])
    ((mini_batch,),) = divide(samples, config)
    one = mini_batch.micro_batches[0]
    step(rank, one, config)
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        wall_s = step(rank, one, config)
    events = sorted(seen.key_averages(), key=lambda event: -event.self_device_time_total)
    busy_us = sum(event.self_device_time_total for event in events)
    for event in events[:12]:
        share = event.self_device_time_total / busy_us
        print(f"    {share:6.1%} {event.count:6} × {event.key[:100]}", file=sys.stderr)
    of_attention = sum(
        event.self_device_time_total
        for event in events
        if any(word in event.key.lower() for word in ("flash", "fmha", "attention"))
    )
    return {
        "s": wall_s, "GPU busy %": 100 * busy_us / 1e6 / wall_s,
        "kernels": sum(event.count for event in events),
        "of them attention's time %": 100 * of_attention / busy_us,
    }  # fmt: skip


def or_failed(measure: Callable[[], Figures]) -> Figures:
    try:
        return measure()
    except RuntimeError as error:  # torch's, out of memory among them
        free()
        return {"failed": " ".join(str(error).split())[:120] or type(error).__name__}


def median_s(call: Callable[[], Any], repeats: int) -> float:
    call()  # warms up
    return statistics.median(seconds(call) for _ in range(repeats))


def seconds(call: Callable[[], Any]) -> float:
    began = now()
    call()
    return now() - began


def free() -> None:
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def in_memory() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


# ── one part after the other ─────────────────────────────────────────────────────────────────

PARTS = {
    "facts": Part(facts, 10, 40),
    "alfworld": Part(alfworld, 60, 110),
    "trainer": Part(trainer, 40, 100),
    "embedded": Part(embedded, 25, 50),
    "attention": Part(attention, 20, 45),
    "publish": Part(publish, 25, 60),
    "vllm": Part(vllm, 90, 150),
    "recomputed": Part(recomputed, 25, 50),
    "compiled": Part(compiled, 60, 150),
    "small": Part(small, 90, 240),
    "long": Part(long, 30, 90),
    "adapters": Part(adapters, 60, 120),
    "colocated": Part(colocated, 90, 180),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--limit", type=float, default=300, help="seconds in all")
    parser.add_argument("--steps", type=int, default=20, help="of ALFWorld, at most")
    parser.add_argument("--policy", type=Path)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    names = options.parts.split(",")
    if unknown := set(names) - PARTS.keys():
        parser.error(f"--parts: {', '.join(sorted(unknown))}: give some of {', '.join(PARTS)}")
    if options.rows:
        run_here(names[0], PARTS[names[0]], options)
        return
    ends = time.monotonic() + options.limit
    found: dict[str, list[Row]] = {}
    for name in (name for name in PARTS if name in names):
        left_s = max(0.0, ends - time.monotonic())
        if left_s < PARTS[name].least_s:
            found[name] = [("", {"left out": f"{left_s:.0f} s were left"})]
        else:
            found[name] = run_apart(name, min(PARTS[name].most_s, left_s), options)
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "gpu.json").write_text(json.dumps(found, indent=2) + "\n")
    print()
    for name, rows in found.items():
        for what, figures in rows:
            print(told(name, what, figures))
    print(f"written to {os.path.relpath(RESULTS / 'gpu.json')}")


def run_apart(name: str, limit_s: float, options: argparse.Namespace) -> list[Row]:
    """The rows of one part, from a process of its own; as many as there are after `limit_s`."""
    print(f"── {name}, {limit_s:.0f} s at most", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        file.touch()
        command = [
            sys.executable, __file__, f"--parts={name}", f"--limit={limit_s}",
            f"--steps={options.steps}", f"--rows={file}",
        ]  # fmt: skip
        if options.policy:
            command.append(f"--policy={options.policy}")
        began = time.monotonic()
        process = subprocess.Popen(command, start_new_session=True)
        try:
            process.wait(limit_s)
            ended = {"took s": time.monotonic() - began}
            if process.returncode:
                ended["ended with"] = process.returncode
        except subprocess.TimeoutExpired:
            ended = {"stopped after s": limit_s}
            process.send_signal(signal.SIGINT)  # so that it clears up
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        rows: list[Row] = [(row["what"], row["figures"]) for row in lines(file)]
    return [*rows, ("", ended)]


def run_here(name: str, part: Part, options: argparse.Namespace) -> None:
    with options.rows.open("a") as file:

        def write(what: str, figures: Figures) -> None:
            file.write(json.dumps({"what": what, "figures": figures}) + "\n")
            file.flush()
            print(told(name, what, figures), file=sys.stderr, flush=True)

        try:
            for what, figures in part.run(options):
                write(what, figures)
        except Exception as error:  # the table says why, and the next part has its turn
            write("", {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"})
            raise


def told(part: str, what: str, figures: Figures) -> str:
    cells = ", ".join(f"{name} {_short(value)}" for name, value in figures.items())
    return f"{part:10} {what:40} {cells}"


def _short(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


if __name__ == "__main__":
    main()
