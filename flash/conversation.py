"""Conversations token by token: what was sampled stays as it was sampled.

`TokenSequence` grows into what a trajectory holds. `ChatTemplate` makes prompts of messages in the
model's own chat template; of each later turn it tokenises only what the template puts after the
assistant's words.
"""

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flash.types import Completion, SampledSequence

Message = Mapping[str, Any]

# What is longer is not tokenised, which takes 1 s for a million: of texts that are worth reading a
# token has fewer than 10 characters, and few models read a million tokens.
CHARS_A_TOKEN, MAX_CHARS = 32, 4_000_000


def longest_text(max_sequence_tokens: int) -> int:
    """The most characters that are tokenised where so many tokens have room."""
    return min(CHARS_A_TOKEN * max_sequence_tokens, MAX_CHARS)


class TokenSequence:
    """Tokens in the order they were seen or sampled, with what the engine said of each."""

    def __init__(self, prompt: Sequence[int]) -> None:
        self.token_ids: list[int] = []
        self._mask: list[float] = []
        self._logprobs: list[float] = []
        self._versions: list[int] = []
        self._temperatures: list[float] = []
        self._turns: list[int] = []
        self._turn = 0
        self.add_prompt(prompt)

    def add_prompt(self, token_ids: Sequence[int]) -> None:
        self.token_ids += token_ids
        self._mask += [0.0] * len(token_ids)
        self._logprobs += [0.0] * len(token_ids)
        self._versions += [-1] * len(token_ids)
        self._temperatures += [1.0] * len(token_ids)
        self._turns += [-1] * len(token_ids)

    def add_sampled(self, completion: Completion, *, turn: int | None = None) -> None:
        """`turn` is which response of the episode it is; without it the next one."""
        self._turn = self._turn if turn is None else turn
        self.token_ids += completion.token_ids
        self._mask += [1.0] * len(completion.token_ids)
        self._logprobs += completion.logprobs
        self._versions += completion.versions
        self._temperatures += [completion.temperature] * len(completion.token_ids)
        self._turns += [self._turn] * len(completion.token_ids)
        self._turn += 1

    def snapshot(self) -> SampledSequence:
        """As arrays, up to the last sampled token: what was read after it trains nothing."""
        end = max((at + 1 for at, sampled in enumerate(self._mask) if sampled), default=0)
        return SampledSequence(
            token_ids=np.array(self.token_ids[:end], dtype=np.int64),
            loss_mask=np.array(self._mask[:end], dtype=np.float32),
            logprobs=np.array(self._logprobs[:end], dtype=np.float32),
            versions=np.array(self._versions[:end], dtype=np.int64),
            temperatures=np.array(self._temperatures[:end], dtype=np.float32),
            turns=np.array(self._turns[:end], dtype=np.int64),
        )


class ChatTemplate:
    """A tokenizer's chat template.

    Messages are as Hugging Face templates take them: `role`, `content`, and for tools
    `tool_calls` with their arguments as a mapping. `stop_token_ids` end an assistant's turn.
    Raises ValueError for a tokenizer without a template, and for messages that it refuses.
    """

    def __init__(self, tokenizer: Any) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path!r} has no chat template: use "
                f"agent.style=plain, or an instruction-tuned model"
            )
        self._tokenizer = tokenizer
        # Stands where the assistant's words stood; nobody else can write it.
        self._sentinel = f"sampled-{secrets.token_hex(8)}"
        turn = {"role": "assistant", "content": "!"}
        user = {"role": "user", "content": "?"}
        end_of_turn = (self.between([user], turn, [user], sampled=()) or [])[:1]
        self._special = set(tokenizer.all_special_ids)
        stops = [*end_of_turn, tokenizer.eos_token_id]
        self.stop_token_ids = tuple(dict.fromkeys(t for t in stops if t in self._special))

    def prompt(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> list[int]:
        """Tokens of the whole conversation, up to the start of the assistant's next words."""
        return self._encode(self.render(messages, tools))

    def between(
        self,
        before: Sequence[Message],
        said: Message,
        after: Sequence[Message],
        *,
        sampled: Sequence[int],
        tools: Sequence[Any] = (),
    ) -> list[int] | None:
        """Tokens from the end of `sampled`, which said `said`, to the start of the next words.

        None where the template does not show where that turn ends; then only `prompt` is left.
        """
        marked = dict(said)
        if calls := said.get("tool_calls"):
            function = {**calls[-1]["function"], "arguments": {"argument": self._sentinel}}
            marked["tool_calls"] = [*calls[:-1], {**calls[-1], "function": function}]
        else:
            marked["content"] = self._sentinel
        _, shown, rest = self.render([*before, marked, *after], tools).rpartition(self._sentinel)
        if calls and shown:
            # What follows is the syntax of the call, which was sampled, up to the stop token.
            ended = bool(sampled) and sampled[-1] in self._special
            end = self._tokenizer.decode([sampled[-1]]) if ended else self._sentinel
            _, shown, rest = rest.partition(end)
        if not shown:
            return None
        token_ids = self._encode(rest)
        if sampled and token_ids and not calls and sampled[-1] == token_ids[0]:
            return token_ids[1:]  # the model has ended its turn itself
        return token_ids

    def render(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> str:
        """The conversation as the template writes it, up to the start of the next words."""
        try:
            rendered: str = self._tokenizer.apply_chat_template(
                list(messages), tools=list(tools) or None, tokenize=False,
                add_generation_prompt=True,
            )  # fmt: skip
        except Exception as error:  # the boundary to the template, which is the model's own code
            raise ValueError(f"the model's chat template refuses the messages: {error}") from error
        return rendered

    def _encode(self, text: str) -> list[int]:
        # The template has written the special tokens already.
        token_ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return token_ids
