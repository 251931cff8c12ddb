"""Functions that are tools, and such as are none."""

import asyncio
import os
import time


async def add(a: int, b: int) -> int:
    """Adds two numbers.

    Args:
        a: the one
        b: the other
    """
    return a + b


async def _other() -> None:
    """Another."""


other_add = _other
other_add.__name__ = "add"


async def table() -> dict[str, list[int]]:
    """Rows."""
    return {"rows": [1, 2]}


async def fails(how: str) -> None:
    """Raises.

    Args:
        how: what it says
    """
    raise ValueError(how)


async def surrogate() -> str:
    """Half a pair."""
    return "\ud800"


async def thing() -> object:
    """No data."""
    return object()


async def leaves() -> None:
    """Exits."""
    raise SystemExit("enough")


async def cancels() -> None:
    """Is cancelled by nobody."""
    raise asyncio.CancelledError


async def untyped(a) -> None:  # type: ignore[no-untyped-def]
    """Of any type.

    Args:
        a: it
    """


async def undescribed(a: int) -> None:
    """Of an argument it says nothing."""


def pid(fail: bool = False) -> int:
    """Its process.

    Args:
        fail: raise
    """
    if fail:
        raise ValueError("as asked")
    return os.getpid()


def blocks() -> None:
    """For ever."""
    time.sleep(1e6)


def dies() -> None:
    """With its process."""
    os._exit(3)


def prints(what: str) -> str:
    """Says and answers.

    Args:
        what: it
    """
    print(what)
    return what


def hoards() -> int:
    """Takes 4 GB."""
    return len(b"x" * (4 << 30))
