"""An HTTP server that strangers can't use up, and web pages can't use: of door and worker.

Whoever has an account on a machine can connect to its ports. So a connection is a stranger's
until a request on it has shown a key. Strangers have a number of connections in common, and one
more closes the one that is oldest: who has a key shows it at once, so it is never theirs.
"""

import asyncio
import ipaddress
import socket
import ssl
from collections.abc import Hashable, Mapping
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

from flash.system.machine import open_file_limit

_BODY_TIMEOUT_S = 60.0  # for a client to send the body of its request
# To send a request's header, and between two requests. OpenAI's clients keep a connection for 5 s.
_IDLE_TIMEOUT_S = 30.0
_HANDSHAKE_TIMEOUT_S = 10.0  # of TLS: until then a connection is not counted
# Many times what comes in one turn of the event loop, of which a connection needs two or three to
# be heard.
_STRANGERS = 2048
_BACKLOG = 128


class Listener:
    """Serves an app at a host and port.

    Connections are closed that bring no request in time; those with a key may be half of the
    files that this process may open, and one more is closed at once.
    """

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self._most = open_file_limit() // 2
        self._strangers: dict[web.RequestHandler, None] = {}  # in the order in which they came
        self._known: dict[web.RequestHandler, Hashable] = {}  # and whose they are
        self._runner: web.AppRunner | None = None
        self._server: asyncio.Server | None = None

    async def start(
        self, app: web.Application, *, tls: ssl.SSLContext | None = None, **options: Any
    ) -> str:
        """The URL. OSError if nobody can listen there. `options` are of aiohttp's RequestHandler.

        A client that goes away takes its request with it. No log of paths: they may hold keys.
        """
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1.0)
        await self._runner.setup()
        loop, server = asyncio.get_running_loop(), self._runner.server
        options = {"keepalive_timeout": _IDLE_TIMEOUT_S, "access_log": None} | options
        self._server = await loop.create_server(
            lambda: _Connection(self, server, loop=loop, **options),
            self._host,
            self._port,
            backlog=_BACKLOG,
            ssl=tls,
            ssl_handshake_timeout=None if tls is None else _HANDSHAKE_TIMEOUT_S,
        )
        port = self._server.sockets[0].getsockname()[1]
        scheme = "http" if tls is None else "https"
        return f"{scheme}://{f'[{self._host}]' if ':' in self._host else self._host}:{port}"

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        if self._runner is not None:
            await self._runner.cleanup()

    def vouch(
        self, request: web.Request, *, owner: Hashable = None, most: int | None = None
    ) -> None:
        """The request has shown a key: its connection is no stranger's from now on, but `owner`'s.

        If that one has more than `most`, its oldest is closed.
        """
        connection = request.protocol
        if connection not in self._strangers:
            return
        del self._strangers[connection]
        self._known[connection] = owner
        if most is not None:
            own = [known for known, of in self._known.items() if of == owner]
            if len(own) > most:
                self._close(own[0])

    def arrived(self, connection: web.RequestHandler) -> None:
        if len(self._strangers) + len(self._known) >= self._most:
            connection.force_close()
            return
        self._strangers[connection] = None
        if len(self._strangers) > min(_STRANGERS, self._most // 2):
            self._close(next(iter(self._strangers)))

    def left(self, connection: web.RequestHandler) -> None:
        self._strangers.pop(connection, None)
        self._known.pop(connection, None)

    def _close(self, connection: web.RequestHandler) -> None:
        self.left(connection)  # now, because it is told later, when more may have come
        connection.force_close()


class _Connection(web.RequestHandler):
    """One whose coming and going the listener is told."""

    def __init__(self, listener: Listener, server: Any, **options: Any) -> None:
        super().__init__(server, **options)
        self._listener = listener

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._listener.arrived(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._listener.left(self)
        super().connection_lost(exc)


def from_elsewhere(url: str) -> str:
    """For other machines, where it is of all addresses of this one."""
    here = f"//{socket.gethostname()}:"
    return url.replace("//0.0.0.0:", here).replace("//[::]:", here)


async def read_body(request: web.Request) -> bytes:
    """HTTPRequestTimeout for a client that takes its time."""
    try:
        async with asyncio.timeout(_BODY_TIMEOUT_S):
            return await request.read()
    except TimeoutError as error:
        raise web.HTTPRequestTimeout(
            reason=f"the body took longer than {_BODY_TIMEOUT_S:g} s"
        ) from error


def local_address(request: web.Request) -> str:
    """The address of this machine that the request came to."""
    sockname = request.transport.get_extra_info("sockname") if request.transport else None
    return str(sockname[0]) if sockname else ""


def page_refusal(headers: Mapping[str, str], *, local_address: str) -> str:
    """Why a request is not answered that a browser sends for a web page; "" for any other.

    A page has an Origin. One whose name was made to mean this machine (DNS rebinding) has none in
    some requests, but still its own name as the Host.
    """
    if "Origin" in headers:
        return f"Origin={headers['Origin'][:80]!r}: web pages are not answered here"
    host = headers.get("Host", "")
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        name = "?"
    if host and _is_loopback(local_address) and not _is_loopback(name):
        return (
            f"Host={host[:80]!r} came to {local_address}, which is not of that name: write "
            f"127.0.0.1 or localhost in the URL"
        )
    return ""


def _is_loopback(name: str) -> bool:
    if name.removesuffix(".") == "localhost":
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback
