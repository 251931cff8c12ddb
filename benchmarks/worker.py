"""The embedded engine under multi-turn episodes: how many requests at a time are fastest?

Each episode asks for a few tokens twelve times, with a prompt that grows; a new one starts when one
ends. On a CPU, attention of a step is computed between all tokens of all its requests, and masked;
so its cost grows with the square of how many there are.

    python benchmarks/worker.py [--at-a-time 8,12,16,32,64] [--episodes 96]
"""

import argparse
import asyncio
import json
import random
import tempfile
from pathlib import Path

import torch

from flash.small_policy import create
from flash.worker.engine import EmbeddedEngine, EngineRequest

RESULTS = Path(__file__).parent / "results" / "worker.json"
WORDS = 1000
TURNS, FIRST_PROMPT, NEW_TOKENS, OBSERVED_TOKENS = 12, 40, 4, 10


async def measure(model: Path, at_a_time: int, episodes: int) -> dict[str, float]:
    """Episodes and requests per second with so many at a time."""
    engine = EmbeddedEngine(
        str(model), device="cpu", dtype="float32", cache_tokens=32_768, max_running=at_a_time
    )
    rng = random.Random(0)
    places = asyncio.Semaphore(at_a_time)

    def words(count: int) -> list[int]:
        return [rng.randrange(4, WORDS) for _ in range(count)]

    async def episode(number: int) -> None:
        async with places:
            context = words(FIRST_PROMPT)
            for turn in range(TURNS):
                request = EngineRequest(
                    request_id=f"{number}-{turn}", token_ids=context, max_tokens=NEW_TOKENS
                )
                sampled = (await engine.generate(request)).token_ids
                context = [*context, *sampled, *words(OBSERVED_TOKENS)]

    await asyncio.gather(*(episode(-1 - n) for n in range(8)))  # warm-up
    clock = asyncio.get_running_loop().time
    began = clock()
    await asyncio.gather(*(episode(n) for n in range(episodes)))
    elapsed = clock() - began
    engine.close()
    return {
        "at_a_time": at_a_time,
        "requests_per_s": episodes * TURNS / elapsed,
        "episodes_per_s": episodes / elapsed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--at-a-time", default="8,12,16,32,64")
    parser.add_argument("--episodes", type=int, default=96)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print(f"{'at a time':>9} {'requests/s':>10} {'episodes/s':>10} {'to the last':>11}")
    with tempfile.TemporaryDirectory() as folder:
        model = create(Path(folder), [f"w{n}" for n in range(WORDS)])
        for at_a_time in map(int, options.at_a_time.split(",")):
            rows.append(asyncio.run(measure(model, at_a_time, options.episodes)))
    for row in rows:
        ratio = row["episodes_per_s"] / rows[-1]["episodes_per_s"]
        print(
            f"{row['at_a_time']:9.0f} {row['requests_per_s']:10.0f} "
            f"{row['episodes_per_s']:10.1f} {ratio:10.2f}x"
        )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"settings": vars(options), "rows": rows}, indent=2) + "\n")
    print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
