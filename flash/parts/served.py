"""Servers that `flash eval` plays on as they are: what they speak, and of which model."""

from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

import aiohttp
import msgspec

from flash.hub.chat_worker import ROUTE as CHAT
from flash.hub.chat_worker import ChatWorker
from flash.hub.completions_worker import ROUTE as COMPLETIONS
from flash.hub.completions_worker import CompletionsWorker
from flash.hub.fixed_worker import FixedWorker
from flash.hub.http_worker import HttpWorker
from flash.hub.sglang_worker import SglangWorker
from flash.hub.worker import Worker
from flash.section import is_url

_ASK_TIMEOUT_S = 30.0
_NO_ROUTE = (404, 405, 501)
_NO_KEY = (401, 403)
_HTTP_CLIENT_ERROR = 400
# In this order: who has an earlier one has the later ones too, and these say less.
Protocol = Literal["vllm", "sglang", "completions", "chat"]
_ROUTES: dict[str, Protocol] = {
    "/inference/v1/generate": "vllm",
    "/generate": "sglang",
    COMPLETIONS: "completions",
    CHAT: "chat",
}


@dataclass(frozen=True, slots=True)
class Served:
    """A server at `url`: by which protocol it is asked, what it calls its model, and where the
    tokenizer of that comes from."""

    url: str
    speaks: Protocol
    name: str
    source: str

    def worker(self, tokenizer: Any, *, api_key: str) -> Worker:
        """What asks it for tokens, or tokenises its text where it tells none."""
        if self.speaks == "vllm":
            return FixedWorker(HttpWorker(self.url, api_key=api_key))
        if self.speaks == "sglang":
            return FixedWorker(SglangWorker(self.url, api_key=api_key))
        of_text = ChatWorker if self.speaks == "chat" else CompletionsWorker
        return FixedWorker(of_text(self.url, model=self.name, tokenizer=tokenizer, api_key=api_key))


class _Card(msgspec.Struct):
    id: str
    root: str | None = None


class _Cards(msgspec.Struct):
    data: list[_Card]


def server_url(given: str) -> tuple[str, str]:
    """Without the /v1 that OpenAI's clients want; and the model's name, which may stand after a #.

    ValueError for what can't be, or holds a key.
    """
    given, _, name = given.partition("#")
    if not is_url(given):
        raise ValueError(f"--model {given} is not a URL: write http://host:8000")
    parts = urlsplit(given)
    if parts.username or parts.password or parts.query:
        host = parts.hostname
        raise ValueError(
            f"--model {parts.scheme}://…{host}…: a URL is kept in the results, and must hold no "
            f"key: export it, and give --engine.api_key '$NAME'"
        )
    return given.rstrip("/").removesuffix("/v1"), name


async def ask_server(url: str, *, name: str, tokenizer: str | None, api_key: str) -> Served:
    """What a server at that URL speaks, and which model it has, of several that of that `name`;
    `tokenizer` is where that model's comes from, if the server does not say it.

    Raises ValueError, with what can be done, for one that can't be reached, refuses the key, lacks
    the model, or has none of the routes.
    """
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = aiohttp.ClientTimeout(total=_ASK_TIMEOUT_S)
    try:
        async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
            card = await _model_at(session, url, name)
            for route, speaks in _ROUTES.items():
                # An empty request starts nothing: who has the route objects to it.
                async with session.post(f"{url}{route}", json={}) as response:
                    if response.status not in _NO_ROUTE:
                        return Served(url, speaks, card.id, tokenizer or card.root or card.id)
    except (TimeoutError, aiohttp.ClientError, OSError) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"--model {url} can't be reached: {why}: start the server, or correct the URL"
        ) from error
    raise ValueError(
        f"--model {url} has none of {', '.join(_ROUTES)}: give the URL of a server that has one, "
        f"or the model's name or folder"
    )


async def _model_at(session: aiohttp.ClientSession, url: str, name: str) -> _Card:
    async with session.get(f"{url}/v1/models") as response:
        if response.status in _NO_KEY:
            raise ValueError(
                f"--model {url} refuses us ({response.status}): export its key, and give "
                f"--engine.api_key '$NAME'"
            )
        body = await response.read()
        if response.status >= _HTTP_CLIENT_ERROR:
            raise ValueError(
                f"--model {url} answered {response.status} to /v1/models: give the URL of a "
                f"server that speaks OpenAI's protocol"
            )
    try:
        cards = msgspec.json.decode(body, type=_Cards).data
    except msgspec.MsgspecError as error:
        raise ValueError(
            f"--model {url} names no models at /v1/models ({error}): give the URL of a server "
            f"that speaks OpenAI's protocol"
        ) from error
    meant = [card for card in cards if name in (card.id, "")]
    if len(meant) != 1:
        names = ", ".join(card.id for card in cards) or "none"
        raise ValueError(
            f"--model {url}{'#' * bool(name)}{name} serves {names}: name one of several that it "
            f"serves, as {url}#NAME"
        )
    return meant[0]
