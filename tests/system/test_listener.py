"""Strangers at a port: they use up nothing, and a browser gets no answer for a web page."""

import asyncio
import contextlib
import os
import resource
from collections.abc import AsyncIterator, Iterator

import aiohttp
import pytest
from aiohttp import StreamReader, web
from aiohttp.base_protocol import BaseProtocol
from aiohttp.test_utils import make_mocked_request

from flash.hub.http_worker import HttpWorker
from flash.system.listener import Listener, page_refusal, read_body
from flash.system.machine import open_file_limit, raise_open_file_limit
from flash.virtual_time import in_virtual_time

HALF = b"GET / HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer "  # of a request
WHOLE = HALF + b"key\r\n\r\n"


@contextlib.contextmanager
def open_files(most: int) -> Iterator[None]:
    """So many this process may open, inside."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


class Served:
    """A listener whose app answers who has the key."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self.url = ""
        self._writers: list[asyncio.StreamWriter] = []

    async def answer(self, request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != "Bearer key":
            raise web.HTTPUnauthorized
        self.listener.vouch(request)
        return web.Response(text="well")

    async def ask(self) -> str:
        """Over a connection of its own."""
        headers = {"Authorization": "Bearer key"}
        async with aiohttp.request("GET", self.url, headers=headers) as response:
            return await response.text()

    async def connect(self, sent: bytes = b"") -> asyncio.StreamReader:
        """A connection that sends so much, and no more."""
        host, port = self.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        self._writers.append(writer)
        writer.write(sent)
        return reader

    async def close(self) -> None:
        for writer in self._writers:
            writer.close()
        await self.listener.close()


@contextlib.asynccontextmanager
async def served(*, files: int = 400, **options) -> AsyncIterator[Served]:
    with open_files(files):
        server = Served(Listener("127.0.0.1", 0))
    app = web.Application()
    app.router.add_get("/{path:.*}", server.answer)
    server.url = await server.listener.start(app, **options)
    try:
        yield server
    finally:
        await server.close()


@pytest.mark.parametrize("sent", [b"", HALF], ids=["silent", "half a header"])
async def test_strangers_close_each_others_connections_and_never_one_with_a_key(sent):
    async with served(files=400) as server:  # 200 connections, of which 100 may be strangers'
        known = await server.connect(WHOLE)
        assert (await known.readuntil(b"well")).startswith(b"HTTP/1.1 200")
        strangers = [await server.connect(sent) for _ in range(150)]
        assert await server.ask() == "well", "a newcomer is heard"
        assert {await stranger.read() for stranger in strangers[:50]} == {b""}, "the oldest"
        assert not any(reader.at_eof() for reader in (known, *strangers[51:]))


@pytest.mark.parametrize("sent", [b"", HALF, WHOLE], ids=["silent", "half a header", "idle"])
async def test_a_connection_without_a_request_is_closed_in_time(sent):
    async with served(keepalive_timeout=0.05) as server:
        async with asyncio.timeout(10):
            told = await (await server.connect(sent)).read()
        assert told.endswith(b"well" if sent == WHOLE else b"")


@in_virtual_time
async def test_a_body_that_does_not_come_to_its_end_is_waited_for_a_minute():
    connection = BaseProtocol(asyncio.get_running_loop())
    connection.connection_made(asyncio.Transport())
    unfinished = StreamReader(connection, 1024)
    unfinished.feed_data(b"{")
    request = make_mocked_request("POST", "/", payload=unfinished)
    with pytest.raises(web.HTTPRequestTimeout, match="the body took longer than 60 s"):
        await read_body(request)
    assert asyncio.get_running_loop().time() < 61


@pytest.mark.slow
async def test_ten_thousand_connections_shut_nobody_out():
    """How long honest requests take meanwhile, `benchmarks/floods.py` tells."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    before = len(os.listdir("/proc/self/fd"))
    with open_files(hard):
        async with served(files=hard) as server:
            known = await server.connect(WHOLE)
            await known.readuntil(b"well")
            for _ in range(100):
                await asyncio.gather(*(server.connect(HALF) for _ in range(100)))
                assert await server.ask() == "well"
            assert not known.at_eof()
            # Ours, and at its side those that are open at a time.
            assert len(os.listdir("/proc/self/fd")) - before < 10_000 + 2_200


async def test_connections_leave_files_for_the_rest_of_the_process():
    async with served(files=100) as server:
        known = [await server.connect(WHOLE) for _ in range(50)]
        for reader in known:
            await reader.readuntil(b"well")
        assert await (await server.connect(WHOLE)).read() == b"", "one more than half of them"
        assert not any(reader.at_eof() for reader in known)


async def test_a_worker_is_not_blamed_for_a_socket_that_this_machine_lacks(caplog):
    async with served() as server:
        worker = HttpWorker(server.url, api_key="key")
        taken = [os.dup(2)]
        with open_files(max(taken) + 8), contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(2))
        with open_files(max(taken) + 1):
            asked = asyncio.create_task(worker.check_health())
            while "short of something" not in caplog.text:
                await asyncio.sleep(0)
            assert not asked.done()
            for file in taken:
                os.close(file)
            await asked
        await worker.close()


def test_the_limit_of_open_files_is_raised_as_far_as_it_may():
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open_files(200):
        raise_open_file_limit()
        assert open_file_limit() == min(hard, 65_536)


LOOPBACK, LAN = "127.0.0.1", "192.168.0.7"


@pytest.mark.parametrize(
    ("headers", "address"),
    [
        ({}, LOOPBACK),  # no browser leaves the Host out
        ({"Host": "127.0.0.1:8000"}, LOOPBACK),
        ({"Host": "localhost:8000"}, LOOPBACK),
        ({"Host": "LOCALHOST."}, LOOPBACK),
        ({"Host": "127.8.8.8"}, LOOPBACK),
        ({"Host": "[::1]:8000"}, "::1"),
        ({"Host": "127.0.0.1:8000"}, "::ffff:127.0.0.1"),
        ({"Host": "node-3.cluster:8000"}, LAN),  # by what names others know us is not known
    ],
)
def test_a_request_of_a_program_is_answered(headers, address):
    assert page_refusal(headers, local_address=address) == ""


@pytest.mark.parametrize(
    ("headers", "address"),
    [
        ({"Host": "127.0.0.1:8000", "Origin": "https://evil.example"}, LOOPBACK),
        ({"Host": "127.0.0.1:8000", "Origin": "null"}, LOOPBACK),
        ({"Host": "127.0.0.1:8000", "Origin": "http://127.0.0.1:9000"}, LOOPBACK),
        ({"Host": "node-3:8000", "Origin": "http://node-3:8000"}, LAN),
        ({"Host": "evil.example"}, LOOPBACK),
        ({"Host": "evil.example:8000"}, "::1"),
        ({"Host": "localhost.evil.example"}, LOOPBACK),
        ({"Host": "127.0.0.1.evil.example"}, LOOPBACK),
        ({"Host": "user@evil.example"}, LOOPBACK),
        ({"Host": "[evil"}, LOOPBACK),
        ({"Host": "0.0.0.0:8000"}, LOOPBACK),
        ({"Host": "evil.example"}, "::ffff:127.0.0.1"),
    ],
)
def test_a_request_of_a_web_page_is_refused_with_what_is_wrong(headers, address):
    why = page_refusal(headers, local_address=address)
    assert headers.get("Origin", headers["Host"]) in why
