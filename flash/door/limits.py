"""How much one token may ask for."""

import asyncio
import contextlib
import math
from collections.abc import Iterator

from flash.door.errors import ApiError


class Allowance:
    """So many responses at a time, so many requests a second.

    Requests come out of a bucket that holds a second's worth and refills evenly.
    """

    def __init__(self, *, max_concurrent: int, requests_per_s: float) -> None:
        self._max_concurrent = max_concurrent
        self._requests_per_s = requests_per_s
        self._running = 0
        self._clock = asyncio.get_running_loop().time
        self._left = self._most = max(1.0, requests_per_s)
        self._filled_at = self._clock()

    def take_request(self) -> None:
        """Counts one request; ApiError 429 if there were too many."""
        now = self._clock()
        self._left = min(self._most, self._left + (now - self._filled_at) * self._requests_per_s)
        self._filled_at = now
        if self._left < 1:
            raise _too_many(
                f"more than {self._requests_per_s:g} requests a second with this token",
                wait_s=(1 - self._left) / self._requests_per_s,
            )
        self._left -= 1

    @contextlib.contextmanager
    def responses(self, n: int) -> Iterator[None]:
        """Room for n responses while they are sampled; ApiError 429 if there is none."""
        if n > self._max_concurrent:
            raise ApiError(
                400, f"n={n}: at most {self._max_concurrent} responses at a time", param="n"
            )
        if self._running + n > self._max_concurrent:
            raise _too_many(
                f"more than {self._max_concurrent} responses at a time with this token", wait_s=1
            )
        self._running += n
        try:
            yield
        finally:
            self._running -= n


def _too_many(message: str, *, wait_s: float) -> ApiError:
    headers = {"Retry-After": str(max(1, math.ceil(wait_s)))}
    return ApiError(429, message, code="rate_limit_exceeded", headers=headers)
