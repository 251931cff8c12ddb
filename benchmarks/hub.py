"""What does the InferenceHub cost? Requests through it against a plain aiohttp loop to one server.

    direct      a plain aiohttp client, with the JSON library and the garbage collection of the hub:
                the floor
    hub         the same through the InferenceHub
    episodes    the same by EnvironmentAgents in a RolloutLoop, on environments that answer at once

    fake        a server that answers at once with the same tokens: only the client counts
    embedded    the embedded worker with a small policy
    vllm        a vLLM server with the same policy (left out where vLLM is not installed)

As many clients as requests at a time play episodes, of which each turn's prompt holds the turns
before it; answers come whole, or in chunks as they are sampled. The ways take turns, and each
figure is the median of its blocks, so that ratios hold on a machine that has other work. CPU time
and the lag of the event loop are of this process, which has no model in it; `x` is CPU time over
the plain client's. Lag is how late an event that comes at any moment is seen, for the process's own
work: a loop that is busy for a second is late for all of that second.

    python benchmarks/hub.py [--servers fake,embedded,vllm] [--at-a-time 1,64,512,4096]
        [--answers whole,streamed] [--ways direct,hub,episodes] [--seconds 3] [--repeats 3]
        [--prompt 64] [--answer 64] [--turns 5] [--max-running 64]
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import logging
import multiprocessing
import random
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import aiohttp
import msgspec
import uvloop

from flash.agents import EnvironmentAgent
from flash.cli.event_loop import run_loop
from flash.fakes import FakeEnvs
from flash.hub.answers import decode_answer
from flash.hub.embedded_pool import EmbeddedPool
from flash.hub.http_worker import HttpWorker
from flash.hub.hub import InferenceHub
from flash.hub.pool import ProcessPool
from flash.hub.server_client import STREAMED_FROM_TOKENS
from flash.hub.vllm_pool import VllmPool
from flash.rollout.config import RolloutSettings
from flash.rollout.loop import RolloutLoop
from flash.system.machine import has_vllm
from flash.types import GenerateRequest, Observation, SamplingParams, Task, Weights
from flash.warm_start.small_policy import create

RESULTS = Path(__file__).parent / "results" / "hub.json"
WORDS = 1000
BETWEEN = [5, 6]  # what is read between two turns
GROUP, BATCHES = 8, 2  # episodes of a task; batches that are under way
TICK_S = 0.005

Play = Callable[[], Coroutine[Any, Any, None]]
Row = dict[str, float]


# ── the ways ─────────────────────────────────────────────────────────────────────────────────


class Count:
    """What was answered so far; `warm` is set once that are so many answers."""

    def __init__(self, warm_after: int) -> None:
        self.tokens: list[int] = []
        self.latencies: list[float] = []
        self.warm = asyncio.Event()
        self._warm_after = warm_after

    def add(self, tokens: int, seconds: float) -> None:
        self.tokens.append(tokens)
        self.latencies.append(seconds)
        if len(self.tokens) == self._warm_after:
            self.warm.set()


async def clients(
    ask: Callable[[str, list[int]], Awaitable[list[int]]], count: Count, options: argparse.Namespace
) -> None:
    """Each of them plays episodes until it is cancelled."""

    async def client(number: int) -> None:
        for episode in itertools.count():
            session, token_ids = f"{number}-{episode}", prompt(number, options.prompt)
            for _ in range(options.turns):
                asked = time.perf_counter()
                answer = await ask(session, token_ids)
                count.add(len(answer), time.perf_counter() - asked)
                token_ids = token_ids + answer + BETWEEN

    async with asyncio.TaskGroup() as tasks:
        for number in range(options.clients):
            tasks.create_task(client(number))
            if number % 32 == 31:  # it is not the hub's fault if all come in one moment
                await asyncio.sleep(0)


@asynccontextmanager
async def direct(
    worker: HttpWorker, count: Count, options: argparse.Namespace
) -> AsyncIterator[Play]:
    """A plain client of the protocol."""
    url, numbers = worker.name + "/inference/v1/generate", itertools.count()
    sampling = {"temperature": 1.0, "stop_token_ids": [], "ignore_eos": True, "logprobs": 0}
    sampling |= {"max_tokens": options.max_tokens}
    streams: dict[str, bool] = {"stream": True} if options.streamed else {}
    async with aiohttp.ClientSession(
        headers=worker.headers,
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None),
        json_serialize_bytes=msgspec.json.encode,
        read_bufsize=1 << 20,
    ) as session:

        async def ask(_: str, token_ids: list[int]) -> list[int]:
            body: dict[str, Any] = {
                "request_id": f"direct-{next(numbers)}",
                "token_ids": token_ids,
                "sampling_params": sampling,
                **streams,
            }
            async with session.post(url, json=body) as response:
                if response.content_type != "text/event-stream":
                    return decode_answer(await response.read()).choices[0].token_ids
                tokens: list[int] = []
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        tokens += decode_answer(line[len(b"data: ") :]).choices[0].token_ids
                return tokens

        yield lambda: clients(ask, count, options)


@asynccontextmanager
async def through_hub(
    worker: HttpWorker, count: Count, options: argparse.Namespace
) -> AsyncIterator[Play]:
    """The same through the hub."""
    sampling = SamplingParams(max_tokens=options.max_tokens)
    async with InferenceHub([client_of(worker)], max_running=options.room) as hub:

        async def ask(session: str, token_ids: list[int]) -> list[int]:
            request = GenerateRequest(token_ids=token_ids, sampling=sampling, session=session)
            return (await hub.generate(request)).token_ids

        yield lambda: clients(ask, count, options)


@asynccontextmanager
async def through_episodes(
    worker: HttpWorker, count: Count, options: argparse.Namespace
) -> AsyncIterator[Play]:
    """The same by agents, with a trainer that trains nothing and publishes at once."""
    envs = FakeEnvs(turns=(options.turns, options.turns), step_s=(0.0, 0.0))
    async with (
        InferenceHub([client_of(worker)], max_running=options.room) as hub,
        RolloutLoop(
            Counting(hub, count),
            agent=lambda: EnvironmentAgent(
                envs=envs, style=Style(options.prompt), max_tokens=options.max_tokens
            ),
            tasks=map(Task, itertools.count()),
            batch_size=max(1, options.clients // BATCHES),
            group_size=min(GROUP, max(1, options.clients // BATCHES)),
            alpha=BATCHES - 1,
            settings=RolloutSettings(on_stale="drop"),
        ) as rollouts,
    ):

        async def play() -> None:
            while True:
                batch = await rollouts.next_batch()
                await rollouts.publish(Weights(version=batch.version + 1, path=Path("/none")))

        yield play


WAYS = {"direct": direct, "hub": through_hub, "episodes": through_episodes}


class Counting:
    """A hub, whose answers are counted."""

    def __init__(self, hub: InferenceHub, count: Count) -> None:
        self._hub = hub
        self._count = count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._hub, name)

    async def generate(self, *args: Any, **options: Any) -> Any:
        asked = time.perf_counter()
        completion = await self._hub.generate(*args, **options)
        self._count.add(len(completion.token_ids), time.perf_counter() - asked)
        return completion


class Style:
    """Prompts as the other ways have them."""

    stop_token_ids: tuple[int, ...] = ()

    def __init__(self, length: int) -> None:
        self._length = length

    def first(self, observation: Observation) -> list[int]:
        return prompt(int(observation.text.split()[-1]), self._length)

    def next(self, observation: Observation, sampled: Sequence[int]) -> list[int]:
        return BETWEEN

    def action(self, sampled: Sequence[int]) -> str:
        return ""


class Unchanging(HttpWorker):
    """Its weights stay, whatever is published."""

    async def load_weights(self, weights: Weights) -> None:
        pass

    async def recompute(self) -> None:
        pass


def client_of(worker: HttpWorker) -> HttpWorker:
    """Another client of the same server, for the hub to close."""
    return Unchanging(
        worker.name, api_key=worker.headers.get("Authorization", "")[len("Bearer ") :]
    )


def prompt(client: int, length: int) -> list[int]:
    return [4 + (7 * client + 13 * position) % (WORDS - 4) for position in range(length)]


# ── measuring ────────────────────────────────────────────────────────────────────────────────


async def block(way: str, worker: HttpWorker, options: argparse.Namespace) -> Row:
    """One way for so many seconds, once each client has been answered."""
    count = Count(2 * options.clients)
    async with WAYS[way](worker, count, options) as play:
        playing = asyncio.create_task(play(), name=way)
        await count.warm.wait()
        count.tokens.clear()
        count.latencies.clear()
        clock = time.perf_counter
        began, cpu_began = clock(), time.process_time()
        async with lag() as lags:
            await asyncio.wait([playing], timeout=options.seconds)
        elapsed, cpu = clock() - began, time.process_time() - cpu_began
        requests, tokens = len(count.tokens), sum(count.tokens)
        latencies = count.latencies
        playing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await playing
    return {
        "requests_per_s": requests / elapsed,
        "tokens_per_s": tokens / elapsed,
        "p50_ms": 1000 * percentile(latencies, 50),
        "p99_ms": 1000 * percentile(latencies, 99),
        "cpu_ms": 1000 * cpu / requests,
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


async def compare(worker: HttpWorker, options: argparse.Namespace) -> Row:
    """Blocks of the ways in turn; medians, and the median of the neighbours' ratios."""
    ways = options.ways.split(",")
    blocks: dict[str, list[Row]] = {way: [] for way in ways}
    for _ in range(options.repeats):
        for way in ways:
            blocks[way].append(await block(way, worker, options))
    row: Row = {"at_a_time": options.clients, "streamed": options.streamed}
    for way, measured in blocks.items():
        for name in measured[0]:
            row[f"{way}_{name}"] = statistics.median(one[name] for one in measured)
        if floor := blocks.get("direct"):
            row[f"{way}_x"] = statistics.median(
                one["cpu_ms"] / plain["cpu_ms"] for one, plain in zip(measured, floor, strict=True)
            )
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
    Instant.tokens = answer_tokens
    Instant.prepare("0")

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
    """Reads whole HTTP/1.1 requests and answers each at once, whole or in chunks, as vLLM does."""

    tokens: int
    whole: bytes
    chunks: list[bytes]

    @classmethod
    def prepare(cls, version: str) -> None:
        """What is answered with that version."""
        rng = random.Random(0)
        sampled = [(rng.randrange(4, WORDS), -8 * rng.random()) for _ in range(cls.tokens)]
        span = [{"version": version, "start": 0, "end": cls.tokens}]

        def encoded(start: int, end: int) -> bytes:
            entries = [{"token_id": t, "logprob": p, "rank": 3} for t, p in sampled[start:end]]
            choice = {
                "index": 0,
                "finish_reason": "length" if end == cls.tokens else None,
                "stop_reason": None,
                "token_ids": [t for t, _ in sampled[start:end]],
                "routed_experts": None,
                "sampling_mask": None,
                "weight_versions": span if end == cls.tokens else None,
                "logprobs": {"content": [{**e, "top_logprobs": [e]} for e in entries]},
            }
            answer = {"request_id": "fake", "choices": [choice]}
            return json.dumps(answer, separators=(",", ":")).encode()

        body = encoded(0, cls.tokens)
        head = "HTTP/1.1 200 OK\r\nContent-Type: {}\r\n{}\r\n\r\n"
        cls.whole = head.format("application/json", f"Content-Length: {len(body)}").encode() + body
        # vLLM tells of the first token at once, and then at its intervals.
        ends = sorted({1, *range(32, cls.tokens, 32), cls.tokens})
        events = [encoded(*pair) for pair in itertools.pairwise([0, *ends])]
        chunks = [b"data: " + event + b"\n\n" for event in [*events, b"[DONE]"]]
        cls.chunks = [b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks]
        opening = head.format("text/event-stream; charset=utf-8", "Transfer-Encoding: chunked")
        cls.chunks[0] = opening.encode() + cls.chunks[0]
        cls.chunks[-1] += b"0\r\n\r\n"

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
            asked, self._received = self._received[:end], self._received[end:]
            if asked.startswith(b"POST /update_weight_version"):
                self.prepare(json.loads(asked[head:])["new_version"])
            if b'"stream":true' in asked[head:]:
                self._stream(0)
            else:
                self._transport.write(self.whole)

    def _stream(self, number: int) -> None:
        """A chunk a turn of the loop, so that each is a packet of its own."""
        if self._transport.is_closing():
            return
        self._transport.write(self.chunks[number])
        if number + 1 < len(self.chunks):
            asyncio.get_running_loop().call_soon(self._stream, number + 1)


# ── the table ────────────────────────────────────────────────────────────────────────────────

COLUMNS = (
    ("at_a_time", "at a time", ".0f"),
    ("direct_cpu_ms", "CPU ms: direct", ".3f"),
    ("hub_cpu_ms", "  hub", ".3f"),
    ("hub_x", "  x  ", ".2f"),
    ("episodes_cpu_ms", "episodes", ".3f"),
    ("episodes_x", "  x  ", ".2f"),
    ("direct_requests_per_s", "requests/s: direct", ".0f"),
    ("hub_requests_per_s", "  hub", ".0f"),
    ("episodes_requests_per_s", "episodes", ".0f"),
    ("direct_lag_p99_ms", "lag p99 ms: direct", ".1f"),
    ("hub_lag_p99_ms", "  hub", ".1f"),
    ("episodes_lag_p99_ms", "episodes", ".1f"),
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
            print(f"{server:8}  answers   " + line((title, title, "") for _, title, _ in COLUMNS))
            async with serving(server, model, options) as worker:
                for answers, clients in itertools.product(
                    options.answers.split(","), map(int, options.at_a_time.split(","))
                ):
                    streamed = answers == "streamed"
                    least, most = (
                        (STREAMED_FROM_TOKENS, 1 << 20)
                        if streamed
                        else (1, STREAMED_FROM_TOKENS - 1)
                    )
                    block_options = argparse.Namespace(
                        **vars(options),
                        clients=clients,
                        streamed=streamed,
                        max_tokens=min(max(options.answer, least), most),
                        room=clients if server == "fake" else options.max_running,
                    )
                    row = await compare(worker, block_options)
                    rows.append({"server": server, **row})
                    cells = line(
                        (row.get(name, float("nan")), t, form) for name, t, form in COLUMNS
                    )
                    print(f"{'':10}{answers:10}{cells}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--servers", default="fake,embedded,vllm")
    parser.add_argument("--at-a-time", default="1,64,512,4096")
    parser.add_argument("--answers", default="whole,streamed")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--seconds", type=float, default=3.0, help="of a block")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the first turn's")
    parser.add_argument(
        "--answer", type=int, default=64, help="tokens; real servers stream 128 and more"
    )
    parser.add_argument("--turns", type=int, default=5, help="of an episode")
    parser.add_argument(
        "--max-running", type=int, default=64,
        help="requests at one worker at a time; the fake takes all",
    )  # fmt: skip
    options = parser.parse_args()
    logging.getLogger("flash").setLevel(logging.ERROR)  # blocks end in the middle of a publish
    rows = run_loop(measure(options))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps({"settings": vars(options), "rows": rows}, indent=2) + "\n")
    print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
