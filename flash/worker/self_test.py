"""Whether the embedded engine computes what its model does, seen before it serves.

    texts ─► requests, all at once ─► tokens and their logprobs ─┬─► the same
                                └──► a forward pass of each ─────┘

A cache may keep less than a model looks back on, or keys and values that are not its own; the model
would then sample from another policy than the one that is trained.
"""

import asyncio
from collections.abc import Sequence

import torch

from flash.trainer.self_test import last_logprobs, texts, told
from flash.worker.engine import (
    EmbeddedEngine,
    EngineDied,
    EngineRequest,
    EngineResult,
    cannot_serve,
)

_SAMPLED = 16  # tokens after each text
_LIMIT = 1e-3  # in nats, where the model computes in float32
_ROUNDED = 1 / 32  # of the largest logit, in half precision: as the probe after each publish has it
_WITHIN = 0.9  # of a text's tokens: routers of experts put single ones far off in half precision


async def check_engine(engine: EmbeddedEngine) -> None:
    """ValueError that names the model's type, what differs and what to do.

    Nobody else may use the engine meanwhile. It raises EngineDied for want of memory.
    """
    kind = engine.config.model_type
    prompts = texts(engine.config, at_most=max(1, engine.longest - _SAMPLED))
    try:
        results = await asyncio.gather(
            *(_sampled(engine, number, prompt) for number, prompt in enumerate(prompts))
        )
    except EngineDied as error:
        if isinstance(engine.failure(), torch.OutOfMemoryError):
            raise
        raise ValueError(cannot_serve(kind, error)) from error
    await engine.pause("keep")
    for prompt, result in zip(prompts, results, strict=True):
        gap, limit = _gap(engine, [*prompt, *result.token_ids], result.logprobs)
        if not gap <= limit:  # nan is none either
            why = (
                f"its logprobs are {gap:.2g} nats from the model's own after {len(prompt)} tokens, "
                f"{limit:.2g} would be rounding; config.json has {told(engine.config)}"
            )
            raise ValueError(cannot_serve(kind, why))
    await engine.resume()


async def _sampled(engine: EmbeddedEngine, number: int, prompt: Sequence[int]) -> EngineResult:
    most = max(1, min(_SAMPLED, engine.longest - len(prompt)))
    request = EngineRequest(request_id=f"self-test {number}", token_ids=prompt, max_tokens=most)
    return await engine.generate(request)


def _gap(
    engine: EmbeddedEngine, text: Sequence[int], logprobs: Sequence[float]
) -> tuple[float, float]:
    """By how much its last tokens' logprobs are off, and how much that may be."""
    logits_TV = engine.plain_logits(text, len(logprobs))
    plain_T = last_logprobs(logits_TV, text).cpu()
    gap = float((torch.tensor(logprobs) - plain_T).abs().quantile(_WITHIN))
    if engine.dtype == torch.float32:
        return gap, _LIMIT
    return gap, max(_LIMIT, _ROUNDED * float(logits_TV.abs().max()))
