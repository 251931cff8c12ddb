"""Lets explorers have folders of files: of the controller, and of explorers that relay them."""

import asyncio
import contextlib
import hmac
import logging
import os
import secrets
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Self

import msgspec
from aiohttp import WSMsgType, web

from flash.explorer.changes import write_changes
from flash.explorer.files import (
    HEARTBEAT_S,
    ROUTE,
    Have,
    Lost,
    Manifest,
    Sources,
    Withdrawn,
    authorization,
    contents_of,
    decode_from_fetcher,
    encode,
    manifest_of,
    stamp_of,
)
from flash.explorer.messages import UNREADABLE, Changes, Files
from flash.explorer.turns import Seat, Turns
from flash.system.listener import Listener

logger = logging.getLogger(__name__)

_CHANGES = "changes"  # within the folder: it goes with it
_KEY_BYTES = 32
_LARGEST_MESSAGE = 4096
_PIECE_BYTES = 8 << 20
_CHUNK_BYTES = 1 << 20
_SHORTEST_TURN_S = 10.0
_QUICK_BYTES_PER_S = 1e9
_SLOWEST_BYTES_PER_S = 100e6  # whoever takes files more slowly keeps nobody else waiting


class FileServer:
    """Serves what is offered to whoever has the key of it. Enter it; then `add_to` an app that is
    served anyway, or `listen`.

    Args:
        piece_bytes: what is fetched as a whole.
        shortest_turn_s: that an explorer has to itself at a source; longer for large folders.
    """

    def __init__(
        self, *, piece_bytes: int = _PIECE_BYTES, shortest_turn_s: float = _SHORTEST_TURN_S
    ) -> None:
        self._piece_bytes = piece_bytes
        self._shortest_turn_s = shortest_turn_s
        self._offers: dict[str, _Offer] = {}
        # Of the quickest explorer, for the last folder that they took whole.
        self._bytes_per_s = 0.0
        self._vouch: Callable[[web.Request], None] = lambda request: None
        self._listener: Listener | None = None
        self._tasks = asyncio.TaskGroup()

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.withdraw_all()
        if self._listener is not None:
            await self._listener.close()
        await self._tasks.__aexit__(None, None, None)

    def add_to(self, app: web.Application, vouch: Callable[[web.Request], None]) -> None:
        """Its routes; `vouch` is told of requests that have shown a key."""
        self._vouch = vouch
        app.router.add_get(ROUTE, self._attend)
        app.router.add_get(ROUTE + "/{name}", self._send)

    async def listen(self, host: str, port: int, *, tls: ssl.SSLContext | None = None) -> str:
        """At a port of its own: the URL. OSError if nobody can listen there."""
        app = web.Application(client_max_size=_LARGEST_MESSAGE)
        self._listener = Listener(host, port)
        self.add_to(app, self._listener.vouch)
        return await self._listener.start(app, tls=tls)

    async def offer(self, folder: Path, *, before: Files | None = None) -> Files:
        """Until `withdraw`, or until the folder is gone when another one is offered; meanwhile
        nobody gets anything of it that has changed. OSError if it can't be read.

        What changed since the files `before` is offered too, if they were asked for and it is
        little: it is written into a folder in this one.
        """
        files = await self._offer(folder)
        if before is not None and (changes := await self._changes(before, Path(files.path))):
            files = msgspec.structs.replace(files, changes=changes)
        for key, offer in list(self._offers.items()):
            if not await asyncio.to_thread(offer.folder.is_dir):
                self.withdraw(key)
        return files

    async def _offer(self, folder: Path) -> Files:
        whole = await asyncio.to_thread(folder.resolve)
        stamp = await asyncio.to_thread(stamp_of, whole)
        files = Files(str(whole), stamp, secrets.token_hex(_KEY_BYTES))
        await self._add(files.key, whole)
        return files

    async def _changes(self, before: Files, folder: Path) -> Changes | None:
        """None if nobody lacked the files `before`, if whole folders come as quickly as changes are
        found and made, or if there is too much that changed."""
        offer = self._offers.get(before.key)
        if offer is None or offer.manifest is None:
            return None
        if before.changes is None and offer.turns.quickest_s:
            self._bytes_per_s = offer.size / offer.turns.quickest_s
        if self._bytes_per_s > _QUICK_BYTES_PER_S:
            return None
        changes = folder / _CHANGES
        try:
            if not await asyncio.to_thread(write_changes, offer.folder, folder, changes):
                return None
            return Changes(before.stamp, await self._offer(changes))
        except OSError as error:
            logger.warning("explorers get %s whole: %s", folder, error)
            return None

    async def relay(self, key: str, folder: Path, manifest: Manifest) -> None:
        """Offers what was fetched, by the same key."""
        await self._add(key, folder, manifest)

    def withdraw(self, key: str) -> None:
        """Whoever takes it is told, at once."""
        offer = self._offers.pop(key, None)
        if offer is not None:
            offer.withdrawn = True
            for seat in offer.seats:
                seat.changed.set()

    def withdraw_all(self) -> None:
        for key in list(self._offers):
            self.withdraw(key)

    async def _add(self, key: str, folder: Path, manifest: Manifest | None = None) -> None:
        contents = await asyncio.to_thread(contents_of, folder)
        size = sum(size for size, _ in contents.values())
        turns = Turns(turn_s=self._turn_s(size))
        self._offers[key] = _Offer(folder, contents, size, turns, manifest)

    def _turn_s(self, size: int) -> float:
        """Twice what the quickest took for the folder before, if that is longer: where a line is
        slow for all, who shares it with more of them only has it later."""
        turn_s = self._shortest_turn_s + size / _SLOWEST_BYTES_PER_S
        for offer in reversed(self._offers.values()):
            if offer.turns.quickest_s:
                return max(turn_s, 2 * offer.turns.quickest_s)
        return turn_s

    def _offered(self, request: web.Request) -> "_Offer":
        given = request.headers.get("Authorization", "").encode(errors="replace")
        for key, offer in self._offers.items():
            if hmac.compare_digest(given, authorization(key).encode()):
                self._vouch(request)
                return offer
        raise web.HTTPForbidden(reason="there are no files for this key")

    # ── pieces ───────────────────────────────────────────────────────────────────────────────

    async def _send(self, request: web.Request) -> web.StreamResponse:
        offer = self._offered(request)
        name = request.match_info["name"]
        if name not in offer.contents:
            raise web.HTTPNotFound(reason="there is no such file in the folder")
        start, stop = _asked(request, offer.contents[name][0])
        response = web.StreamResponse(status=206)
        response.content_type = "application/octet-stream"
        response.content_length = stop - start
        for offset in range(start, stop, _CHUNK_BYTES):
            size = min(_CHUNK_BYTES, stop - offset)
            data = await asyncio.to_thread(offer.read, name, offset, size)
            if data is None and not response.prepared:
                raise web.HTTPGone(reason="the file was changed or removed")
            if data is None:
                request.protocol.force_close()
                break
            await response.prepare(request)
            await response.write(data)
        return response

    # ── whom to take them from ───────────────────────────────────────────────────────────────

    async def _attend(self, request: web.Request) -> web.WebSocketResponse:
        """Tells one that wants the files all that it needs, for as long as it is connected."""
        offer = self._offered(request)
        socket = web.WebSocketResponse(
            heartbeat=HEARTBEAT_S, max_msg_size=_LARGEST_MESSAGE, compress=False
        )
        await socket.prepare(request)
        seat = Seat()
        offer.seats.add(seat)
        try:
            async with asyncio.TaskGroup() as tasks:
                telling = tasks.create_task(self._tell(offer, seat, socket), name="files")
                await _hear(offer, seat, socket)
                telling.cancel()
        finally:
            offer.seats.discard(seat)
            offer.turns.leave(seat)
        return socket

    async def _tell(self, offer: "_Offer", seat: Seat, socket: web.WebSocketResponse) -> None:
        manifest = await self._manifest(offer)
        with contextlib.suppress(ConnectionError):  # then there is nothing more to hear, either
            if manifest is not None:
                await socket.send_bytes(encode(manifest))
                offer.turns.join(seat)
            while manifest is not None:
                await seat.changed.wait()
                seat.changed.clear()
                if offer.withdrawn:
                    break
                await socket.send_bytes(encode(Sources(list(seat.sources))))
            await socket.send_bytes(encode(Withdrawn()))
            await socket.close()

    async def _manifest(self, offer: "_Offer") -> Manifest | None:
        """Computed when it is asked for first; None if the folder can't be read any more."""
        if offer.manifest is None:
            if offer.computing is None:
                computing = _compute(offer, self._piece_bytes)
                offer.computing = self._tasks.create_task(computing, name="checksums")
            await asyncio.shield(offer.computing)
        return offer.manifest


class _Offer:
    """A folder, and who takes it."""

    def __init__(
        self,
        folder: Path,
        contents: dict[str, tuple[int, int]],
        size: int,
        turns: Turns,
        manifest: Manifest | None,
    ) -> None:
        self.folder = folder
        self.contents = contents
        self.size = size
        self.turns = turns
        self.seats: set[Seat] = set()
        self.manifest = manifest
        self.computing: asyncio.Task[None] | None = None
        self.withdrawn = False

    def read(self, name: str, offset: int, size: int) -> bytes | None:
        """None if the file is not any more what was offered. Blocks."""
        try:
            with (self.folder / name).open("rb", buffering=0) as file:
                about = os.fstat(file.fileno())
                if (about.st_size, about.st_mtime_ns) != self.contents[name]:
                    return None
                file.seek(offset)
                return file.read(size)
        except OSError:
            return None


async def _compute(offer: _Offer, piece_bytes: int) -> None:
    try:
        offer.manifest = await asyncio.to_thread(
            manifest_of, offer.folder, piece_bytes, wanted=lambda: not offer.withdrawn
        )
    except OSError as error:
        logger.warning("explorers can't have %s: %s", offer.folder, error)


async def _hear(offer: _Offer, seat: Seat, socket: web.WebSocketResponse) -> None:
    async for message in socket:
        if message.type is not WSMsgType.BINARY:
            return
        try:
            said = decode_from_fetcher(message.data)
        except UNREADABLE as error:
            logger.warning("an explorer asks for files in words that are none: %s", error)
            return
        match said:
            case Lost(url):
                offer.turns.lost(seat, url)
            case Have(url):
                offer.turns.have(seat, url)


def _asked(request: web.Request, size: int) -> tuple[int, int]:
    """The part of a file of that size that a request wants."""
    try:
        asked = request.http_range
    except ValueError:
        asked = slice(0, 0)
    if asked.start is None or asked.stop is None or not 0 <= asked.start < asked.stop <= size:
        raise web.HTTPRequestRangeNotSatisfiable(reason="the Range must be a part of the file")
    return asked.start, asked.stop
