"""A server that answers bytes, whatever they are."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable


def answer(body: bytes, *fields: str, status: str = "200 OK") -> bytes:
    """One whole answer with a length."""
    head = [f"HTTP/1.1 {status}", *fields, f"Content-Length: {len(body)}"]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def chunked(*pieces: bytes, fields: tuple[str, ...] = (), whole: bool = True) -> bytes:
    """An answer in chunks; if it is not `whole` it lacks its end."""
    head = ["HTTP/1.1 200 OK", *fields, "Transfer-Encoding: chunked"]
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return "\r\n".join(head).encode() + b"\r\n\r\n" + chunks + (b"0\r\n\r\n" if whole else b"")


class RawServer:
    """Answers the nth request with the nth of these, then hangs up if it is told to, or waits.

    `requests` are the head and the body of each with the number of its connection, `closed` is how
    many connections the client has closed.
    """

    def __init__(self, *answers: bytes, hang_up: bool = False) -> None:
        self.requests: list[tuple[int, bytes, bytes]] = []
        self.closed = 0
        self.change = asyncio.Condition()
        self.url = ""
        self._answers = iter(answers)
        self._hang_up = hang_up
        self._connections = 0
        self._talks: set[asyncio.Task[None] | None] = set()

    async def wait_until(self, holds: Callable[[], bool]) -> None:
        async with self.change:
            await self.change.wait_for(holds)

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._talks.add(asyncio.current_task())
        connection, self._connections = self._connections, self._connections + 1
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                _, _, length = head.lower().partition(b"content-length: ")
                body = await reader.readexactly(int(length.split(b"\r\n")[0] or 0))
                await self._tell(lambda found=(connection, head, body): self.requests.append(found))
                writer.write(next(self._answers, b""))
                if self._hang_up:
                    writer.write_eof()
                    break
            await reader.read()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        await self._tell(self._count_closed)

    async def end(self) -> None:
        """Once the client has closed its connections."""
        await asyncio.gather(*(talk for talk in self._talks if talk is not None))

    def _count_closed(self) -> None:
        self.closed += 1

    async def _tell(self, change: Callable[[], None]) -> None:
        async with self.change:
            change()
            self.change.notify_all()


@contextlib.asynccontextmanager
async def raw_server(
    *answers: bytes, hang_up: bool = False, tls: ssl.SSLContext | None = None
) -> AsyncIterator[RawServer]:
    script = RawServer(*answers, hang_up=hang_up)
    server = await asyncio.start_server(script.talk, "127.0.0.1", 0, ssl=tls)
    script.url = f"http{'s' if tls else ''}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield script
    finally:
        server.close()
        await script.end()
        await server.wait_closed()
