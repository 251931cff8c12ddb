"""What sets one protocol apart from another: how answers and errors look."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flash.door.errors import ApiError
from flash.door.respond import Exchange, Response

Frame = tuple[str, Mapping[str, Any] | str]
"""Of a stream of server-sent events: the event's name, if they have names, and its data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """Of the routes that speak it. `whole` and `stream` are given the exchange, its responses in
    their order, and the model's name."""

    whole: Callable[[Exchange, Sequence[Response], str], Mapping[str, Any]]
    stream: Callable[[Exchange, Sequence[Response], str], Iterator[Frame]]
    error: Callable[[ApiError], Mapping[str, Any]]
