"""`python -I inside.py`, in a sandbox: calls a function as its standard input says.

Its answer is, as JSON on its standard output, whether the function returned, and what; else what it
raised. A function that is at fault otherwise has no answer. What it prints goes to standard error.
"""

import asyncio
import importlib
import inspect
import json
import os
import sys
from collections.abc import Awaitable, Callable, Mapping
from operator import attrgetter
from typing import Any


def main() -> None:
    request = json.load(sys.stdin)
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answer:
        os.dup2(2, 1)
        sys.path[:0] = request["path"]
        module, _, attribute = request["name"].partition(":")
        function = attrgetter(attribute)(importlib.import_module(module))
        if "arguments" in request:
            json.dump(called(function, request["arguments"]), answer)


def called(function: Callable[..., Any], arguments: Mapping[str, Any]) -> tuple[bool, str]:
    try:
        result = function(**arguments)
        if inspect.isawaitable(result):
            result = asyncio.run(waited_for(result))
    except Exception as error:  # the boundary to the user's function; the policy is told
        return False, " ".join(f"{type(error).__name__}: {error}".split())
    if isinstance(result, str):
        return True, str.__str__(result)
    import msgspec  # noqa: PLC0415 (most answers are texts)

    return True, msgspec.json.encode(result).decode()


async def waited_for(result: Awaitable[Any]) -> Any:
    return await result


if __name__ == "__main__":
    main()
