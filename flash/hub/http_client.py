"""An HTTP/1.1 client of one server, for many requests at a time.

It has of HTTP what the worker protocol needs: requests with a length, on connections that are kept
for the next one. What is heard is parsed by llhttp, as Node has it and aiohttp, through httptools,
and in the turn of the loop in which it comes: a request wakes its task once, when its answer is
whole. That costs a third of what aiohttp's client does.
"""

import asyncio
import base64
import socket
import ssl
from collections.abc import Callable, Mapping
from typing import NamedTuple, cast
from urllib.parse import quote, unquote, urlsplit

import httptools
from aiohappyeyeballs import start_connection

from flash.system.shortage import when_there_is_room

# uvicorn closes a connection that idles for 5 s: let go of it before, so that no request is sent
# into one that is about to be closed.
_KEPT_S = 3.0
_RESOLVED_S = 10.0
_NEXT_ADDRESS_AFTER_S = 0.25
_LONGEST_HEAD_BYTES = 1 << 16
_PATH_CHARACTERS = "/%:@!$&'()*+,;=~"
_HTTP_OK, _HTTP_SERVER_ERROR = 200, 500
_EVENT_STREAM = b"text/event-stream"


class HttpAnswer(NamedTuple):
    """An answer of any status; of one that was streamed the body is empty."""

    status: int
    streamed: bool
    body: bytes


class HttpClient:
    """Asks one server; every request has a connection to itself while it lasts.

    There are as many connections as requests: who asks has a bound. So have deadlines. Redirects
    are answers like others, and cookies are nobody's.

    Raises ValueError for a URL or headers that can't be.
    """

    def __init__(self, url: str, headers: Mapping[str, str]) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"url={url!r} must be http://HOST:PORT or https://HOST")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._host = parts.hostname
        self._port = parts.port or (443 if self._tls else 80)
        self._path = quote(parts.path.rstrip("/"), safe=_PATH_CHARACTERS)
        fields = {"Host": parts.netloc.rpartition("@")[2]}
        if parts.username is not None:
            user = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            fields["Authorization"] = f"Basic {base64.b64encode(user.encode()).decode()}"
        fields |= headers
        for name, value in fields.items():
            if not (name + value).isprintable():
                raise ValueError(f"{name} has a character that no header can have")
        self._head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self._idle: dict[_Connection, None] = {}  # the one that idles longest comes first
        self._open: set[_Connection] = set()
        self._closing_idle: asyncio.TimerHandle | None = None
        self._addresses: list[tuple[int, int, int, str, tuple[str, int]]] = []
        self._resolved_at = -_RESOLVED_S
        self._resolving = asyncio.Lock()
        self._closed = False

    async def send(
        self,
        method: str,
        route: str,
        json: bytes = b"",
        on_piece: Callable[[bytes], None] | None = None,
    ) -> HttpAnswer:
        """The whole answer, or its last word if it is an event stream that went to `on_piece`.

        A request that is cancelled closes its connection, which is how a server hears of it.
        Raises OSError for a server that can't be reached, hangs up too early or speaks no HTTP, and
        what `on_piece` raises.
        """
        typed = "Content-Type: application/json\r\n" if json else ""
        head = (
            f"{method} {self._path}{route} HTTP/1.1\r\n{self._head}{typed}"
            f"Content-Length: {len(json)}\r\n\r\n"
        )
        connection = self._take_idle()
        if connection is None:  # a socket that this machine has not is no failure of the server's
            connection = await when_there_is_room(self._connect)
        answer = connection.ask(head.encode() + json, on_piece)
        try:
            return await answer
        finally:
            if answer.cancelled():  # else it is idle, or somebody else's by now
                connection.abort()

    async def close(self) -> None:
        """Ends all connections, and the requests that they have."""
        self._closed = True
        if self._closing_idle is not None:
            self._closing_idle.cancel()
        for connection in [*self._open]:
            connection.abort()
        await asyncio.sleep(0)  # the loop lets go of a socket in its next turn

    # ── connections ──────────────────────────────────────────────────────────────────────────

    def keep(self, connection: "_Connection") -> None:
        """It can be asked again."""
        loop = connection.loop
        connection.idle_since = loop.time()
        self._idle[connection] = None
        if self._closing_idle is None:
            self._closing_idle = loop.call_later(_KEPT_S, self._close_idle)

    def forget(self, connection: "_Connection") -> None:
        """It is closed."""
        self._open.discard(connection)
        self._idle.pop(connection, None)

    def _take_idle(self) -> "_Connection | None":
        """The one that was used last: the others are closed sooner."""
        if not self._idle:
            return None
        connection, _ = self._idle.popitem()
        if connection.loop.time() - connection.idle_since < _KEPT_S:
            return connection
        connection.abort()
        return None  # and the others are older still

    def _close_idle(self) -> None:
        """Those that idle for too long."""
        loop = asyncio.get_running_loop()
        self._closing_idle = None
        while self._idle:
            oldest = next(iter(self._idle))
            due = oldest.idle_since + _KEPT_S
            if loop.time() < due:
                self._closing_idle = loop.call_at(due, self._close_idle)
                return
            del self._idle[oldest]
            oldest.abort()

    async def _connect(self) -> "_Connection":
        loop = asyncio.get_running_loop()
        try:
            await self._resolve()
            # uvloop tries one address after the other, each until the system gives it up.
            sock = await start_connection(
                self._addresses, happy_eyeballs_delay=_NEXT_ADDRESS_AFTER_S
            )
        except OSError as error:
            self._resolved_at = -_RESOLVED_S  # the name may have another address by now
            failure = ConnectionError(f"Cannot connect to host {self._host}:{self._port} [{error}]")
            failure.errno = error.errno
            raise failure from error
        try:
            _, connection = await loop.create_connection(
                lambda: _Connection(self, loop),
                sock=sock,
                ssl=self._tls,
                server_hostname=self._host if self._tls else None,
            )
        except BaseException:
            sock.close()
            raise
        if self._closed:
            connection.abort()
            raise ConnectionError("the client was closed meanwhile")
        self._open.add(connection)
        return connection

    async def _resolve(self) -> None:
        """Once in a while, and for all that want to connect."""
        loop = asyncio.get_running_loop()
        async with self._resolving:
            if loop.time() - self._resolved_at < _RESOLVED_S:
                return
            found = await loop.getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
            self._addresses = cast(list[tuple[int, int, int, str, tuple[str, int]]], found)
            self._resolved_at = loop.time()


class _Connection(asyncio.Protocol):
    """One connection: it is asked, answers, and is asked again."""

    __slots__ = (
        "_answer", "_client", "_complete", "_has_length", "_on_piece", "_parser", "_pieces",
        "_reusable", "_since_body", "_status", "_streams", "_transport", "idle_since", "loop",
    )  # fmt: skip

    def __init__(self, client: HttpClient, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.idle_since = 0.0
        self._client = client
        self._parser = httptools.HttpResponseParser(self)
        self._answer: asyncio.Future[HttpAnswer] | None = None

    def ask(
        self, request: bytes, on_piece: Callable[[bytes], None] | None
    ) -> asyncio.Future[HttpAnswer]:
        """What is answered; if that is cancelled the connection is of no use any more."""
        self._answer = self.loop.create_future()
        self._on_piece = on_piece
        self._begin()
        self._transport.write(request)
        return self._answer

    def abort(self) -> None:
        self._transport.abort()

    def _begin(self) -> None:
        """An answer is expected."""
        self._status = 0
        self._streams = self._has_length = self._reusable = self._complete = False
        self._pieces: list[bytes] = []
        self._since_body = 0  # bytes that were no body's

    # ── what the transport tells ─────────────────────────────────────────────────────────────

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        answer = self._answer
        if answer is None or answer.done():  # nobody has asked, or nobody wants to know
            self.abort()
            return
        self._since_body += len(data)
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._reusable = False
            if not self._complete:  # else it has said more than was asked
                why = error.__context__ or error
                self._fail(ConnectionError(f"it answered what is no HTTP: {why}"))
        if self._complete:
            self._finish()
        elif self._since_body > _LONGEST_HEAD_BYTES:
            self._fail(ConnectionError(f"its headers are above {_LONGEST_HEAD_BYTES} bytes"))

    def connection_lost(self, error: Exception | None) -> None:
        self._client.forget(self)
        if self._answer is None:
            return
        if error is None and self._status and not self._has_length:
            self._finish()  # this end is the answer's
        else:
            self._fail(error or ConnectionError("Server disconnected"))

    # ── what the parser tells ────────────────────────────────────────────────────────────────

    def on_message_begin(self) -> None:
        if self._complete:
            raise ConnectionError("more answers than requests")

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if self._status:  # after the body
            return
        if name == b"content-type":
            self._streams = value.lower().startswith(_EVENT_STREAM)
        elif name in (b"content-length", b"transfer-encoding"):
            self._has_length = True

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()
        self._reusable = self._parser.should_keep_alive()
        self._streams &= self._on_piece is not None and self._status == _HTTP_OK

    def on_body(self, piece: bytes) -> None:
        self._since_body = 0
        if not self._streams:
            self._pieces.append(piece)
        elif self._answer is not None and not self._answer.done():
            assert self._on_piece is not None
            try:
                self._on_piece(piece)
            except Exception as error:  # it is for who asked
                self._fail(error)

    def on_message_complete(self) -> None:
        if self._status < _HTTP_OK:  # "100 Continue", and the like: the answer is still to come
            self._begin()
        else:
            self._complete = True

    # ── ends ─────────────────────────────────────────────────────────────────────────────────

    def _finish(self) -> None:
        """The answer is whole."""
        answer, self._answer = self._answer, None
        assert answer is not None
        # After a fault of its application uvicorn closes a connection that it said it would keep.
        well = self._status < _HTTP_SERVER_ERROR
        if self._reusable and well and not self._transport.is_closing():
            self._client.keep(self)
        else:
            self.abort()
        if not answer.done():
            answer.set_result(HttpAnswer(self._status, self._streams, b"".join(self._pieces)))

    def _fail(self, error: Exception) -> None:
        self.abort()
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)
