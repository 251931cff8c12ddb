"""Compiled layers compute what the model's own do, and are compiled once."""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from transformers import AutoConfig, AutoModelForCausalLM

from flash.trainer import layers
from flash.trainer.config import LoraConfig, TrainerConfig
from flash.trainer.layers import missing_to_compile
from flash.trainer.objectives.settings import KlSettings
from flash.trainer.packing import divide
from flash.trainer.rank import Rank
from flash.trainer.trainer import Trainer
from flash.types import Batch, Sample

SamplesOf = Callable[..., list[Sample]]
SaveModel = Callable[..., Path]
Model: Any = AutoModelForCausalLM

# Torch's compiler looks at `.grad` of what it traces, and hides the warning by a filter of its own
# that an error of pytest's goes before.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

COMPILED = TrainerConfig(compile=True, threads=1, learning_rate=1e-3, warmup_steps=0)
PLAIN = COMPILED.model_copy(update={"compile": False})


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled as always, but run by torch's own operators: to write C++ takes a minute."""
    monkeypatch.setattr(layers, "_BACKEND", "aot_eager")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Dynamo's settings and what it has compiled are the process's."""
    dynamo: Any = torch._dynamo
    counters.clear()
    with dynamo.config.patch(skip_fsdp_guards=True):
        yield
    dynamo.reset()


def save_windowed(folder: Path, kind: str = "qwen2") -> Path:
    """A model whose layers differ in how far they look back."""
    config = AutoConfig.for_model(
        kind, vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        layer_types=["full_attention", "sliding_attention"], sliding_window=8,
        use_sliding_window=True, initializer_range=0.3, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        Model.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


@contextlib.contextmanager
def started(model: Path, config: TrainerConfig, reference: Path | None = None) -> Iterator[Rank]:
    rank = Rank()
    assert not rank.start(str(model), None, config, 0, 1, None, 0, reference and str(reference))
    try:
        yield rank
    finally:
        dist.destroy_process_group()


def trained(model: Path, config: TrainerConfig, samples: list[Sample]) -> list[torch.Tensor]:
    """The gradients of an optimizer step."""
    gradients: list[torch.Tensor] = []

    def keep(*_: Any) -> None:
        parameters: Any = rank._scorer.parameters()
        gradients.extend(parameter.grad.full_tensor().clone() for parameter in parameters)

    with started(model, config) as rank:
        rank._optimizer.register_step_pre_hook(keep)
        (share,) = divide(samples, config)
        rank.step(share, 0)
    return gradients


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(("units", "recomputed"), [("one unit", False), ("layers are units", True)])
def test_compiled_layers_have_the_same_gradients(
    units: str,
    recomputed: bool,
    tmp_path: Path,
    samples_of: SamplesOf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Several passes of several sequences, so that no size may be taken for granted."""
    if units == "layers are units":
        monkeypatch.setattr("flash.trainer.sharding._ONE_UNIT_PARAMETERS", 0)
    model = save_windowed(tmp_path / "model")
    more = {"gradient_checkpointing": recomputed, "tokens_per_micro_batch": 60}
    compiled, plain = (
        trained(model, config.model_copy(update=more), samples_of(8))
        for config in (COMPILED, PLAIN)
    )
    assert any(gradient.abs().max() > 1e-3 for gradient in plain)
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
def test_layers_with_adapters_are_compiled_as_the_reference_without_them_is(
    tmp_path: Path, samples_of: SamplesOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flash.trainer.sharding._ONE_UNIT_PARAMETERS", 0)
    model = save_windowed(tmp_path / "model")
    more = {
        "lora": LoraConfig(rank=4),
        "kl": KlSettings(coefficient=0.5),
        "gradient_checkpointing": True,
        "tokens_per_micro_batch": 60,
    }
    told = []
    for config in (COMPILED, PLAIN):
        adapted = config.model_copy(update=more)
        with started(model, adapted, model) as rank:
            steps = [divide(samples_of(8, seed=version), adapted)[0] for version in range(3)]
            told.append([rank.step(share, version) for version, share in enumerate(steps)])
    for compiled, plain in zip(*told, strict=True):
        assert compiled == pytest.approx(plain, rel=1e-3, abs=1e-6)
    assert plain["kl_reference"] > 1e-5


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
def test_layers_are_compiled_once_for_passes_of_all_sizes(
    save_model: SaveModel, tmp_path: Path
) -> None:
    with started(save_model(tmp_path / "model"), COMPILED) as rank:
        rank.score([range(5), range(9)])
        assert counters["stats"]["unique_graphs"] > 0
        with torch.compiler.set_stance("fail_on_recompile"):
            for sizes in ([7], [30, 2], [8, 8, 8, 20]):
                rank.score([range(size) for size in sizes])


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
def test_settings_in_which_layers_differ_are_not_taken_for_those_of_the_first(
    tmp_path: Path,
) -> None:
    model = save_windowed(tmp_path / "model")
    scores = []
    for config in (COMPILED, PLAIN):
        with started(model, config) as rank:
            scores.append(rank.score([range(40), range(12)]).logprobs)
    for compiled, plain in zip(*scores, strict=True):
        assert compiled == pytest.approx(plain, abs=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("traced")
def test_a_critic_is_compiled_too(
    save_model: SaveModel, tmp_path: Path, samples_of: SamplesOf
) -> None:
    model = save_model(tmp_path / "model")
    found = []
    for settings in (COMPILED, PLAIN):
        config = TrainerConfig.model_validate(settings.model_dump() | {"advantages": "gae"})
        counters.clear()
        with started(model, config) as rank:
            assert rank._critic is not None
            valuer: Any = rank._critic._valuer
            torch.nn.init.ones_(valuer.head.weight.to_local())
            found.append([values.tolist() for values in rank.values([samples_of(3)])[0]])
        assert (counters["stats"]["unique_graphs"] > 0) == config.compile
    for compiled, plain in zip(*found, strict=True):
        assert compiled == pytest.approx(plain, abs=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler (g++)")
@pytest.mark.timeout(600)
async def test_two_ranks_train_compiled_layers(
    save_model: SaveModel,
    tmp_path: Path,
    samples_of: SamplesOf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With code of torch's compiler, which the ranks' processes write and run."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "written"))
    model = save_model(tmp_path / "model")
    told = []
    for settings in (COMPILED, PLAIN):
        config = settings.model_copy(update={"ranks": 2})
        async with Trainer(model=model, config=config, run_dir=tmp_path) as trainer:
            told.append(await trainer.step(Batch(samples=samples_of(6), version=0)))
    assert list((tmp_path / "written").rglob("*.so"))
    compiled, plain = ({**metrics, "time/train_s": 0} for metrics in told)
    assert compiled == pytest.approx(plain, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(
    ("device", "there", "environment", "missing"),
    [
        ("cpu", {"g++"}, {}, ""),
        ("cpu", {"gcc"}, {}, "a C++ compiler (g++)"),
        ("cpu", {"g++"}, {"CXX": "clang++"}, "a C++ compiler (clang++)"),
        ("cuda", {"clang"}, {}, ""),
        ("cuda", set(), {}, "a C compiler (gcc or clang)"),
    ],
)
def test_what_compiling_needs_is_looked_for(
    device: str,
    there: set[str],
    environment: dict[str, str],
    missing: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: name if name in there else None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert missing_to_compile(device) == missing


def test_a_machine_without_a_compiler_is_told_before_anything_is_trained(
    save_model: SaveModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    rank = Rank()
    try:
        why = rank.start(str(save_model(tmp_path / "model")), None, COMPILED, 0, 1, None, 0)
    finally:
        dist.destroy_process_group()
    assert why == (
        "trainer.compile=true needs a C++ compiler (no-such-compiler): install it, or leave it out"
    )
