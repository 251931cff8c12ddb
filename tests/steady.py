"""Workers that take their time to the second, and what the hub is asked of them."""

import asyncio
from pathlib import Path

from flash.fakes import FakeWorker
from flash.types import GenerateRequest, SamplingParams, Scores, Weights


def request(max_tokens: int = 10, prompt: int = 5, session: str = "") -> GenerateRequest:
    return GenerateRequest(
        token_ids=list(range(prompt)),
        sampling=SamplingParams(max_tokens=max_tokens),
        session=session,
    )


def weights(version: int, score=None) -> Weights:
    """`score` is of one sequence."""

    async def scores(sequences):
        return Scores(logprobs=[await score(token_ids) for token_ids in sequences])

    path = Path(f"/fake/{version}")
    return Weights(version=version, path=path, score=scores if score is not None else None)


def steady(name: str = "w", kind: type[FakeWorker] = FakeWorker, **options) -> FakeWorker:
    """Samples exactly `max_tokens`, one a second; a weight load takes a second too."""
    fixed = {"token_s": (1, 1), "tokens": (10**6, 10**6), "load_s": (1, 1)}
    return kind(name, **(fixed | options))


def now() -> float:
    return asyncio.get_running_loop().time()
