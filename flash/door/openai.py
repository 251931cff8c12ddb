"""OpenAI's chat and text completions, as they are told whole or piece by piece."""

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from flash.door.dialect import Dialect, Frame
from flash.door.errors import ApiError
from flash.door.reply import Delta, Reply, token_logprobs
from flash.door.respond import Exchange, Response
from flash.door.schema import usage

Choice = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """What sets a chat apart from a completion.

    `message` are the words of a whole choice, `part` those of one of a stream, `logprobs` what is
    said of the logprobs of its tokens.
    """

    kind: str
    chunk_kind: str
    id_prefix: str
    first: Delta | None
    message: Callable[[Reply], Choice]
    part: Callable[[Delta], Choice]
    logprobs: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def dialect(self) -> Dialect:
        return Dialect(whole=self._whole, stream=self._stream, error=error_body)

    def _whole(
        self, exchange: Exchange, responses: Sequence[Response], model: str
    ) -> dict[str, Any]:
        choices = []
        for response in responses:
            kept = len(response.completion.token_ids)
            words = self.message(response.reply)
            choices.append(self._choice(exchange, response, words, 0, kept, response.finish_reason))
        head = self._head(self.kind, model)
        return {**head, "choices": choices, "usage": _usage(exchange, responses)}

    def _stream(
        self, exchange: Exchange, responses: Sequence[Response], model: str
    ) -> Iterator[Frame]:
        head = self._head(self.chunk_kind, model)
        told = exchange.ask.include_usage
        for response in responses:
            for choice in self._chunks(exchange, response):
                yield "", {**head, "choices": [choice], **({"usage": None} if told else {})}
        if told:
            yield "", {**head, "choices": [], "usage": _usage(exchange, responses)}
        yield "", "[DONE]"

    def _head(self, kind: str, model: str) -> dict[str, Any]:
        name = f"{self.id_prefix}-{uuid.uuid4().hex}"
        return {"id": name, "object": kind, "created": int(time.time()), "model": model}

    def _chunks(self, exchange: Exchange, response: Response) -> Iterator[Choice]:
        if self.first is not None:
            yield self._choice(exchange, response, self.part(self.first), 0, 0, None)
        pending = 0  # tokens whose logprobs were not told yet
        for deltas, end in response.pieces:
            for delta in deltas:
                yield self._choice(exchange, response, self.part(delta), pending, end, None)
                pending = end
        kept = len(response.completion.token_ids)
        last = response.finish_reason
        yield self._choice(exchange, response, self.part({}), pending, kept, last)

    def _choice(
        self,
        exchange: Exchange,
        response: Response,
        words: Choice,
        start: int,
        end: int,
        finish_reason: str | None,
    ) -> Choice:
        """With the logprobs of the tokens from `start` to `end`, if they are asked for."""
        logprobs = None
        if exchange.ask.logprobs and start < end:
            sampled = response.completion
            logprobs = self.logprobs(
                token_logprobs(
                    exchange.tokenizer, sampled.token_ids[start:end], sampled.logprobs[start:end]
                )
            )
        return {
            "index": response.index,
            **words,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }


def _usage(exchange: Exchange, responses: Sequence[Response]) -> dict[str, int]:
    sampled = [len(response.completion.token_ids) for response in responses]
    return usage(prompt=len(exchange.prompt), sampled=sampled)


def error_body(error: ApiError) -> dict[str, Any]:
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
        error.status, "server_error" if error.status >= 500 else "invalid_request_error"
    )
    return {
        "error": {
            "message": str(error), "type": kind, "param": error.param, "code": error.code,
        }
    }  # fmt: skip


CHAT = _Shape(
    kind="chat.completion",
    chunk_kind="chat.completion.chunk",
    id_prefix="chatcmpl",
    first={"role": "assistant", "content": ""},
    message=lambda reply: {"message": reply.message()},
    part=lambda delta: {"delta": delta},
    logprobs=lambda of_tokens: {"content": of_tokens, "refusal": None},
).dialect()

TEXT = _Shape(
    kind="text_completion",
    chunk_kind="text_completion",
    id_prefix="cmpl",
    first=None,
    message=lambda reply: {"text": reply.content},
    part=lambda delta: {"text": delta.get("content", "")},
    logprobs=lambda of_tokens: {
        "tokens": [entry["token"] for entry in of_tokens],
        "token_logprobs": [entry["logprob"] for entry in of_tokens],
        "top_logprobs": None,
        "text_offset": None,
    },
).dialect()
