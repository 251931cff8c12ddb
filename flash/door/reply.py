"""What sampled tokens say: text, reasoning and tool calls, whole or piece by piece."""

import contextlib
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from flash.conversation import generation_stops
from flash.door.schema import function_call

Delta = dict[str, Any]
_PARTIAL = "\ufffd"  # what a decoder writes for bytes that are no character, or not one yet
_PREFIX_TOKENS = 256  # of the prompt: more than any template puts before the model's own words
REASONING = ("thinking", "reasoning", "reasoning_content")


class Reply:
    """One response as it comes, in OpenAI's deltas, and at the end as a message.

    `feed` takes tokens as they are sampled, in pieces of any size; the deltas don't depend on
    the pieces but for where they are cut. Held back: a character of which bytes are missing, the
    beginning of what may be a stop string or a marker of the response format.

    Args:
        stop: strings that end the text; the first is not part of it.
        stop_token_ids: one of them at the end of the tokens is no part of the text.
        response_template: transformers' description of how the model writes its reasoning and
            tool calls, as `load_template` gives it; None leaves the text as it is.
        prompt: what the model continued; its end may have begun the response ("<think>").
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        stop: Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        response_template: Any = None,
        prompt: Sequence[int] = (),
        tools: Sequence[Any] = (),
    ) -> None:
        self.content = ""
        self.reasoning = ""
        self.tool_calls: list[dict[str, Any]] = []
        self.token_ids: list[int] = []
        self.kept_format = True  # what was written can be read with the response template
        self.stopped = ""  # the stop string: what is fed after it does not count
        self._tokenizer = tokenizer
        self._stop = stop
        self._stop_token_ids = stop_token_ids
        self._parser: Any = None
        if response_template is not None:
            self._parser = tokenizer.get_response_parser(
                response_template, prefix=list(prompt[-_PREFIX_TOKENS:]), tools=list(tools) or None
            )
        self._window = self._fresh = 0  # where the text to decode and its new part begin
        self._told = 0  # characters of the window's text
        self._text = ""
        self._passed = 0  # characters of the text that no stop string can begin in

    def feed(self, token_ids: Sequence[int]) -> list[Delta]:
        """The deltas that these tokens bring."""
        if self.stopped:
            return []
        self.token_ids += token_ids
        text = self._decode(self._window)
        whole = text.rstrip(_PARTIAL)
        piece, self._told = whole[self._told :], max(self._told, len(whole))
        if whole == text:
            self._window, self._fresh = self._fresh, len(self.token_ids)
            self._told = len(self._decode(self._window))
        return self._pass(piece, final=False)

    def finish(self) -> list[Delta]:
        """The deltas of what was held back."""
        if self.stopped:
            return self._flush()
        return self._pass(self._decode(self._window)[self._told :], final=True) + self._flush()

    def message(self) -> dict[str, Any]:
        """After `finish`: the assistant's message."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content, "refusal": None}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["content"] = self.content or None
            message["tool_calls"] = self.tool_calls
        return message

    def _decode(self, start: int, end: int | None = None) -> str:
        token_ids = self.token_ids[start:end]
        if end is None and token_ids and token_ids[-1] in self._stop_token_ids:
            token_ids.pop()
        text: str = self._tokenizer.decode(
            token_ids,
            skip_special_tokens=self._parser is None,
            clean_up_tokenization_spaces=False,
        )
        return text

    def _pass(self, piece: str, *, final: bool) -> list[Delta]:
        """Lets text through up to a stop string, or to where one may have begun."""
        self._text += piece
        until = len(self._text)
        if self._stop:
            starts = {stop: self._text.find(stop, self._passed) for stop in self._stop}
            found = {stop: at for stop, at in starts.items() if at >= 0}
            if found:
                self.stopped = min(found, key=lambda stop: found[stop])
                until = found[self.stopped]
                del self.token_ids[self._tokens_to(until) :]
            elif not final:
                until -= max(_overlap(self._text, stop) for stop in self._stop)
        piece, self._passed = self._text[self._passed : until], max(until, self._passed)
        return self._say(piece) if piece else []

    def _tokens_to(self, found: int) -> int:
        """How many tokens it took to write the stop string that begins there."""
        least, most = 1, len(self.token_ids)
        while least < most:
            middle = (least + most) // 2
            text = self._decode(0, middle)
            if any(text.find(stop, found) == found for stop in self._stop):
                most = middle
            else:
                least = middle + 1
        return least

    # ── the response format ──────────────────────────────────────────────────────────────────

    def _say(self, text: str) -> list[Delta]:
        if self._parser is None:
            return self._add_content(text)
        try:
            events = self._parser.feed(text)
            return self._deltas(events)
        except (ValueError, KeyError, TypeError):
            return self._as_text()

    def _flush(self) -> list[Delta]:
        if self._parser is None:
            return []
        try:
            _, events = self._parser.finalize()
            return self._deltas(events)
        except (ValueError, KeyError, TypeError):
            return self._as_text()

    def _deltas(self, events: Sequence[Mapping[str, Any]]) -> list[Delta]:
        # All or nothing: a call that can't be told must leave no part of itself.
        calls = [
            function_call(value, f"call_{uuid.uuid4().hex}")
            for event in events
            if event["type"] == "region_close" and event["field"] == "tool_calls"
            for value in (event["value"] if isinstance(event["value"], list) else [event["value"]])
        ]
        deltas: list[Delta] = []
        for event in events:
            if event["type"] != "region_chunk" or event["dirty"]:
                continue
            if event["field"] == "content":
                deltas += self._add_content(event["text"])
            elif event["field"] in REASONING:
                text = event["text"] if self.reasoning else event["text"].lstrip()
                self.reasoning += text
                deltas += [{"reasoning_content": text}] if text else []
        for call in calls:
            deltas.append({"tool_calls": [{"index": len(self.tool_calls), **call}]})
            self.tool_calls.append(call)
        return deltas

    def _add_content(self, text: str) -> list[Delta]:
        if self._parser is not None and not self.content:
            text = text.lstrip()  # the format's own white space, after reasoning
        self.content += text
        return [{"content": text}] if text else []

    def _as_text(self) -> list[Delta]:
        """The model did not keep to its format: what it wrote is given as it stands."""
        self._parser, self.kept_format = None, False
        text = self._text[: self._passed]
        if self.content:
            text = text.rpartition(self.content)[2]
        return self._add_content(text)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


@dataclass(frozen=True, slots=True)
class Manners:
    """How a model writes: as far as its tokenizer, its configuration and transformers know.

    `response_template` describes its reasoning and tool calls, None if nobody knows;
    `stop_token_ids` end its turns, those that call tools among them.
    """

    response_template: Mapping[str, Any] | None
    stop_token_ids: tuple[int, ...]


def manners_of(tokenizer: Any) -> Manners:
    """Reads the files of the tokenizer's model: not for the event loop."""
    template: Mapping[str, Any] | None = getattr(tokenizer, "response_template", None)
    if not (path := tokenizer.name_or_path):
        return Manners(template, ())
    from transformers import AutoConfig  # noqa: PLC0415
    from transformers.cli.serving.utils import get_response_template  # noqa: PLC0415

    with contextlib.suppress(OSError, ValueError):
        model: Any = SimpleNamespace(config=AutoConfig.from_pretrained(path))
        template = get_response_template(tokenizer, model)
    return Manners(template, generation_stops(tokenizer))


def load_template(template: Mapping[str, Any] | None, *, tools: bool) -> Any:
    """A response template made ready; without tools, what looks like a call is text."""
    if template is None:
        return None
    from transformers.utils.chat_parsing.response_templates import (  # noqa: PLC0415
        load_response_template,
    )

    left_out = () if tools else ("tool_calls",)
    fields = {name: field for name, field in template["fields"].items() if name not in left_out}
    return load_response_template({**template, "fields": fields})


def token_logprobs(
    tokenizer: Any, token_ids: Sequence[int], logprobs: Sequence[float]
) -> list[dict[str, Any]]:
    """The sampled tokens' logprobs as a chat tells them, one for each token."""
    entries = []
    for token_id, logprob in zip(token_ids, logprobs, strict=True):
        text = tokenizer.decode([token_id], clean_up_tokenization_spaces=False)
        # Of a part of a character the bytes can't be told from its text.
        encoded = None if _PARTIAL in text else list(text.encode())
        entries.append({"token": text, "bytes": encoded, "logprob": logprob, "top_logprobs": []})
    return entries
