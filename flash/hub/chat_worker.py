"""A server of OpenAI's /v1/chat/completions: it is told messages, and tells text.

A conversation is tokens here. So it is written in a chat template of its own (`framed`), in which
tokens that no text holds say where a message begins, and for each request it is read back from
them. The tokenizer is any other model's: limits and counts are by that, near enough.
"""

import asyncio
import secrets
from collections.abc import Sequence
from typing import Any

import msgspec

from flash.hub.text_worker import TextWorker
from flash.hub.worker import BadRequest, OnTokens, WorkerBusy
from flash.types import Completion, SamplingParams

ROUTE = "/v1/chat/completions"
_NEWER_LIMIT = "max_completion_tokens"
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


class ChatWorker(TextWorker):
    """As TextWorker, with a `framed` tokenizer."""

    def __init__(self, url: str, *, model: str, tokenizer: Any, api_key: str = "") -> None:
        super().__init__(url, model=model, tokenizer=tokenizer, api_key=api_key)
        self._begins = {
            tokenizer.convert_tokens_to_ids(mark): role for mark, role in _BEGINS.items()
        }
        self._ends: int = tokenizer.convert_tokens_to_ids(_ENDS)
        self._limit = "max_tokens"  # what the server calls it

    async def generate(
        self,
        request_id: str,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        on_tokens: OnTokens | None = None,
    ) -> Completion:
        messages, limit = self._messages(token_ids), self._limit
        try:
            return await self._answer(messages, limit, sampling)
        except BadRequest as error:
            # OpenAI's newer models know the limit by this name alone, many servers by the other.
            if _NEWER_LIMIT not in str(error) or limit == _NEWER_LIMIT:
                raise
            self._limit = _NEWER_LIMIT
        return await self._answer(messages, _NEWER_LIMIT, sampling)

    async def _answer(
        self, messages: Sequence[_Message], limit: str, sampling: SamplingParams
    ) -> Completion:
        request = {
            "model": self._model,
            "messages": messages,
            limit: sampling.max_tokens,
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
        for token in token_ids:
            if token in self._begins:
                messages.append((self._begins[token], []))
            elif token != self._ends and messages:
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
        ended = choice.finish_reason != "length"
        tokens = self._tokens(choice.message.content or "", ended=ended, sampling=sampling)
        return self._completion(tokens, answer, ended=ended, sampling=sampling)


def _text(tokenizer: Any, token_ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(token_ids, clean_up_tokenization_spaces=False)
    return text
