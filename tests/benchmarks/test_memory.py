"""benchmarks/memory.py: ranks under a limit of their memory, and what its formula says."""

from pathlib import Path
from typing import Any

import memory
import pytest
import torch
import transformers

from flash.errors import TrainerFailure
from flash.trainer.attention import PACKED_ATTENTION
from flash.trainer.config import TrainerConfig
from flash.trainer.model_files import check_files
from flash.trainer.scorer import TokenScorer
from flash.trainer.trainer import Trainer

Model: Any = transformers.AutoModelForCausalLM


@pytest.mark.slow
async def test_a_rank_that_needs_more_than_its_limit_fails(tmp_path: Path) -> None:
    memory.write_model(tmp_path / "m", memory.config_of(layers=1))
    limited = memory.LimitedRanks(2e9)
    trainer = Trainer(
        model=tmp_path / "m", config=TrainerConfig(threads=1), run_dir=tmp_path / "run",
        starter=limited,
    )  # fmt: skip
    async with trainer:
        assert await limited.peak_of(trainer.score([[1, 2, 3]])) > memory.PROCESS_USED / 2
        limited.limit(1e6)
        with pytest.raises(TrainerFailure, match="memory"):
            await trainer.score([range(4000)])  # more than it has asked for before


def test_a_written_model_is_one_that_can_be_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "FILE_BYTES", 10_000)
    config = memory.config_of(layers=2, hidden=128, inner=64, vocabulary=32)
    memory.write_model(tmp_path / "m", config)
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 2
    check_files(str(tmp_path / "m"), field="model")


def kept_bytes(config: Any, tokens: int, *, half: bool) -> int:
    """What autograd keeps of a forward pass, but for weights."""
    model = Model.from_config(
        config, attn_implementation=PACKED_ATTENTION,
        dtype=torch.bfloat16 if half else torch.float32,
    ).eval()  # fmt: skip
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        TokenScorer(model)(torch.zeros(tokens, dtype=torch.long), (tokens,), torch.tensor([1]))
    return sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in own)


@pytest.mark.parametrize("half", [False, True])
def test_activations_are_what_autograd_keeps(half: bool) -> None:
    one, two = (
        memory.config_of(layers=layers, hidden=256, inner=1024, vocabulary=64) for layers in (1, 2)
    )
    layer = kept_bytes(two, 256, half=half) - kept_bytes(one, 256, half=half)
    expected = memory.activation_bytes(one, 256, half=half, recomputed=False)
    assert layer == pytest.approx(expected, rel=0.05)


def test_recomputed_one_layer_keeps_all_and_each_its_input() -> None:
    config = memory.config_of(layers=10, hidden=256, inner=1024)
    kept, recomputed = (
        memory.activation_bytes(config, 100, half=True, recomputed=each) for each in (False, True)
    )
    assert recomputed == kept / 10 + 10 * 100 * 256 * 2


def test_what_is_shared_out_over_more_gpus_is_less_on_each_and_the_rest_is_not() -> None:
    few, many = (memory.on_gpus(memory.GPU_MODELS["7B (Qwen2.5)"], gpus) for gpus in (8, 64))
    for what in ("weights", "gradients", "moments"):
        assert few[what] == 8 * many[what]
    assert few["gathered"] == many["gathered"]
    assert few["weights"] == pytest.approx(7.6e9 * 4 / 8, rel=0.01)
