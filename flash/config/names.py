"""Names in a configuration: other ways to write a setting, and what a user may call things."""

import re
from collections.abc import Mapping
from typing import Any

# What a section's bare value stands for: `env: frozen_lake`, `engine: embedded`.
BARE = {
    "env": "name",
    "reward": "name",
    "engine": "kind",
    "cluster": "kind",
    "objective": "name",
    "advantages": "name",
}
# Other systems' names of our fields.
ALIASES = {"async_generation_ratio": "alpha"}


def without_aliases(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings under our names. ValueError if two names of one field disagree."""
    settings = dict(given)
    for alias, name in ALIASES.items():
        if alias in settings:
            value = settings.pop(alias)
            if settings.setdefault(name, value) != value:
                raise ValueError(
                    f"{name}={settings[name]} and {alias}={value} are two names of one field: "
                    f"give one"
                )
    return settings


def check_names(names: Mapping[str, Any], where: str = "") -> None:
    """ValueError for a name that no metric and no folder can have; `where` it was given."""
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,40}", str(name)):
            raise ValueError(
                f"{where}{name!r} is no name: use at most 40 letters, digits, '_' and '-'"
            )
