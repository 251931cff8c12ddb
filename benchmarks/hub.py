"""What does the InferenceHub cost? Requests through it against a plain aiohttp loop to one server.

    fake        answers at once with the same tokens: only the client counts
    embedded    the embedded worker with a small policy
    vllm        a vLLM server with the same policy (left out where vLLM is not installed)

As many clients as requests at a time ask again and again; the two ways take turns, and each figure
is the median of its blocks, so that ratios hold on a machine that has other work. CPU time and the
lag of the event loop are of this process, which has no model in it. Lag is how late an event that
comes at any moment is seen, for the process's own work: a loop that is busy for a second is late
for all of that second.

    python benchmarks/hub.py [--servers fake,embedded,vllm] [--at-a-time 1,64,512,4096]
        [--seconds 3] [--repeats 3] [--prompt 64] [--answer 32] [--max-running 64]
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import cast

import aiohttp
import uvloop

from flash.cli.event_loop import run_loop
from flash.hub.embedded_pool import EmbeddedPool
from flash.hub.http_worker import HttpWorker
from flash.hub.hub import InferenceHub
from flash.hub.pool import ProcessPool
from flash.hub.vllm_pool import VllmPool
from flash.system.machine import has_vllm
from flash.types import GenerateRequest, SamplingParams
from flash.warm_start.small_policy import create

RESULTS = Path(__file__).parent / "results" / "hub.json"
WORDS = 1000
TICK_S = 0.005

Ask = Callable[[int], Awaitable[int]]
Row = dict[str, float]


# ── the two ways ─────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def direct(worker: HttpWorker, options: argparse.Namespace) -> AsyncIterator[Ask]:
    """Gives a function that sends the request of a client and returns how many tokens it got."""
    async with aiohttp.ClientSession(
        headers=worker.headers,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None),
    ) as session:
        sampling = {"temperature": 1.0, "stop_token_ids": [], "ignore_eos": True, "logprobs": 0}
        numbers = iter(range(10**9))

        async def ask(client: int) -> int:
            body = {
                "request_id": f"direct-{next(numbers)}",
                "token_ids": prompt(client, options.prompt),
                "sampling_params": {"max_tokens": options.answer, **sampling},
            }
            async with session.post(worker.name + "/inference/v1/generate", json=body) as response:
                answer = await response.json()
            return len(answer["choices"][0]["token_ids"])

        yield ask


@asynccontextmanager
async def through_hub(
    worker: HttpWorker, max_running: int, options: argparse.Namespace
) -> AsyncIterator[Ask]:
    """The same through the hub."""
    sampling = SamplingParams(max_tokens=options.answer)
    client = HttpWorker(worker.name)
    client.headers = worker.headers
    async with InferenceHub([client], max_running=max_running) as hub:

        async def ask(client: int) -> int:
            request = GenerateRequest(
                token_ids=prompt(client, options.prompt), sampling=sampling, session=str(client)
            )
            return len((await hub.generate(request)).token_ids)

        yield ask


def prompt(client: int, length: int) -> list[int]:
    return [4 + (7 * client + 13 * position) % (WORDS - 4) for position in range(length)]


# ── measuring ────────────────────────────────────────────────────────────────────────────────


async def block(ask: Ask, at_a_time: int, seconds: float) -> Row:
    """Each client asks until the time is up, and at least once."""
    clock = time.perf_counter
    tokens: list[int] = []
    latencies: list[float] = []

    async def client(number: int) -> None:
        asked = began
        while asked < ends:
            tokens.append(await ask(number))
            answered = clock()
            latencies.append(answered - asked)
            asked = answered

    began, cpu_began = clock(), time.process_time()
    ends = began + seconds
    async with lag() as lags, asyncio.TaskGroup() as clients:
        for number in range(at_a_time):
            clients.create_task(client(number))
            if number % 32 == 31:  # it is not the hub's fault if all come in one moment
                await asyncio.sleep(0)
    elapsed, cpu = clock() - began, time.process_time() - cpu_began
    return {
        "requests_per_s": len(latencies) / elapsed,
        "tokens_per_s": sum(tokens) / elapsed,
        "p50_ms": 1000 * percentile(latencies, 50),
        "p99_ms": 1000 * percentile(latencies, 99),
        "cpu_s_per_1000": 1000 * cpu / len(latencies),
        "lag_p99_ms": 1000 * percentile(lags, 99),
    }


@asynccontextmanager
async def lag() -> AsyncIterator[list[float]]:
    """How late the loop was at each tick of the clock, those included that it slept through.

    Only CPU time of this thread counts as being late: what other processes take is not its fault.
    """
    lags: list[float] = []

    async def tick() -> None:
        due, cpu = time.perf_counter() + TICK_S, time.thread_time()
        while True:
            await asyncio.sleep(due - time.perf_counter())
            late, cpu_before, cpu = time.perf_counter() - due, cpu, time.thread_time()
            own = min(1.0, (cpu - cpu_before) / max(late, 1e-9))
            while late >= 0:
                lags.append(own * late)
                late -= TICK_S
                due += TICK_S

    ticking = asyncio.create_task(tick(), name="lag")
    try:
        yield lags
    finally:
        ticking.cancel()
        await asyncio.wait([ticking])


def percentile(values: list[float], percent: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


async def compare(
    worker: HttpWorker, at_a_time: int, max_running: int, options: argparse.Namespace
) -> Row:
    """Blocks of the two ways in turn; medians, and the median of the neighbours' ratios."""
    blocks: dict[str, list[Row]] = {"direct": [], "hub": []}
    for _ in range(options.repeats):
        for way, client in (
            ("direct", direct(worker, options)),
            ("hub", through_hub(worker, max_running, options)),
        ):
            async with client as ask:
                # Connections are made, and the server has seen the sizes.
                await asyncio.gather(
                    *(ask(number) for number in range(min(at_a_time, max_running)))
                )
                blocks[way].append(await block(ask, at_a_time, options.seconds))
    row: Row = {"at_a_time": at_a_time}
    for way, measured in blocks.items():
        for name in measured[0]:
            row[f"{way}_{name}"] = statistics.median(one[name] for one in measured)
    pairs = list(zip(blocks["direct"], blocks["hub"], strict=True))
    row["ratio"] = statistics.median(h["requests_per_s"] / d["requests_per_s"] for d, h in pairs)
    for name in ("p50_ms", "p99_ms"):
        row[f"added_{name}"] = statistics.median(h[name] - d[name] for d, h in pairs)
    return row


# ── servers ──────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def serving(
    server: str, model: Path, options: argparse.Namespace
) -> AsyncIterator[HttpWorker]:
    if server == "fake":
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=serve_fake, args=(theirs, options.answer))
        process.start()
        try:
            yield HttpWorker(ours.recv())
        finally:
            process.terminate()
            process.join()
        return
    pool: ProcessPool
    if server == "embedded":
        pool = EmbeddedPool(
            str(model), size=1, max_running=options.max_running, cache_tokens=65_536, threads=1,
            dtype="float32", version=0, seed=0, log_dir=model / "logs", start_timeout_s=300,
        )  # fmt: skip
    else:
        pool = VllmPool(
            str(model), size=1, max_running=options.max_running, cache_tokens=65_536, threads=1,
            max_tokens=2048, tensor_parallel=1, devices=[], gpu_memory=0.5, dtype="float32",
            seed=0, arguments=[], log_dir=model / "logs", start_timeout_s=300,
        )  # fmt: skip
    try:
        [worker] = await pool.start(lambda worker, why, final: print(why), lambda worker: None)
        yield cast(HttpWorker, worker)
    finally:
        await pool.stop()


def serve_fake(told: Connection, answer_tokens: int) -> None:
    rng = random.Random(0)
    token_ids = [rng.randrange(4, WORDS) for _ in range(answer_tokens)]
    content = [
        {**entry, "top_logprobs": [entry]}
        for entry in ({"token_id": t, "logprob": -8 * rng.random(), "rank": 3} for t in token_ids)
    ]
    choice = {
        "index": 0,
        "finish_reason": "length",
        "stop_reason": None,
        "token_ids": token_ids,
        "routed_experts": None,
        "sampling_mask": None,
        "weight_versions": [{"version": "0", "start": 0, "end": answer_tokens}],
        "logprobs": {"content": content},
    }
    body = json.dumps({"request_id": "fake", "choices": [choice]}, separators=(",", ":")).encode()
    head = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"
    Instant.answer = head.format(len(body)).encode() + body

    async def serve() -> None:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(Instant, "127.0.0.1", 0, backlog=8192)
        told.send(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        parent = multiprocessing.parent_process()
        assert parent is not None
        gone = asyncio.Event()
        loop.add_reader(parent.sentinel, gone.set)
        await gone.wait()
        server.close()

    with contextlib.suppress(KeyboardInterrupt):
        uvloop.run(serve())


class Instant(asyncio.Protocol):
    """Reads whole HTTP/1.1 requests, whatever they say, and answers each at once."""

    answer: bytes

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._received = b""

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (head := self._received.find(b"\r\n\r\n")) >= 0:
            _, _, length = self._received[:head].lower().partition(b"content-length:")
            end = head + 4 + int(length.split(b"\r\n", 1)[0] or 0)
            if len(self._received) < end:
                return
            self._received = self._received[end:]
            self._transport.write(self.answer)


# ── the table ────────────────────────────────────────────────────────────────────────────────

COLUMNS = (
    ("at_a_time", "at a time", ".0f"),
    ("direct_requests_per_s", "direct/s", ".0f"),
    ("hub_requests_per_s", "  hub/s", ".0f"),
    ("ratio", "ratio", ".2f"),
    ("hub_tokens_per_s", "hub tok/s", ".0f"),
    ("added_p50_ms", "p50 + ms", ".1f"),
    ("added_p99_ms", "p99 + ms", ".1f"),
    ("direct_cpu_s_per_1000", "direct CPU s/1000", ".3f"),
    ("hub_cpu_s_per_1000", "hub CPU s/1000", ".3f"),
    ("direct_lag_p99_ms", "direct lag p99 ms", ".1f"),
    ("hub_lag_p99_ms", "hub lag p99 ms", ".1f"),
)


def line(cells: Iterable[tuple[object, str, str]]) -> str:
    """Each cell as wide as its title."""
    return "  ".join(f"{cell:>{len(title)}{form}}" for cell, title, form in cells)


async def measure(options: argparse.Namespace) -> list[dict[str, float | str]]:
    rows: list[dict[str, float | str]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        servers = options.servers.split(",")
        if servers != ["fake"]:
            make = multiprocessing.get_context("spawn").Process(  # keeps torch out of this process
                target=create, args=(model, [f"w{n}" for n in range(WORDS)])
            )
            make.start()
            make.join()
        for server in servers:
            if server == "vllm" and not has_vllm():
                print("vllm: not installed, left out (`make setup-vllm`)")
                continue
            print(f"{server:8}  " + line((title, title, "") for _, title, _ in COLUMNS))
            async with serving(server, model, options) as worker:
                for at_a_time in map(int, options.at_a_time.split(",")):
                    max_running = at_a_time if server == "fake" else options.max_running
                    row = await compare(worker, at_a_time, max_running, options)
                    rows.append({"server": server, **row})
                    cells = line((row[name], title, form) for name, title, form in COLUMNS)
                    print(" " * 10 + cells, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--servers", default="fake,embedded,vllm")
    parser.add_argument("--at-a-time", default="1,64,512,4096")
    parser.add_argument("--seconds", type=float, default=3.0, help="at least, of a block")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--answer", type=int, default=32, help="tokens")
    parser.add_argument(
        "--max-running", type=int, default=64,
        help="requests at one worker at a time; the fake takes all",
    )  # fmt: skip
    options = parser.parse_args()
    rows = run_loop(measure(options))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"settings": vars(options), "rows": rows}, indent=2) + "\n")
    print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
