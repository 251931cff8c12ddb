"""Models for packed sequences, whole in this process."""

from pathlib import Path
from typing import Any

import torch
import transformers

from flash.trainer.attention import PACKED_ATTENTION

Model: Any = transformers.AutoModelForCausalLM  # its types are not published


def load_packed(folder: Path) -> Any:
    """In float32; it evaluates."""
    return Model.from_pretrained(folder, dtype=torch.float32, attn_implementation=PACKED_ATTENTION)
