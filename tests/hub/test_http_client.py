"""The HTTP client, against a server that answers any bytes."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trustme

from flash.hub import http_client
from flash.hub.http_client import HttpClient
from tests.hub.raw_server import RawServer, answer, chunked, raw_server

EVENTS = ("Content-Type: text/event-stream; charset=utf-8",)


@asynccontextmanager
async def talking(
    *answers: bytes, hang_up: bool = False, path: str = "", headers: dict[str, str] | None = None
) -> AsyncIterator[tuple[HttpClient, RawServer]]:
    async with raw_server(*answers, hang_up=hang_up) as server:
        client = HttpClient(server.url + path, headers or {})
        try:
            yield client, server
        finally:
            await client.close()


async def test_a_request_says_all_that_a_server_needs():
    async with talking(answer(b"yes"), path="/a b/", headers={"Authorization": "Bearer key"}) as (
        client,
        server,
    ):
        assert (await client.send("POST", "/route?mode=keep", b"[1]")).body == b"yes"
        [(_, head, body)] = server.requests
        host = server.url.removeprefix("http://")
        assert head.decode().split("\r\n") == [
            "POST /a%20b/route?mode=keep HTTP/1.1", f"Host: {host}", "Authorization: Bearer key",
            "Content-Type: application/json", "Content-Length: 3", "", "",
        ]  # fmt: skip
        assert body == b"[1]"


async def test_a_url_with_a_user_says_who_that_is():
    async with talking(answer(b"")) as (_, server):
        client = HttpClient(server.url.replace("//", "//me:a%3Ab@"), {})
        await client.send("GET", "/")
        await client.close()
        assert b"\r\nAuthorization: Basic bWU6YTpi\r\n" in server.requests[0][1]
        assert b"me" not in server.requests[0][1].split(b"Host: ")[1].split(b"\r\n")[0]


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", "http://host:99999"])
def test_what_is_no_url_is_refused(url):
    with pytest.raises(ValueError, match=r"http://HOST:PORT|[Pp]ort"):
        HttpClient(url, {})


def test_a_key_with_a_line_break_is_refused():
    with pytest.raises(ValueError, match="Authorization has a character that no header can have"):
        HttpClient("http://host", {"Authorization": "Bearer key\r\nHost: other"})


async def test_a_connection_that_uvicorn_closes_after_a_fault_is_not_used_again():
    fault = answer(b"no", status="500 Internal Server Error")
    async with talking(fault, answer(b"next")) as (client, server):
        assert (await client.send("POST", "/", b"1")).status == 500
        assert (await client.send("POST", "/", b"2")).body == b"next"
        assert [number for number, _, _ in server.requests] == [0, 1]


@pytest.mark.parametrize(
    "said",
    [
        answer(b"whole"),
        chunked(b"wh", b"ole"),
        b"HTTP/1.1 100 Continue\r\n\r\n" + answer(b"whole"),
        b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + answer(b"whole"),
    ],
)
async def test_a_connection_is_used_again_once_its_answer_is_whole(said):
    async with talking(said, answer(b"next")) as (client, server):
        assert (await client.send("POST", "/", b"1")).body == b"whole"
        assert (await client.send("POST", "/", b"2")).body == b"next"
        assert [(number, body) for number, _, body in server.requests] == [(0, b"1"), (0, b"2")]


@pytest.mark.parametrize(
    "said",
    [
        answer(b"whole", "Connection: close"),
        # Two answers to one request: the second one is nobody's, however much of it has come.
        answer(b"whole") + answer(b"stray"),
        answer(b"whole") + b"HTTP/1.1 200 OK\r\nContent-Le",
        answer(b"whole") + b"H",
        answer(b"whole") + b"nonsense",
    ],
)
async def test_a_connection_that_can_not_be_used_again_is_closed(said):
    async with talking(said, answer(b"next")) as (client, server):
        assert (await client.send("POST", "/", b"1")).body == b"whole"
        assert (await client.send("POST", "/", b"2")).body == b"next"
        assert [number for number, _, _ in server.requests] == [0, 1]


async def test_a_word_that_nobody_asked_for_ends_a_connection():
    async with talking(answer(b"whole")) as (client, server):
        await client.send("POST", "/", b"1")
        [connection] = client._idle
        connection.data_received(answer(b"stray"))
        await server.wait_until(lambda: server.closed == 1)
        assert not client._idle


async def test_an_answer_without_a_length_ends_with_its_connection():
    said = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\nall there is"
    async with talking(said, hang_up=True) as (client, _):
        assert (await client.send("GET", "/")).body == b"all there is"


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (b"", "Server disconnected"),
        (answer(b"whole")[:-1], "Server disconnected"),
        (chunked(b"not whole", whole=False), "Server disconnected"),
        (b"HTTP/1.1 200 OK\r\n", "Server disconnected"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "no HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n12", "no HTTP"),
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            "no HTTP",
        ),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000, "headers are above 65536 bytes"),
        (
            b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\nother words",
            "no HTTP",
        ),
    ],
)
async def test_what_is_no_whole_answer_is_an_error(said, told):
    async with talking(said, hang_up=True) as (client, server):
        with pytest.raises(ConnectionError, match=told):
            await client.send("POST", "/", b"1")
        await server.wait_until(lambda: server.closed == 1)


async def test_trailers_without_end_are_an_error_too():
    said = chunked(b"whole", whole=False) + b"0\r\nX: " + b"x" * 1_000_000
    async with talking(said) as (client, _):
        with pytest.raises(ConnectionError, match="headers are above"):
            await client.send("POST", "/", b"1")


async def test_an_answer_may_be_longer_than_headers():
    async with talking(answer(b"x" * 300_000), chunked(*[b"x" * 10] * 20_000)) as (client, _):
        assert len((await client.send("POST", "/", b"1")).body) == 300_000
        assert len((await client.send("POST", "/", b"1")).body) == 200_000


async def test_a_stream_of_events_is_heard_as_it_comes_and_other_bodies_are_kept():
    heard: list[bytes] = []
    async with talking(
        chunked(b"one", b"two", fields=EVENTS),
        chunked(b"whole", whole=False) + f"0\r\n{EVENTS[0]}\r\n\r\n".encode(),
        answer(b"no", *EVENTS, status="500 Internal Server Error"),
    ) as (client, _):
        assert await client.send("POST", "/", b"1", heard.append) == (200, True, b"")
        assert b"".join(heard) == b"onetwo"
        assert await client.send("POST", "/", b"1", heard.append) == (200, False, b"whole")
        assert await client.send("POST", "/", b"1", heard.append) == (500, False, b"no")
        assert b"".join(heard) == b"onetwo"


async def test_what_a_listener_raises_ends_its_request_alone():
    def refuse(piece: bytes) -> None:
        raise ValueError(f"not {piece!r}")

    async with talking(chunked(b"one", b"two", fields=EVENTS), answer(b"next")) as (client, server):
        with pytest.raises(ValueError, match="not b'one'"):
            await client.send("POST", "/", b"1", refuse)
        assert (await client.send("POST", "/", b"2")).body == b"next"
        assert [number for number, _, _ in server.requests] == [0, 1]


async def test_a_request_that_is_cancelled_closes_its_connection_and_no_other():
    async with talking() as (client, server):
        first, second = (asyncio.create_task(client.send("POST", "/", b"1")) for _ in range(2))
        await server.wait_until(lambda: len(server.requests) == 2)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        await server.wait_until(lambda: server.closed == 1)
        assert not second.done()
        second.cancel()
        await asyncio.wait([second])


async def test_a_request_that_is_cancelled_after_its_answer_came_leaves_the_connection_alone():
    async with talking(answer(b"whole"), answer(b"next")) as (client, server):

        async def cancel() -> None:
            await server.wait_until(lambda: len(server.requests) == 1)
            while not client._idle:
                await asyncio.sleep(0)
            first.cancel()

        first = asyncio.create_task(client.send("POST", "/", b"1"))
        cancelling = asyncio.create_task(cancel())
        await asyncio.wait([first, cancelling])
        assert (await client.send("POST", "/", b"2")).body == b"next"
        assert [number for number, _, _ in server.requests] == [0, 0]


async def test_connections_that_idle_are_closed(monkeypatch):
    monkeypatch.setattr(http_client, "_KEPT_S", 0.01)
    async with talking(answer(b"1"), answer(b"2")) as (client, server):
        calls = [client.send("POST", "/", b"1") for _ in range(2)]
        await asyncio.gather(*calls)
        await server.wait_until(lambda: server.closed == 2)
        assert not client._idle
        assert not client._open


async def test_of_connections_that_idle_the_timer_waits_for_the_next_one():
    async with talking(answer(b"1"), answer(b"2")) as (client, server):
        await asyncio.gather(*(client.send("POST", "/", b"1") for _ in range(2)))
        first, second = client._idle
        first.idle_since -= http_client._KEPT_S
        client._close_idle()
        await server.wait_until(lambda: server.closed == 1)
        assert [*client._idle] == [second]
        assert client._closing_idle is not None
        assert client._closing_idle.when() == second.idle_since + http_client._KEPT_S


async def test_a_connection_that_idled_too_long_is_not_asked_again(monkeypatch):
    async with talking(answer(b"1"), answer(b"2")) as (client, server):
        await client.send("POST", "/", b"1")
        [connection] = client._idle
        connection.idle_since -= http_client._KEPT_S  # and its timer is late
        await client.send("POST", "/", b"1")
        assert [number for number, _, _ in server.requests] == [0, 1]


async def test_closing_ends_what_is_under_way_and_what_idles():
    async with talking(answer(b"1")) as (client, server):
        await client.send("POST", "/", b"1")
        call = asyncio.create_task(client.send("POST", "/", b"2"))
        other = asyncio.create_task(client.send("POST", "/", b"3"))
        await server.wait_until(lambda: len(server.requests) == 3)
        await client.close()
        for task in (call, other):
            with pytest.raises(ConnectionError, match="disconnected"):
                await task
        await server.wait_until(lambda: server.closed == 2)
        with pytest.raises(ConnectionError, match="closed meanwhile"):
            await client.send("POST", "/", b"4")


async def test_by_tls_a_server_must_have_a_certificate_that_this_machine_trusts(
    tmp_path, monkeypatch
):
    authority, tls = trustme.CA(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(tls)
    async with raw_server(answer(b"1"), answer(b"2"), tls=tls) as server:
        stranger = HttpClient(server.url, {})
        with pytest.raises(ssl.SSLCertVerificationError, match="certificate verify failed"):
            await stranger.send("POST", "/", b"1")
        await stranger.close()
        authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
        client = HttpClient(server.url, {})
        assert [(await client.send("POST", "/", b"1")).body for _ in "12"] == [b"1", b"2"]
        assert [number for number, _, _ in server.requests] == [0, 0]
        await client.close()


async def test_who_can_not_be_reached_is_named():
    client = HttpClient("http://127.0.0.1:9", {})
    with pytest.raises(ConnectionError, match=r"Cannot connect to host 127\.0\.0\.1:9") as refused:
        await client.send("GET", "/")
    assert refused.value.errno is not None
    await client.close()
