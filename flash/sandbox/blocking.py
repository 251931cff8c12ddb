"""A sandbox for code that is not async: each call waits for its answer."""

import asyncio
import threading
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from flash.sandbox.sandbox import WORK, Outcome, Sandbox

_T = TypeVar("_T")


class BlockingSandbox:
    """A sandbox as an environment uses it, whose `step` is a plain call.

    Opened at once; `close` ends it. Its event loop runs in a thread of its own, which may be used
    beside a running event loop, and lasts as long as the sandbox: where a process is to die with
    its parent, the kernel means the thread that started it.
    """

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._loop = asyncio.SelectorEventLoop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sandbox", daemon=True)
        self._thread.start()
        try:
            self._wait(sandbox.__aenter__())
        except BaseException:
            self._end()
            raise

    def run(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        cwd: str = WORK,
        seconds: float | None = None,
        output_bytes: int | None = None,
    ) -> Outcome:
        """As `Sandbox.run`, likewise those below."""
        return self._wait(
            self._sandbox.run(
                argv, stdin=stdin, env=env, cwd=cwd, seconds=seconds, output_bytes=output_bytes
            )
        )

    def write(self, path: str, data: bytes) -> None:
        self._wait(self._sandbox.write(path, data))

    def read(self, path: str) -> bytes:
        return self._wait(self._sandbox.read(path))

    def copy_in(self, folder: Path, path: str = WORK) -> None:
        self._wait(self._sandbox.copy_in(folder, path))

    def close(self) -> None:
        """Kills everything in it, and waits until it has ended."""
        try:
            self._wait(self._sandbox.aclose())
        finally:
            self._end()

    def _wait(self, call: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(call, self._loop).result()

    def _end(self) -> None:
        self._wait(self._loop.shutdown_default_executor())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
