"""The door: OpenAI's and Anthropic's protocols over the hub, for agents that know nothing of this
engine.

POST /v1/chat/completions, /v1/completions;  GET /v1/models      the token as bearer, or x-api-key
POST /v1/responses;  GET, DELETE /v1/responses/<id>              of the same episode
POST /v1/messages, /v1/messages/count_tokens
POST /episodes/<token>/v1/…                                      the token in the path
GET  /metrics                                                    for Prometheus; the run's token

No other route exists. Each episode has its own token, and what is sampled with it becomes that
episode's samples; the run's token serves clients that train nothing.
"""

import asyncio
import hashlib
import itertools
import json
import logging
import secrets
import traceback
from collections.abc import (
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Iterator,
    MutableMapping,
    Sequence,
)
from typing import Any, TypeVar

import aiohttp
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from flash.door.anthropic import MESSAGES, parse_messages
from flash.door.anthropic import error_body as anthropic_error
from flash.door.dialect import Dialect, Frame
from flash.door.elsewhere import ElsewhereSession
from flash.door.limits import Allowance
from flash.door.metrics import Metrics
from flash.door.openai import CHAT, TEXT
from flash.door.openai import error_body as openai_error
from flash.door.respond import Exchange, Responder, Response
from flash.door.responses import Request
from flash.door.schema import ApiError, ChatAsk, Ignore, parse_chat, parse_text
from flash.door.session import DoorSession, Session
from flash.hub.hub import InferenceHub
from flash.roles import Elsewhere
from flash.system.listener import Listener, local_address, page_refusal, read_body
from flash.types import Completion, Generate, GenerateRequest, SamplingParams

logger = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Answer = Callable[[web.Request, DoorSession], Awaitable[web.StreamResponse]]

_S = TypeVar("_S", bound=Session)

_MESSAGES = "/v1/messages"
_CONNECTIONS_A_RESPONSE = 4  # that a token may have, busy or idle
_READ_TIMEOUT_S = 60.0  # for a client to read its answer
_MAX_DEPTH = 100  # of a body; more than a tool's schema has
_HOLDERS = (dict, list)


class Door:
    """Serves the hub in OpenAI's and Anthropic's protocols, in this event loop.

    >>> async with Door(hub, tokenizer=tokenizer, model="policy") as door:
    ...     session = door.open(episode.generate, max_tokens=256, temperature=1.0, ...)
    ...     client = openai.AsyncOpenAI(base_url=session.base_url, api_key=session.api_key)

    Args:
        model: the name that clients must ask for.
        host: where to listen; another than loopback lets others on the network try tokens.
        ignore: fields that clients may send without being heeded, such as `temperature`, `top_p`
            or `model`, or "*"; without it they are refused, lest an agent think it had its way.
        max_body_bytes: of one request.
        max_concurrent, requests_per_s: for each token; more is answered 429.
        max_tokens, max_sequence_tokens: of requests with the run's token.
    """

    def __init__(
        self,
        hub: InferenceHub,
        *,
        tokenizer: Any,
        model: str,
        host: str = "127.0.0.1",
        port: int = 0,
        ignore: Collection[str] = (),
        max_body_bytes: int = 4 * 1024 * 1024,
        max_concurrent: int = 64,
        requests_per_s: float = 100.0,
        max_tokens: int = 1024,
        max_sequence_tokens: int = 32_768,
    ) -> None:
        self.token = secrets.token_urlsafe(32)
        self.url = ""
        self._hub = hub
        self._tokenizer = tokenizer
        self._model = model
        self._address = (host, port)
        self._listener = Listener(host, port)
        self._ignore = Ignore(ignore)
        self._max_body_bytes = max_body_bytes
        self._max_concurrent = max_concurrent
        self._requests_per_s = requests_per_s
        self._max_tokens = max_tokens
        self._max_sequence_tokens = max_sequence_tokens
        self._metrics = Metrics(hub)
        # By the token's digest: how long a look-up takes tells nothing of the token.
        self._sessions: dict[bytes, Session] = {}

    async def __aenter__(self) -> "Door":
        self._responder = await Responder.create(self._tokenizer, self._metrics)
        self._http = aiohttp.ClientSession()
        app = web.Application(
            client_max_size=self._max_body_bytes, middlewares=[self._answer_errors]
        )
        for prefix in ("", "/episodes/{token}"):
            app.router.add_post(f"{prefix}/v1/chat/completions", self._asked(self._chat))
            app.router.add_post(f"{prefix}/v1/completions", self._asked(self._text))
            app.router.add_post(f"{prefix}/v1/responses", self._asked(self._responses))
            for add in (app.router.add_get, app.router.add_delete):
                add(f"{prefix}/v1/responses/{{id}}", self._asked(self._response))
            app.router.add_post(f"{prefix}{_MESSAGES}", self._asked(self._messages))
            app.router.add_post(
                f"{prefix}{_MESSAGES}/count_tokens", self._asked(self._count_tokens)
            )
            app.router.add_get(f"{prefix}/v1/models", self._asked(self._models))
        app.router.add_get("/metrics", self._metrics_route)
        host, port = self._address
        try:
            self.url = await self._listener.start(app, logger=_WithoutTexts(logger))
        except OSError as error:
            await self._listener.close()
            await self._http.close()
            raise ValueError(
                f"the door can't listen on {host}:{port} ({error.strerror}): choose another port, "
                f"or 0 for a free one"
            ) from error
        self._own = self._new_session(
            DoorSession, self._generate, token=self.token, temperature=None,
            max_tokens=self._max_tokens, max_sequence_tokens=self._max_sequence_tokens,
        )  # fmt: skip
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for session in list(self._sessions.values()):
            session.close()
        await self._listener.close()
        await self._http.close()

    def open(
        self,
        generate: Generate,
        *,
        max_tokens: int,
        temperature: float | None,
        max_sequence_tokens: int,
        role: str = "",
        turns: Iterator[int] | None = None,
    ) -> DoorSession:
        """A token for one episode, whose `generate` answers its calls; close it at its end.

        A client may ask for fewer than `max_tokens`, not for more; nor for another temperature.
        Without a temperature nothing is kept of what is sampled, and clients may ask for any. Of an
        episode that several play each `role` has a session, and all the same numbers of `turns`.
        """
        return self._new_session(
            DoorSession, generate, max_tokens=max_tokens, temperature=temperature,
            max_sequence_tokens=max_sequence_tokens, role=role, turns=turns,
        )  # fmt: skip

    def open_elsewhere(self, to: Elsewhere) -> ElsewhereSession:
        """A token whose calls another model answers; close it at the end of the episode."""
        return self._new_session(ElsewhereSession, to, self._http)

    def _new_session(
        self, kind: type[_S], *of_kind: Any, token: str | None = None, **options: Any
    ) -> _S:
        def forget(session: Session) -> None:
            self._sessions.pop(_digest(session.api_key), None)

        token = token or secrets.token_urlsafe(32)
        allowance = Allowance(
            max_concurrent=self._max_concurrent, requests_per_s=self._requests_per_s
        )
        session = kind(
            *of_kind, door_url=self.url, api_key=token, allowance=allowance, on_close=forget,
            **options,
        )  # fmt: skip
        self._sessions[_digest(token)] = session
        return session

    async def _generate(self, token_ids: Sequence[int], sampling: SamplingParams) -> Completion:
        return await self._hub.generate(GenerateRequest(token_ids=token_ids, sampling=sampling))

    # ── the routes ───────────────────────────────────────────────────────────────────────────

    def _asked(self, answer: Answer) -> Handler:
        """The route of a request that is answered here, or passed on by the session of a role."""

        async def route(request: web.Request) -> web.StreamResponse:
            session = self._session(request)
            if isinstance(session, DoorSession):
                return await answer(request, session)
            assert isinstance(session, ElsewhereSession)
            with session.allowance.responses(1):
                return await session.pass_on(
                    request, await _json(request) if request.can_read_body else None
                )

        return route

    async def _chat(self, request: web.Request, session: DoorSession) -> web.StreamResponse:
        body = await _json(request)
        session.check_room(_length(body))
        # In a thread: to check, render and tokenise a long conversation takes its time.
        ask = await asyncio.to_thread(parse_chat, body, model=self._model, ignore=self._ignore)
        with session.allowance.responses(ask.n):
            exchange = await asyncio.to_thread(self._responder.chat, session, ask)
            return await self._answer(request, exchange, CHAT)

    async def _text(self, request: web.Request, session: DoorSession) -> web.StreamResponse:
        ask = parse_text(await _json(request), model=self._model, ignore=self._ignore)
        with session.allowance.responses(ask.n):
            exchange = await asyncio.to_thread(self._responder.text, session, ask)
            return await self._answer(request, exchange, TEXT)

    async def _responses(self, request: web.Request, session: DoorSession) -> web.StreamResponse:
        body = await _json(request)
        session.check_room(_length(body, "input"))
        asked = await asyncio.to_thread(
            Request, body, model=self._model, ignore=self._ignore, kept=session.kept
        )
        with session.allowance.responses(asked.ask.n):
            exchange = await asyncio.to_thread(self._responder.chat, session, asked.ask)
            return await self._answer(request, exchange, asked.dialect)

    async def _response(self, request: web.Request, session: DoorSession) -> web.StreamResponse:
        name = request.match_info["id"]
        if name not in session.kept:
            raise ApiError(404, f"this episode has no response {name!r} that was stored")
        if request.method == "DELETE":
            del session.kept[name]
            return web.json_response({"id": name, "object": "response", "deleted": True})
        return web.json_response(session.kept[name].body, dumps=_dumps)

    async def _messages(self, request: web.Request, session: DoorSession) -> web.StreamResponse:
        ask, exchange = await self._of_messages(request, session)
        with session.allowance.responses(ask.n):
            return await self._answer(request, exchange, MESSAGES)

    async def _count_tokens(self, request: web.Request, session: DoorSession) -> web.StreamResponse:
        _, exchange = await self._of_messages(request, session)
        return web.json_response({"input_tokens": len(exchange.prompt)})

    async def _of_messages(
        self, request: web.Request, session: DoorSession
    ) -> tuple[ChatAsk, Exchange]:
        body = await _json(request)
        session.check_room(_length(body))
        ask = await asyncio.to_thread(parse_messages, body, model=self._model, ignore=self._ignore)
        return ask, await asyncio.to_thread(self._responder.chat, session, ask)

    async def _models(self, request: web.Request, session: DoorSession) -> web.StreamResponse:
        card = {"id": self._model, "object": "model", "created": 0, "owned_by": "flash"}
        return web.json_response({"object": "list", "data": [card]})

    async def _metrics_route(self, request: web.Request) -> web.StreamResponse:
        if self._session(request) is not self._own:
            raise ApiError(403, "the metrics are for the run's own token")
        body = self._metrics.exposition()
        return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE_LATEST})

    def _session(self, request: web.Request) -> Session:
        """Whose request it is; it counts against that token's rate."""
        if why := page_refusal(request.headers, local_address=local_address(request)):
            raise ApiError(403, why)
        token = request.match_info.get("token")
        if token is None:
            kind, _, token = request.headers.get("Authorization", "").partition(" ")
            if kind.lower() != "bearer":
                token = request.headers.get("x-api-key")
            if token is None:
                raise ApiError(401, "a bearer token is needed", code="invalid_api_key")
        session = self._sessions.get(_digest(token))
        if session is None or not secrets.compare_digest(
            session.api_key.encode(), token.encode(errors="replace")
        ):
            raise ApiError(
                401, "the token is unknown, or its episode has ended", code="invalid_api_key"
            )
        most = _CONNECTIONS_A_RESPONSE * self._max_concurrent
        self._listener.vouch(request, owner=session.api_key, most=most)
        session.allowance.take_request()
        return session

    async def _answer(
        self, request: web.Request, exchange: Exchange, dialect: Dialect
    ) -> web.StreamResponse:
        indices = range(exchange.ask.n)
        if exchange.ask.n == 1:
            answers = [await exchange.respond(0)]
        else:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(_or_error(exchange.respond(i))) for i in indices]
            outcomes = [task.result() for task in tasks]
            answers = [outcome for outcome in outcomes if isinstance(outcome, Response)]
            for outcome in outcomes:
                if isinstance(outcome, ApiError):
                    raise outcome
        if exchange.ask.stream:
            return await _stream(request, dialect.stream(exchange, answers, self._model))
        return web.json_response(dialect.whole(exchange, answers, self._model), dumps=_dumps)

    @web.middleware
    async def _answer_errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        route = request.match_info.route.resource
        name = route.canonical if route is not None else "none"
        told = None
        try:
            response = await handler(request)
        except ApiError as error:
            told = error
        except web.HTTPException as error:
            headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else {}
            told = ApiError(error.status, f"{request.method}: {error.reason}", headers=headers)
        except Exception as error:  # ours; its message may quote what the client sent
            while isinstance(error, ExceptionGroup):
                error = error.exceptions[0]
            places = "".join(traceback.format_tb(error.__traceback__))
            logger.error("the door failed: %s in\n%s", type(error).__name__, places)
            told = ApiError(500, f"the door failed: {type(error).__name__}; its log tells where")
        if told is not None:
            shape = anthropic_error if _MESSAGES in request.path else openai_error
            response = web.json_response(shape(told), status=told.status, headers=told.headers)
        self._metrics.requests.labels(name, response.status).inc()
        return response


async def _or_error(response: Awaitable[Response]) -> Response | ApiError:
    """Of several, one that fails must not show as a failure of the group."""
    try:
        return await response
    except ApiError as error:
        return error


def _length(body: Any, field: str = "messages") -> int:
    """Of a conversation's messages, each of which is a token at least."""
    messages = body.get(field) if isinstance(body, dict) else None
    return len(messages) if isinstance(messages, list) else 0


async def _json(request: web.Request) -> Any:
    raw = await read_body(request)
    try:
        body = json.loads(raw)
        if b"\\ud" in raw.lower():
            _dumps(body).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "the body is not JSON, or not UTF-8") from error
    level = [body]
    for _ in range(_MAX_DEPTH):
        inner = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, _HOLDERS)]
        if not inner:
            return body
        level = list(itertools.chain.from_iterable(inner))
    raise ApiError(400, f"the body is nested deeper than {_MAX_DEPTH} levels")


async def _stream(request: web.Request, frames: Iterable[Frame]) -> web.StreamResponse:
    headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache"}
    response = web.StreamResponse(headers=headers)
    try:
        async with asyncio.timeout(_READ_TIMEOUT_S):
            await response.prepare(request)
            for event, data in frames:
                named = f"event: {event}\n" if event else ""
                told = data if isinstance(data, str) else _dumps(data)
                await response.write(f"{named}data: {told}\n\n".encode())
            await response.write_eof()
    except (TimeoutError, ConnectionError):  # it reads no more, or is gone
        if request.transport is not None:
            request.transport.abort()
    return response


class _WithoutTexts(logging.LoggerAdapter[logging.Logger]):
    """For aiohttp: its errors about malformed requests quote them."""

    def process(
        self, msg: Any, kwargs: MutableMapping[str, Any]
    ) -> tuple[Any, MutableMapping[str, Any]]:
        return msg, {**kwargs, "exc_info": None}


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="replace")).digest()
