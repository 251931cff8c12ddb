"""Pools of worker processes on free loopback ports; one that dies is started anew."""

import abc
import asyncio
import contextlib
import logging
import os
import secrets
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import psutil

from flash.errors import InferenceFailure, first_error
from flash.hub.http_worker import HttpWorker
from flash.hub.worker import OnExit, OnReady, Worker, WorkerFailure
from flash.system.process import PARENT_PID_VARIABLE, log_report

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
_STOP_GRACE_S = 5.0
_READY_CHECK_S = 0.2
_MOST_READ = 1 << 18  # bytes of a log at a time
_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 0.5, 30.0
# One that dies so often, without having lived as long between, will not live.
_DEATHS_IN_A_ROW, _SETTLED_S = 5, 60.0


@dataclass(slots=True, eq=False)
class _Seat:
    """A place in the pool: its port and its worker stay, its process is replaced."""

    number: int
    port: int
    reservation: socket.socket
    worker: Worker
    log: Path
    log_start: int = 0  # of the present process's lines
    log_read: int = 0  # up to there
    process: asyncio.subprocess.Process | None = None


class ProcessPool(abc.ABC):
    """Worker processes side by side, each in a group of its own with a log of its own.

    Args:
        size: how many workers.
        log_dir: where `worker_<n>.log` goes.
        start_timeout_s: for a worker to load the model and answer its health check.
        say: is told in a line what the workers are at while they start, and when they are ready.
    """

    # What they are at from the first line of a log on that has one of these, in their order.
    _STAGES: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self,
        *,
        size: int,
        log_dir: Path,
        start_timeout_s: float,
        say: Callable[[str], None] = logger.info,
    ) -> None:
        self._size = size
        self._say = say
        self._stage = -1  # the furthest that any of them has come
        self._log_dir = log_dir
        self._start_timeout_s = start_timeout_s
        self._seats: list[_Seat] = []
        self._keepers: list[asyncio.Task[None]] = []
        self._may_start = asyncio.Event()
        self._may_start.set()
        # Nobody else on this machine may ask the workers anything.
        self._api_key = secrets.token_urlsafe(16)

    @abc.abstractmethod
    def _command(self, number: int, host: str, port: int) -> Sequence[str]:
        """The command line of worker `number`."""

    @abc.abstractmethod
    def _environment(self, number: int) -> Mapping[str, str]:
        """What it gets beside this process's environment."""

    def _client(self, number: int, url: str) -> Worker:
        """What the hub talks to worker `number` through."""
        return HttpWorker(url, api_key=self._api_key)

    @property
    def pids(self) -> list[int]:
        """Of the processes that were started last, one a worker."""
        return [seat.process.pid for seat in self._seats if seat.process is not None]

    async def start(self, on_exit: OnExit, on_ready: OnReady) -> list[Worker]:
        """Starts all of them and waits until each is well.

        From then on `on_exit(worker, why, final)` tells of each death, `on_ready(worker)` that its
        process was started anew and is well; after a final death it is not. Raises
        InferenceFailure with the end of the log of a worker that does not get ready at first.
        """
        clock = asyncio.get_running_loop().time
        self._began = clock()
        self._log_dir.mkdir(parents=True, exist_ok=True)
        self._seats = [self._seat(number) for number in range(self._size)]
        try:
            with first_error():
                async with asyncio.TaskGroup() as starts:
                    for seat in self._seats:
                        starts.create_task(self._launch(seat), name=f"start worker {seat.number}")
        except BaseException:
            await self.stop()
            raise
        if self._STAGES:
            self._say(f"engine: ready after {clock() - self._began:.0f} s")
        self._keepers = [
            asyncio.create_task(
                self._keep(seat, on_exit, on_ready), name=f"keep worker {seat.number}"
            )
            for seat in self._seats
        ]
        return [seat.worker for seat in self._seats]

    def restart(self, worker: Worker) -> None:
        """Kills a worker that is of no use any more; a new process takes its place."""
        for seat in self._seats:
            if seat.worker is worker:
                _kill(seat)

    def hold(self) -> None:
        """Those that die are not started anew until `release`."""
        self._may_start.clear()

    def release(self) -> None:
        """Those that died meanwhile are started anew."""
        self._may_start.set()

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL to those that take longer than a few seconds."""
        for keeper in self._keepers:
            keeper.cancel()
        for seat in self._seats:
            if seat.process is not None and seat.process.returncode is None:
                seat.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STOP_GRACE_S):
                for seat in self._seats:
                    if seat.process is not None:
                        await seat.process.wait()
        for seat in self._seats:
            _kill(seat)
            if seat.process is not None:
                await seat.process.wait()
            await seat.worker.close()
            seat.reservation.close()
        if self._keepers:
            await asyncio.wait(self._keepers)
        for keeper in self._keepers:
            if not keeper.cancelled():
                keeper.result()

    def _seat(self, number: int) -> _Seat:
        reservation = _reserve_port()
        port = reservation.getsockname()[1]
        return _Seat(
            number=number,
            port=port,
            reservation=reservation,
            worker=self._client(number, f"http://{LOOPBACK}:{port}"),
            log=self._log_dir / f"worker_{number}.log",
        )

    async def _launch(self, seat: _Seat) -> None:
        """Starts the seat's process and waits until it is well; InferenceFailure if it is not."""
        with seat.log.open("ab") as log:
            seat.log_start = seat.log_read = log.tell()
            seat.process = await asyncio.create_subprocess_exec(
                *self._command(seat.number, LOOPBACK, seat.port),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={
                    **os.environ,
                    **self._environment(seat.number),
                    PARENT_PID_VARIABLE: str(os.getpid()),
                },
                start_new_session=True,
            )
        exited = asyncio.create_task(seat.process.wait(), name=f"exit of worker {seat.number}")
        try:
            async with asyncio.timeout(self._start_timeout_s):
                while not exited.done():
                    with contextlib.suppress(WorkerFailure):
                        if await asyncio.to_thread(_listens, seat):
                            await seat.worker.check_health()
                            return
                    await asyncio.wait((exited,), timeout=_READY_CHECK_S)
                    self._tell_stage(seat)
        except TimeoutError:
            _kill(seat)
            raise InferenceFailure(
                f"worker {seat.number} was not ready after engine.start_timeout_s="
                f"{self._start_timeout_s:g} s. {_log_of(seat)}"
            ) from None
        finally:
            exited.cancel()
        _kill(seat)  # what it may have left behind
        raise InferenceFailure(
            f"worker {seat.number} ended at its start with exit code {seat.process.returncode}. "
            f"{_log_of(seat)}"
        )

    def _tell_stage(self, seat: _Seat) -> None:
        """Tells what the seat's process is at, if none has come so far."""
        words = list(self._STAGES.items())
        if self._stage == len(words) - 1:
            return
        with seat.log.open("rb") as log:
            log.seek(seat.log_read)
            new = log.read(_MOST_READ)
        if b"\n" in new or len(new) == _MOST_READ:  # what is not a whole line is read again
            seat.log_read += new.rfind(b"\n") + 1 or len(new)
        text = new.decode(errors="replace")
        found = [number for number, (word, _) in enumerate(words) if word in text]
        if found and found[-1] > self._stage:
            self._stage = found[-1]
            after_s = asyncio.get_running_loop().time() - self._began
            self._say(f"engine: {words[self._stage][1]} (after {after_s:.0f} s)")

    async def _keep(self, seat: _Seat, on_exit: OnExit, on_ready: OnReady) -> None:
        """Waits for the worker's death, again and again, and starts it anew."""
        clock = asyncio.get_running_loop().time
        deaths = 0
        started = True
        while True:
            try:
                if not started:
                    await self._may_start.wait()
                    await self._launch(seat)
                    on_ready(seat.worker)
                since = clock()
                assert seat.process is not None
                code = await seat.process.wait()
                _kill(seat)  # what it left behind
                if clock() - since > _SETTLED_S:
                    deaths = 0
                why = (
                    f"worker {seat.number} (pid {seat.process.pid}) ended with exit code {code}. "
                    f"{_log_of(seat)}"
                )
            except InferenceFailure as failure:
                why = str(failure)
            started = False
            deaths += 1
            final = deaths >= _DEATHS_IN_A_ROW
            on_exit(seat.worker, why, final)
            if final:
                return
            await asyncio.sleep(min(_FIRST_BACKOFF_S * 2**deaths, _LONGEST_BACKOFF_S))


def _reserve_port() -> socket.socket:
    """A port that no one is given while this socket is open; whoever names it can listen on it."""
    reservation = socket.socket()
    reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reservation.bind((LOOPBACK, 0))
    return reservation


def _listens(seat: _Seat) -> bool:
    """Whether the seat's process, or one of its family, has the port by now.

    Until it does, any user of this machine may: who would be told the key by a health check, and
    be trained on.
    """
    assert seat.process is not None
    with contextlib.suppress(psutil.Error):  # one that has ended meanwhile
        process = psutil.Process(seat.process.pid)
        return any(
            connection.status == psutil.CONN_LISTEN and connection.laddr.port == seat.port
            for member in (process, *process.children(recursive=True))
            for connection in member.net_connections("inet")
        )
    return False


def _log_of(seat: _Seat) -> str:
    return f"From {seat.log}:\n{log_report(seat.log, seat.log_start)}"


def _kill(seat: _Seat) -> None:
    """SIGKILL to the process, if it lives, and to all of its group."""
    if seat.process is not None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(seat.process.pid, signal.SIGKILL)
