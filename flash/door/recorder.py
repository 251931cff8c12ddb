"""Joins the calls of an episode into sequences, and remembers the conversations behind them."""

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flash.conversation import ChatTemplate, Message, TokenSequence
from flash.types import Completion, SampledSequence


class Recorder:
    """What was really sampled in an episode, or by one role in it, as sequences.

    A call whose prompt starts with the whole of a sequence, token by token, extends that sequence;
    any other opens a new one. So each sampled token is one in exactly one sequence: where
    two calls go on from the same one, the second sequence has the common part as its prompt.

    `turns` numbers the responses of an episode, also of roles that it has more than one of.
    """

    def __init__(self, *, role: str = "", turns: Iterator[int] | None = None) -> None:
        self._role = role
        self._turns = itertools.count() if turns is None else turns
        self._sequences: list[TokenSequence] = []

    def add(
        self, prompt: Sequence[int], completion: Completion, *, trained: bool = True
    ) -> "Known":
        """Records a call; what it returns names the call's tokens, prompt and all. What was sampled
        under a constraint is not `trained`."""
        sequence = max(
            (s for s in self._sequences if _starts_with(prompt, s.token_ids)),
            key=lambda s: len(s.token_ids),
            default=None,
        )
        if sequence is None:
            sequence = TokenSequence(prompt, role=self._role)
            self._sequences.append(sequence)
        else:
            sequence.add_prompt(prompt[len(sequence.token_ids) :])
        sequence.add_sampled(completion, turn=next(self._turns), trained=trained)
        return Known(sequence, len(sequence.token_ids))

    def sequences(self) -> list[SampledSequence]:
        """In the order in which they were opened."""
        return [sequence.snapshot() for sequence in self._sequences]


class Known:
    """The first tokens of a sequence: of one call its prompt and what was sampled."""

    def __init__(self, sequence: TokenSequence, length: int) -> None:
        self._sequence = sequence
        self._length = length

    def token_ids(self) -> list[int]:
        return self._sequence.token_ids[: self._length]


def _starts_with(token_ids: Sequence[int], beginning: Sequence[int]) -> bool:
    last = len(beginning) - 1
    return (
        len(token_ids) > last
        and token_ids[last] == beginning[last]  # most that differ, differ there
        and list(token_ids[: last + 1]) == list(beginning)
    )


class Memory:
    """The tokens of what the client has seen, so that nothing sampled is tokenised again.

    A client sends the whole conversation each time. As far as it is one that was seen, with the
    assistant's message as it was given out, its tokens are taken from here, and only the rest is
    rendered. White space around the assistant's words, how a call's arguments are spaced, and
    reasoning that the client leaves out make no difference.
    """

    def __init__(self) -> None:
        self._chats: dict[bytes, Known] = {}
        self._texts: list[tuple[str, Known]] = []

    def chat_prompt(
        self, template: ChatTemplate, messages: Sequence[Message], shown: Mapping[str, Any]
    ) -> list[int]:
        """Tokens of the conversation up to the start of the next words.

        `shown` is what the template is given beside the messages, such as tools.
        """
        digests = _digests(messages, shown)
        for at in reversed(range(len(messages))):
            known = self._chats.get(digests[at])
            if known is None:
                continue
            sampled = known.token_ids()
            between = template.between(
                messages[:at], messages[at], messages[at + 1 :], sampled=sampled, shown=shown
            )
            if between is not None:
                return sampled + between
        return template.prompt(messages, shown)

    def note_chat(
        self, messages: Sequence[Message], said: Message, shown: Mapping[str, Any], known: Known
    ) -> None:
        """The client was given `said` in answer to the messages."""
        self._chats[_digests([*messages, said], shown)[-1]] = known

    def text_prompt(self, tokenizer: Any, text: str) -> list[int]:
        """Tokens of a text that may go on from an earlier one and its completion."""
        seen = max(
            (pair for pair in self._texts if text.startswith(pair[0])),
            key=lambda pair: len(pair[0]),
            default=None,
        )
        if seen is None:
            whole: list[int] = tokenizer.encode(text)
            return whole
        start, known = seen
        rest: list[int] = tokenizer.encode(text[len(start) :], add_special_tokens=False)
        return known.token_ids() + rest

    def note_text(self, text: str, known: Known) -> None:
        """The client knows this text, its prompt and the completion, as these tokens."""
        self._texts.append((text, known))


def _digests(messages: Sequence[Message], shown: Mapping[str, Any]) -> list[bytes]:
    """One for each message: of the conversation up to it."""
    running = hashlib.blake2b(json.dumps(shown, sort_keys=True).encode(), digest_size=16)
    digests = []
    for message in messages:
        compared = {name: value for name, value in message.items() if name != "reasoning_content"}
        if message["role"] == "assistant":
            compared["content"] = message["content"].strip()
            if calls := message.get("tool_calls"):
                compared["tool_calls"] = [_as_object(call) for call in calls]
        running.update(json.dumps(compared, sort_keys=True).encode())
        digests.append(running.digest())
    return digests


def _as_object(call: Mapping[str, Any]) -> dict[str, Any]:
    """The call, its arguments an object as every dialect can tell them."""
    function = call["function"]
    return {**call, "function": {**function, "arguments": as_object(function["arguments"])}}


def as_object(arguments: Any) -> dict[str, Any]:
    """A call's arguments as dialects tell them that have nothing else, whatever was written."""
    return arguments if isinstance(arguments, dict) else {"arguments": arguments}
