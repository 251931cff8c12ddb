"""A model on its way from its files into the shards of the ranks; no rank ever holds it whole.

    config.json ─► the model, on torch's meta device ─► FSDP's shards of nothing
    weight files ─► of each weight this rank's rows ───────────┴─► the shards

What transformers does with names, experts that are stored apart, tied weights and buffers that no
file has, it does here too: each rank with its own rows.
"""

import gc
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    convert_and_load_state_dict_in_model,
    set_param_for_module,
)
from transformers.modeling_utils import LoadStateDictConfig, load_state_dict

from flash.trainer.config import LoraConfig, TrainerConfig
from flash.trainer.fused import fuse, fuse_layers
from flash.trainer.layers import compile_layers
from flash.trainer.lora import add_adapters, begin_adapters, own_layer
from flash.trainer.model_files import check_found, empty_model, read_config, weight_files
from flash.trainer.router_replay import Routers
from flash.trainer.scorer import TokenScorer
from flash.trainer.self_test import check_packed, check_replay
from flash.trainer.sequence_parallel import SequenceGroup, check_config
from flash.trainer.sharding import shard


def unloaded(source: str) -> Any:
    """The causal language model, in float32, on torch's meta device; it evaluates.

    Trained it never is in torch's sense: so it has no dropout and no jitter of routers, wherever
    a model has them; a sampler has none.
    """
    # Weights and optimizer are float32 everywhere; on a GPU layers compute in bfloat16.
    return empty_model(read_config(source), torch.float32).eval()


def sharded_scorer(
    source: str,
    config: TrainerConfig,
    *,
    device: Any,
    half: bool,
    adapters: int | None = None,
    group: SequenceGroup | None = None,
    replays: bool = False,
) -> TokenScorer:
    """What scores tokens with a model, loaded and sharded over all ranks; a collective.

    `adapters`: their seed, if it gets those of `config.lora`. `group`: the ranks that share each
    pass. `replays`: whether its routers take the experts that workers chose.

    ValueError if the model's files are not whole, or it can't compute packed sequences, or not with
    such experts. That is compared in float32, also where layers compute in bfloat16.
    """
    checked: Any = _unloaded_scorer(source, config, half=False, group=group)
    load_weights(checked.model, source, device)
    # FSDP keeps the root's own weights together after a forward pass of all of it, so that the
    # test can call the model in it.
    check_packed(checked)
    fused = not config.compile and fuse(checked)  # torch.compile fuses the same
    if replays:
        checked.routers = Routers(checked.model, group=group)
        check_replay(checked)
    checked.reshard()
    scorer: TokenScorer = checked
    if half or adapters is not None:
        lora = None if adapters is None else config.lora
        scorer = _unloaded_scorer(source, config, half=half, lora=lora, group=group)
        _take_over(scorer, checked)
        del checked
        gc.collect()  # FSDP's states refer to each other, and keep copies where rows are uneven
        if adapters is not None:
            begin_adapters(scorer, seed=adapters, device=device)
        if fused:
            fuse_layers(scorer.model)
        if replays:
            scorer.routers = Routers(scorer.model, group=group)
    if config.compile:
        compile_layers(scorer.model)
    return scorer


def load_weights(model: Any, source: str, device: Any) -> None:
    """Reads a model's weights into its shards, each rank its rows; the rest of it is made.

    Args:
        model: sharded, on torch's meta device. A model without a head leaves out the files' head.
        source: a directory or a hub name.

    ValueError if the files are not that model's.
    """
    names: Any = get_model_conversion_mapping(model)
    _check_rows(model, names)
    settings = LoadStateDictConfig(
        device_map={"": device}, ignore_mismatched_sizes=True, weight_mapping=names
    )
    weights: dict[str, Any] = {}  # not read yet
    for path in weight_files(source):
        weights |= _rows_of(path) if path.suffix == ".safetensors" else load_state_dict(path)
    found: Any = convert_and_load_state_dict_in_model(model, weights, settings, None)[0]
    _fill_empty_shards(model, found, device)
    if model.base_model is model:
        found.unexpected_keys.clear()
    check_found(model, found)
    _check_tied(model)
    # What no file need have, and buffers that none has.
    made = {name for name, tensor in model.state_dict().items() if tensor.is_meta}
    model._move_missing_keys_from_meta_to_device(made, settings.device_map, None, None)
    model._initialize_missing_keys(is_quantized=False)


def _rows_of(path: Path) -> dict[str, "_Rows"]:
    with safe_open(path, framework="pt") as file:
        return {
            name: _Rows(path, name, file.get_slice(name).get_shape())
            for name in file.keys()  # noqa: SIM118
        }


class _Rows:
    """A weight of a safetensors file, which is mapped into memory only while it is read."""

    def __init__(self, path: Path, name: str, shape: list[int]) -> None:
        self._path = path
        self._name = name
        self._shape = shape

    def get_shape(self) -> list[int]:
        return self._shape

    def __getitem__(self, rows: Any) -> Tensor:
        with safe_open(self._path, framework="pt") as file:
            read: Tensor = file.get_slice(self._name)[rows]
            return read.clone()  # the file may change


def _unloaded_scorer(
    source: str,
    config: TrainerConfig,
    *,
    half: bool,
    lora: LoraConfig | None = None,
    group: SequenceGroup | None = None,
) -> TokenScorer:
    model = unloaded(source)
    check_config(model.config, config.sequence_ranks)
    scorer = TokenScorer(model, group=group)
    if lora is not None:
        add_adapters(model, lora, source=source, half=half)
    shard(scorer, model, ranks=dist.get_world_size(), half=half, shard_size=config.shard_size)
    return scorer


def _check_rows(model: Any, names: Any) -> None:
    """ValueError if rows of the files' weights are not rows of the model's, and that matters."""
    divided = any(
        isinstance(parameter, DTensor) and parameter.to_local().shape != parameter.shape
        for parameter in model.parameters()
    )
    for rule in names if divided else ():
        for made in rule.operations if isinstance(rule, WeightConverter) else ():
            by_rows = isinstance(made, MergeModulelist) and made.dim == 0
            beside = isinstance(made, Concatenate) and made.dim > 0
            if not by_rows and not beside:
                raise ValueError(
                    f"model_type={model.config.model_type!r} makes {rule.target_patterns[0]} of "
                    f"whole weights ({type(made).__name__}), of which no rank can read a part: "
                    f"use trainer.ranks=1, or trainer.shard_size=1"
                )


@torch.no_grad()
def _fill_empty_shards(model: Any, found: Any, device: Any) -> None:
    """Where there are fewer experts than ranks, some rank has none to stack, which is no error."""
    set_own: Any = set_param_for_module  # its types have every model quantized
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta and isinstance(parameter, DTensor):
            own = parameter.to_local()
            if not own.numel():
                set_own(model, name, own.new_empty(own.shape, device=device), found, None)
                found.conversion_errors.pop(name, None)


def _check_tied(model: Any) -> None:
    """ValueError if weights that FSDP knows as one are two in the files."""
    untied = model.get_expanded_tied_weights_keys(all_submodels=True).keys()
    if untied := sorted(untied - model.all_tied_weights_keys.keys()):
        raise ValueError(
            f"its files hold another {untied[0]} than what config.json ties it to: set "
            f"tie_word_embeddings=false there"
        )


def _take_over(scorer: TokenScorer, other: TokenScorer) -> None:
    """The parameters and buffers of another scorer of the same model, without adapters; each
    parameter in the dtype that it has here, and trained if it is here."""
    taken: dict[nn.Parameter, nn.Parameter] = {}
    for name, of in other.named_modules():
        to = own_layer(scorer.get_submodule(name))
        for own, parameter in of.named_parameters(recurse=False):
            if parameter not in taken:
                here = to.get_parameter(own)
                taken[parameter] = nn.Parameter(
                    parameter.detach().to(here.dtype), requires_grad=here.requires_grad
                )
            setattr(to, own, taken[parameter])
        for own, buffer in of.named_buffers(recurse=False):
            setattr(to, own, buffer)
