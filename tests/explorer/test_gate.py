"""Where explorers come in: who is let in, and whom an explorer believes. On loopback."""

import asyncio
import contextlib
import ssl

import aiohttp
import pytest
import trustme

from flash.config import load
from flash.errors import FlashError
from flash.explorer.address import Address
from flash.explorer.explore import checked, explore, local_config
from flash.explorer.file_server import FileServer
from flash.explorer.gate import Gate, NotTheController, joined
from flash.explorer.link import LinkLost
from flash.explorer.messages import Welcome


@contextlib.asynccontextmanager
async def gate(token="secret", **options):
    came = asyncio.Queue()

    async def welcome(wire):
        over = asyncio.Event()
        came.put_nowait((wire, over))
        await over.wait()

    opened = Gate(token, welcome, files=FileServer(), host="127.0.0.1", port=0, **options)
    url = await opened.start()
    try:
        yield url, came
    finally:
        await opened.close()


async def test_both_sides_have_the_token_and_it_is_never_sent():
    async with (
        gate() as (url, came),
        aiohttp.ClientSession() as session,
        joined(session, url, "secret") as wire,
    ):
        theirs, over = await came.get()
        await wire.send(b"x" * 10_000_000)
        assert len(await theirs.receive()) == 10_000_000
        await theirs.send(b"back")
        assert await wire.receive() == b"back"
        over.set()
        with pytest.raises(LinkLost):
            await wire.receive()


async def test_an_explorer_with_another_token_believes_nobody_and_is_let_in_nowhere():
    async with gate() as (url, came), aiohttp.ClientSession() as session:
        with pytest.raises(NotTheController, match="another token") as refusal:
            async with joined(session, url, "wrong"):
                pass
        assert not refusal.value.again
        # One that does not look is not let in either.
        async with session.post(f"{url}/explorers", json={"nonce": "0" * 64}) as response:
            nonce = (await response.json())["nonce"]
        for proof in ("", "0" * 64, "ä"):
            headers = {"X-Flash-Nonce": nonce, "X-Flash-Proof": proof}
            with pytest.raises(aiohttp.WSServerHandshakeError, match="403"):
                await session.ws_connect(f"{url}/explorers", headers=headers)
        # No text at all: the header's bytes are half of a character.
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        writer.write(
            f"GET /explorers HTTP/1.1\r\nHost: localhost\r\nX-Flash-Nonce: {nonce}\r\n".encode()
            + b"X-Flash-Proof: \xff\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"
        )
        assert b" 403 " in await reader.readline()
        writer.close()
        assert came.empty()


async def test_a_proof_opens_one_connection_only():
    seen = {}

    async def spy(session, context, params):
        seen.update({n: v for n, v in params.headers.items() if n.startswith("X-Flash")})

    trace = aiohttp.TraceConfig()
    trace.on_request_start.append(spy)
    async with gate() as (url, came), aiohttp.ClientSession(trace_configs=[trace]) as session:
        async with joined(session, url, "secret"):
            (await came.get())[1].set()
        assert "secret" not in str(seen)
        with pytest.raises(aiohttp.WSServerHandshakeError, match="403"):
            await session.ws_connect(f"{url}/explorers", headers=seen)


async def test_web_pages_are_not_answered():
    async with gate() as (url, _), aiohttp.ClientSession() as session:
        for headers in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}):
            async with session.post(f"{url}/explorers", json={"nonce": "0"}, headers=headers) as r:
                assert r.status == 403
            async with session.get(f"{url}/explorers", headers=headers) as r:
                assert r.status == 403


@pytest.mark.parametrize("body", [b"", b"{", b'{"nonce": 3}', b"[" * 3000, b'{"nonce": "\xff"}'])
async def test_a_body_that_is_none_is_refused(body):
    async with gate() as (url, _), aiohttp.ClientSession() as session:
        async with session.post(f"{url}/explorers", data=body) as response:
            assert response.status == 400
        async with session.post(f"{url}/explorers", data=b"x" * 10_000) as response:
            assert response.status == 413


async def test_something_else_than_a_controller_is_told_so():
    async def nonsense(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(nonsense, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, aiohttp.ClientSession() as session:
        with pytest.raises(NotTheController, match="is no controller"):
            async with joined(session, f"http://127.0.0.1:{port}", "secret"):
                pass
    async with aiohttp.ClientSession() as session:
        with pytest.raises(NotTheController, match="nobody answers") as refusal:
            async with joined(session, f"http://127.0.0.1:{port}", "secret"):
                pass
        assert refusal.value.again


@pytest.mark.parametrize(
    ("status", "again"), [(502, True), (503, True), (429, True), (404, False), (401, False)]
)
async def test_a_proxy_whose_controller_is_away_is_asked_again(status, again):
    async def away(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 {status} For now\r\nContent-Length: 0\r\n\r\n".encode())
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(away, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, aiohttp.ClientSession() as session:
        with pytest.raises(NotTheController, match=f"{status} For now") as refusal:
            async with joined(session, url, "secret"):
                pass
    assert refusal.value.again == again


async def test_where_somebody_else_has_the_port_of_a_runs_last_start_its_next_is_waited_for(
    tmp_path,
):
    said = asyncio.Queue()
    told = checked(source=str(tmp_path), token="", overrides={})
    async with gate("another") as (taken, _), gate() as (url, came):
        Address(taken, "secret").write(tmp_path)
        exploring = asyncio.create_task(explore(told, stop=asyncio.Event(), say=said.put_nowait))
        assert "another token" in await said.get()
        Address(url, "secret").write(tmp_path)
        _, over = await came.get()
        exploring.cancel()
        await asyncio.wait((exploring,))
        over.set()


async def test_an_explorer_that_was_away_at_the_end_of_a_run_does_not_wait_for_it_for_ever(
    tmp_path,
):
    said = asyncio.Queue()
    told = checked(source=str(tmp_path), token="", name="a", overrides={})
    async with gate() as (url, came):
        Address(url, "secret").write(tmp_path)
        exploring = asyncio.create_task(explore(told, stop=asyncio.Event(), say=said.put_nowait))
        _, over = await came.get()
    Address.remove(tmp_path)
    over.set()
    await exploring
    while (last := await said.get()) != "a: the run is over":
        assert "is away" in last


async def test_an_explorer_waits_no_longer_than_it_is_told_for_whoever_has_its_url(tmp_path):
    told = checked(
        source="http://127.0.0.1:1", token="t", folder=tmp_path, wait_s=0.0, overrides={}
    )
    away = r"leaves: .* away for 0 s \(nobody answers at http://127.0.0.1:1\), or the run is over"
    with pytest.raises(FlashError, match=away):
        await explore(told, stop=asyncio.Event(), say=[].append)


async def test_two_explorers_of_one_folder_are_too_many(tmp_path):
    said = asyncio.Queue()
    (tmp_path / "explorers" / "a").mkdir(parents=True)
    told = checked(source=str(tmp_path), token="", name="a", overrides={})
    first = asyncio.create_task(explore(told, stop=asyncio.Event(), say=said.put_nowait))
    await said.get()
    with pytest.raises(FlashError, match="is another explorer's, in process .*--name of its own"):
        await explore(told, stop=asyncio.Event())
    first.cancel()
    await asyncio.wait((first,))


async def test_waiting_for_a_run_makes_no_folder_of_it(tmp_path):
    said = asyncio.Queue()
    told = checked(source=str(tmp_path / "typo"), token="", overrides={})
    exploring = asyncio.create_task(explore(told, stop=asyncio.Event(), say=said.put_nowait))
    await said.get()
    exploring.cancel()
    await asyncio.wait((exploring,))
    assert not (tmp_path / "typo").exists()


async def test_an_explorer_that_waits_for_nodes_for_what_it_has_leaves_when_it_is_asked_to(
    tmp_path,
):
    stop, came, went = asyncio.Event(), asyncio.Event(), asyncio.Event()

    @contextlib.asynccontextmanager
    async def elsewhere():
        came.set()
        try:
            await asyncio.Event().wait()
            yield
        finally:
            went.set()

    told = checked(source=str(tmp_path), token="", overrides={})
    exploring = asyncio.create_task(explore(told, stop=stop, elsewhere=elsewhere()))
    await came.wait()
    stop.set()
    await exploring
    assert went.is_set()


def test_an_explorer_without_workers_is_refused():
    config = load("frozen_lake", {"explorers.expected": 1}).model_dump(mode="json")
    welcome = Welcome(
        run="r", name="r", controller="", config=config, where="", model="m", model_files=None,
        version=0, published=0, lease_s=1, keeps=[],
    )  # fmt: skip
    assert local_config(welcome, "m", {}).engine.workers
    with pytest.raises(ValueError, match=r"engine\.workers=0: an explorer has workers"):
        local_config(welcome, "m", {"engine.workers": 0})


async def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").touch()
    told = checked(source=str(tmp_path), token="", folder=tmp_path / "file" / "x", overrides={})
    with pytest.raises(ValueError, match="Not a directory.*give a --folder"):
        await explore(told, stop=asyncio.Event())


async def test_who_says_nothing_to_a_gate_with_tls_is_let_go(monkeypatch):
    monkeypatch.setattr("flash.system.listener._HANDSHAKE_TIMEOUT_S", 0.01)
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(server)
    async with gate(tls=server) as (url, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
        async with asyncio.timeout(30):
            assert await reader.read() == b""
        writer.close()


async def test_with_a_certificate_both_speak_tls(tmp_path):
    authority, other = trustme.CA(), trustme.CA()
    files = {}
    for name, whose in (("ca", authority), ("other", other)):
        files[name] = tmp_path / f"{name}.pem"
        whose.cert_pem.write_to_path(str(files[name]))
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(server)
    async with gate(tls=server) as (url, came), aiohttp.ClientSession() as session:
        assert url.startswith("https://")
        tls = ssl.create_default_context(cafile=str(files["ca"]))
        async with joined(session, url, "secret", tls=tls) as wire:
            theirs, over = await came.get()
            await wire.send(b"x")
            assert await theirs.receive() == b"x"
            over.set()
        for untrusted in (None, ssl.create_default_context(cafile=str(files["other"]))):
            with pytest.raises(NotTheController, match="--ca") as refusal:
                async with joined(session, url, "secret", tls=untrusted):
                    pass
            assert not refusal.value.again
        with pytest.raises(NotTheController, match="with TLS write https://"):
            async with joined(session, url.replace("https", "http"), "secret"):
                pass
    async with gate() as (url, _), aiohttp.ClientSession() as session:
        with pytest.raises(NotTheController, match="without TLS write http://"):
            async with joined(session, url.replace("http", "https"), "secret"):
                pass
