"""What the door bears of others: honest requests while somebody floods it.

    nothing            honest requests alone
    idle               connections without a token that say nothing, 10,000 in all
    half a header      the same, each with the beginning of a request
    reconnecting       connections opened and closed as fast as one process can
    wrong tokens       requests with a token that is none, as fast as one process can
    slow bodies        1,000 requests with a good token whose bodies never end
    long conversations requests of 100,000 messages, with a good token, one after the other

The door stands over a worker that answers at once, in the commands' event loop. Who asks and who
floods are processes of their own. Latency is of honest requests, each on a connection of its own;
memory is the door's process. Then an episode with 1,000 conversations, each of two requests.

    python benchmarks/floods.py [--requests 300]
"""

import argparse
import asyncio
import contextlib
import json
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flash.cli.event_loop import run_loop
from flash.door import Door, DoorSession
from flash.fakes import FakeWorker
from flash.hub.hub import InferenceHub
from flash.rollout.episode import Episode
from flash.types import Task

RESULTS = Path(__file__).parent / "results" / "floods.json"
FLOODS = (
    "nothing", "idle", "half a header", "reconnecting", "wrong tokens", "slow bodies",
    "long conversations",
)  # fmt: skip
HEAD = "POST {path}/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant: "
CONVERSATIONS = 1000

Row = dict[str, Any]


def byte_tokenizer() -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer_class: Any = PreTrainedTokenizerFast
    tokenizer = tokenizer_class(tokenizer_object=core, eos_token="<|end|>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


async def measure(requests: int) -> list[Row]:
    """A row for each flood, and one for the many conversations of an episode."""
    tokenizer = byte_tokenizer()
    words = tokenizer.encode("well<|end|>")
    worker = FakeWorker("worker", token_s=(0, 0), script=lambda prompt, sampling: words)
    rows = []
    async with (
        InferenceHub([worker], max_running=1000) as hub,
        Door(
            hub, tokenizer=tokenizer, model="policy", max_concurrent=1000, requests_per_s=1e6
        ) as door,
    ):
        for flood in FLOODS:
            honest, hostile = new_session(door, hub), new_session(door, hub)
            attack = await start(__file__, "--flood", flood, hostile.base_url)
            assert attack.stdout is not None
            if flood != "nothing":
                await attack.stdout.readline()  # it has begun
            asking = await start(__file__, "--ask", honest.base_url, "--requests", str(requests))
            out, _ = await asking.communicate()
            rss = psutil.Process().memory_info().rss
            with contextlib.suppress(ProcessLookupError):
                attack.kill()
            await attack.wait()
            rows.append({"flood": flood, **json.loads(out), "memory_mb": rss / 1e6})
            show(rows[-1])
            for session in (honest, hostile):
                session.close()
        session = new_session(door, hub)
        asking = await start(__file__, "--converse", session.base_url)
        out, _ = await asking.communicate()
        rows.append({"flood": f"{CONVERSATIONS} conversations", **json.loads(out)})
        rows[-1]["memory_mb"] = psutil.Process().memory_info().rss / 1e6
        show(rows[-1])
        assert len(session.sequences()) == CONVERSATIONS
    return rows


def new_session(door: Door, hub: InferenceHub) -> DoorSession:
    episode = Episode(1, Task(1), hub=hub)
    return door.open(episode.generate, max_tokens=16, temperature=1.0, max_sequence_tokens=8192)


async def start(*arguments: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable, *arguments, stdout=asyncio.subprocess.PIPE
    )


def show(row: Row) -> None:
    print(
        f"{row['flood']:20} {row['p50_ms']:8.1f} {row['p99_ms']:8.1f} {row['most_ms']:8.1f} "
        f"{row['failed']:7} {row['memory_mb']:8.0f}",
        flush=True,
    )


# ── who asks ─────────────────────────────────────────────────────────────────────────────────


async def ask(url: str, requests: int) -> Row:
    """Honest requests, one after the other, each on a connection of its own."""
    took, failed = [], 0
    for _ in range(requests):
        began = time.monotonic()
        failed += not await one_request(url, [{"role": "user", "content": "hi"}])
        took.append(time.monotonic() - began)
    return latencies(took, failed)


async def one_request(url: str, messages: list[dict[str, str]]) -> bool:
    body = {"model": "policy", "messages": messages}
    try:
        async with aiohttp.request("POST", f"{url}/chat/completions", json=body) as response:
            await response.read()
            return response.status == 200
    except (aiohttp.ClientError, TimeoutError):
        return False


async def converse(url: str) -> Row:
    """Conversations of one episode side by side, each of two requests."""
    took, failed = [], 0

    async def conversation(number: int) -> None:
        nonlocal failed
        said = [{"role": "user", "content": f"{number}"}]
        for _ in range(2):
            began = time.monotonic()
            failed += not await one_request(url, said)
            took.append(time.monotonic() - began)
            said += [{"role": "assistant", "content": "well"}, {"role": "user", "content": "and"}]

    for first in range(0, CONVERSATIONS, 20):
        await asyncio.gather(*(conversation(first + n) for n in range(20)))
    return latencies(took, failed)


def latencies(took_s: list[float], failed: int) -> Row:
    cuts = statistics.quantiles(took_s, n=100)
    return {
        "p50_ms": 1e3 * cuts[49], "p99_ms": 1e3 * cuts[98], "most_ms": 1e3 * max(took_s),
        "failed": failed,
    }  # fmt: skip


# ── who floods ───────────────────────────────────────────────────────────────────────────────


class Flood:
    """Says when it is at its height, and goes on until it is killed."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._host, _, self._path = url.removeprefix("http://").partition("/")
        self._begun = False

    async def run(self, kind: str) -> None:
        head = HEAD.format(path=f"/{self._path}", host=self._host).encode()
        body = head + b"Content-Length: 1000000\r\n\r\n{"
        await {
            "nothing": lambda: asyncio.sleep(0),
            "idle": lambda: self._hold(10_000, b""),
            "half a header": lambda: self._hold(10_000, b"GET / HTTP"),
            "reconnecting": self._reconnect,
            "wrong tokens": self._guess,
            "slow bodies": lambda: self._hold(1000, body, more=b" "),
            "long conversations": self._talk,
        }[kind]()

    async def _hold(self, connections: int, sent: bytes, more: bytes = b"") -> None:
        """What is closed is opened again."""
        held = [await self._connect(sent) for _ in range(connections)]
        self._at_height()
        while True:
            for number, writer in enumerate(held):
                if writer is None or writer.is_closing():
                    held[number] = await self._connect(sent)
                else:
                    writer.write(more)
                if number % 100 == 0:
                    await asyncio.sleep(0.01)

    async def _reconnect(self) -> None:
        while True:
            for writer in await asyncio.gather(*(self._connect(b"") for _ in range(100))):
                if writer is not None:
                    writer.close()
            self._at_height()

    async def _guess(self) -> None:
        said = [{"role": "user", "content": "hi"}]
        wrong = f"http://{self._host}/episodes/none/v1"
        while True:
            await asyncio.gather(*(one_request(wrong, said) for _ in range(50)))
            self._at_height()

    async def _talk(self) -> None:
        while True:
            self._at_height()
            await one_request(self._url, [{"role": "user", "content": "x"}] * 100_000)

    async def _connect(self, sent: bytes) -> asyncio.StreamWriter | None:
        address, port = self._host.split(":")
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection(address, int(port))
            writer.write(sent)
            return writer
        return None

    def _at_height(self) -> None:
        if not self._begun:
            print("begun", flush=True)
        self._begun = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--ask", metavar="URL", help="for this script itself, as the next two")
    parser.add_argument("--converse", metavar="URL")
    parser.add_argument("--flood", nargs=2, metavar=("KIND", "URL"))
    given = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if given.ask:
        print(json.dumps(asyncio.run(ask(given.ask, given.requests))))
    elif given.converse:
        print(json.dumps(asyncio.run(converse(given.converse))))
    elif given.flood:
        kind, url = given.flood
        asyncio.run(Flood(url).run(kind))
    else:
        print(f"{'flood':20} {'p50 ms':>8} {'p99 ms':>8} {'most ms':>8} {'failed':>7} {'MB':>8}")
        rows = run_loop(measure(given.requests))
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
