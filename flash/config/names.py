"""Other ways to write a setting: a section by its bare value, a field by another system's name."""

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
