"""Child processes of ours that answer calls: environment hosts and trainer ranks.

The parent starts `python -m module` with one end of a socket pair and awaits `call(method, …)`;
the child runs `serve(handler)`, which answers calls one at a time, in order. Messages have their
length in front. Calls are pickles: what we send is ours. So are the answers of children that run
our code alone (`Pickles`); of those that run a user's, answers are msgpack of declared types
(`Declared`), because to read a pickle is to run what it says. A child runs under a guard
(`flash/system/guard.py`), which ends it with all that it started when its parent ends or kills it.
"""

import asyncio
import atexit
import contextlib
import ctypes
import gc
import itertools
import os
import pickle
import re
import signal
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any, Protocol, get_type_hints

import msgspec

from flash.errors import EpisodeFailure, ProcessFailure
from flash.system.guarded import Guarded, start_guarded

_LENGTH = struct.Struct("!Q")
_FD_VARIABLE = "FLASH_CHILD_FD"
PARENT_PID_VARIABLE = "FLASH_PARENT_PID"  # for die_with_parent
_LOG_TAIL_BYTES = 4000
_EXIT_GRACE_S = 5.0
_ERROR_CHARS = 100_000
_ERROR = re.compile(r"\b[A-Z]\w*(Error|Exception): .+")


class Answers(Protocol):
    """How a child's answers are read. None is longer than `max_bytes`."""

    max_bytes: int

    def read(self, answer: bytes, methods: Mapping[int, str]) -> tuple[int, bool, Any]:
        """Which call it answers, whether that went well, and its result or its error's text.

        `methods` are those of the calls without an answer. Raises for what is none.
        """
        ...


class Pickles:
    """Answers of children that run our code alone."""

    max_bytes = 1 << 62

    def read(self, answer: bytes, methods: Mapping[int, str]) -> tuple[int, bool, Any]:
        call_id, ok, value = pickle.loads(answer)
        return call_id, ok, value


class Declared:
    """Answers of children that run a user's code: plain data, as the methods declare it.

    Args:
        handler: the class that answers there, with `serve(…, write=written)`.
    """

    max_bytes = 64 << 20  # more than an environment's longest texts in all

    def __init__(self, handler: type) -> None:
        self._handler = handler
        self._envelope = msgspec.msgpack.Decoder(tuple[int, bool, msgspec.Raw])
        self._error = msgspec.msgpack.Decoder(str)
        self._results = {
            name: msgspec.msgpack.Decoder(get_type_hints(method)["return"])
            for name, method in vars(handler).items()
            if not name.startswith("_")
        }

    def read(self, answer: bytes, methods: Mapping[int, str]) -> tuple[int, bool, Any]:
        call_id, ok, value = self._envelope.decode(answer)
        result = self._results[methods[call_id]]
        return call_id, ok, (result if ok else self._error).decode(value)

    def __reduce__(self) -> tuple[type["Declared"], tuple[type]]:
        return Declared, (self._handler,)


class Process(Protocol):
    """One that was started and answers calls, as `Child` does: here, or on another node."""

    @property
    def name(self) -> str: ...

    @property
    def alive(self) -> bool: ...

    async def call(self, method: str, *args: Any, timeout_s: float | None = None) -> Any: ...

    async def wait_dead(self) -> ProcessFailure: ...

    async def stop(self, grace_s: float = 5.0) -> None: ...

    def kill(self) -> None: ...


class StartProcess(Protocol):
    """Starts `python -m module`, as `Child.start` does, here or on another node.

    Raises ProcessFailure if there is no place for it.
    """

    async def __call__(
        self, module: str, *, name: str, log_path: Path, answers: Answers | None = None
    ) -> Process: ...


class Child:
    """One child process; make it with `await Child.start(…)`."""

    def __init__(
        self,
        name: str,
        process: Guarded,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        log_path: Path,
        answers: Answers,
    ) -> None:
        self.name = name
        self.log_path = log_path
        self._process = process
        self._reader = reader
        self._writer = writer
        self._answers = answers
        self._ids = itertools.count()
        self._unanswered: dict[int, str] = {}
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._dead: ProcessFailure | None = None
        self._receiver = asyncio.create_task(self._receive(), name=f"receive from {name}")

    @classmethod
    async def start(
        cls,
        module: str,
        *args: str,
        name: str,
        log_path: Path,
        env: Mapping[str, str] | None = None,
        answers: Answers | None = None,
        pass_fds: Sequence[int] = (),
        cwd: str | None = None,
    ) -> "Child":
        """Start `python -m module *args`; its output goes to `log_path`.

        `answers` says how they are read; by default they are pickles. `pass_fds` are its own, too,
        by the same numbers.
        """
        return await cls.of_command(
            [sys.executable, "-m", module, *args],
            name=name,
            log_path=log_path,
            env={**os.environ, **(env or {})},
            answers=answers or Pickles(),
            pass_fds=pass_fds,
            cwd=cwd,
        )

    @classmethod
    async def of_command(
        cls,
        command: Sequence[str],
        *,
        name: str,
        log_path: Path,
        env: Mapping[str, str],
        answers: Answers,
        pass_fds: Sequence[int] = (),
        cwd: str | None = None,
    ) -> "Child":
        """As `start`, of a program that answers as `serve` does; `env` is all of its environment.

        It finds the number of its socket in FLASH_CHILD_FD.
        """
        ours, theirs = socket.socketpair()
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with theirs, log_path.open("ab") as log:
            process = await start_guarded(
                *command,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno(), *pass_fds],
                env={**env, _FD_VARIABLE: str(theirs.fileno())},
                cwd=cwd,
            )
        reader, writer = await asyncio.open_unix_connection(sock=ours)
        return cls(name, process, reader, writer, log_path, answers)

    @property
    def pid(self) -> int:
        """Of its guard."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._dead is None

    async def call(self, method: str, *args: Any, timeout_s: float | None = None) -> Any:
        """The result of `handler.method(*args)` in the child.

        Raises ProcessFailure with the child's traceback if the method raised, with the end of its
        log if it died, TimeoutError if there was no answer in time (the child may still be busy).
        """
        if self._dead is not None:
            raise self._dead
        call_id = next(self._ids)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[call_id] = answer
        try:
            payload = pickled((call_id, method, args))
            self._unanswered[call_id] = method
            self._writer.write(_LENGTH.pack(len(payload)) + payload)
            async with asyncio.timeout(timeout_s):
                return await answer
        finally:
            self._waiting.pop(call_id, None)

    async def wait_dead(self) -> ProcessFailure:
        """Waits until the process has ended, and says why."""
        await asyncio.shield(self._receiver)
        assert self._dead is not None
        return self._dead

    async def stop(self, grace_s: float = 5.0) -> None:
        """End the child: closed socket first, SIGKILL after `grace_s`."""
        self._writer.close()
        try:
            async with asyncio.timeout(grace_s):
                await self._process.wait()
        except TimeoutError:
            self.kill()
        await asyncio.shield(self._receiver)

    def kill(self) -> None:
        """SIGKILL to the child and all that it started."""
        self._process.kill()

    async def _read(self, length: int) -> tuple[int, bool, Any]:
        if length > self._answers.max_bytes:
            raise ValueError(f"an answer of {length} bytes, more than {self._answers.max_bytes}")
        return self._answers.read(await self._reader.readexactly(length), self._unanswered)

    async def _receive(self) -> None:
        unreadable = ""
        # ConnectionError: the child's end vanished; IncompleteReadError: it closed.
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
                try:
                    call_id, ok, value = await self._read(length)
                    del self._unanswered[call_id]
                except (asyncio.IncompleteReadError, ConnectionError):
                    raise
                except Exception:  # the boundary: reading a pickle can raise anything
                    # Whose answer it was is not known, so nobody may go on waiting for one.
                    unreadable = f"\nIts last answer can't be read here:\n{traceback.format_exc()}"
                    self.kill()
                    break
                answer = self._waiting.get(call_id)
                if answer is None or answer.done():
                    continue
                if ok:
                    answer.set_result(value)
                else:
                    told = f"\n{value}" if "\n" in value else f" {value}"
                    answer.set_exception(ProcessFailure(f"{self.name} raised:{told}"))
        # A child that closed its socket but lives on (an environment's stray thread) is no use.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_EXIT_GRACE_S):
                await self._process.wait()
        code = await self._process.end()
        self._writer.close()
        self._dead = ProcessFailure(
            f"{self.name} (pid {self.pid}) ended with exit code {code}. "
            f"The end of {self.log_path}:\n{log_tail(self.log_path)}{unreadable}"
        )
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(self._dead)


def log_tail(path: Path, *, since: int = 0) -> str:
    """The last lines of a log file, from byte `since` on, for error messages."""
    if not path.exists():
        return "(no log)"
    with path.open("rb") as log:
        log.seek(max(since, path.stat().st_size - _LOG_TAIL_BYTES))
        return log.read().decode(errors="replace").strip() or "(empty)"


def log_report(path: Path, since: int = 0) -> str:
    """The first error that was logged after `since` bytes, if one can be made out, and the end.

    What goes wrong first is the cause; a server's own shutdown comes last, and may be long.
    """
    tail = log_tail(path)
    if path.exists():
        with path.open("rb") as log:
            log.seek(since)
            for line in log:
                error = _ERROR.search(line.decode(errors="replace"))
                if error and error.group() not in tail:
                    return f"{error.group()}\n…\n{tail}"
    return tail


def die_with_parent(by: signal.Signals = signal.SIGKILL) -> None:
    """Ends this process, by that signal, when the one that started it ends, or has ended already.

    Does nothing in a process that a user started, and nothing off Linux.
    """
    parent = os.environ.pop(PARENT_PID_VARIABLE, "")
    if parent and sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, by)
        if os.getppid() != int(parent):
            os.kill(os.getpid(), by)


@contextlib.contextmanager
def lasting() -> Iterator[None]:
    """Around imports that take seconds: what they make lives as long as the process.

    No search for garbage goes through it, then or later. It is a quarter of their time.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # at the very end triton complains of what is left
        gc.enable()


def pickled(message: object) -> bytes:
    """As `Pickles` reads it."""
    return pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)


def written(message: object) -> bytes:
    """As `Declared` reads it."""
    return msgspec.msgpack.encode(message)


def serve(handler: object, write: Callable[[object], bytes] = pickled) -> None:
    """In the child: answer the parent's calls on `handler` until the parent closes the socket.

    What a method raises, `sys.exit` too, is its answer. Of what ends an episode the message alone
    is told; of others the traceback. A Future that it returns is answered when it is done, and
    other calls meanwhile.
    """
    if _FD_VARIABLE not in os.environ:
        sys.exit("flash: this process is started by flash train and flash eval: use these")
    # Ctrl-C goes to the parent, which ends its children in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sending = threading.Lock()

    def answer(call_id: int, call: Callable[[], object]) -> "Future[Any] | None":
        """Sends what the call returns or raises, but for a Future, which is returned."""
        try:
            result = call()
            if isinstance(result, Future):
                return result
            payload = write((call_id, True, result))
        except EpisodeFailure as error:
            payload = write((call_id, False, _readable(str(error))))
        except BaseException:  # the boundary: the parent gets the traceback
            payload = write((call_id, False, _readable(traceback.format_exc())))
        with sending:
            connection.sendall(_LENGTH.pack(len(payload)) + payload)
        return None

    def answer_later(call_id: int, later: "Future[Any]") -> None:
        answer(call_id, later.result)

    with socket.socket(fileno=int(os.environ[_FD_VARIABLE])) as connection:
        stream = connection.makefile("rb")
        while header := stream.read(_LENGTH.size):
            (length,) = _LENGTH.unpack(header)
            call_id, method, args = pickle.loads(stream.read(length))
            later = answer(call_id, partial(methodcaller(method, *args), handler))
            if later is not None:
                later.add_done_callback(partial(answer_later, call_id))


def _readable(error: str) -> str:
    """What can be sent whatever was raised; of a text that is too long the end tells most."""
    return error[-_ERROR_CHARS:].encode(errors="replace").decode()
