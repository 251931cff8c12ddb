"""A model's files, checked before anything is started with them: their headers are read, no weight.

    config.json ─► the model, on torch's meta device ┐
    headers of the weight files ─► names, shapes ────┴► what lacks, what fits nowhere

transformers draws weights that lack at random and passes over those without a place, so that a run
would go on with another model than the files say.
"""

import contextlib
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig, load_state_dict
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils.hub import cached_file

from flash.system.quiet import no_progress_bars
from flash.trainer.attention import PACKED_ATTENTION
from flash.trainer.checkpoint import ADAPTERS_FILE, STATE_FILE
from flash.trainer.config import LoraConfig
from flash.trainer.lora import check_targets
from flash.trainer.router_replay import Routers
from flash.trainer.scorer import TokenScorer, by_itself
from flash.trainer.self_test import check_layers
from flash.trainer.sequence_parallel import check_config
from flash.trainer.small_copy import check_small_copy

# In the order in which transformers looks for them.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# Text models of families that also see or hear keep these in their tokenizer, past the embedding.
_PLACEHOLDERS = ("image_token", "video_token", "audio_token")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json")


def check_files(
    source: str,
    *,
    field: str,
    lora: LoraConfig | None = None,
    sequence_ranks: int = 1,
    replays: bool = False,
) -> Any:
    """The model's configuration, if its weights are whole and fit it, and it can be trained.

    Args:
        source: a directory or a hub name; what is not here yet is fetched.
        field: the setting that names it.
        lora: the adapters that it is to have.
        sequence_ranks: that are to share each of its passes.
        replays: whether its routers are to take the experts that workers chose.

    Raises ValueError with what is wrong and what to do.
    """
    try:
        config = read_config(source)
        check_config(config, sequence_ranks)
        # bfloat16, which every kind of layer can be given there
        model = empty_model(config, torch.bfloat16)
        _check_weights(model, _headers(source))
        with contextlib.suppress(RuntimeError):  # it takes weights, so the ranks will see
            check_layers(TokenScorer(model))
        if replays:
            Routers(model)
        check_small_copy(config)
    except ValueError as error:
        why = " ".join(str(error).split())
        raise ValueError(f"{field}={source!r}: {why}") from error
    if lora is not None:
        check_targets(model, lora)
    return config


def count_parameters(source: str) -> int:
    """Of the model's files, by their headers. ValueError if they are not whole."""
    return sum(tensor.numel() for tensor in _headers(source).values())


def check_vocabulary(tokenizer: Any, config: Any, *, source: str) -> None:
    """ValueError if the tokenizer gives tokens that the model has no embedding for."""
    rows = int(config.get_text_config().vocab_size)
    placeholders = {getattr(tokenizer, name, None) for name in _PLACEHOLDERS}
    special = set(tokenizer.all_special_tokens)
    past = {
        token: number
        for token, number in tokenizer.get_vocab().items()
        if number >= rows
        and token not in placeholders
        and (token not in special or _is_in_files(source, token))
    }
    if past:
        first = min(past, key=past.__getitem__)
        raise ValueError(
            f"model={source!r}: its tokenizer is larger than the model: {len(past)} tokens, "
            f"the first {first!r} with the id {past[first]}, are past the vocab_size={rows} of "
            f"config.json: give the tokenizer that belongs to the model, or resize the model's "
            f"embedding"
        )


def _is_in_files(source: str, token: str) -> bool:
    """If not, the tokenizer's class has added it of its own accord, and no text has it."""
    paths = filter(None, (_file(source, name) for name in _TOKENIZER_FILES))
    return any(token in path.read_text(encoding="utf-8") for path in paths)


def read_config(source: str) -> Any:
    """ValueError if it is none of a model that transformers makes here and that can be trained."""
    path = _file(source, "config.json")
    if path is None and _file(source, ADAPTERS_FILE) is not None:
        raise ValueError(
            "there are adapters and no model: make one of the checkpoint that they are of (flash "
            "export CHECKPOINT --out DIR), and give that"
        )
    if path is None:
        raise ValueError("there is no config.json, so it is not a model")
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        kind = written["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"config.json names no model_type ({error!r}): fetch the model again"
        ) from error
    if kind not in CONFIG_MAPPING:
        own = "; code that comes with a model is not run" if "auto_map" in written else ""
        raise ValueError(
            f"config.json has model_type={kind!r}, which this version of transformers does not "
            f"know{own}: give another model, or update transformers"
        )
    if "quantization_config" in written:
        raise ValueError(
            "config.json has a quantization_config, and quantized weights can't be trained: give "
            "the model that they were made from"
        )
    try:
        return AutoConfig.from_pretrained(source)
    except Exception as error:  # the boundary to transformers' classes, which raise all kinds
        raise ValueError(f"config.json can't be used: correct it ({error})") from error


def empty_model(config: Any, dtype: torch.dtype) -> Any:
    """The causal language model, for packed sequences, on torch's meta device: without weights.

    ValueError if the configuration makes none.
    """
    model_class: Any = AutoModelForCausalLM  # its types are not published
    try:
        with torch.device("meta"):
            model: Any = model_class.from_config(
                config, dtype=dtype, attn_implementation=PACKED_ATTENTION
            )
    except Exception as error:  # the boundary to transformers' classes, which raise all kinds
        if isinstance(error, KeyError) and error.args == (PACKED_ATTENTION,):  # its own table
            raise ValueError(by_itself(config.model_type)) from error
        raise ValueError(
            f"config.json (model_type={config.model_type!r}) makes no causal language model: give "
            f"one that is, or correct its sizes ({type(error).__name__}: {str(error)[:200]})"
        ) from error
    return model


def weight_files(source: str) -> list[Path]:
    """Those with the weights, fetched if need be. ValueError if one is missing."""
    for single, index in (_WEIGHTS, _PICKLED):
        if (path := _file(source, single)) is not None:
            return [path]
        if (path := _file(source, index)) is not None:
            return _files_of(source, path)
    if (Path(source).parent / STATE_FILE).is_file():
        raise ValueError(
            "it is what a checkpoint has beside its weights: make a model of that (flash export "
            "CHECKPOINT --out DIR), and give it"
        )
    raise ValueError(
        f"there are no weights ({_WEIGHTS[0]}, or {_WEIGHTS[1]} and what it names): fetch the "
        f"model again, as safetensors"
    )


def _files_of(source: str, index: Path) -> list[Path]:
    """What an index names, if each file has what it shall have by it."""
    try:
        places: dict[str, str] = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index.name} is no index ({error!r}): fetch the model again") from error
    paths: list[Path] = []
    lacking = dict(places)
    for name in sorted(set(places.values())):
        path = _file(source, name)
        if path is None:
            raise ValueError(f"{name} is missing, which {index.name} names: fetch the model again")
        paths.append(path)
        for weight in _header(path):
            lacking.pop(weight, None)
    if lacking:
        weight = min(lacking)
        raise ValueError(
            f"{lacking[weight]} lacks {weight}, which {index.name} says is there: fetch the model "
            f"again"
        )
    return paths


def _headers(source: str) -> dict[str, Tensor]:
    """Names and shapes of the weights in the model's files, as tensors without data."""
    return {name: tensor for path in weight_files(source) for name, tensor in _header(path).items()}


def _header(path: Path) -> dict[str, Tensor]:
    try:
        return load_state_dict(path, map_location="meta")
    except (SafetensorError, OSError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path.name} can't be read, it is cut or damaged: fetch the model again ({error})"
        ) from error


def _file(source: str, name: str) -> Path | None:
    """A file of the model, fetched if need be; None if there is none."""
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    try:
        found = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise ValueError(
            f"{name} can't be fetched: check the name and the connection to the hub, or give a "
            f"directory ({error})"
        ) from error
    return None if found is None else Path(found)


def _check_weights(model: Any, headers: dict[str, Tensor]) -> None:
    """By transformers' own rules of names, tied weights and experts that are stored apart."""
    names: Any = get_model_conversion_mapping(model)
    settings = LoadStateDictConfig(
        device_map={"": "meta"}, ignore_mismatched_sizes=True, weight_mapping=names
    )
    with no_progress_bars():
        found: Any = convert_and_load_state_dict_in_model(model, headers, settings, None)[0]
    check_found(model, found)


def check_found(model: Any, found: Any) -> None:
    """Ties what is tied. ValueError if what transformers found in a model's files is not all of
    it, or more."""
    model.tie_weights(missing_keys=found.missing_keys, recompute_mapping=False)
    model._adjust_missing_and_unexpected_keys(found)
    remedy = "give the weights and the config.json of one model"
    if found.missing_keys:
        raise ValueError(f"its files lack {_some(found.missing_keys)}: {remedy}")
    if found.mismatched_keys:
        name, in_file, in_config = min(found.mismatched_keys)
        raise ValueError(
            f"{name} is {list(in_file)} in its files, and {list(in_config)} by its config.json (so "
            f"are {len(found.mismatched_keys)} weights): {remedy}"
        )
    if found.conversion_errors:
        name, why = min(found.conversion_errors.items())
        raise ValueError(f"{name} can't be made of what its files hold ({why}): {remedy}")
    if found.unexpected_keys:
        raise ValueError(
            f"its files hold {_some(found.unexpected_keys)}, which its config.json has no place "
            f"for: {remedy}"
        )


def _some(names: set[str]) -> str:
    first = sorted(names)[0]
    return f"the weight {first}" if len(names) == 1 else f"{len(names)} weights, {first} and others"
