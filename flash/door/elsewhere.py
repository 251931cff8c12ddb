"""Requests of a role that another model plays: passed on to where it is, and its answers back."""

import re
from collections.abc import Mapping
from typing import Any

import aiohttp
from aiohttp import web

from flash.door.errors import ApiError
from flash.door.session import Session
from flash.roles import Elsewhere
from flash.types import SampledSequence

_PATH = re.compile(r"[\w-]+(/[\w-]+)*")
_NO_DEADLINE = aiohttp.ClientTimeout(total=None)  # the episode has one


class ElsewhereSession(Session):
    """The way of one role to another model; nothing that is said there is kept."""

    def __init__(self, to: Elsewhere, http: aiohttp.ClientSession, **of_any: Any) -> None:
        super().__init__(**of_any)
        self._to = to
        self._http = http

    def sequences(self) -> list[SampledSequence]:
        return []

    async def pass_on(
        self, request: web.Request, body: Mapping[str, Any] | None
    ) -> web.StreamResponse:
        """The answer of the model elsewhere, whatever it is, as it comes. ApiError, 502, if there
        is none."""
        _, _, path = request.path.partition("/v1/")
        if not _PATH.fullmatch(path):  # an id in it might lead anywhere, with the key
            raise ApiError(
                404, f"{path!r} is passed on to no model: it may have no such characters"
            )
        url = f"{self._to.url.rstrip('/')}/{path}"
        asked = None if body is None else {**body, "model": self._to.model}
        response: web.StreamResponse | None = None
        try:
            async with (
                self.calling(),
                self._http.request(
                    request.method, url, json=asked, headers=self._headers(request),
                    timeout=_NO_DEADLINE,
                ) as answer,
            ):  # fmt: skip
                kind = answer.headers.get("Content-Type", "application/json")
                response = web.StreamResponse(status=answer.status, headers={"Content-Type": kind})
                await response.prepare(request)
                async for piece in answer.content.iter_any():
                    await response.write(piece)
                await response.write_eof()
                return response
        except (aiohttp.ClientError, OSError, ApiError) as error:
            if response is None:
                if isinstance(error, ApiError):
                    raise
                raise ApiError(502, f"{url} did not answer ({type(error).__name__})") from error
            if request.transport is not None:
                request.transport.abort()  # its beginning was told
            return response

    def _headers(self, request: web.Request) -> dict[str, str]:
        """The key as OpenAI and as Anthropic have it, and which version of these is spoken."""
        spoken = {
            name: value
            for name, value in request.headers.items()
            if name.lower().startswith("anthropic-")
        }
        if not self._to.api_key:
            return spoken
        key = self._to.api_key
        return {**spoken, "Authorization": f"Bearer {key}", "x-api-key": key}
