"""The embedded engine compared with its model at its start; tests/trainer/test_families.py does so
for each family."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flash.worker.config import WorkerConfig
from flash.worker.engine import EmbeddedEngine, EngineDied
from flash.worker.self_test import check_engine
from flash.worker.server import serve
from tests.families import save_family

pytestmark = pytest.mark.slow


@pytest.fixture
def opened() -> Iterator[Any]:
    engines = []

    def open_engine(folder: Path, *, dtype: str = "float32", room: int = 512) -> EmbeddedEngine:
        engine = EmbeddedEngine(
            str(folder), device="cpu", dtype=dtype, cache_tokens=room, max_running=4
        )
        engines.append(engine)
        return engine

    yield open_engine
    for engine in engines:
        engine.close()


async def test_in_half_precision_rounding_is_no_difference(tmp_path: Path, opened: Any) -> None:
    save_family(tmp_path, "mistral")
    await check_engine(opened(tmp_path, dtype="bfloat16"))


async def test_in_half_precision_another_attention_is_one(tmp_path: Path, opened: Any) -> None:
    save_family(tmp_path, "diffllama")
    with pytest.raises(ValueError, match=r"logprobs are .* nats from the model's own after 64 tok"):
        await check_engine(opened(tmp_path, dtype="bfloat16"))


async def test_texts_fit_into_a_small_cache(tmp_path: Path, opened: Any) -> None:
    save_family(tmp_path, "llama")
    await check_engine(opened(tmp_path, room=64))


@pytest.mark.parametrize(
    ("failure", "raised", "match"),
    [
        (KeyError("heads"), ValueError, r"'llama' can't be served .*engine\.kind=vllm.*heads"),
        (torch.OutOfMemoryError("out of memory"), EngineDied, "out of memory"),
    ],
)
async def test_a_model_that_fails_names_vllm_and_want_of_memory_is_no_fault_of_it(
    failure: Exception, raised: type[Exception], match: str, tmp_path: Path, opened: Any
) -> None:
    save_family(tmp_path, "llama")
    engine = opened(tmp_path)

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise failure

    engine._model.forward = fail
    with pytest.raises(raised, match=match):
        await check_engine(engine)


async def test_a_worker_that_is_not_its_model_is_never_ready(tmp_path: Path) -> None:
    save_family(tmp_path, "diffllama")
    ready: list[str] = []
    with pytest.raises(ValueError, match="'diffllama' can't be served by an embedded worker"):
        await serve(WorkerConfig(model=str(tmp_path), device="cpu"), on_ready=ready.append)
    assert not ready
