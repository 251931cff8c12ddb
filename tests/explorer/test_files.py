"""A model's files on their way to explorers: nothing is lost, sent twice, or taken unverified."""

import asyncio
import contextlib
import hashlib
import os
import random
import shutil
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import aiohttp
import msgspec
import pytest
import trustme
from aiohttp import web
from aiohttp.test_utils import TestServer

from flash.explorer import file_server
from flash.explorer.changes import write_changes
from flash.explorer.explore import checked
from flash.explorer.fetch import Fetcher
from flash.explorer.file_server import FileServer
from flash.explorer.files import (
    FetchFailure,
    GoneError,
    Manifest,
    authorization,
    decode_from_server,
    encode,
    is_here,
    manifest_of,
    stamp_of,
)
from flash.explorer.fleet import Fleet
from flash.explorer.gate import Gate
from flash.explorer.hub import FleetHub
from flash.explorer.messages import Files, Publish
from flash.fakes import FakeWires
from flash.types import Weights
from flash.virtual_time import in_virtual_time
from tests.explorer.fleets import Controller, Explorer
from tests.steady import weights

TLS_SERVER, TLS_CLIENT = ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT
PIECE = 1000
SIZES = {
    "config.json": 300,
    "model-00001-of-00003.safetensors": 7_500,
    "model-00002-of-00003.safetensors": 7_000,
    "model-00003-of-00003.safetensors": 999,
    "model.safetensors.index.json": 1_200,
    "tokenizer.json": 2_001,
    "vocabulary (50% of it)#1?.txt": 10,
    "merges.txt": 0,
}
PIECES = 1 + 8 + 7 + 1 + 2 + 3 + 1


def model(folder: Path, *, seed: int = 0) -> Path:
    """A folder with a sharded model's files."""
    folder.mkdir(parents=True)
    for name, size in SIZES.items():
        (folder / name).write_bytes(random.Random(f"{seed}{name}").randbytes(size))
    return folder


def stepped(before: Path, folder: Path, *, places: Sequence[int] = (100, 7_000)) -> Path:
    """Its weights after a step: of the first file these bytes are one more than they were."""
    shutil.copytree(before, folder, ignore=shutil.ignore_patterns("changes"))
    file = folder / next(name for name in SIZES if name.endswith(".safetensors"))
    content = bytearray(file.read_bytes())
    for place in places:
        content[place] = (content[place] + 1) % 256
    file.write_bytes(content)
    return folder


def elsewhere(files: Files) -> Files:
    """As an explorer sees them that does not share the controller's disk."""
    return msgspec.structs.replace(files, path="/not/here")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


class Site:
    """A file server at a port; counts what it is asked for. `on_piece` is called before each."""

    def __init__(self, **options) -> None:
        self.files = FileServer(piece_bytes=PIECE, **options)
        self.pieces = 0
        self.bytes = 0
        self.asked_from: list[int] = []
        self.sockets: list[web.Request] = []
        self.on_piece: Callable[[int], Awaitable[web.Response | None]] | None = None

    async def _count(self, request: web.Request, handler) -> web.StreamResponse:
        if request.path == "/files":
            self.sockets.append(request)
        elif "-" in (part := request.headers.get("Range", "")):
            self.pieces += 1
            first, last = part.removeprefix("bytes=").split("-")
            self.bytes += int(last or 0) + 1 - int(first or 0)
            self.asked_from.append(int(first or 0))
            if self.on_piece and (answer := await self.on_piece(self.pieces)):
                return answer
        return await handler(request)

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator["Site"]:
        @web.middleware
        async def count(request: web.Request, handler) -> web.StreamResponse:
            return await self._count(request, handler)

        app = web.Application(middlewares=[count])
        async with self.files:
            self.files.add_to(app, lambda request: None)
            async with TestServer(app) as self.server:
                self.url = str(self.server.make_url("")).rstrip("/")
                yield self


@contextlib.asynccontextmanager
async def fetcher(controller: Site, into: Path, relay: Site | None = None, **options):
    """An explorer's, with the place where it relays."""
    async with contextlib.AsyncExitStack() as stack:
        session = await stack.enter_async_context(aiohttp.ClientSession())
        if relay is not None:
            await stack.enter_async_context(relay.open())
            options |= {"relay": relay.files, "relay_url": relay.url}
        yield await stack.enter_async_context(
            Fetcher(session, lambda: controller.url, into, backoff_s=0, **options)
        )


async def known(site: Site, relays: int) -> None:
    """Waits until the controller knows so many relays."""
    turns = next(iter(site.files._offers.values())).turns
    while len(turns._peers) < relays:
        await asyncio.sleep(0)


async def test_what_came_is_what_was_offered(tmp_path: Path):
    async with Site().open() as site, fetcher(site, tmp_path / "into") as explorer:
        files = elsewhere(await site.files.offer(model(tmp_path / "model")))
        folder = await explorer.fetch(files)
        assert content(folder) == content(tmp_path / "model")
        assert (site.pieces, site.bytes) == (PIECES, sum(SIZES.values()))
        assert list((tmp_path / "into").iterdir()) == [folder]
        assert await explorer.fetch(files) == folder
        assert site.pieces == PIECES


async def test_two_who_want_the_same_at_once_have_one_download(tmp_path: Path):
    async with Site().open() as site, fetcher(site, tmp_path / "into") as explorer:
        files = elsewhere(await site.files.offer(model(tmp_path / "model")))
        first, second = await asyncio.gather(explorer.fetch(files), explorer.fetch(files))
        assert first == second
        assert site.pieces == PIECES


async def test_nothing_is_fetched_where_the_disk_is_shared(tmp_path: Path):
    async with Site().open() as site, fetcher(site, tmp_path / "into") as explorer:
        files = await site.files.offer(model(tmp_path / "model"))
        assert await explorer.fetch(files) == tmp_path / "model"
        assert not site.sockets and not (tmp_path / "into").exists()


async def test_to_eight_explorers_the_controller_sends_two_copies_at_most(tmp_path: Path):
    relays = [Site() for _ in range(8)]
    async with Site().open() as site, contextlib.AsyncExitStack() as stack:
        explorers = [
            await stack.enter_async_context(fetcher(site, tmp_path / f"{number}", relay))
            for number, relay in enumerate(relays)
        ]
        files = elsewhere(await site.files.offer(model(tmp_path / "model")))
        folders = await asyncio.gather(*(explorer.fetch(files) for explorer in explorers))
        assert all(content(folder) == content(tmp_path / "model") for folder in folders)
        size = sum(SIZES.values())
        assert site.bytes <= 2 * size
        assert site.bytes + sum(relay.bytes for relay in relays) == 8 * size


async def test_explorers_that_do_not_relay_are_served_all_the_same(tmp_path: Path):
    async with Site().open() as site, contextlib.AsyncExitStack() as stack:
        explorers = [
            await stack.enter_async_context(fetcher(site, tmp_path / f"{number}"))
            for number in range(5)
        ]
        files = elsewhere(await site.files.offer(model(tmp_path / "model")))
        folders = await asyncio.gather(*(explorer.fetch(files) for explorer in explorers))
        assert all(content(folder) == content(tmp_path / "model") for folder in folders)
        assert site.pieces == 5 * PIECES


class Stopped:
    """From the number of a piece on, none is sent until `go` is set."""

    def __init__(self, site: Site, number: int) -> None:
        self.reached, self.go = asyncio.Event(), asyncio.Event()
        self._number = number
        site.on_piece = self.on_piece

    async def on_piece(self, number: int) -> None:
        if number >= self._number:
            self.reached.set()
            await self.go.wait()


async def test_an_explorer_that_was_killed_goes_on_where_it_was(tmp_path: Path):
    into = tmp_path / "into"
    async with Site().open() as site:
        files = elsewhere(await site.files.offer(model(tmp_path / "model")))
        stopped = Stopped(site, 11)
        async with fetcher(site, into) as explorer, asyncio.TaskGroup() as tasks:
            fetching = tasks.create_task(explorer.fetch(files))
            await stopped.reached.wait()  # two are asked for at a time
            fetching.cancel()
        assert [path.name for path in into.iterdir()] == [f"{files.stamp}.partial"]
        stopped.go.set()
        before = site.pieces
        async with fetcher(site, into) as explorer:
            folder = await explorer.fetch(files)
        assert content(folder) == content(tmp_path / "model")
        assert site.pieces - before <= PIECES - 9


async def test_a_lost_connection_costs_what_was_under_way_alone(tmp_path: Path):
    async with Site().open() as site, fetcher(site, tmp_path / "into") as explorer:
        files = elsewhere(await site.files.offer(model(tmp_path / "model")))

        async def cut(number: int) -> None:
            if number == 11:
                site.sockets[0].transport.abort()

        site.on_piece = cut
        folder = await explorer.fetch(files)
        assert content(folder) == content(tmp_path / "model")
        assert len(site.sockets) == 2
        assert site.pieces <= PIECES + 2


async def test_what_another_process_left_is_verified_before_it_is_used(tmp_path: Path):
    async with Site().open() as site:
        files = elsewhere(await site.files.offer(model(tmp_path / "model")))
        async with fetcher(site, tmp_path / "into") as explorer:
            folder = await explorer.fetch(files)
        shard = folder / "model-00002-of-00003.safetensors"
        torn = bytearray(shard.read_bytes())
        torn[3500:] = bytes(2000)
        shard.write_bytes(torn)
        (folder / "left.json").touch()
        before = site.pieces
        async with fetcher(site, tmp_path / "into") as explorer:
            assert content(await explorer.fetch(files)) == content(tmp_path / "model")
        assert site.pieces - before == 4  # from 3,500 to 7,000


async def test_a_peer_that_lies_is_found_out_and_asked_no_more(tmp_path: Path):
    relay = Site()

    async def lie(number: int) -> web.Response:
        return web.Response(status=206, body=bytes(PIECE))

    async with (
        Site().open() as site,
        fetcher(site, tmp_path / "1", relay) as liar,
        fetcher(site, tmp_path / "2") as explorer,
    ):
        files = elsewhere(await site.files.offer(model(tmp_path / "model")))
        await liar.fetch(files)
        await known(site, 1)
        relay.on_piece = lie
        assert content(await explorer.fetch(files)) == content(tmp_path / "model")
        assert 1 <= relay.pieces <= 2


async def test_a_controller_that_sends_what_it_did_not_announce_is_given_up(tmp_path: Path):
    async def lie(number: int) -> web.Response:
        return web.Response(status=206, body=bytes(PIECE))

    async with Site().open() as site, fetcher(site, tmp_path / "into") as explorer:
        files = elsewhere(await site.files.offer(model(tmp_path / "model")))
        site.on_piece = lie
        with pytest.raises(FetchFailure, match="whose checksum is another") as failure:
            await explorer.fetch(files)
        assert not isinstance(failure.value, GoneError)
        assert not (tmp_path / "into" / files.stamp).exists()


async def test_what_came_of_a_piece_before_its_connection_was_lost_is_not_fetched_again(
    tmp_path: Path,
):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_bytes(data := random.Random(0).randbytes(PIECE))

    async def lose(number: int) -> web.Response | None:
        """More often than a controller may be wrong: each time 50 bytes have come."""
        first = site.asked_from[-1]
        sent = data[first : first + 50]
        return web.Response(status=206, body=sent) if first < PIECE / 2 else None

    async with Site().open() as site, fetcher(site, tmp_path / "into") as explorer:
        site.on_piece = lose
        fetched = await explorer.fetch(elsewhere(await site.files.offer(folder)))
        assert content(fetched) == {"weights": data}
        assert sorted(set(site.asked_from)) == list(range(0, PIECE // 2 + 1, 50))


async def test_a_turn_is_as_long_as_the_quickest_needs_where_that_is_longer(tmp_path: Path):
    for shortest_turn_s in (0, 60):
        async with (
            Site(shortest_turn_s=shortest_turn_s).open() as site,
            fetcher(site, tmp_path / f"into {shortest_turn_s}") as explorer,
        ):
            turns = []
            for seed in range(3):
                folder = model(tmp_path / f"{shortest_turn_s} {seed}", seed=seed)
                files = await site.files.offer(folder)
                turns.append(site.files._offers[files.key].turns)
                if seed == 0:
                    await explorer.fetch(elsewhere(files))
                    while not turns[0].quickest_s:
                        await asyncio.sleep(0)
            first, second, third = (each.turn_s for each in turns)
            assert second == third == max(first, 2 * turns[0].quickest_s)
            assert (second > first) == (shortest_turn_s == 0)


async def test_a_peer_that_has_died_is_forgotten(tmp_path: Path):
    relay = Site()
    async with Site().open() as site, fetcher(site, tmp_path / "2") as explorer:
        files = elsewhere(await site.files.offer(model(tmp_path / "model")))
        async with fetcher(site, tmp_path / "1", relay) as peer:
            await peer.fetch(files)
            await known(site, 1)
        assert content(await explorer.fetch(files)) == content(tmp_path / "model")
        assert relay.pieces == 0


async def test_a_peer_that_can_not_be_reached_delays_nobody(tmp_path: Path):
    relay = Site()
    async with (
        Site().open() as site,
        fetcher(site, tmp_path / "1", relay) as peer,
        fetcher(site, tmp_path / "2") as explorer,
    ):
        files = elsewhere(await site.files.offer(model(tmp_path / "model")))
        await peer.fetch(files)
        await known(site, 1)
        await relay.server.close()
        assert content(await explorer.fetch(files)) == content(tmp_path / "model")
        assert site.pieces == 2 * PIECES


async def test_a_controller_that_is_away_is_waited_for(tmp_path: Path):
    async with Site().open() as site:
        files = elsewhere(await site.files.offer(model(tmp_path / "model")))
        nobody = Site()
        nobody.url = "http://127.0.0.1:9"
        tried = []

        def controller() -> str:
            tried.append(1)
            return (nobody if len(tried) <= 20 else site).url

        async with (
            aiohttp.ClientSession() as session,
            Fetcher(session, controller, tmp_path / "into", backoff_s=0) as explorer,
        ):
            assert content(await explorer.fetch(files)) == content(tmp_path / "model")


async def test_what_is_withdrawn_is_gone_at_once_for_all_who_take_it_or_wait(tmp_path: Path):
    async with Site().open() as site, contextlib.AsyncExitStack() as stack:
        files = elsewhere(await site.files.offer(model(tmp_path / "model")))
        stopped = Stopped(site, 1)
        explorers = [
            await stack.enter_async_context(fetcher(site, tmp_path / f"{number}"))
            for number in range(3)
        ]
        async with asyncio.TaskGroup() as tasks:
            fetching = [tasks.create_task(gone(explorer, files)) for explorer in explorers]
            await stopped.reached.wait()
            while len(site.sockets) < 3:
                await asyncio.sleep(0)
            site.files.withdraw(files.key)
            await asyncio.wait(fetching)
        stopped.go.set()


async def gone(explorer: Fetcher, files: Files) -> None:
    with pytest.raises(GoneError, match="offers /not/here no more"):
        await explorer.fetch(files)


@in_virtual_time
async def test_an_explorer_that_comes_too_late_for_weights_takes_the_newer_ones():
    gone = []

    async def have(files: Files) -> Path:
        if files.path in ("/fake/2", "/fake/3"):
            gone.append(files.path)
            raise GoneError(files.path)
        return Path(files.path)

    wires = FakeWires()
    controller = Controller(wires, alpha=3)
    async with controller.running() as loop:
        explorer = Explorer(wires, have=have).start()
        for version in range(1, 5):
            await loop.next_batch()
            await loop.publish(weights(version))
        while explorer.hub.version < 4:
            await asyncio.sleep(1)
    assert gone == ["/fake/2", "/fake/3"]


@in_virtual_time
async def test_a_model_that_is_gone_is_had_from_the_controllers_next_start():
    asked = []

    async def have(files: Files) -> Path:
        asked.append(files.key)
        if files.key == "first":
            raise GoneError(files.path)
        return Path("/fetched")

    wires = FakeWires()
    controller = Controller(wires)
    connection = Explorer(wires).connection
    first, second = (Files("/model", "stamp", key) for key in ("first", "second"))
    async with connection.kept():
        async with controller.killed(model_files=first):
            await connection.welcomed()
            having = asyncio.create_task(connection.model_by(have))
            await asyncio.sleep(1)
            assert not having.done()
        async with controller.killed(model_files=second):
            assert await having == "/fetched"
    assert asked == ["first", "second"]


# ── changes ──────────────────────────────────────────────────────────────────────────────────────


@contextlib.asynccontextmanager
async def two_versions(tmp_path: Path):
    """A site, an explorer that has the first version of a model, and its files."""
    first = model(tmp_path / "first")
    async with Site().open() as site, fetcher(site, tmp_path / "into") as explorer:
        files = await site.files.offer(first)
        await explorer.fetch(elsewhere(files))
        site.bytes = site.pieces = 0
        yield site, explorer, files


async def test_of_weights_whose_last_version_is_here_only_changes_are_fetched(tmp_path: Path):
    async with two_versions(tmp_path) as (site, explorer, first):
        small = sum(size for name, size in SIZES.items() if not name.endswith(".safetensors"))
        before, files = tmp_path / "first", first
        for number in range(3):
            after = stepped(before, tmp_path / f"after {number}", places=range(50, 7_000, 500))
            files = await site.files.offer(after, before=files)
            site.bytes = 0
            assert content(await explorer.fetch(elsewhere(files))) == content(after)
            assert small < site.bytes < small + 200
            before = after
        left = {path.name for path in (tmp_path / "into").iterdir()}
        assert len(left) == 3  # two versions, and what made the second of them


async def test_explorers_take_changes_from_each_other(tmp_path: Path):
    first = model(tmp_path / "first")
    async with (
        Site().open() as site,
        fetcher(site, tmp_path / "a", Site()) as a,
        fetcher(site, tmp_path / "b", Site()) as b,
    ):
        files = await site.files.offer(first)
        await a.fetch(elsewhere(files))
        await b.fetch(elsewhere(files))
        after = stepped(first, tmp_path / "after")
        files = await site.files.offer(after, before=files)
        await a.fetch(elsewhere(files))
        assert files.changes is not None
        changes = site.files._offers[files.changes.files.key]
        while not changes.turns._peers:
            await asyncio.sleep(0)
        site.bytes = 0
        assert content(await b.fetch(elsewhere(files))) == content(after)
        assert site.bytes == 0


async def test_changes_that_make_something_else_cost_the_pieces_that_are_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def write_others(before: Path, after: Path, into: Path) -> bool:
        return write_changes(before, stepped(after, into.parent.parent / "wrong"), into)

    monkeypatch.setattr(file_server, "write_changes", write_others)
    async with two_versions(tmp_path) as (site, explorer, first):
        after = stepped(tmp_path / "first", tmp_path / "after", places=[3_000])
        files = await site.files.offer(after, before=first)
        assert files.changes is not None
        of_changes = sum(path.stat().st_size for path in Path(files.changes.files.path).iterdir())
        assert content(await explorer.fetch(elsewhere(files))) == content(after)
        assert site.bytes == of_changes + PIECE + 500  # those of bytes 100 and 7,000


async def test_changes_that_can_not_be_applied_cost_a_whole_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def write_nonsense(before: Path, after: Path, into: Path) -> bool:
        assert write_changes(before, after, into)
        next(into.glob("*.changes")).write_bytes(b"nonsense")
        return True

    monkeypatch.setattr(file_server, "write_changes", write_nonsense)
    async with two_versions(tmp_path) as (site, explorer, first):
        after = stepped(tmp_path / "first", tmp_path / "after")
        files = await site.files.offer(after, before=first)
        assert content(await explorer.fetch(elsewhere(files))) == content(after)
        assert site.pieces > PIECES


async def test_who_has_another_version_or_began_anew_gets_weights_whole(tmp_path: Path):
    async with two_versions(tmp_path) as (site, explorer, first):
        second = stepped(tmp_path / "first", tmp_path / "second")
        third = stepped(second, tmp_path / "third")
        files = await site.files.offer(second, before=first)
        async with fetcher(site, tmp_path / "new") as new:
            await new.fetch(elsewhere(files))
        files = await site.files.offer(third, before=files)
        async with fetcher(site, tmp_path / "new") as anew:
            for one in (explorer, anew):
                site.pieces = 0
                assert content(await one.fetch(elsewhere(files))) == content(third)
                assert site.pieces == PIECES


async def test_changes_are_looked_for_only_if_somebody_lacks_files_and_offered_if_few(
    tmp_path: Path,
):
    first, second = model(tmp_path / "first"), model(tmp_path / "second", seed=1)
    async with Site().open() as site, fetcher(site, tmp_path / "into") as explorer:
        files = await site.files.offer(first)
        assert await explorer.fetch(files) == first
        after = stepped(first, tmp_path / "after")
        assert (await site.files.offer(after, before=files)).changes is None
        assert not (after / "changes").exists()
        await explorer.fetch(elsewhere(files))
        assert (await site.files.offer(second, before=files)).changes is None
        assert not (second / "changes").exists()
        shutil.rmtree(first)
        assert (await site.files.offer(after, before=files)).changes is None


async def test_a_version_is_published_with_what_changed_since_the_last_one(tmp_path: Path):
    told: list[Publish] = []

    class Told:
        def publish(self, message: Publish) -> None:
            told.append(msgspec.msgpack.decode(encode(message), type=Publish))

    before, after = (Weights(version=n, path=tmp_path / str(n)) for n in (1, 2))
    model(before.path)
    stepped(before.path, after.path)
    async with Site().open() as site, fetcher(site, tmp_path / "into") as explorer:
        hub = FleetHub(None, version=0, offer=site.files.offer)
        hub.over(cast(Fleet, SimpleNamespace(updates=Told())))
        for weights in (before, after):
            await hub.publish(weights)
            folder = await explorer.fetch(elsewhere(told[-1].files))
            assert content(folder) == content(weights.path)
    assert told[0].files.changes is None
    assert told[1].files.changes is not None
    assert told[1].files.changes.base == told[0].files.stamp


async def test_a_quick_link_brings_whole_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    async with two_versions(tmp_path) as (site, _, first):
        turns = site.files._offers[first.key].turns
        while not turns.quickest_s:
            await asyncio.sleep(0)
        monkeypatch.setattr(file_server, "_QUICK_BYTES_PER_S", 1.0)
        after = stepped(tmp_path / "first", tmp_path / "after")
        assert (await site.files.offer(after, before=first)).changes is None
        monkeypatch.undo()
        assert (await site.files.offer(after, before=first)).changes is not None


async def test_a_relay_ends_with_the_offer(tmp_path: Path):
    relay = Site()
    async with Site().open() as site, fetcher(site, tmp_path / "1", relay) as explorer:
        files = elsewhere(await site.files.offer(model(tmp_path / "model")))
        await explorer.fetch(files)
        await known(site, 1)
        assert files.key in relay.files._offers
        site.files.withdraw(files.key)
        while relay.files._offers:
            await asyncio.sleep(0)


async def test_an_unknown_key_is_of_files_that_are_gone(tmp_path: Path):
    async with Site().open() as site, fetcher(site, tmp_path / "into") as explorer:
        files = elsewhere(await site.files.offer(model(tmp_path / "model")))
        await gone(explorer, msgspec.structs.replace(files, key="another"))


async def test_a_folder_that_was_removed_is_gone(tmp_path: Path):
    async with Site().open() as site, fetcher(site, tmp_path / "into") as explorer:
        files = elsewhere(await site.files.offer(model(tmp_path / "model")))

        async def remove(number: int) -> None:
            if number == 5:
                await asyncio.to_thread(shutil.rmtree, tmp_path / "model")

        site.on_piece = remove
        await gone(explorer, files)
        await gone(explorer, files)  # with the manifest, which is kept
        other = elsewhere(await site.files.offer(model(tmp_path / "other", seed=1)))
        assert [*site.files._offers] == [other.key]
        shutil.rmtree(tmp_path / "other")
        await gone(explorer, other)  # before there was a manifest


async def test_a_file_that_changed_is_not_sent(tmp_path: Path):
    async with Site().open() as site, aiohttp.ClientSession() as session:
        files = await site.files.offer(model(tmp_path / "model"))
        (tmp_path / "model/config.json").write_bytes(bytes(SIZES["config.json"]))
        assert await status(session, site, "config.json", files.key, "0-9") == 410
        assert await status(session, site, "tokenizer.json", files.key, "0-9") == 206


@pytest.mark.parametrize("part", ["", "0-300", "5-", "-5", "300-301", "9-8", "x"])
async def test_a_part_that_is_none_is_refused(tmp_path: Path, part):
    async with Site().open() as site, aiohttp.ClientSession() as session:
        files = await site.files.offer(model(tmp_path / "model"))
        assert await status(session, site, "config.json", files.key, part) == 416


async def status(
    session: aiohttp.ClientSession, site: Site, path: str, key: str, part: str = ""
) -> int:
    headers = {"Authorization": authorization(key)} if key else {}
    headers |= {"Range": f"bytes={part}"} if part else {}
    url = aiohttp.client.URL(f"{site.url}/files{path and '/'}{path}", encoded=True)
    async with session.get(url, headers=headers) as response:
        return response.status


@pytest.mark.parametrize("key", ["", "another", "é"])
async def test_without_the_key_nothing_is_told(tmp_path: Path, key):
    async with Site().open() as site, aiohttp.ClientSession() as session:
        await site.files.offer(model(tmp_path / "model"))
        for path in ("", "config.json", "nothing"):
            assert await status(session, site, path, key) == 403


async def test_a_key_that_is_no_text_is_none(tmp_path: Path):
    async with Site().open() as site:
        await site.files.offer(model(tmp_path / "model"))
        reader, writer = await asyncio.open_connection("127.0.0.1", site.server.port)
        writer.write(b"GET /files HTTP/1.1\r\nHost: here\r\nAuthorization: \xff\r\n\r\n")
        assert b" 403 " in await reader.readline()
        writer.close()


async def test_a_file_that_changes_while_it_is_sent_ends_the_answer(tmp_path: Path):
    path = model(tmp_path / "model") / "large"
    path.touch()
    os.truncate(path, 64 << 20)
    async with Site().open() as site, aiohttp.ClientSession() as session:
        files = await site.files.offer(tmp_path / "model")
        headers = {"Authorization": authorization(files.key), "Range": f"bytes=0-{(64 << 20) - 1}"}
        async with session.get(f"{site.url}/files/large", headers=headers) as response:
            assert response.status == 206
            os.truncate(path, 1 << 20)
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.read()


@pytest.mark.parametrize(
    "name", ["..%2Fsecret", "%2e%2e%2Fsecret", "inside/secret", "inside", "..%5Csecret", "%00"]
)
async def test_what_is_not_in_the_folder_is_not_to_be_had(tmp_path: Path, name):
    folder = model(tmp_path / "model")
    (tmp_path / "secret").touch()
    (folder / "inside").mkdir()
    (folder / "inside/secret").touch()
    async with Site().open() as site, aiohttp.ClientSession() as session:
        files = await site.files.offer(folder)
        assert await status(session, site, name, files.key) == 404


@pytest.mark.parametrize("name", ["", ".", "..", "../secret", "/secret", "a\0b"])
def test_a_manifest_names_files_alone(tmp_path: Path, name):
    said = {"type": "Manifest", "piece_bytes": 10, "files": [[name, 0, []]]}
    with pytest.raises(msgspec.ValidationError, match="is no file's name"):
        decode_from_server(encode(said))


@pytest.mark.parametrize(
    ("piece_bytes", "size", "checksums"),
    [(0, 5, 1), (-1, 5, 1), (1 << 30, 5, 1), (10, -1, 0), (10, 11, 1), (10, 0, 1), (10, 10, 0)],
)
def test_a_manifest_has_a_checksum_for_each_piece(piece_bytes, size, checksums):
    files = [["a", size, [b"1"] * checksums]]
    said = {"type": "Manifest", "piece_bytes": piece_bytes, "files": files}
    with pytest.raises(msgspec.ValidationError):
        decode_from_server(encode(said))


async def test_the_newest_two_are_kept_and_what_was_begun_before_is_removed(tmp_path: Path):
    into = tmp_path / "into"
    (into / f"{'0' * 64}.partial").mkdir(parents=True)
    (into / "notes").mkdir()
    relay = Site()
    async with Site().open() as site, fetcher(site, into, relay) as explorer:
        folders = []
        for version in range(4):
            folder = model(tmp_path / f"version_{version}", seed=version)
            folders.append(await explorer.fetch(elsewhere(await site.files.offer(folder))))
            kept = {path for path in into.iterdir() if path.name != "notes"}
            assert kept == set(folders[-2:])
        assert (into / "notes").is_dir()
        while len(relay.files._offers) != 2:
            await asyncio.sleep(0)


async def test_a_disk_without_room_is_told_of(tmp_path: Path, monkeypatch):
    async with Site().open() as site, fetcher(site, tmp_path / "into") as explorer:
        files = elsewhere(await site.files.offer(model(tmp_path / "model")))
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 4, 5))
        with pytest.raises(FetchFailure, match=r"19,010 bytes are to come, and 5 are free.*into"):
            await explorer.fetch(files)


async def test_a_place_that_is_no_folder_is_told_of(tmp_path: Path):
    (tmp_path / "into").touch()
    async with Site().open() as site, fetcher(site, tmp_path / "into") as explorer:
        files = elsewhere(await site.files.offer(model(tmp_path / "model")))
        with pytest.raises(FetchFailure, match="can't be stored: .*into"):
            await explorer.fetch(files)


async def test_a_gate_with_tls_has_the_files_too(tmp_path: Path):
    authority = trustme.CA()
    theirs, ours = (ssl.SSLContext(kind) for kind in (TLS_SERVER, TLS_CLIENT))
    authority.issue_cert("127.0.0.1").configure_cert(theirs)
    authority.configure_trust(ours)

    async def welcome(wire) -> None:
        raise AssertionError("nobody comes")

    async with FileServer() as server, aiohttp.ClientSession() as session:
        gate = Gate("token", welcome, files=server, host="127.0.0.1", port=0, tls=theirs)
        url = await gate.start()
        try:
            files = elsewhere(await server.offer(model(tmp_path / "model")))
            async with Fetcher(session, lambda: url, tmp_path / "into", tls=ours) as explorer:
                assert content(await explorer.fetch(files)) == content(tmp_path / "model")
        finally:
            server.withdraw_all()
            await gate.close()


async def test_an_explorer_listens_for_itself(tmp_path: Path):
    manifest = manifest_of(model(tmp_path / "model"), PIECE)
    async with FileServer() as relay, aiohttp.ClientSession() as session:
        url = await relay.listen("127.0.0.1", 0)
        await relay.relay("key", tmp_path / "model", manifest)
        headers = {"Authorization": authorization("key"), "Range": "bytes=10-19"}
        async with session.get(f"{url}/files/config.json", headers=headers) as response:
            expected = (tmp_path / "model/config.json").read_bytes()[10:20]
            assert (response.status, await response.read()) == (206, expected)


async def test_a_folder_is_read_once_however_many_ask(tmp_path: Path, monkeypatch):
    read = []

    def counted(folder: Path, *args, **options) -> Manifest:
        read.append(folder)
        return manifest_of(folder, *args, **options)

    monkeypatch.setattr(file_server, "manifest_of", counted)
    async with Site().open() as site, contextlib.AsyncExitStack() as stack:
        files = elsewhere(await site.files.offer(model(tmp_path / "model")))
        assert not read
        explorers = [
            await stack.enter_async_context(fetcher(site, tmp_path / f"{number}"))
            for number in range(3)
        ]
        await asyncio.gather(*(explorer.fetch(files) for explorer in explorers))
        assert read == [tmp_path / "model"]


def test_checksums_come_in_the_order_of_the_files_from_several_threads(tmp_path: Path):
    manifest = manifest_of(model(tmp_path / "model"), PIECE)
    assert [entry.name for entry in manifest.files] == sorted(SIZES)
    for piece in manifest.pieces():
        data = (tmp_path / "model" / piece.file).read_bytes()[piece.offset :][: piece.size]
        assert hashlib.sha256(data).digest() == piece.checksum
    assert decode_from_server(encode(manifest)) == manifest


def test_a_folder_that_changes_while_it_is_read_has_no_manifest(tmp_path: Path):
    folder = model(tmp_path / "model")
    with pytest.raises(OSError, match="is wanted no more"):
        manifest_of(folder, PIECE, wanted=lambda: False)

    def shorten() -> bool:
        (folder / "tokenizer.json").write_bytes(b"")
        return True

    with pytest.raises(OSError, match="tokenizer.json became shorter"):
        manifest_of(folder, PIECE, wanted=shorten)


def test_a_stamp_tells_what_changed(tmp_path: Path):
    folder = model(tmp_path / "model")
    stamp = stamp_of(folder)
    assert stamp_of(folder) == stamp
    (folder / "config.json").write_bytes(bytes(300))
    assert stamp_of(folder) != stamp


def test_a_folder_that_can_not_be_looked_at_is_not_here():
    assert not is_here("/" + "x" * 1000, "")


@pytest.mark.parametrize(
    "address",
    ["host", "10.0.0.7:port", "10.0.0.7:99999", "a@10.0.0.7", "10.0.0.7/x", ":80", "[::1"],
)
def test_a_relay_that_has_no_address_is_refused(address):
    with pytest.raises(ValueError, match="must be an address of this machine at which other"):
        checked(source="runs/x", token="", relay=address, overrides={})


def test_nothing_is_relayed_in_the_clear_of_a_run_with_tls():
    for source in ("https://host:1", "HTTPS://host:1"):
        with pytest.raises(ValueError, match="--relay sends weights in the clear"):
            checked(source=source, token="token", relay="10.0.0.7:80", overrides={})
    for address in ("10.0.0.7", "0.0.0.0:8766", "[::1]:8766"):
        assert checked(source="runs/x", token="", relay=address, overrides={}).relay == address
