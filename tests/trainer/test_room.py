"""How many tokens a pass is given, where the configuration leaves it to the ranks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flash.fakes import fake_sample
from flash.trainer import sharding
from flash.trainer.config import TOKENS_OF_PASS, TrainerConfig
from flash.trainer.fused import can_fuse, fuse, fuse_layers
from flash.trainer.room import tokens_that_fit, tokens_with_room
from flash.trainer.scorer import TokenScorer
from flash.trainer.sharding import load_model, make_optimizer
from flash.trainer.trainer import Trainer
from flash.types import Batch

SaveModel = Callable[..., Path]


def loaded(save_model: SaveModel, folder: Path, device: str) -> tuple[TokenScorer, Any]:
    scorer = TokenScorer(load_model(str(save_model(folder)))).to(device)
    return scorer, make_optimizer(scorer, TrainerConfig(), learning_rate=1e-3)


@pytest.mark.parametrize(
    ("free_gb", "token_mb", "tokens"),
    [(100, 4, 17_408), (100, 0.5, 32_768), (0.1, 4, 1024), (-3, 4, 1024)],
)
def test_a_pass_has_what_fits_in_steps_that_make_sense(free_gb, token_mb, tokens):
    assert tokens_that_fit(free_gb * 1e9, token_mb * 1e6) == tokens


def test_on_a_cpu_a_pass_has_what_is_usual_there(save_model: SaveModel, tmp_path: Path) -> None:
    scorer, optimizer = loaded(save_model, tmp_path / "m", "cpu")
    assert tokens_with_room(scorer, optimizer) == TOKENS_OF_PASS == TrainerConfig().tokens_of_pass


@pytest.mark.parametrize(("given", "expected"), [(None, 640), (100, 100)])
async def test_ranks_are_asked_once_and_only_if_nothing_is_configured(
    given: int | None, expected: int, tmp_path: Path
) -> None:
    """Of several ranks the one with the least room counts, because all pass as often."""
    trainer = Trainer(
        model="none",
        config=TrainerConfig(ranks=2, tokens_per_micro_batch=given),
        run_dir=tmp_path,
    )
    asked = []

    async def call_each(method: str, arguments: list[Any], **_: Any) -> list[Any]:
        asked.append(method)
        return [1000, 640] if method == "room" else [{}, {}]

    trainer._call_each = call_each  # type: ignore[method-assign]
    for version in range(2):
        await trainer.step(Batch(samples=[fake_sample(range(9))], version=version))
    assert trainer.config.tokens_per_micro_batch == expected
    assert asked.count("room") == (1 if given is None else 0)


def test_on_a_cpu_nothing_is_fused_and_large_models_have_a_unit_for_each_layer(
    save_model: SaveModel, tmp_path: Path
) -> None:
    scorer, _ = loaded(save_model, tmp_path / "m", "cpu")
    assert not can_fuse(scorer.model)
    assert not fuse(scorer)
    if not torch.cuda.is_available():
        assert sharding._most_in_one_unit(1) == sharding._most_in_one_unit(2) == 50_000_000


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_model_that_is_fused_leaves_others_of_its_type_as_they_are(
    save_model: SaveModel, tmp_path: Path, kind: str
) -> None:
    pytest.importorskip("liger_kernel")
    directory = str(save_model(tmp_path / "m", kind))
    fused = load_model(directory)
    fuse_layers(fused)
    assert "liger" in fused.base_model.norm.forward.__func__.__module__
    other = TokenScorer(load_model(directory))
    assert "liger" not in other.model.base_model.norm.forward.__func__.__module__
    other(torch.arange(9), (9,), torch.arange(1, 9))  # rotary positions and all, on a CPU


@pytest.mark.gpu
def test_on_a_gpu_a_pass_of_so_many_tokens_fits(save_model: SaveModel, tmp_path: Path) -> None:
    scorer, optimizer = loaded(save_model, tmp_path / "m", "cuda")
    tokens = tokens_with_room(scorer, optimizer)
    assert tokens % 1024 == 0
    assert all(parameter.grad is None for parameter in scorer.parameters())
    assert sharding._most_in_one_unit(1) > sharding._most_in_one_unit(2)
    token_ids = torch.zeros(tokens, dtype=torch.long, device="cuda")
    lengths = [64] * (tokens // 64)
    scored = torch.arange(tokens, device="cuda")
    scorer(token_ids, lengths, scored[scored % 64 > 0]).sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_on_a_gpu_fused_kernels_compute_the_same_logprobs_and_gradients(
    save_model: SaveModel, tmp_path: Path, kind: str
) -> None:
    pytest.importorskip("liger_kernel")
    scorer = TokenScorer(load_model(str(save_model(tmp_path / "m", kind)))).cuda()
    token_ids = torch.arange(50, device="cuda")
    scored = torch.arange(1, 50, device="cuda")

    def computed() -> list[torch.Tensor]:
        logprobs = scorer(token_ids, (50,), scored)
        return [logprobs.detach(), *torch.autograd.grad(logprobs.sum(), list(scorer.parameters()))]

    plain = computed()
    assert fuse(scorer)
    for one, other in zip(computed(), plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
