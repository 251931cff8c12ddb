"""How an explorer comes by folders of the controller's files, and lets other explorers have them.

STAMP.partial/  what was fetched of it, or made by changes; of that, what is right is not fetched
STAMP/          whole, as it was before anybody saw it by that name
"""

import asyncio
import contextlib
import logging
import re
import shutil
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Self

import aiohttp

from flash.explorer.changes import apply_changes
from flash.explorer.download import Download, SourceFailure, on_disk
from flash.explorer.file_server import FileServer
from flash.explorer.files import FetchFailure, Have, Piece, encode, is_here
from flash.explorer.messages import Files

logger = logging.getLogger(__name__)

_MOST_IN_VAIN = 8  # tries in a row in which the controller answers, and nothing comes of it
_LONGEST_BACKOFF_S = 30.0
_STAMP = re.compile(r"[0-9a-f]{64}")
_PARTIAL = ".partial"


class Fetcher:
    """Fetches folders into one that is its own. Enter it; one is fetched after the other.

    Args:
        controller: its URL, as far as that is known now.
        into: nobody else puts anything there.
        keep: so many of the folders may be there at once: to fetch one more removes the oldest.
        relay, relay_url: where others may take what was fetched, if there is such a place.
        tls: for the controller and other explorers.
        backoff_s: after the first failure; twice as long after each one more.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        controller: Callable[[], str],
        into: Path,
        *,
        keep: int = 2,
        relay: FileServer | None = None,
        relay_url: str = "",
        tls: ssl.SSLContext | None = None,
        backoff_s: float = 0.5,
    ) -> None:
        self._session = session
        self._controller = controller
        self._into = into
        self._keep = keep
        self._relay = relay
        self._relay_url = relay_url
        self._tls = tls
        self._backoff_s = backoff_s
        self._changes = Path()  # those that made the newest of its folders, if any did
        self._whole: list[Path] = []  # oldest first; what another process left is verified again
        self._downloads: dict[Path, Download] = {}  # of which the controller has heard or will
        self._lock = asyncio.Lock()  # room is made for one at a time
        self._tasks = asyncio.TaskGroup()

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for download in self._downloads.values():
            await download.close()
        await self._tasks.__aexit__(None, None, None)

    async def fetch(self, files: Files) -> Path:
        """Where these are on this machine.

        Waits for a controller that is away. Raises GoneError if it does not have them any more,
        FetchFailure if what it sends is wrong again and again, or can't be stored. What there is
        of them by then is not fetched again.
        """
        if await asyncio.to_thread(is_here, files.path, files.stamp):
            return Path(files.path)
        if not _STAMP.fullmatch(files.stamp):
            raise FetchFailure(f"{files.stamp[:80]!r} is not the stamp of a folder")
        async with self._lock:
            folder = self._into / files.stamp
            if folder not in self._whole:
                await self._make_room(folder)
                await self._make_of_changes(files, folder)
                await self._fetch(files, folder)
                self._whole.append(folder)
            return folder

    async def _make_of_changes(self, files: Files, folder: Path) -> None:
        """What the changes make of the folder before, if that is here. It is verified as what was
        there of a folder always is, and what is wrong of it is fetched."""
        changes = files.changes
        if changes is None or (base := self._into / changes.base) not in self._whole:
            return
        if not _STAMP.fullmatch(changes.files.stamp):
            return
        self._changes = self._into / changes.files.stamp
        try:
            await self._fetch(changes.files, self._changes)
            await on_disk(apply_changes, base, self._changes, _partial_of(folder))
        except (FetchFailure, ValueError) as failure:
            logger.warning("fetches %s whole: %s", files.path, failure)

    async def _fetch(self, files: Files, folder: Path) -> None:
        partial = _partial_of(folder)
        download = await self._download(files, partial)
        try:
            await on_disk(partial.rename, folder)
        except BaseException:
            await download.close()
            raise
        self._downloads[folder] = download
        self._tasks.create_task(self._pass_on(download, files.key, folder), name="relay")

    async def _download(self, files: Files, partial: Path) -> Download:
        """Again and again; a controller that is away may come back."""
        failures = in_vain = 0
        begun: dict[Piece, bytearray] = {}
        while True:
            download = Download(
                self._session, self._controller(), files, partial, begun, tls=self._tls
            )
            try:
                await download.run()
                return download
            except SourceFailure as failure:
                failures = 1 if download.got_on else failures + 1
                in_vain = in_vain + 1 if download.answered and not download.got_on else 0
                if in_vain == _MOST_IN_VAIN:
                    raise FetchFailure(f"{files.path} can't be fetched: {failure}") from failure
                logger.warning("tries again to fetch %s: %s", files.path, failure)
            await asyncio.sleep(min(self._backoff_s * 2 ** (failures - 1), _LONGEST_BACKOFF_S))

    async def _pass_on(self, download: Download, key: str, folder: Path) -> None:
        """Says that it is here; and lets others have it, as long as the controller does."""
        try:
            with contextlib.suppress(OSError):  # the connection has ended, or the folder is gone
                if self._relay is None:
                    await download.socket.send_bytes(encode(Have("")))
                    return
                await self._relay.relay(key, folder, download.manifest)
                await download.socket.send_bytes(encode(Have(self._relay_url)))
                async for _ in download.socket:
                    pass
        finally:
            if self._relay is not None:
                self._relay.withdraw(key)
            await download.close()

    async def _make_room(self, folder: Path) -> None:
        """For it, and for changes that make it."""
        for oldest in self._whole[: max(0, len(self._whole) + 1 - self._keep)]:
            self._whole.remove(oldest)
            await self._downloads.pop(oldest).close()
        if self._changes in self._downloads:
            await self._downloads.pop(self._changes).close()
        partial = _partial_of(folder)
        await on_disk(_sweep, self._into, {*self._whole, folder, partial})
        await on_disk(_begin_again, folder, partial)


def _partial_of(folder: Path) -> Path:
    return folder.with_suffix(_PARTIAL)


def _sweep(into: Path, kept: set[Path]) -> None:
    """Removes the other folders, of this process or one before it."""
    into.mkdir(parents=True, exist_ok=True)
    for path in into.iterdir():
        if path not in kept and _STAMP.fullmatch(path.name.removesuffix(_PARTIAL)):
            shutil.rmtree(path)


def _begin_again(folder: Path, partial: Path) -> None:
    """What an explorer before this one had is not known to be whole: a crash may have torn it."""
    if folder.exists():
        shutil.rmtree(partial, ignore_errors=True)
        folder.rename(partial)
