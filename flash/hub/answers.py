"""What a worker answers to a request for tokens, on the wire: JSON, whole or in events."""

import msgspec

from flash.hub.worker import OnTokens, WorkerFailure
from flash.types import Completion, FinishReason, SamplingParams

# vLLM sends this for a logprob that is nan.
_CLAMPED_LOGPROB = -9000.0
_LONGEST_LINE_BYTES = 1 << 20
_EVENT = b"data: "
_DONE = b"data: [DONE]"


class _Entry(msgspec.Struct, gc=False):
    logprob: float


class _Logprobs(msgspec.Struct, gc=False):
    content: list[_Entry]


class _Span(msgspec.Struct, gc=False):
    version: str
    start: int
    end: int


class Choice(msgspec.Struct, gc=False):
    """A whole answer, or a chunk of a stream; the last chunk has reason and versions."""

    token_ids: list[int]
    logprobs: _Logprobs | None
    finish_reason: FinishReason | None
    weight_versions: list[_Span] | None

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

    choices: list[Choice]


decode_answer = msgspec.json.Decoder(Answer).decode


class TokenStream:
    """An answer in server-sent events, which is fed as it comes; `last` is its last one."""

    def __init__(self, worker: str, on_tokens: OnTokens) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.last: Choice | None = None
        self._worker = worker
        self._on_tokens = on_tokens
        self._rest = b""  # the beginning of a line

    def feed(self, piece: bytes) -> None:
        """Some more bytes, cut anywhere; raises WorkerFailure for what is not of this protocol."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(_EVENT) and self.last is None and not line.startswith(_DONE):
                self._hear(line[len(_EVENT) :])
        if len(self._rest) > _LONGEST_LINE_BYTES:
            raise WorkerFailure(f"{self._worker} sent a line of a stream that is too long")

    def _hear(self, event: bytes) -> None:
        try:
            choice = decode_answer(event).choices[0]
            logprobs = choice.numbers()
        except (IndexError, ValueError) as error:  # msgspec's errors are ValueErrors
            raise unreadable(self._worker, event, error) from error
        self.token_ids += choice.token_ids
        self.logprobs += logprobs
        self._on_tokens(choice.token_ids, logprobs)
        if choice.finish_reason is not None:
            self.last = choice


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
    count = len(token_ids)
    versions = [-1] * count
    for span in last.weight_versions or ():
        if not 0 <= span.start <= span.end <= count:
            raise ValueError(f"span {span.start} … {span.end} of {count} tokens")
        versions[span.start : span.end] = [int(span.version)] * (span.end - span.start)
    return Completion(
        token_ids=token_ids,
        logprobs=logprobs,
        versions=versions,
        temperature=sampling.temperature,
        finish_reason=last.finish_reason,
        worker=worker,
    )


def unreadable(worker: str, answer: bytes, error: Exception) -> WorkerFailure:
    """The worker's fault, whose answer is not of this protocol."""
    return WorkerFailure(
        f"{worker} sent an answer that is not of this protocol ({error!r}): "
        f"{answer.decode(errors='replace')[:300]}"
    )
