"""A trained model as a Hugging Face directory, with what lay beside the weights it began with.

    weights, config.json          ◄── transformers, from the model
    tokenizer, template, how to generate ◄── copied, as the model's makers gave them

transformers loads much that it refuses to save: a temperature without do_sample in
generation_config.json, or a tokenizer whose class can't write what it has read.
"""

import shutil
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import GenerationConfig
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME
from transformers.utils.hub import cached_file

_PATTERNS = (
    "tokenizer*.*",
    "vocab*.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*.*",
    "additional_chat_templates/*.jinja",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "*processor_config.json",
    GENERATION_CONFIG_NAME,
)


def save_model(model: Any, directory: Path, *, source: str, weights: dict[str, Tensor]) -> None:
    """Writes a Hugging Face model.

    Args:
        source: what the model was loaded from: a directory or a hub name.
        weights: whole, under the model's own names.
    """
    generation_class: Any = GenerationConfig  # its types are not published
    generation, model.generation_config = model.generation_config, generation_class()
    try:
        model.save_pretrained(directory, state_dict=weights)
    finally:
        model.generation_config = generation
    generation.to_json_file(directory / GENERATION_CONFIG_NAME, use_diff=True)
    copy_beside(source, directory)


def copy_beside(source: str, directory: Path) -> None:
    """What lay beside the weights that a model was loaded from."""
    folder = Path(source)
    if not folder.is_dir():
        folder = Path(str(cached_file(source, CONFIG_NAME))).parent
    for path in (path for pattern in _PATTERNS for path in folder.glob(pattern)):
        copy = directory / path.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
