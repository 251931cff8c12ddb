"""Where explorers come in: a port of the controller, and how the two know each other.

    explorer                                   controller
    POST /explorers  its nonce            ──►
                                          ◄──  a nonce, and a proof that it has the run's token
    GET /explorers   a proof likewise     ──►  from here on a WebSocket: frames of link.py

The token itself is never sent. Whoever can come between the two needs none: give a certificate
where others than you can (`explorers.certificate`).
"""

import asyncio
import hashlib
import hmac
import secrets
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec
from aiohttp import WSMsgType, web

from flash.explorer.file_server import FileServer
from flash.explorer.link import LinkLost, Wire
from flash.explorer.messages import UNREADABLE
from flash.system.listener import Listener, local_address, page_refusal, read_body

_PATH = "/explorers"
_NONCE, _PROOF = "X-Flash-Nonce", "X-Flash-Proof"
_NONCE_BYTES = 32
_NONCES = 1024  # that were given and not used yet: the oldest is forgotten
_TIMEOUT_S = 10.0
_LARGEST_BODY = 4096
_FOR_NOW = (408, 429, 500, 502, 503, 504)  # of a proxy whose controller is away, above all


class _Opening(msgspec.Struct):
    nonce: str


class _Answer(msgspec.Struct):
    nonce: str
    proof: str


class NotTheController(Exception):
    """What answers does not have the run's token, or is something else; `again`: it may be soon."""

    def __init__(self, why: str, *, again: bool = False) -> None:
        super().__init__(why)
        self.again = again


class Gate:
    """Lets those in who have the token; `welcome` has each one's wire until it returns.

    `files` are to be had at the same port, by whoever has their key.
    """

    def __init__(
        self,
        token: str,
        welcome: Callable[[Wire], Awaitable[None]],
        *,
        files: FileServer,
        host: str,
        port: int,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._token = token
        self._welcome = welcome
        self._files = files
        self._listener = Listener(host, port)
        self._tls = tls
        self._nonces: dict[str, str] = {}

    async def start(self) -> str:
        """The URL. OSError if nobody can listen there."""
        app = web.Application(client_max_size=_LARGEST_BODY)
        app.router.add_post(_PATH, self._open)
        app.router.add_get(_PATH, self._enter)
        self._files.add_to(app, self._listener.vouch)
        return await self._listener.start(app, tls=self._tls)

    async def close(self) -> None:
        await self._listener.close()

    async def _open(self, request: web.Request) -> web.Response:
        if refusal := page_refusal(request.headers, local_address=local_address(request)):
            raise web.HTTPForbidden(reason=refusal)
        try:
            theirs = msgspec.json.decode(await read_body(request), type=_Opening).nonce
        except UNREADABLE as error:
            raise web.HTTPBadRequest(reason="a nonce is missing") from error
        ours = secrets.token_hex(_NONCE_BYTES)
        self._nonces[ours] = theirs
        while len(self._nonces) > _NONCES:
            del self._nonces[next(iter(self._nonces))]
        answer = _Answer(ours, proof(self._token, "controller", theirs, ours))
        return web.Response(body=msgspec.json.encode(answer), content_type="application/json")

    async def _enter(self, request: web.Request) -> web.WebSocketResponse:
        if refusal := page_refusal(request.headers, local_address=local_address(request)):
            raise web.HTTPForbidden(reason=refusal)
        ours = request.headers.get(_NONCE, "")
        theirs = self._nonces.pop(ours, None)
        expected = proof(self._token, "explorer", theirs or "", ours)
        given = request.headers.get(_PROOF, "").encode(errors="replace")
        if theirs is None or not hmac.compare_digest(expected.encode(), given):
            raise web.HTTPForbidden(reason="the proof is not of this run's token")
        self._listener.vouch(request)
        socket = web.WebSocketResponse(max_msg_size=0, compress=False)
        await socket.prepare(request)
        await self._welcome(SocketWire(socket))
        return socket


def proof(token: str, who: str, explorers_nonce: str, controllers_nonce: str) -> str:
    """That `who` has the token, in answer to these nonces."""
    words = f"{who}:{explorers_nonce}:{controllers_nonce}"
    return hmac.new(token.encode(), words.encode(), hashlib.sha256).hexdigest()


class SocketWire:
    """A WebSocket, of either side."""

    def __init__(self, socket: web.WebSocketResponse | aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket

    @property
    def local_address(self) -> str:
        sockname = self._socket.get_extra_info("sockname")
        return str(sockname[0]) if sockname else ""

    async def send(self, frame: bytes) -> None:
        try:
            await self._socket.send_bytes(frame)
        except (OSError, RuntimeError, aiohttp.ClientError) as error:
            raise LinkLost(f"the connection has ended: {error!r}") from error

    async def receive(self) -> bytes:
        try:
            message = await self._socket.receive()
        except (OSError, RuntimeError, aiohttp.ClientError) as error:
            raise LinkLost(f"the connection has ended: {error!r}") from error
        if message.type is WSMsgType.BINARY:
            return bytes(message.data)
        raise LinkLost("the other side has closed the connection")

    async def close(self) -> None:
        await self._socket.close()


@asynccontextmanager
async def joined(
    session: aiohttp.ClientSession, url: str, token: str, *, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Wire]:
    """The wire to the controller at that URL, which has shown that it has the token.

    Raises NotTheController.
    """
    address = url.rstrip("/") + _PATH
    tls_options: dict[str, Any] = {} if tls is None else {"ssl": tls}
    theirs = secrets.token_hex(_NONCE_BYTES)
    try:
        async with (
            asyncio.timeout(_TIMEOUT_S),
            session.post(address, json={"nonce": theirs}, **tls_options) as response,
        ):
            if response.status != 200:
                raise NotTheController(
                    f"{url} answers {response.status} {response.reason}",
                    again=response.status in _FOR_NOW,
                )
            answer = msgspec.json.decode(await response.read(), type=_Answer)
    except aiohttp.ClientConnectorCertificateError as error:
        raise NotTheController(f"{url}: {error}: give --ca the certificate's file") from error
    except aiohttp.ClientSSLError as error:
        raise NotTheController(f"{url}: {error}: without TLS write http://") from error
    except aiohttp.ServerDisconnectedError as error:
        why = f"what answers at {url} hangs up: with TLS write https://"
        raise NotTheController(why, again=True) from error
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise NotTheController(f"nobody answers at {url}", again=True) from error
    except UNREADABLE as error:
        raise NotTheController(f"what answers at {url} is no controller") from error
    expected = proof(token, "controller", theirs, answer.nonce)
    if not hmac.compare_digest(expected.encode(), answer.proof.encode(errors="replace")):
        raise NotTheController(
            f"the controller at {url} has another token than this explorer: give the one of the "
            f"run's explorers.json"
        )
    headers = {_NONCE: answer.nonce, _PROOF: proof(token, "explorer", theirs, answer.nonce)}
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            socket = await session.ws_connect(
                address, headers=headers, max_msg_size=0, compress=0, **tls_options
            )
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise NotTheController(f"{url} lets nobody in: {error}", again=True) from error
    try:
        yield SocketWire(socket)
    finally:
        await socket.close()
