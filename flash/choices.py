"""Choices that settings name and parts make; apart, because settings are read without NumPy."""

from typing import Literal

UpdateMode = Literal["keep", "keep_stale_kv", "abort", "wait"]
"""What a publish does to requests under way."""
