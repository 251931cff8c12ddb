"""A server of OpenAI's /v1/chat/completions, for evaluations: it is told messages, and tells text.

A conversation is tokens here. So it is written in a chat template of its own (`framed`), in which
tokens that no text holds say where a message begins, and for each request it is read back from
them. The tokenizer is any other model's: limits and counts are by that, near enough.
"""

import asyncio
import secrets
from collections.abc import Sequence
from typing import Any

import msgspec

from flash.hub.server_client import ServerClient
from flash.hub.worker import BadRequest, OnTokens, WorkerBusy, WorkerFailure
from flash.types import Completion, FinishReason, SamplingParams

ROUTE = "/v1/chat/completions"
_WAITS_S = (1, 2, 4, 8, 16, *[30] * 20)  # where a service has had enough requests for a while
_MARK = f"-{secrets.token_hex(8)}|>"  # so that no text is taken for one of these tokens
_BEGINS = {f"<|{role}{_MARK}": role for role in ("system", "user", "assistant")}
_ENDS = f"<|end{_MARK}"
_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}"
    "{{ raise_exception('results of tools are not told to an endpoint of chat alone') }}{% endif %}"
    f"<|{{{{ m.role }}}}{_MARK}{{{{ m.content }}}}{_ENDS}{{% endfor %}}"
    f"{{% if add_generation_prompt %}}<|assistant{_MARK}{{% endif %}}"
)
_ANY_TEXT = "Straße 10,\n\t{x: ‘漢’} 🙂  ."


def framed(tokenizer: Any) -> Any:
    """The same tokenizer, which now writes conversations as a ChatWorker reads them.

    ValueError for one that does not give texts back as they were.
    """
    if _text(tokenizer, tokenizer.encode(_ANY_TEXT, add_special_tokens=False)) != _ANY_TEXT:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path!r} can't write any text, so it can't stand "
            f"for that of a model that has chat alone: give --tokenizer NAME of a model with one "
            f"of bytes, as Qwen's and Llama 3's are"
        )
    tokenizer.add_special_tokens({"additional_special_tokens": [*_BEGINS], "eos_token": _ENDS})
    tokenizer.chat_template = _TEMPLATE
    tokenizer.response_template = None
    return tokenizer


class _Message(msgspec.Struct):
    role: str = "assistant"
    content: str | None = None


class _Choice(msgspec.Struct):
    message: _Message
    finish_reason: str | None = None


class _Answer(msgspec.Struct):
    choices: list[_Choice]


_decode = msgspec.json.Decoder(_Answer).decode


class ChatWorker(ServerClient):
    """Client of one server at `url`; it has no control routes, so it serves a FixedWorker.

    Args:
        model: what the server calls the model.
        tokenizer: a `framed` one.
    """

    constrains = False

    def __init__(self, url: str, *, model: str, tokenizer: Any, api_key: str = "") -> None:
        super().__init__(url, api_key=api_key)
        self._model = model
        self._tokenizer = tokenizer
        self._begins = {
            tokenizer.convert_tokens_to_ids(mark): role for mark, role in _BEGINS.items()
        }
        self._ends: int = tokenizer.convert_tokens_to_ids(_ENDS)
        self._limit = "max_tokens"

    async def generate(
        self,
        request_id: str,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        on_tokens: OnTokens | None = None,
    ) -> Completion:
        messages = self._messages(token_ids)
        try:
            return await self._answer(messages, sampling)
        except BadRequest as error:
            # OpenAI's newer models know the limit by this name alone, many servers by the other.
            if "max_completion_tokens" not in str(error) or self._limit != "max_tokens":
                raise
            self._limit = "max_completion_tokens"
        return await self._answer(messages, sampling)

    async def abort(self, request_id: str) -> None:
        """The connection of a request that was cancelled is closed, which is all there is."""

    async def check_health(self) -> None:
        await self._call("GET", "/v1/models")

    async def _answer(self, messages: Sequence[_Message], sampling: SamplingParams) -> Completion:
        request = {
            "model": self._model,
            "messages": messages,
            self._limit: sampling.max_tokens,
            "temperature": sampling.temperature,
        }
        for wait_s in _WAITS_S:
            try:
                return self._whole(await self._call("POST", ROUTE, request), sampling)
            except WorkerBusy:
                await asyncio.sleep(wait_s)
        return self._whole(await self._call("POST", ROUTE, request), sampling)

    def _messages(self, token_ids: Sequence[int]) -> list[_Message]:
        """The conversation that the tokens hold, without the answer's beginning."""
        messages: list[tuple[str, list[int]]] = []
        within = False
        for token in token_ids:
            if token in self._begins:
                messages.append((self._begins[token], []))
                within = True
            elif token == self._ends:
                within = False
            elif within:
                messages[-1][1].append(token)
        if len(messages) < 2:
            raise BadRequest(
                f"{self.name} has chat alone, and this is no conversation: use agent.style=chat, "
                f"or the door's routes of messages"
            )
        return [_Message(role, _text(self._tokenizer, said)) for role, said in messages[:-1]]

    def _whole(self, answer: bytes, sampling: SamplingParams) -> Completion:
        with self._readable(answer):
            choice = _decode(answer).choices[0]
        text = choice.message.content or ""
        tokens = self._tokenizer.encode(text, add_special_tokens=False)
        if choice.finish_reason != "length":
            tokens.append(self._ends)
        cut = choice.finish_reason == "length" or len(tokens) > sampling.max_tokens
        ended: FinishReason = "length" if cut else "stop"
        tokens = tokens[: sampling.max_tokens]
        if not tokens:
            raise WorkerFailure(f"{self.name}{ROUTE} answered nothing: {answer[:300]!r}")
        return Completion(
            token_ids=tokens,
            logprobs=[0.0] * len(tokens),
            versions=[0] * len(tokens),
            temperature=sampling.temperature,
            finish_reason=ended,
            worker=self.name,
        )


def _text(tokenizer: Any, token_ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)
    return text
