"""Servers that run already, used through the hub: a request may outlive the weights it began with.

    python examples/attach_to_vllm.py path/to/model http://host:8000 http://host:8001

docs/engines.md tells how such a vLLM server is started; `flash worker` serves the same routes. What
`engine.urls` names in a run is attached in this way, and so is a worker in any script.
"""

import asyncio
import os
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from flash import Completion, GenerateRequest, HttpWorker, InferenceHub, SamplingParams, Weights


async def main(model: Path, urls: Sequence[str], *, api_key: str = "") -> list[Completion]:
    """Asks for some responses, publishes weights once the first has come, and returns them all.

    `model` is a directory of safetensors that the servers can read. It is published twice, as
    version 0 and as version 1; a trainer would have made others in between, and would give their
    `score`, by which the hub checks each worker's logprobs after a publish.
    """
    workers = [HttpWorker(url, api_key=api_key) for url in urls]
    requests = [
        GenerateRequest(token_ids=[5, 6, 7], sampling=SamplingParams(max_tokens=40 * length))
        for length in range(1, 9)
    ]
    async with (
        # Whatever weights the servers have, they are given these before they are asked anything.
        InferenceHub(workers, weights=Weights(version=0, path=model)) as hub,
        asyncio.TaskGroup() as tasks,
    ):
        asked = [tasks.create_task(hub.generate(each), name="ask") for each in requests]
        await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
        report = await hub.publish(Weights(version=1, path=model))
        answers = await asyncio.gather(*asked)
    print(f"version {report.version}: {report.workers} workers, {report.paused_s:.2f} s paused")
    for answer in answers:
        spans = (f"{len(list(span))} by version {of}" for of, span in groupby(answer.versions))
        print(f"{answer.worker}: {len(answer.token_ids)} tokens, {', '.join(spans)}")
    return answers


if __name__ == "__main__":
    key = os.environ.get("FLASH_WORKER_API_KEY", "")
    asyncio.run(main(Path(sys.argv[1]).resolve(), sys.argv[2:], api_key=key))
