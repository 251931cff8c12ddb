"""A server of OpenAI's /v1/completions: it tells text, and of tokens what it may.

The prompt is a list of token ids, which vLLM, SGLang and llama.cpp take. Where the answer has no
`token_ids` (vLLM gives them) its text is tokenised here.
"""

from collections.abc import Sequence

import msgspec

from flash.hub.text_worker import TextWorker
from flash.hub.worker import OnTokens
from flash.types import Completion, SamplingParams

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
    finish_reason: str | None = None
    token_ids: list[int] | None = None


class _Answer(msgspec.Struct):
    choices: list[_Choice]


_decode = msgspec.json.Decoder(_Answer).decode


class CompletionsWorker(TextWorker):
    """As TextWorker."""

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

    def _whole(self, answer: bytes, sampling: SamplingParams) -> Completion:
        with self._readable(answer):
            choice = _decode(answer).choices[0]
        ended = choice.finish_reason != "length"
        tokens = choice.token_ids
        if tokens is None:
            tokens = self._tokens(choice.text, ended=ended, sampling=sampling)
        return self._completion(tokens, answer, ended=ended, sampling=sampling)
