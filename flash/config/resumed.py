"""What a resume can't change: what its checkpoint has already, whatever is configured."""

from collections.abc import Mapping
from typing import Any

from flash.config.model import SMALL
from flash.config.run import Config


def check_resumed(config: Config, before: Mapping[str, Any]) -> None:
    """ValueError for the first field that a run can't have otherwise than `before`."""
    now = config.model_dump(mode="json")
    for field in ("model", "seed", *(("policy", "warm_start") if config.model == SMALL else ())):
        name, was, wanted = _difference(field, before.get(field, now[field]), now[field])
        if was != wanted:
            raise ValueError(
                f"{name}={wanted!r} with checkpoint.resume: the run began with {was!r}, which is "
                f"what its checkpoint has: leave {name} as it was, or start anew under another name"
            )


def _difference(name: str, was: Any, now: Any) -> tuple[str, Any, Any]:
    """The innermost field that is not as it was; `name` itself if there is none."""
    if isinstance(was, Mapping) and isinstance(now, Mapping):
        for field, value in now.items():
            if field in was and was[field] != value:
                return _difference(f"{name}.{field}", was[field], value)
        return name, None, None
    return name, was, now
