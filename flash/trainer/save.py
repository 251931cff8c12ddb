"""A trained model as a Hugging Face directory, with what lay beside the weights it began with.

    weights, config.json          ◄── export.py, from the model
    tokenizer, template, how to generate ◄── copied, as the model's makers gave them

transformers loads much that it refuses to save: a temperature without do_sample in
generation_config.json, or a tokenizer whose class can't write what it has read.
"""

import shutil
from pathlib import Path
from typing import Any

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


def save_beside(model: Any, directory: Path, *, source: str) -> None:
    """Writes how to generate, and copies what lay beside the weights that the model began with.

    Args:
        source: what the model was loaded from: a directory or a hub name.
    """
    model.generation_config.to_json_file(directory / GENERATION_CONFIG_NAME, use_diff=True)
    folder = Path(source)
    if not folder.is_dir():
        folder = Path(str(cached_file(source, CONFIG_NAME))).parent
    for path in (path for pattern in _PATTERNS for path in folder.glob(pattern)):
        copy = directory / path.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
