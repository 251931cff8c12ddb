"""One try at a folder of files: pieces from several sources at once, verified and written."""

import asyncio
import contextlib
import errno
import logging
import shutil
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar
from urllib.parse import quote

import aiohttp
from aiohttp import ClientWebSocketResponse, WSMsgType

from flash.errors import first_error, one_line
from flash.explorer.files import (
    HEARTBEAT_S,
    HERE,
    ROUTE,
    FetchFailure,
    GoneError,
    Lost,
    Manifest,
    Piece,
    Sources,
    Withdrawn,
    authorization,
    checksum_of,
    decode_from_server,
    encode,
    missing_in,
)
from flash.explorer.messages import UNREADABLE, Files

logger = logging.getLogger(__name__)

_AT_ONCE = 2  # pieces from each source
_TIMEOUT = aiohttp.ClientTimeout(total=600.0, sock_connect=10.0, sock_read=30.0)  # of a piece


P = ParamSpec("P")
R = TypeVar("R")


class SourceFailure(Exception):
    """A source can't be reached, or does not send what it should."""


class Download:
    """Writes into `partial` what is missing there; tells whether the controller has `answered`, and
    whether anything came that need not be fetched again, if it is what it should be (`got_on`).

    `begun` has what the controller had sent of pieces when it failed: the next try goes on there.
    When it has run, `socket` is open, for the controller to hear of it.
    """

    manifest: Manifest
    socket: ClientWebSocketResponse

    def __init__(
        self,
        session: aiohttp.ClientSession,
        controller_url: str,
        files: Files,
        partial: Path,
        begun: dict[Piece, bytearray],
        *,
        tls: ssl.SSLContext | None,
    ) -> None:
        self.answered = False
        self.got_on = False
        self._session = session
        self._files = files
        self._url = controller_url.rstrip("/")
        self._partial = partial
        self._begun = begun
        self._ssl = True if tls is None else tls
        self._authorization = {"Authorization": authorization(files.key)}
        self._told: asyncio.Future[Manifest] = asyncio.get_running_loop().create_future()
        self._missing: asyncio.Queue[Piece] = asyncio.Queue()  # at most those of the manifest
        self._taking: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """Raises SourceFailure if the controller fails, GoneError, FetchFailure."""
        self.socket = await self._connect()
        try:
            with first_error():
                async with asyncio.TaskGroup() as tasks:
                    following = tasks.create_task(self._follow(tasks), name="files")
                    self.manifest = await self._told
                    for piece in await on_disk(_prepare, self._partial, self.manifest):
                        self._missing.put_nowait(piece)
                    await self._missing.join()
                    for task in (following, *self._taking.values()):
                        task.cancel()
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Of the socket."""
        await self.socket.close()
        # aiohttp leaves that to the garbage collector where the other side was lost.
        self.socket._response.close()

    async def _connect(self) -> ClientWebSocketResponse:
        try:
            return await self._session.ws_connect(
                self._url + ROUTE,
                headers=self._authorization,
                heartbeat=HEARTBEAT_S,
                max_msg_size=0,
                compress=0,
                ssl=self._ssl,
            )
        except aiohttp.WSServerHandshakeError as error:
            self._check_offered(error.status)
            raise SourceFailure(f"{self._url} answers {error.status} {error.message}") from error
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise SourceFailure(one_line(error)) from error

    async def _follow(self, tasks: asyncio.TaskGroup) -> None:
        """What the controller says, as long as it does."""
        async for message in self.socket:
            if message.type is not WSMsgType.BINARY:
                break
            try:
                said = decode_from_server(message.data)
            except UNREADABLE as error:
                raise SourceFailure(f"{self._url} is no controller: {error}") from error
            self.answered = True
            match said:
                case Manifest():
                    self._told.set_result(said)
                case Sources(urls):
                    for url in urls:
                        if url not in self._taking:
                            taking = self._take_from(url)
                            self._taking[url] = tasks.create_task(taking, name=f"from {url}")
                case Withdrawn():
                    raise GoneError(f"{self._url} offers {self._files.path} no more")
        raise SourceFailure(f"the connection to {self._url} has ended")

    async def _take_from(self, source: str) -> None:
        """Pieces, until it fails; another one may get those then."""
        try:
            with first_error():
                async with asyncio.TaskGroup() as tasks:
                    for _ in range(_AT_ONCE):
                        tasks.create_task(self._take_pieces(source), name=f"from {source}")
        except SourceFailure as failure:
            if source == HERE:
                raise
            logger.warning("takes nothing more from another explorer: %s", failure)
            with contextlib.suppress(ConnectionError):  # which ends _follow
                await self.socket.send_bytes(encode(Lost(source)))

    async def _take_pieces(self, source: str) -> None:
        while True:
            piece = await self._missing.get()
            try:
                data = await self._get(piece, source)
                if not await on_disk(_store, self._partial, piece, data):
                    raise SourceFailure(
                        f"{source or self._url} sent a piece of {piece.file} whose checksum is "
                        f"another"
                    )
                self.got_on = True
            except BaseException:
                self._missing.put_nowait(piece)
                raise
            finally:
                self._missing.task_done()

    async def _get(self, piece: Piece, source: str) -> bytes:
        if source != HERE:
            return await self._read(piece, source, bytearray())
        data = self._begun.pop(piece, bytearray())
        before = len(data)
        try:
            return await self._read(piece, source, data)
        except BaseException:
            if len(data) > before:
                self.got_on = True
            self._begun[piece] = data
            raise

    async def _read(self, piece: Piece, source: str, data: bytearray) -> bytes:
        """All of the piece, of which there are these data."""
        url = f"{source or self._url}{ROUTE}/{quote(piece.file, safe='')}"
        headers = self._authorization | {
            "Range": f"bytes={piece.offset + len(data)}-{piece.offset + piece.size - 1}",
            "Accept-Encoding": "identity",
        }
        try:
            async with self._session.get(
                url, headers=headers, timeout=_TIMEOUT, ssl=self._ssl, allow_redirects=False
            ) as response:
                if source == HERE:
                    self._check_offered(response.status)
                if response.status != 206:
                    raise SourceFailure(f"{url} answers {response.status} {response.reason}")
                async for chunk in response.content.iter_any():
                    data += chunk[: piece.size - len(data)]
                    if len(data) == piece.size:
                        return bytes(data)
                raise SourceFailure(f"{url} ended after {len(data)} of {piece.size} bytes")
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
            raise SourceFailure(f"{url}: {one_line(error)}") from error

    def _check_offered(self, status: int) -> None:
        if status in (403, 410):
            raise GoneError(f"{self._url} offers {self._files.path} no more")


async def on_disk(work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """What the work gives that is done in a thread; FetchFailure if the disk has no room."""
    try:
        return await asyncio.to_thread(work, *args, **kwargs)
    except OSError as error:
        raise FetchFailure(f"files can't be stored: {error}") from error


def _prepare(partial: Path, manifest: Manifest) -> list[Piece]:
    """Makes the files, and tells which of their pieces are missing."""
    partial.mkdir(parents=True, exist_ok=True)
    begun = {path.name for path in partial.iterdir()}
    for entry in manifest.files:
        with (partial / entry.name).open("ab") as file:
            file.truncate(entry.size)
    for name in begun - {entry.name for entry in manifest.files}:
        (partial / name).unlink()
    pieces = list(manifest.pieces())
    missing = [piece for piece in pieces if piece.file not in begun]
    missing += missing_in(partial, [piece for piece in pieces if piece.file in begun])
    wanted, free = sum(piece.size for piece in missing), shutil.disk_usage(partial).free
    if wanted > free:
        raise OSError(
            errno.ENOSPC, f"{wanted:,} bytes are to come, and {free:,} are free", str(partial)
        )
    return missing


def _store(partial: Path, piece: Piece, data: bytes) -> bool:
    """Writes the piece if it is what it should be, and tells whether it is."""
    if checksum_of(data) != piece.checksum:
        return False
    with (partial / piece.file).open("r+b") as file:
        file.seek(piece.offset)
        file.write(data)
    return True
