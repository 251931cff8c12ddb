"""Weights read from files into shards: what each rank has is its rows of the whole model."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import (
    _clear_fast_path_sharding_prop_cache,
    _clear_python_sharding_prop_cache,
)
from torch.testing._internal.distributed.fake_pg import FakeStore

from flash.trainer.config import TrainerConfig
from flash.trainer.critic import TokenValuer
from flash.trainer.loading import load_weights, unloaded
from flash.trainer.scorer import TokenScorer
from flash.trainer.sharding import shard
from flash.trainer.trainer import Trainer

SaveModel = Callable[..., Path]
Model: Any = transformers.AutoModelForCausalLM
SEVERAL_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
KINDS: dict[str, dict[str, Any]] = {
    "llama": SEVERAL_HEADS,
    "qwen2": SEVERAL_HEADS,
    "qwen3": SEVERAL_HEADS,
    "gemma3_text": SEVERAL_HEADS | {"layer_types": ["full_attention", "sliding_attention"]},
    "mixtral": SEVERAL_HEADS | {"num_local_experts": 4},
    "qwen3_moe": SEVERAL_HEADS | {"num_experts": 4, "moe_intermediate_size": 24},
    "gpt2": {"num_attention_heads": 4},  # its matrices are transposed
    "phi3": {"num_attention_heads": 4, "num_key_value_heads": 2},
}


def saved(folder: Path, kind: str, *, tied: bool = False, **settings: Any) -> Path:
    """A random model whose sizes three ranks can't divide evenly."""
    sizes = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
        "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, **KINDS[kind], **settings,
    }  # fmt: skip
    config = transformers.AutoConfig.for_model(kind, tie_word_embeddings=tied, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        Model.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


@contextlib.contextmanager
def as_rank(rank: int, ranks: int) -> Iterator[None]:
    """This process is one of so many, of which no other is there."""
    # For a mesh like one before DTensor would take that one, of another rank.
    _clear_fast_path_sharding_prop_cache()
    _clear_python_sharding_prop_cache()
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def loaded(folder: Path, ranks: int, shard_size: int | None = None) -> Any:
    model = unloaded(str(folder))
    shard(TokenScorer(model), model, ranks=ranks, half=False, shard_size=shard_size)
    load_weights(model, str(folder), "cpu")
    return model


def rows(tensor: torch.Tensor, part: int, parts: int) -> torch.Tensor:
    """One part of as many, of which the last may be shorter or empty."""
    each = -(-len(tensor) // parts)
    return tensor[part * each : (part + 1) * each]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_each_rank_has_its_rows_of_what_transformers_loads(
    kind: str, tied: bool, ranks: int, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "m", kind, tied=tied)
    whole = Model.from_pretrained(folder, dtype=torch.float32)
    for rank in range(ranks):
        with as_rank(rank, ranks):
            model = loaded(folder, ranks)
            parameters = dict(model.named_parameters())
            assert parameters.keys() == dict(whole.named_parameters()).keys()
            for name, expected in whole.named_parameters():
                assert torch.equal(parameters[name].to_local(), rows(expected, rank, ranks)), name
            buffers = dict(model.named_buffers())
            assert buffers.keys() == dict(whole.named_buffers()).keys()
            for name, expected in whole.named_buffers():
                assert torch.equal(buffers[name], expected), name
            assert not model.training


def test_of_groups_that_replicate_each_has_it_all(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", "llama")
    whole = Model.from_pretrained(folder, dtype=torch.float32)
    for rank in range(4):
        with as_rank(rank, 4):
            for name, parameter in loaded(folder, 4, shard_size=2).named_parameters():
                expected = rows(whole.get_parameter(name), rank % 2, 2)
                assert torch.equal(parameter.to_local(), expected), name


def in_two_files(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    places = {name: f"{number % 2}.safetensors" for number, name in enumerate(sorted(weights))}
    for file in set(places.values()):
        save_file({n: t for n, t in weights.items() if places[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": places})
    )


def in_a_pickle(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    torch.save(weights, folder / "pytorch_model.bin")


def in_bfloat16(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    halved = {name: tensor.bfloat16() for name, tensor in weights.items()}
    save_file(halved, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("keep", [in_two_files, in_a_pickle, in_bfloat16])
def test_files_may_be_of_each_form(keep: Callable[..., None], tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", "mixtral")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    keep(folder, weights)
    whole = Model.from_pretrained(folder, dtype=torch.float32)
    with as_rank(1, 2):
        for name, parameter in loaded(folder, 2).named_parameters():
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter.to_local(), rows(whole.get_parameter(name), 1, 2)), name


def test_a_critic_has_the_layers_and_leaves_out_the_head(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", "llama")
    whole = Model.from_pretrained(folder, dtype=torch.float32).model
    with as_rank(1, 2):
        model = unloaded(str(folder))
        valuer = TokenValuer(model)
        shard(valuer, model, ranks=2, half=False)
        load_weights(valuer.body, str(folder), "cpu")
        for name, parameter in valuer.body.named_parameters():
            assert torch.equal(parameter.to_local(), rows(whole.get_parameter(name), 1, 2)), name
        assert isinstance(valuer.head.weight, DTensor)
        assert not valuer.head.weight.to_local().any()


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda w: w.pop("model.norm.weight"), "its files lack the weight model.norm.weight"),
        (lambda w: w.update(more=torch.ones(1)), "its files hold the weight more, which its conf"),
        (
            lambda w: w.update({"lm_head.weight": torch.ones(97, 32)}),
            "its files hold another lm_head.weight than what config.json ties it to: set "
            "tie_word_embeddings=false",
        ),
    ],
    ids=["lacks", "has more", "is not tied"],
)
def test_files_of_another_model_are_refused(
    change: Callable[..., Any], why: str, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "m", "llama", tied=True)
    change_weights(folder, change)
    with as_rank(0, 1), pytest.raises(ValueError, match=why):
        loaded(folder, 1)


def test_a_tied_head_may_be_in_the_files_as_well_or_alone(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", "llama", tied=True)
    for change in (
        lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}),
        lambda w: w.pop("model.embed_tokens.weight"),
    ):
        change_weights(folder, change)
        with as_rank(0, 1):
            model = loaded(folder, 1)
            assert model.lm_head.weight is model.model.embed_tokens.weight
            assert not model.lm_head.weight.is_meta


def test_weights_that_are_made_of_whole_ones_are_refused_where_ranks_have_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    divided = transformers.core_model_loading.WeightConverter(
        "self_attn.qkv.weight", ["self_attn.q_proj.weight", "self_attn.k_proj.weight"],
        operations=[transformers.core_model_loading.Chunk(dim=0)],
    )  # fmt: skip
    monkeypatch.setattr(
        "flash.trainer.loading.get_model_conversion_mapping", lambda model: [divided]
    )
    folder = saved(tmp_path / "m", "llama")
    with (
        as_rank(0, 2),
        pytest.raises(ValueError, match=r"'llama' makes .*q_proj.* \(Chunk\).*trainer.ranks=1"),
    ):
        loaded(folder, 2)
    with as_rank(0, 1):
        loaded(folder, 1)


def peaks() -> list[int]:
    """Of each rank, the most memory that it ever had, in bytes, by the kernel."""
    found = []
    for process in psutil.Process().children(recursive=True):
        if "flash.trainer" in process.cmdline():
            status = Path(f"/proc/{process.pid}/status").read_text()
            if not process.children():  # not the guard of one
                found.append(int(status.partition("VmHWM:")[2].split()[0]) * 1024)
    return found


@pytest.mark.slow
async def test_no_rank_ever_holds_a_whole_model(tmp_path: Path, save_model: SaveModel) -> None:
    large = saved(
        tmp_path / "large", "llama", hidden_size=512, intermediate_size=2048,
        num_hidden_layers=24, num_attention_heads=8, num_key_value_heads=8, head_dim=64,
    )  # fmt: skip
    whole = (large / "model.safetensors").stat().st_size
    assert whole > 400e6
    in_bfloat16(large, load_file(large / "model.safetensors"))

    async def peak(model: Path, ranks: int) -> int:
        config = TrainerConfig(ranks=ranks, threads=1)
        async with Trainer(model=model, config=config, run_dir=tmp_path / "run") as trainer:
            await trainer.score([[1, 2, 3]])
            found = peaks()
            assert len(found) == ranks
            return max(found)

    without = await peak(save_model(tmp_path / "small"), 1)
    assert await peak(large, 1) - without > whole
    assert await peak(large, 3) - without < 0.9 * whole


def test_what_was_loaded_is_no_longer_in_its_files(tmp_path: Path) -> None:
    folder = saved(tmp_path / "m", "llama")
    with as_rank(0, 1):
        model = loaded(folder, 1)
        before = [parameter.to_local().clone() for parameter in model.parameters()]
        size = (folder / "model.safetensors").stat().st_size
        (folder / "model.safetensors").write_bytes(bytes(size))  # in place
        for parameter, expected in zip(model.parameters(), before, strict=True):
            assert torch.equal(parameter.to_local(), expected)
