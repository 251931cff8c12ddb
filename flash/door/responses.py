"""OpenAI's responses: what a client may ask for in these words, and how it is answered.

An episode keeps what it was answered with `store`, as is the default: a later request goes on from
that by `previous_response_id`, or by a reference to one of its items.
"""

import itertools
import json
import time
import uuid
from collections.abc import Container, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictStr

from flash.door.dialect import Dialect, Frame
from flash.door.openai import error_body
from flash.door.reply import Reply
from flash.door.respond import Exchange, Response
from flash.door.schema import (
    LEAVE_OUT,
    SAMPLER,
    Body,
    ChatAsk,
    Positive,
    Shape,
    Vocabulary,
    refused,
)

Message = dict[str, Any]


# ── the shapes ───────────────────────────────────────────────────────────────────────────────


class _Part(Shape):
    type: Literal["input_text", "output_text", "text"]
    text: StrictStr
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: Any = None  # of an answer, which may come back
    parsed: Any = None  # what a client made of it


class _Item(Shape):
    id: StrictStr | None = None
    status: StrictStr | None = None


class _Said(_Item):
    type: Literal["message"] = "message"
    role: Literal["user", "system", "developer", "assistant"]
    content: StrictStr | list[_Part]
    phase: StrictStr | None = None


class _Call(_Item):
    type: Literal["function_call"]
    call_id: StrictStr
    name: StrictStr
    arguments: StrictStr
    parsed_arguments: Any = None  # what a client made of them


class _CallOutput(_Item):
    type: Literal["function_call_output"]
    call_id: StrictStr
    output: StrictStr | list[_Part]


class _Thought(Shape):
    type: Literal["reasoning_text", "summary_text"]
    text: StrictStr


class _Reasoning(_Item):
    type: Literal["reasoning"]
    summary: tuple[_Thought, ...] = ()
    content: tuple[_Thought, ...] = ()
    encrypted_content: StrictStr | None = None


class _Reference(Shape):
    type: Literal["item_reference"]
    id: StrictStr


class _Tool(Shape):
    type: Literal["function"]
    name: StrictStr
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None
    strict: Annotated[Literal[False] | None, Field(exclude=True)] = None

    def to_template(self) -> dict[str, Any]:
        function = self.model_dump(exclude_none=True, exclude={"type"})
        return {"type": "function", "function": function}


class _StreamOptions(Shape):
    include_obfuscation: Literal[False] = False


class _Responses(Body):
    input: StrictStr | list[Any]
    instructions: StrictStr | None = None
    previous_response_id: StrictStr | None = None
    store: StrictBool = True
    max_output_tokens: Positive | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    tools: tuple[_Tool, ...] = ()
    tool_choice: Literal["auto", "none"] = "auto"
    stream: StrictBool = False
    stream_options: _StreamOptions | None = None


_KINDS: Mapping[str, type[Shape]] = {
    "message": _Said,
    "function_call": _Call,
    "function_call_output": _CallOutput,
    "reasoning": _Reasoning,
    "item_reference": _Reference,
}
_MAY_BE_IGNORED = {"model", "temperature", "tool_choice"}
_PARTS: tuple[type[Shape], ...] = (_Part, _Thought, _Tool, *_KINDS.values())
_NESTED = {name for shape in _PARTS for name in shape.model_fields} - {"strict", "annotations"}
_THINKS = "how long the policy thinks is its own choice"
_VOCABULARY = Vocabulary(
    heeded=_Responses.model_fields.keys() - _MAY_BE_IGNORED,
    nested=_NESTED,
    neutral={
        "top_p": ((1,), SAMPLER),
        "top_logprobs": ((0,), "only the sampled token's logprob is known"),
        "text": (
            ({}, {"format": {"type": "text"}}),
            "what is sampled is not constrained by a grammar, and how much is written is the "
            "policy's own choice",
        ),
        "reasoning": (({},), _THINKS),
        # Thoughts are told as they are, which is more than their encrypted form.
        "include": (
            ([], ["reasoning.encrypted_content"]),
            "nothing else is known of an answer; logprobs are told by /v1/chat/completions",
        ),
        "parallel_tool_calls": ((True,), "how many tools are called is the policy's choice"),
        "truncation": (("disabled",), "a conversation is never cut"),
        "background": ((False,), "an answer is waited for"),
        "service_tier": (("auto", "default"), "there is one tier"),
        "max_tool_calls": ((), "the agent calls its tools itself"),
        "conversation": ((), "use previous_response_id, or send the items again"),
        "prompt": ((), "no prompts are kept here: send the text"),
        "context_management": (([],), "a conversation is never cut"),
    },
    holders={"content", "output", "summary"},
    kinds={"input_text", "output_text", "text", "reasoning_text", "summary_text", "function"},
    names={*_Responses.model_fields, *_StreamOptions.model_fields, *_NESTED, "strict"},
    remedies={
        "tool_choice": 'whether a tool is called is the policy\'s choice: send "auto" or "none", '
        "or have the door ignore it (agent.ignore)",
        "strict": f"arguments are not constrained by their schema: {LEAVE_OUT}",
        "include_obfuscation": "nothing is padded here: leave it out",
        "type": "only text and functions are known here: leave it out, or have the door ignore "
        "such parts by their type (agent.ignore)",
    },
)


# ── the requests ─────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Kept:
    """An answer that may be gone on from: its body, and the conversation up to its end."""

    body: Mapping[str, Any]
    messages: Sequence[Message]


class Request:
    """A request that can be honoured, and how it is answered.

    Raises ApiError, naming the field, for what can't be. `kept` is the episode's, by id.
    """

    def __init__(
        self, body: Any, *, model: str, ignore: Container[str], kept: MutableMapping[str, Kept]
    ) -> None:
        self.id = f"resp_{uuid.uuid4().hex}"
        self._kept = kept
        self._asked = asked = _VOCABULARY.body(_Responses, body, model=model, ignore=ignore)
        self._messages: list[Message] = []
        if (previous := asked.previous_response_id) is not None:
            if previous not in kept:
                raise refused(
                    "previous_response_id", previous,
                    "this episode has no such response that was stored: send the items again",
                )  # fmt: skip
            self._messages += kept[previous].messages
        if isinstance(asked.input, str):
            self._messages.append({"role": "user", "content": asked.input})
        else:
            items = [self._item(given, n, ignore) for n, given in enumerate(asked.input)]
            self._messages = _joined(self._messages, [item for item in items if item is not None])
        if not self._messages:
            raise refused("input", asked.input, "it holds nothing to answer: send an item at least")
        first = [] if asked.instructions is None else [_words_of("system", asked.instructions)]
        tools = [tool.to_template() for tool in asked.tools]
        self.ask = ChatAsk(
            n=1,
            max_tokens=asked.max_output_tokens,
            temperature=asked.temperature,
            stop=(),
            stream=asked.stream,
            include_usage=True,
            logprobs=False,
            messages=[*first, *self._messages],
            tools=tools,
            parse_tools=bool(tools) and asked.tool_choice == "auto",
            template_variables={},
        )
        self.dialect = Dialect(whole=self._whole, stream=self._stream, error=error_body)

    def _item(self, given: Any, number: int, ignore: Container[str]) -> Shape | None:
        """None for what is to be ignored."""
        kind = given.get("type", "message") if isinstance(given, dict) else "message"
        within = ("input", number)
        shape = _KINDS.get(kind) if isinstance(kind, str) else None
        if shape is None:
            if isinstance(kind, str) and kind in ignore:
                return None
            raise refused(
                f"input[{number}].type", kind,
                f"this door knows {', '.join(_KINDS)}: leave it out, or have the door ignore such "
                f"items by their type (agent.ignore)",
            )  # fmt: skip
        item = _VOCABULARY.part(shape, given, ignore=ignore, within=within)
        if not isinstance(item, _Reference):
            return item
        for answer in self._kept.values():
            for known in answer.body["output"]:
                if known["id"] == item.id:
                    return self._item(known, number, ignore)
        raise refused(
            f"input[{number}].id", item.id, "this episode has no such item: send it whole"
        )

    # ── the answers ──────────────────────────────────────────────────────────────────────────

    def _whole(
        self, exchange: Exchange, responses: Sequence[Response], model: str
    ) -> dict[str, Any]:
        (response,) = responses
        output = _output(response)
        body = {
            **self._head(model),
            **_end(response),
            "output": output,
            "usage": _usage(exchange, response),
        }
        if self._asked.store:
            items = [_VOCABULARY.part(_KINDS[i["type"]], i, ignore=(), within=()) for i in output]
            self._kept[self.id] = Kept(body, _joined(self._messages, items))
        return body

    def _stream(
        self, exchange: Exchange, responses: Sequence[Response], model: str
    ) -> Iterator[Frame]:
        (response,) = responses
        whole = self._whole(exchange, responses, model)
        begun = {
            **self._head(model), "status": "in_progress", "incomplete_details": None, "output": [],
            "usage": None,
        }  # fmt: skip
        events = itertools.chain(
            [_event("created", response=begun)],
            [_event("in_progress", response=begun)],
            *(
                _events(item, index, _pieces(response, item["type"]))
                for index, item in enumerate(whole["output"])
            ),
            [_event(f"{whole['status']}", response=whole)],
        )
        for number, event in enumerate(events):
            yield event["type"], {**event, "sequence_number": number}

    def _head(self, model: str) -> dict[str, Any]:
        asked = self._asked
        return {
            "id": self.id,
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "error": None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": {},
            "parallel_tool_calls": True,
            "previous_response_id": asked.previous_response_id,
            "reasoning": {"effort": None, "summary": None},
            "store": asked.store,
            "temperature": asked.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": asked.tool_choice,
            "tools": [{**tool.model_dump(), "strict": False} for tool in asked.tools],
            "top_p": 1.0,
            "truncation": "disabled",
        }


def _joined(before: Sequence[Message], items: Sequence[Shape]) -> list[Message]:
    """The conversation with these items: what the model said between two others is one message."""
    messages = list(before)
    answer: Message | None = None  # that is being said
    for item in items:
        if isinstance(item, _CallOutput):
            answer = None
            result = _words_of("tool", _words(item.output))
            messages.append({**result, "tool_call_id": item.call_id})
            continue
        if isinstance(item, _Said) and item.role != "assistant":
            answer = None
            role = "system" if item.role == "developer" else item.role
            messages.append(_words_of(role, _words(item.content)))
            continue
        if answer is None:
            answer = _words_of("assistant", "")
            messages.append(answer)
        if isinstance(item, _Said):
            answer["content"] += _words(item.content)
        elif isinstance(item, _Call):
            answer.setdefault("tool_calls", []).append(_call(item))
        elif isinstance(item, _Reasoning):
            thoughts = "".join(part.text for part in item.content)
            answer["reasoning_content"] = answer.get("reasoning_content", "") + thoughts
    return messages


def _words_of(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _words(content: str | Sequence[_Part]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _call(item: _Call) -> dict[str, Any]:
    try:
        arguments = json.loads(item.arguments)
    except ValueError:
        arguments = item.arguments
    function = {"name": item.name, "arguments": arguments}
    return {"id": item.call_id, "type": "function", "function": function}


# ── what is told ─────────────────────────────────────────────────────────────────────────────


def _output(response: Response) -> list[dict[str, Any]]:
    """The items of an answer."""
    reply: Reply = response.reply
    status = "incomplete" if response.finish_reason == "length" else "completed"
    items: list[dict[str, Any]] = []
    if reply.reasoning:
        thoughts = [{"type": "reasoning_text", "text": reply.reasoning}]
        items.append({"type": "reasoning", "id": _id("rs"), "summary": [], "content": thoughts})
    if reply.content or not reply.tool_calls:
        said = {"type": "output_text", "text": reply.content, "annotations": [], "logprobs": []}
        items.append(
            {"type": "message", "id": _id("msg"), "role": "assistant", "status": status,
             "content": [said]}
        )  # fmt: skip
    items += [
        {"type": "function_call", "id": _id("fc"), "call_id": call["id"], "status": "completed",
         **call["function"]}
        for call in reply.tool_calls
    ]  # fmt: skip
    return items


def _id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"


def _end(response: Response) -> dict[str, Any]:
    if response.finish_reason == "length":
        return {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
    return {"status": "completed", "incomplete_details": None}


def _usage(exchange: Exchange, response: Response) -> dict[str, Any]:
    read, said = len(exchange.prompt), len(response.completion.token_ids)
    return {
        "input_tokens": read,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": said,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": read + said,
    }


def _event(kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": f"response.{kind}", **fields}


def _pieces(response: Response, kind: str) -> list[str]:
    """What was said of that kind, as it came."""
    name = {"message": "content", "reasoning": "reasoning_content"}.get(kind, "")
    return [d[name] for deltas, _ in response.pieces for d in deltas if d.get(name)]


def _events(item: Mapping[str, Any], index: int, pieces: Sequence[str]) -> Iterator[dict[str, Any]]:
    """An item from its beginning to its end."""
    place: dict[str, Any] = {"item_id": item["id"], "output_index": index}
    begun = {**item, "status": "in_progress"}
    if item["type"] == "function_call":
        arguments = item["arguments"]
        yield _added({**begun, "arguments": ""}, index)
        yield _event("function_call_arguments.delta", **place, delta=arguments)
        yield _event(
            "function_call_arguments.done",
            **place, name=item["name"], arguments=arguments,
        )  # fmt: skip
    else:
        (part,) = item["content"]
        more: dict[str, Any] = {"logprobs": []} if item["type"] == "message" else {}
        place["content_index"] = 0
        yield _added({**begun, "content": []}, index)
        yield _event("content_part.added", **place, part={**part, "text": ""})
        for piece in pieces:
            yield _event(f"{part['type']}.delta", **place, **more, delta=piece)
        yield _event(f"{part['type']}.done", **place, **more, text=part["text"])
        yield _event("content_part.done", **place, part=part)
    yield _event("output_item.done", output_index=index, item=item)


def _added(item: Mapping[str, Any], index: int) -> dict[str, Any]:
    return _event("output_item.added", output_index=index, item=item)
