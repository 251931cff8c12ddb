"""What SGLang answers to `/generate`, on the wire: JSON, whole or in events.

Each answer and event says in `completion_tokens` how many tokens there are by now. An event has
all of them, or with `--incremental-streaming-output` those since the last one; the last event of
a request that was aborted in the queue repeats some. So what is new are the last of its tokens, as
many as the count has grown by. (SGLang 0.5.23: `_handle_batch_output` and `_handle_abort_req` of
srt/managers/tokenizer_manager.py.)
"""

import base64
from typing import Any, Literal

import msgspec
import numpy as np

from flash.hub.answers import Error, EventStream, Span, refusal, versions_of
from flash.hub.worker import WorkerBroken, WorkerFailure
from flash.types import Completion, Experts, FinishReason, SamplingParams


class _Reason(msgspec.Struct, gc=False):
    type: Literal["stop", "length", "abort"]
    matched: int | str | None = None
    message: str | None = None
    status_code: int | None = None


class _Meta(msgspec.Struct, gc=False):
    finish_reason: _Reason | None
    completion_tokens: int
    output_token_logprobs: list[tuple[float | None, int, Any]] = []  # with the token, and its text
    weight_versions: list[Span] | None = None  # of an answer that is complete
    prompt_tokens: int = 0
    routed_experts: str | None = None  # of an answer that is complete: int32 in base64


class Answer(msgspec.Struct, gc=False):
    """A whole answer, or an event of a stream; an event may be an error instead."""

    output_ids: list[int] = []
    meta_info: _Meta | None = None
    error: Error | None = None

    def after(self, known: int, worker: str) -> tuple[list[int], list[float]]:
        """Its tokens after the first `known`, with their logprobs.

        Raises BadRequest or WorkerFailure if it refuses the request, ValueError if it is not of
        this protocol.
        """
        if self.error is not None:
            raise refusal(self.error.code, f"{worker}: {self.error.message}")
        meta = self.meta()
        reason = meta.finish_reason
        if reason is not None and reason.type == "abort" and reason.status_code is not None:
            raise refusal(reason.status_code, f"{worker}: {reason.message}")
        new = meta.completion_tokens - known
        token_ids = self.output_ids[len(self.output_ids) - new :]
        entries = meta.output_token_logprobs[len(meta.output_token_logprobs) - new :]
        if not 0 <= new == len(token_ids) == len(entries):
            raise ValueError(
                f"{len(token_ids)} tokens and {len(entries)} logprobs, where {new} are new"
            )
        logprobs = [logprob for logprob, _, _ in entries if logprob is not None]
        if len(logprobs) < new:
            raise ValueError("a logprob is not finite")
        if [token for _, token, _ in entries] != token_ids:
            raise WorkerBroken(f"{worker} answered logprobs of other tokens than it has sampled")
        return token_ids, logprobs

    def meta(self) -> _Meta:
        """ValueError for an answer that has none."""
        if self.meta_info is None:
            raise ValueError("an answer without meta_info")
        return self.meta_info


decode_answer = msgspec.json.Decoder(Answer).decode


class SglangStream(EventStream):
    """SGLang's."""

    _last: Answer

    def _hear(self, event: bytes) -> tuple[list[int], list[float]]:
        answer = decode_answer(event)
        new = answer.after(len(self.token_ids), self._worker)
        if answer.meta().finish_reason is not None:
            self._last, self.complete = answer, True
        return new

    def completion(self, sampling: SamplingParams) -> Completion:
        return completion_of(self._last, self.token_ids, self.logprobs, sampling, self._worker)


def completion_of(
    last: Answer,
    token_ids: list[int],
    logprobs: list[float],
    sampling: SamplingParams,
    worker: str,
) -> Completion:
    """From all tokens and what came last; ValueError if there can be none."""
    meta = last.meta()
    if meta.finish_reason is None:
        raise ValueError("an answer without finish_reason")
    if meta.weight_versions is None and token_ids:
        raise WorkerFailure(
            f"{worker} does not tell which version sampled a token (weight_versions), as SGLang "
            f"0.5.23 does: update it"
        )
    return Completion(
        token_ids=token_ids,
        logprobs=logprobs,
        versions=versions_of(meta.weight_versions or (), len(token_ids)),
        temperature=sampling.temperature,
        finish_reason=_reason(meta.finish_reason, sampling, worker),
        worker=worker,
        experts=_experts_of(meta, sampling, len(token_ids)),
    )


def _experts_of(meta: _Meta, sampling: SamplingParams, sampled: int) -> Experts | None:
    """None if nobody asked for them, or there are none."""
    if sampling.experts_from is None or meta.routed_experts is None:
        return None
    flat = np.frombuffer(base64.b64decode(meta.routed_experts, validate=True), "<i4")
    tokens = meta.prompt_tokens + sampled - 1 - sampling.experts_from
    return flat.reshape(tokens, -1).astype(np.int16) if tokens > 0 else None


def _reason(reason: _Reason, sampling: SamplingParams, worker: str) -> FinishReason:
    """`abort`, after which the hub asks for the rest, where a response ends that should not.

    A request with stop tokens can't have SGLang go on at the model's own end of a text.
    """
    if reason.type != "stop":
        return reason.type
    if not isinstance(reason.matched, int):
        raise WorkerBroken(f"{worker} ended a response, which it says to match {reason.matched!r}")
    return "stop" if reason.matched in sampling.stop_token_ids else "abort"
