"""How long a text a model reads at all."""

from collections.abc import Mapping
from typing import Any

_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len")
# Of these the number of positions tells already how far they stretch.
_TOLD = ("default", "llama3", "longrope", "su")


def positions_of(config: Mapping[str, Any]) -> int | None:
    """The most tokens that a model of this `config.json` was made for; None if it names none."""
    config = {**config, **(config.get("text_config") or {})}
    known: list[int] = [config[name] for name in _NAMES if isinstance(config.get(name), int)]
    if not known:
        return None
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, Mapping))]
    return max(known[0], *(_stretched(known[0], kind) for kind in kinds))


def _stretched(positions: int, rope: Mapping[str, Any]) -> int:
    """By positions that are interpolated."""
    if rope.get("rope_type", rope.get("type", "default")) in _TOLD:
        return positions
    original = rope.get("original_max_position_embeddings") or positions
    return int(original * (rope.get("factor") or 1))


def check_positions(config: Mapping[str, Any], *, model: str, max_sequence_tokens: int) -> None:
    """ValueError if the agent's sequences may be longer than the model reads."""
    positions = positions_of(config)
    if positions is not None and max_sequence_tokens > positions:
        raise ValueError(
            f"agent.max_sequence_tokens={max_sequence_tokens} exceeds the {positions} positions of "
            f"model={model!r}: set it to {positions} or less"
        )
