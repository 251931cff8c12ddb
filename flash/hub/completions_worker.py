"""A server of OpenAI's /v1/completions, for evaluations: it tells text, and of tokens what it may.

The prompt is a list of token ids, which vLLM, SGLang and llama.cpp take. Where the answer has no
`token_ids` (vLLM gives them) its text is tokenised here, which may give other tokens than were
sampled; and there are no logprobs, so nothing can be trained on it.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from flash.hub.server_client import ServerClient
from flash.hub.worker import OnTokens, WorkerFailure
from flash.types import Completion, FinishReason, SamplingParams

ROUTE = "/v1/completions"


class _Request(msgspec.Struct):
    model: str
    prompt: list[int]
    max_tokens: int
    temperature: float
    stop_token_ids: tuple[int, ...]  # vLLM and SGLang; others stop where their model does
    return_token_ids: bool = True


class _Choice(msgspec.Struct):
    text: str
    finish_reason: FinishReason | None = None
    token_ids: list[int] | None = None


class _Answer(msgspec.Struct):
    choices: list[_Choice]


_decode = msgspec.json.Decoder(_Answer).decode


class CompletionsWorker(ServerClient):
    """Client of one server at `url`; it has no control routes, so it serves a FixedWorker.

    Args:
        model: what the server calls the model.
        tokenizer: of that model, for its texts.
    """

    constrains = False  # who it is is not known, and many would overlook it

    def __init__(self, url: str, *, model: str, tokenizer: Any, api_key: str = "") -> None:
        super().__init__(url, api_key=api_key)
        self._model = model
        self._tokenizer = tokenizer

    async def generate(
        self,
        request_id: str,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        on_tokens: OnTokens | None = None,
    ) -> Completion:
        request = _Request(
            self._model,
            list(token_ids),
            sampling.max_tokens,
            sampling.temperature,
            sampling.stop_token_ids,
        )
        return self._whole(await self._call("POST", ROUTE, request), sampling)

    async def abort(self, request_id: str) -> None:
        """The connection of a request that was cancelled is closed, which is all there is."""

    async def check_health(self) -> None:
        await self._call("GET", "/v1/models")

    def _whole(self, answer: bytes, sampling: SamplingParams) -> Completion:
        with self._readable(answer):
            choice = _decode(answer).choices[0]
        tokens = choice.token_ids
        if tokens is None:
            encoded = self._tokenizer.encode(choice.text, add_special_tokens=False)
            tokens = encoded[: sampling.max_tokens]
            if choice.finish_reason == "stop" and len(tokens) < sampling.max_tokens:
                tokens += sampling.stop_token_ids[:1]
        if not tokens:
            raise WorkerFailure(f"{self.name}{ROUTE} answered nothing: {answer[:300]!r}")
        return Completion(
            token_ids=tokens,
            logprobs=[0.0] * len(tokens),
            versions=[0] * len(tokens),
            temperature=sampling.temperature,
            finish_reason=choice.finish_reason or "stop",
            worker=self.name,
        )
