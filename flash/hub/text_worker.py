"""A server that tells text, for evaluations: its tokens are those of the text, tokenised here.

They may be others than were sampled, and have no logprobs, so nothing can be trained on them.
"""

from typing import Any

from flash.hub.server_client import ServerClient
from flash.hub.worker import WorkerFailure
from flash.types import Completion, FinishReason, SamplingParams


class TextWorker(ServerClient):
    """Client of one server at `url`; it has no control routes, so it serves a FixedWorker.

    Args:
        model: what the server calls the model.
        tokenizer: of that model, or one that stands for it.
    """

    constrains = False  # who it is is not known, and many would overlook it

    def __init__(self, url: str, *, model: str, tokenizer: Any, api_key: str = "") -> None:
        super().__init__(url, api_key=api_key)
        self._model = model
        self._tokenizer = tokenizer

    async def abort(self, request_id: str) -> None:
        """The connection of a request that was cancelled is closed, which is all there is."""

    async def check_health(self) -> None:
        await self._call("GET", "/v1/models")

    def _tokens(self, text: str, *, ended: bool, sampling: SamplingParams) -> list[int]:
        """Of an answer, with the token that ends it, if it `ended` by itself."""
        tokens: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return [*tokens, *sampling.stop_token_ids[:1]] if ended else tokens

    def _completion(
        self, tokens: list[int], answer: bytes, *, ended: bool, sampling: SamplingParams
    ) -> Completion:
        """Of so many tokens as there may be."""
        if not tokens:
            raise WorkerFailure(f"{self.name} answered nothing: {answer[:300]!r}")
        reason: FinishReason = "stop"
        if not ended or len(tokens) > sampling.max_tokens:
            reason = "length"
        tokens = tokens[: sampling.max_tokens]
        return Completion(
            token_ids=tokens,
            logprobs=[0.0] * len(tokens),
            versions=[0] * len(tokens),
            temperature=sampling.temperature,
            finish_reason=reason,
            worker=self.name,
        )
