"""The embedded worker under multi-turn episodes: how many requests at a time, and what costs what?

Each episode asks for a few tokens several times, with a prompt that grows; a new one starts when
one ends. Three ways: `masked` is the engine with transformers' own attention, `engine` the engine
as it is, `hub` the same behind its HTTP routes in a process of its own, asked through the hub.
CPU time is of this process; the hub's has no model in it.

    python benchmarks/worker.py [--at-a-time 8,16,32,64] [--episodes 64] [--turns 12] [--prompt 40]
"""

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import torch

from flash.hub.embedded_pool import EmbeddedPool
from flash.hub.hub import InferenceHub
from flash.types import GenerateRequest, SamplingParams
from flash.warm_start.small_policy import create
from flash.worker import attention
from flash.worker.engine import EmbeddedEngine, EngineRequest

RESULTS = Path(__file__).parent / "results" / "worker.json"
WAYS = ("masked", "engine", "hub")
WORDS = 1000
NEW_TOKENS, OBSERVED_TOKENS, CACHE_TOKENS = 4, 10, 32_768

Ask = Callable[[str, list[int]], Awaitable[list[int]]]


@asynccontextmanager
async def open_way(way: str, model: Path, at_a_time: int) -> AsyncIterator[Ask]:
    """Gives a function from a name and a prompt to sampled tokens."""
    if way == "hub":
        pool = EmbeddedPool(
            str(model), size=1, max_running=at_a_time, cache_tokens=CACHE_TOKENS, threads=1,
            dtype="float32", version=0, seed=0, log_dir=model / "logs", start_timeout_s=120,
        )  # fmt: skip
        async with InferenceHub(pool, max_running=at_a_time) as hub:

            async def ask_hub(name: str, context: list[int]) -> list[int]:
                sampling = SamplingParams(max_tokens=NEW_TOKENS)
                request = GenerateRequest(token_ids=context, sampling=sampling, session=name)
                return (await hub.generate(request)).token_ids

            yield ask_hub
        return
    use = attention.use
    if way == "masked":
        attention.use = lambda model, manager, *, longest, graphs: None
    engine = EmbeddedEngine(
        str(model), device="cpu", dtype="float32", cache_tokens=CACHE_TOKENS, max_running=at_a_time
    )
    attention.use = use
    numbers = iter(range(10**9))

    async def ask(name: str, context: list[int]) -> list[int]:
        request_id = f"{name} {next(numbers)}"
        request = EngineRequest(request_id=request_id, token_ids=context, max_tokens=NEW_TOKENS)
        return (await engine.generate(request)).token_ids

    try:
        yield ask
    finally:
        engine.close()


async def measure(
    way: str, model: Path, *, at_a_time: int, episodes: int, turns: int, prompt: int
) -> dict[str, float | str]:
    """Requests per second, and per second of this process's CPU time."""
    rng = random.Random(0)
    places = asyncio.Semaphore(at_a_time)

    def words(count: int) -> list[int]:
        return [rng.randrange(4, WORDS) for _ in range(count)]

    async with open_way(way, model, at_a_time) as ask:

        async def episode(number: int) -> None:
            async with places:
                context = words(prompt)
                for _ in range(turns):
                    sampled = await ask(str(number), context)
                    context = [*context, *sampled, *words(OBSERVED_TOKENS)]

        await asyncio.gather(*(episode(-1 - n) for n in range(8)))  # warm-up
        began, cpu_began = time.perf_counter(), time.process_time()
        await asyncio.gather(*(episode(n) for n in range(episodes)))
        elapsed, cpu = time.perf_counter() - began, time.process_time() - cpu_began
    return {
        "way": way,
        "at_a_time": at_a_time,
        "requests_per_s": episodes * turns / elapsed,
        "requests_per_cpu_s": episodes * turns / cpu,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--at-a-time", default="8,16,32,64")
    parser.add_argument("--episodes", type=int, default=64)
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--prompt", type=int, default=40, help="tokens of the first prompt")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print(f"{'':8} {'at a time':>9} {'requests/s':>10} {'requests/CPU s':>14}")
    with tempfile.TemporaryDirectory() as folder:
        model = create(Path(folder), [f"w{n}" for n in range(WORDS)])
        for at_a_time in map(int, options.at_a_time.split(",")):
            for way in WAYS:
                row = asyncio.run(
                    measure(
                        way, model, at_a_time=at_a_time, episodes=options.episodes,
                        turns=options.turns, prompt=options.prompt,
                    )
                )  # fmt: skip
                rows.append(row)
                print(
                    f"{way:8} {at_a_time:9} {row['requests_per_s']:10.0f} "
                    f"{row['requests_per_cpu_s']:14.0f}"
                )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"settings": vars(options), "rows": rows}, indent=2) + "\n")
    print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
