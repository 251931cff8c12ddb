"""What a worker answers to a request for tokens, on the wire: JSON, whole or in events.

The events, and what vLLM says in them; SGLang's words are in flash/hub/sglang_answers.py.
"""

import abc
import base64
from collections.abc import Sequence

import msgspec

from flash.hub.worker import BadRequest, OnTokens, WorkerBusy, WorkerFailure
from flash.routed import unpacked
from flash.types import Completion, Experts, FinishReason, SamplingParams

# vLLM sends this for a logprob that is nan.
_CLAMPED_LOGPROB = -9000.0
# The last event has the experts of all tokens: SGLang's of 94 layers, 8 in each, are 4 KB a token.
_LINE_BYTES, _LINE_BYTES_A_TOKEN = 1 << 22, 1 << 13
_HTTP_CLIENT_ERROR, _HTTP_SERVER_ERROR = 400, 500
# Their fault is not the request's: the worker is busy or gone, or lacks our key.
_HTTP_TOO_MANY = 429
_HTTP_NOT_THE_REQUEST = (401, 403, 404, 408, _HTTP_TOO_MANY)
_EVENT = b"data: "
_DONE = b"data: [DONE]"


class Error(msgspec.Struct, gc=False):
    """In the place of an event, or of an answer."""

    message: str
    code: int = _HTTP_CLIENT_ERROR


class _Entry(msgspec.Struct, gc=False):
    logprob: float


class _Logprobs(msgspec.Struct, gc=False):
    content: list[_Entry]


class Span(msgspec.Struct, gc=False):
    """Tokens of one version, from `start` to before `end`."""

    version: str
    start: int
    end: int


class Choice(msgspec.Struct, gc=False):
    """A whole answer, or a chunk of a stream; the last chunk has reason and versions."""

    token_ids: list[int]
    logprobs: _Logprobs | None
    finish_reason: FinishReason | None
    weight_versions: list[Span] | None
    routed_experts: str | None = None  # of an answer that is complete: .npy in base64

    def numbers(self) -> list[float]:
        """The logprobs; ValueError for one that stands for nan."""
        entries = self.logprobs.content if self.logprobs is not None else []
        logprobs = [entry.logprob for entry in entries]
        if logprobs and min(logprobs) < _CLAMPED_LOGPROB:
            raise ValueError("a logprob is nan")
        return logprobs


class Answer(msgspec.Struct, gc=False):
    """What is read of an answer. Its other fields (vLLM repeats each logprob) become no objects,
    which costs a ninth of json.loads, and leaves the garbage collector nothing to walk through."""

    choices: list[Choice] = []
    error: Error | None = None


decode_answer = msgspec.json.Decoder(Answer).decode


class EventStream(abc.ABC):
    """An answer in server-sent events, which is fed as it comes.

    Args:
        tokens: that it may tell of, the prompt's too.
    """

    complete = False  # its last event has come
    last_event = b""

    def __init__(self, worker: str, on_tokens: OnTokens, *, tokens: int) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self._worker = worker
        self._on_tokens = on_tokens
        self._rest: list[bytes] = []  # the beginning of a line
        self._rest_bytes = 0
        self._longest_line_bytes = _LINE_BYTES + tokens * _LINE_BYTES_A_TOKEN

    def feed(self, piece: bytes) -> None:
        """Some more bytes, cut anywhere; raises WorkerFailure for what is not of this protocol."""
        *lines, rest = piece.split(b"\n")
        if lines:
            lines[0] = b"".join((*self._rest, lines[0]))
            self._rest.clear()
            self._rest_bytes = 0
        self._rest.append(rest)
        self._rest_bytes += len(rest)
        for line in lines:
            if line.startswith(_EVENT) and not self.complete and not line.startswith(_DONE):
                self.last_event = event = line[len(_EVENT) :]
                try:
                    token_ids, logprobs = self._hear(event)
                except (IndexError, ValueError) as error:  # msgspec's errors are ValueErrors
                    raise unreadable(self._worker, event, error) from error
                self.token_ids += token_ids
                self.logprobs += logprobs
                self._on_tokens(token_ids, logprobs)
        if self._rest_bytes > self._longest_line_bytes:
            raise WorkerFailure(f"{self._worker} sent a line of a stream that is too long")

    @abc.abstractmethod
    def _hear(self, event: bytes) -> tuple[list[int], list[float]]:
        """New tokens and their logprobs; ValueError or IndexError if it is not of this protocol.

        BadRequest or WorkerFailure if it refuses the request.
        """

    @abc.abstractmethod
    def completion(self, sampling: SamplingParams) -> Completion:
        """Of all that came, once it is complete; ValueError if there can be none."""


class TokenStream(EventStream):
    """vLLM's."""

    _last: Choice

    def _hear(self, event: bytes) -> tuple[list[int], list[float]]:
        answer = decode_answer(event)
        if answer.error is not None:
            raise refusal(answer.error.code, f"{self._worker}: {answer.error.message}")
        choice = answer.choices[0]
        if choice.finish_reason is not None:
            self._last, self.complete = choice, True
        return choice.token_ids, choice.numbers()

    def completion(self, sampling: SamplingParams) -> Completion:
        return completion_of(self._last, self.token_ids, self.logprobs, sampling, self._worker)


def completion_of(
    last: Choice,
    token_ids: list[int],
    logprobs: list[float],
    sampling: SamplingParams,
    worker: str,
) -> Completion:
    """From all tokens and what came last; ValueError if there can be none."""
    if last.finish_reason is None:
        raise ValueError("an answer without finish_reason")
    return Completion(
        token_ids=token_ids,
        logprobs=logprobs,
        versions=versions_of(last.weight_versions or (), len(token_ids)),
        temperature=sampling.temperature,
        finish_reason=last.finish_reason,
        worker=worker,
        experts=_experts_of(last, sampling),
    )


def _experts_of(last: Choice, sampling: SamplingParams) -> Experts | None:
    """None if nobody asked for them, or there are none."""
    if sampling.experts_from is None or last.routed_experts is None:
        return None
    return unpacked(base64.b64decode(last.routed_experts, validate=True))


def versions_of(spans: Sequence[Span], count: int) -> list[int]:
    """Of each of so many tokens; -1 where no span says it. ValueError for a span beyond them."""
    versions = [-1] * count
    for span in spans:
        if not 0 <= span.start <= span.end <= count:
            raise ValueError(f"span {span.start} … {span.end} of {count} tokens")
        versions[span.start : span.end] = [int(span.version)] * (span.end - span.start)
    return versions


def unreadable(worker: str, answer: bytes, error: Exception) -> WorkerFailure:
    """The worker's fault, whose answer is not of this protocol."""
    return WorkerFailure(
        f"{worker} sent an answer that is not of this protocol ({error!r}): "
        f"{answer.decode(errors='replace')[:300]}"
    )


def refusal(status: int, message: str) -> BadRequest | WorkerFailure:
    """Whose fault an answer with that status is: the request's, or the worker's."""
    of_the_request = _HTTP_CLIENT_ERROR <= status < _HTTP_SERVER_ERROR
    if of_the_request and status not in _HTTP_NOT_THE_REQUEST:
        return BadRequest(message)
    return WorkerBusy(message) if status == _HTTP_TOO_MANY else WorkerFailure(message)
