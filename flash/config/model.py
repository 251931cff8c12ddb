"""What `model` may name: a model that exists, or a small one made and taught on the spot."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SMALL = "small"
_HEADS = ("num_attention_heads", "n_head")


def check_model(model: str) -> None:
    """ValueError if it is neither a hub name nor a directory that holds a model."""
    path = Path(model).expanduser()
    if path.suffix == ".gguf" or (path.is_dir() and _holds_gguf_alone(path)):
        raise ValueError(
            "GGUF files can't be trained: give the safetensors that they were made from, in a "
            "directory with their config.json"
        )
    if _is_hub_name(model):
        return
    if not model or not path.is_dir():
        raise ValueError("there is no such directory; a hub name has the form org/model")
    if not (path / "config.json").is_file():
        raise ValueError(
            "the directory holds no config.json, so it is not a model; of a checkpoint, flash "
            "export CHECKPOINT --out DIR makes one"
        )
    _settings(path)


def check_heads(config: Mapping[str, Any], *, model: str, tensor_parallel: int) -> None:
    """ValueError if servers can't share out the heads of a model of this `config.json`.

    vLLM and SGLang give each GPU as many heads of queries, and as many of keys, or one of these to
    several.
    """
    config = {**config, **(config.get("text_config") or {})}
    heads = next((config[name] for name in _HEADS if isinstance(config.get(name), int)), None)
    if heads is None:
        return
    keys = config.get("num_key_value_heads") or heads
    if heads % tensor_parallel or (keys % tensor_parallel and tensor_parallel % keys):
        of_keys = f" and {keys} of keys" if keys != heads else ""
        fit = [n for n in range(1, heads + 1) if not heads % n and not (keys % n and n % keys)]
        raise ValueError(
            f"engine.tensor_parallel={tensor_parallel} with the {heads} heads{of_keys} of "
            f"model={model!r}, which can't be shared out to so many GPUs: use "
            f"one of {', '.join(map(str, fit))}"
        )


def _holds_gguf_alone(path: Path) -> bool:
    return any(path.glob("*.gguf")) and not any(path.glob("*.safetensors"))


def read_config(model: str) -> Mapping[str, Any] | None:
    """What config.json says of a model, if it is here; ValueError for a file that says nothing."""
    path = Path(model).expanduser()
    if _is_hub_name(model) and not path.is_dir():
        return None
    return _settings(path)


def _settings(path: Path) -> Mapping[str, Any]:
    try:
        settings = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"its config.json can't be read ({error}): load a model again") from error
    if not isinstance(settings, dict):
        raise ValueError("its config.json holds no settings of a model: load a model again")
    return settings


def _is_hub_name(model: str) -> bool:
    """Whether it can't be meant as a path: `name` or `org/name`, and no directory of that name."""
    parts = model.split("/")
    return (
        len(parts) <= 2
        and all(re.fullmatch(r"\w[\w.-]*", part) for part in parts)
        and not Path(parts[0]).is_dir()
    )
