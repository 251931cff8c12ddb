"""`python -m sglang.launch_server`: it samples, loads and tells logprobs as ours do."""

import asyncio
import sys

from aiohttp import web

from flash.fakes import FakeSglang
from flash.hub.http_worker import HttpWorker
from flash.worker.config import WorkerConfig
from flash.worker.server import serve


async def main(words: list[str]) -> None:
    given = dict(word.removeprefix("--").partition("=")[::2] for word in words)
    print(f"Loading safetensors checkpoint shards of {given['model-path']}", flush=True)
    config = WorkerConfig(
        model=given["model-path"],
        dtype=given["dtype"],
        max_running=int(given["max-running-requests"]),
        threads=1,
        seed=int(given["random-seed"]),
        api_key="inner",
    )
    url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(serve(config, on_ready=url.set_result))
        server = FakeSglang(
            HttpWorker(await url, api_key="inner"),
            api_key=given["api-key"],
            incremental="incremental-streaming-output" in given,
            overlap="disable-overlap-schedule" not in given,
            context_length=int(given["context-length"]),
        )
        runner = web.AppRunner(server.app())
        await runner.setup()
        await web.TCPSite(runner, given["host"], int(given["port"])).start()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))
