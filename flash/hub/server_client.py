"""What a client of any inference server needs, whatever its routes: requests, their failures."""

import abc
import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from flash.hub.answers import EventStream, refusal, unreadable
from flash.hub.http_client import HttpAnswer, HttpClient
from flash.hub.worker import WorkerFailure
from flash.types import Completion, SamplingParams

# A stream costs this process half as much again as a whole answer, and vLLM 8% of its speed, with
# 64 tokens in chunks of 16. So it is for answers that are worth keeping when their worker dies.
STREAMED_FROM_TOKENS, STREAM_INTERVAL = 128, 32
_HTTP_REDIRECT = 300

Body = msgspec.Struct | Mapping[str, Any] | None


class ServerClient(abc.ABC):
    """Asks one server at `url`. Deadlines are the caller's."""

    def __init__(self, url: str, *, api_key: str = "") -> None:
        self.name = url.rstrip("/")
        self.headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = HttpClient(url, self.headers)

    async def close(self) -> None:
        await self._client.close()

    async def _call(self, method: str, route: str, body: Body = None) -> bytes:
        return (await self._ask(method, route, body)).body

    @abc.abstractmethod
    def _whole(self, answer: bytes, sampling: SamplingParams) -> Completion:
        """Of an answer that came whole; WorkerFailure if there can be none."""

    async def _streamed(
        self, route: str, body: Body, stream: EventStream, sampling: SamplingParams
    ) -> Completion:
        """Of an answer in events; a server that does not stream sends it whole.

        One that broke off after its last event is complete.
        """
        try:
            answer = await self._ask("POST", route, body, stream)
            if not answer.streamed:
                return self._whole(answer.body, sampling)
            if not stream.complete:
                raise WorkerFailure(f"{self.name}{route} ended its answer before it was complete")
        except WorkerFailure:
            if not stream.complete:
                raise
        with self._readable(stream.last_event):
            return stream.completion(sampling)

    async def _ask(
        self, method: str, route: str, body: Body, stream: EventStream | None = None
    ) -> HttpAnswer:
        """An answer with a good status; a connection that breaks is a WorkerFailure."""
        json = b"" if body is None else msgspec.json.encode(body)
        try:
            answer = await self._client.send(method, route, json, stream.feed if stream else None)
        except OSError as error:
            why = str(error) or repr(error)
            raise WorkerFailure(f"{self.name}{route} can't be reached: {why}") from error
        if answer.status >= _HTTP_REDIRECT:
            message = f"{self.name}{route} answered {answer.status}: "
            message += answer.body.decode(errors="replace")[:500]
            raise refusal(answer.status, message)
        return answer

    @contextlib.contextmanager
    def _readable(self, answer: bytes) -> Iterator[None]:
        """What fails inside is the answer's fault, which is not of this protocol."""
        try:
            yield
        except (IndexError, ValueError) as error:  # msgspec's errors are ValueErrors
            raise unreadable(self.name, answer, error) from error
