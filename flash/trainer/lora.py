"""Low-rank adapters by PEFT, trained in the place of a model's weights.

    weight W, frozen ─────────────────► W x ─┐
    adapter A, B, trained ► (α/rank) B A x ──┴─► what the layer computes

    export      W + (α/rank) B A, under the model's own names: a worker knows of no adapter
    checkpoint  A and B alone, in files as PEFT and transformers load them
    reference   W alone: the model that the run began with is there already

Hu et al. 2021. PEFT is optional, and imported where an adapter is asked for.
"""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.tensor import distribute_tensor
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from flash.seeds import derived
from flash.system import machine
from flash.trainer.checkpoint import ADAPTERS_FILE
from flash.trainer.config import ALL_LINEAR, LoraConfig
from flash.trainer.scorer import TokenScorer

_CONFIG_FILE = "adapter_config.json"
_NAME = "default"  # PEFT's, of the only adapter
_OWN = ".base_layer."  # in the name of what is a layer's own
_ADAPTERS = (".lora_A.", ".lora_B.")
_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # on rank 0


def check_installed(settings: LoraConfig) -> None:
    """ValueError if there are to be adapters, and PEFT is not installed."""
    if settings.rank and importlib.util.find_spec("peft") is None:
        raise ValueError(
            f"trainer.lora.rank={settings.rank} needs PEFT, which is not installed: "
            f"{machine.how_to_install('lora')}, or leave trainer.lora out"
        )


def check_targets(model: Any, settings: LoraConfig) -> None:
    """ValueError if the model, with weights or without, has not what adapters are asked for."""
    if not settings.rank or settings.targets == (ALL_LINEAR,):
        return
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    found = {name.rpartition(".")[2] for name, m in linear.items() if m is not _head(model)}
    for target in settings.targets:
        matched = [name for name in linear if f".{name}".endswith(f".{target}")]
        if not matched or any(linear[name] is _head(model) for name in matched):
            why = "is the head, which has none" if matched else "is no linear module of the model"
            raise ValueError(
                f"trainer.lora.targets={list(settings.targets)}: {target!r} {why}: there are "
                f"{', '.join(sorted(found))}, or {ALL_LINEAR}"
            )


def _head(model: Any) -> nn.Module:
    head: nn.Module = model.get_output_embeddings()
    return head


def add_adapters(model: Any, settings: LoraConfig, *, source: str, half: bool) -> None:
    """Freezes the model's weights and gives each target an adapter, which begins later.

    Args:
        model: on torch's meta device, in float32, not sharded yet.
        source: what it is loaded from, which checkpoints name.
        half: layers compute in bfloat16, and so frozen weights are kept; adapters in float32.

    ValueError if PEFT is not installed, or the model has not what is asked for.
    """
    check_installed(settings)
    check_targets(model, settings)
    from peft import LoraConfig as PeftConfig  # noqa: PLC0415  (it is optional)
    from peft import inject_adapter_in_model  # noqa: PLC0415

    all_linear = settings.targets == (ALL_LINEAR,)
    config = PeftConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=ALL_LINEAR if all_linear else list(settings.targets),
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(Path(source).resolve()) if Path(source).is_dir() else source,
    )
    inject_adapter_in_model(config, model, low_cpu_mem_usage=True)
    for parameter in model.parameters() if half else ():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()


@torch.no_grad()
def begin_adapters(scorer: TokenScorer, *, seed: int, device: Any) -> None:
    """Gives adapters their first weights, which add nothing: the same on however many ranks.

    The scorer is sharded, and all but adapters has its weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived(seed, "adapters"))
        for name, layer in scorer.named_modules():
            if isinstance(layer, nn.Linear) and is_adapter(f"{name}.weight"):
                empty: Any = layer.weight
                whole = nn.Linear(layer.in_features, layer.out_features, bias=False).weight
                if ".lora_B." in name:
                    whole.zero_()
                shards = distribute_tensor(
                    whole.to(device), empty.device_mesh, empty.placements, src_data_rank=None
                )
                layer.weight = nn.Parameter(shards)


def own_layer(layer: nn.Module) -> nn.Module:
    """What an adapter was added to; the layer itself, if it has none."""
    own: nn.Module = getattr(layer, "base_layer", layer)
    return own


def without_adapters(scorer: TokenScorer) -> Callable[..., Tensor]:
    """Scores as the model did before it had adapters."""
    from peft.helpers import rescale_adapter_scale  # noqa: PLC0415  (it is optional)

    def score(*args: Any, **settings: Any) -> Tensor:
        with rescale_adapter_scale(scorer, 0):
            logprobs_T: Tensor = scorer(*args, **settings)
        return logprobs_T

    return score


# ── what is exported ─────────────────────────────────────────────────────────────────────────


def is_adapter(name: str) -> bool:
    """Whether the parameter of that name is an adapter's."""
    return any(part in name for part in _ADAPTERS)


def own_name(name: str) -> str:
    """A parameter's in the model without adapters."""
    return name.replace(_OWN, ".")


@torch.no_grad()
def merged(model: Any, name: str, weight: Tensor) -> Tensor:
    """A parameter with what its adapter adds, in float32; without one as it is.

    Of a sharded model a collective of all ranks, each of which computes its own rows.
    """
    if not name.endswith(f"{_OWN}weight"):
        return weight
    layer = model.get_submodule(name.removesuffix(f"{_OWN}weight"))
    added: Tensor = layer.get_delta_weight(_NAME)
    return weight.float() + added


# ── checkpoints ──────────────────────────────────────────────────────────────────────────────


def gathered_adapters(model: Any) -> dict[str, Tensor]:
    """Copies of them under the names that they have in files, on rank 0; a collective."""
    state: Any = get_model_state_dict(model, options=replace(_WHOLE, ignore_frozen_params=True))
    # Of one rank on a CPU they are the parameters themselves.
    return {_in_file(name): tensor.clone() for name, tensor in state.items() if is_adapter(name)}


def write_adapters(model: Any, adapters: dict[str, Tensor], directory: Path) -> None:
    """Writes what was gathered where PEFT and transformers find it, with what it belongs to."""
    model.peft_config[_NAME].save_pretrained(directory)
    save_file(adapters, directory / ADAPTERS_FILE, metadata={"format": "pt"})


def load_adapters(model: Any, directory: Path, settings: LoraConfig) -> None:
    """Goes on from those of `write_adapters`, each rank with its share of them.

    ValueError if they were made with other settings.
    """
    kept = load_file(directory / ADAPTERS_FILE)
    names = {_in_file(name): name for name, _ in model.named_parameters() if is_adapter(name)}
    shapes = {name: model.get_parameter(own).shape for name, own in names.items()}
    alpha = json.loads((directory / _CONFIG_FILE).read_text())["lora_alpha"]
    if alpha != settings.alpha or {name: t.shape for name, t in kept.items()} != shapes:
        raise ValueError(
            f"{directory} has adapters of another rank, alpha or other targets than trainer.lora: "
            f"give it as the run had it, or begin at the first model"
        )
    state: dict[str, Any] = {names[name]: tensor for name, tensor in kept.items()}
    set_model_state_dict(model, state, options=replace(_WHOLE, strict=False))


def adapted_model(adapters: Path) -> Any:
    """The model that those of `write_adapters` belong to, as its files have it, with them beside
    its weights: what `merged` takes. ValueError if that model is not where it was."""
    from peft import PeftModel  # noqa: PLC0415  (it is optional)

    model_class: Any = AutoModelForCausalLM  # its types are not published
    base = json.loads((adapters / _CONFIG_FILE).read_text())["base_model_name_or_path"]
    try:
        model = model_class.from_pretrained(base, dtype="auto")
    except OSError as error:
        raise ValueError(
            f"{adapters} has adapters of the model {base!r}, which can't be loaded: bring it back, "
            f"or name where it is in {_CONFIG_FILE} (base_model_name_or_path) ({error})"
        ) from error
    PeftModel.from_pretrained(model, adapters)  # puts them into it
    return model


def _in_file(name: str) -> str:
    return f"base_model.model.{name.replace(f'.{_NAME}.', '.')}"
