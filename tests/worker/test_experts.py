"""What the embedded engine tells of the experts that tokens were routed to."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from flash.trainer.router_replay import Routers
from flash.types import UNKNOWN_EXPERT
from flash.worker.engine import EmbeddedEngine, EngineRequest, EngineResult
from flash.worker.self_test import check_engine
from tests.families import save_family

pytestmark = pytest.mark.slow

Model: Any = transformers.AutoModelForCausalLM
# More than two pages of the cache, which others share.
PREFIX = [(7 * place) % 90 + 3 for place in range(37)]


@pytest.fixture
async def opened(tmp_path: Path) -> AsyncIterator[Any]:
    engines = []

    async def open_engine(kind: str, **settings: Any) -> EmbeddedEngine:
        save_family(tmp_path, kind, **settings)
        engine = EmbeddedEngine(
            str(tmp_path), device="cpu", dtype="float32", cache_tokens=1024, max_running=8,
            routed_experts=True,
        )  # fmt: skip
        engines.append(engine)
        await check_engine(engine)
        return engine

    yield open_engine
    for engine in engines:
        engine.close()


def chosen_by(folder: Path, tokens: Sequence[int]) -> np.ndarray[Any, Any]:
    """By a plain forward pass; in each layer in order, because ties of order are nobody's."""
    model = Model.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    routers = Routers(model)
    with torch.no_grad():
        model(torch.tensor([list(tokens)]), use_cache=False)
    return in_order(routers.chosen().numpy())


def in_order(experts: Any) -> np.ndarray[Any, Any]:
    by_layer: np.ndarray[Any, Any] = np.sort(experts.reshape(len(experts), 2, 2), -1)
    return by_layer


async def sample(
    engine: EmbeddedEngine, name: str, tokens: Sequence[int], most: int = 6, **more: Any
) -> EngineResult:
    return await engine.generate(
        EngineRequest(request_id=name, token_ids=tokens, max_tokens=most, **more)
    )


@pytest.mark.parametrize("kind", ["olmoe", "mixtral", "dots1", "laguna"])
async def test_they_are_those_of_a_forward_pass_for_requests_that_share_prefixes_too(
    kind: str, tmp_path: Path, opened: Any
) -> None:
    """All layers of olmoe see all, so that prefixes are shared; dots1 has one without experts."""
    engine = await opened(kind)
    prompts = [PREFIX, PREFIX[:20], [*PREFIX, 5, 6], [9, 8, 7]]
    first = await sample(engine, "first", prompts[0])
    rest = await asyncio.gather(
        *(sample(engine, f"r{n}", prompt) for n, prompt in enumerate(prompts))
    )
    for prompt, result in zip([PREFIX, *prompts], [first, *rest], strict=True):
        assert result.experts is not None
        told, expected = in_order(result.experts), chosen_by(tmp_path, [*prompt, *result.token_ids])
        assert len(told) == len(prompt) + len(result.token_ids) - 1  # nothing follows the last one
        np.testing.assert_array_equal(told, expected[:-1])
    without = (expected == UNKNOWN_EXPERT).all((0, 2))
    assert without.tolist() == [kind in ("dots1", "laguna"), False]
    assert (expected[:, ~without] >= 0).all()


async def test_a_later_turn_asks_for_those_that_it_does_not_know(
    tmp_path: Path, opened: Any
) -> None:
    engine = await opened("mixtral")
    first = await sample(engine, "1", PREFIX)
    tokens = [*PREFIX, *first.token_ids, 11, 12]
    second = await sample(engine, "2", tokens, experts_from=len(first.experts))
    expected = chosen_by(tmp_path, [*tokens, *second.token_ids])[:-1]
    told = np.concatenate([first.experts, second.experts])
    np.testing.assert_array_equal(in_order(told), expected)
    with pytest.raises(ValueError, match="routed_experts_prompt_start=4 must lie within the 3"):
        await sample(engine, "3", [3, 4, 5], experts_from=4)


async def until_sampled(engine: EmbeddedEngine, running: asyncio.Task[Any], tokens: int) -> None:
    while len(engine._sampled_so_far("long")[0]) < tokens:
        assert not running.done(), "it ended before it was stopped"
        await asyncio.sleep(0)


async def test_what_was_sampled_with_older_weights_keeps_its_experts_and_an_abort_has_some(
    tmp_path: Path, opened: Any
) -> None:
    engine = await opened("mixtral")
    running = asyncio.create_task(sample(engine, "long", PREFIX, 219))
    await until_sampled(engine, running, 1)
    await engine.pause("keep")
    before = len(engine._sampled_so_far("long")[0])
    old = chosen_by(tmp_path, PREFIX)
    model = Model.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate.weight" in name:
                parameter.copy_(parameter.flip(0))
    (tmp_path / "new").mkdir()
    model.save_pretrained(tmp_path / "new")
    engine.load_weights(tmp_path / "new")
    engine.set_version(1)
    await engine.resume()
    await until_sampled(engine, running, before + 3)
    await engine.pause("abort")
    result = await running
    assert result.finish_reason == "abort" and [v for v, _, _ in result.spans] == [0, 1]
    told = in_order(result.experts)
    assert len(told) == len(PREFIX) + len(result.token_ids) - 1
    np.testing.assert_array_equal(told[: len(PREFIX)], old)
    new = chosen_by(tmp_path / "new", [*PREFIX, *result.token_ids])[:-1]
    np.testing.assert_array_equal(told[len(PREFIX) + before :], new[len(PREFIX) + before :])
    assert (told != new).any()


async def test_an_engine_that_was_not_asked_tells_none_and_one_without_experts_does_not_start(
    tmp_path: Path,
) -> None:
    save_family(tmp_path, "qwen3")
    settings: Any = {
        "device": "cpu", "dtype": "float32", "cache_tokens": 256, "max_running": 2,
    }  # fmt: skip
    with pytest.raises(ValueError, match="model_type='qwen3' has no routers"):
        EmbeddedEngine(str(tmp_path), routed_experts=True, **settings)
    engine = EmbeddedEngine(str(tmp_path), **settings)
    try:
        assert (await sample(engine, "r", PREFIX)).experts is None
    finally:
        engine.close()
