"""Anthropic's messages: what a client may ask for in these words, and how it is answered."""

import json
import uuid
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictStr

from flash.door.demand import Asked, Choice, demand_of
from flash.door.dialect import Dialect, Frame
from flash.door.errors import LEAVE_OUT, ApiError, refused
from flash.door.recorder import as_object
from flash.door.respond import Exchange, Response
from flash.door.schema import (
    SAMPLER,
    Body,
    ChatAsk,
    Positive,
    Shape,
    Vocabulary,
    strict_of,
)

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_ERRORS = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error",
}  # fmt: skip
# Who wrote a thought: the door's own, which is known by its words.
_SIGNATURE = "flash"


# ── the shapes ───────────────────────────────────────────────────────────────────────────────


class _Text(Shape):
    type: Literal["text"]
    text: StrictStr
    citations: Annotated[list[Any], Field(max_length=0)] | None = None
    parsed_output: Any = None  # what a client made of it


class _Thinking(Shape):
    type: Literal["thinking"]
    thinking: StrictStr
    signature: StrictStr = ""


class _RedactedThinking(Shape):
    """Another server's, of an earlier model: it says nothing here."""

    type: Literal["redacted_thinking"]
    data: StrictStr


class _ToolUse(Shape):
    type: Literal["tool_use"]
    id: StrictStr
    name: StrictStr
    input: dict[str, Any]
    caller: Any = None  # a model, as always here

    def to_template(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": self.input}
        return {"id": self.id, "type": "function", "function": function}


class _ToolResult(Shape):
    type: Literal["tool_result"]
    tool_use_id: StrictStr
    content: StrictStr | list[_Text] = ""
    is_error: StrictBool = False  # its content says so in words


class _System(Shape):
    """The system prompt, by itself."""

    system: StrictStr | list[_Text] = ""


class _UserMessage(Shape):
    role: Literal["user", "system"]
    content: StrictStr | list[Annotated[_Text | _ToolResult, Field(discriminator="type")]]

    def to_template(self) -> Iterator[dict[str, Any]]:
        """Results of tools before words: they answer what was said last."""
        if isinstance(self.content, str):
            yield {"role": self.role, "content": self.content}
            return
        for block in self.content:
            if isinstance(block, _ToolResult):
                yield {
                    "role": "tool",
                    "content": _words(block.content),
                    "tool_call_id": block.tool_use_id,
                }
        said = [block for block in self.content if isinstance(block, _Text)]
        if said:
            yield {"role": self.role, "content": _words(said)}


class _AssistantMessage(Shape):
    role: Literal["assistant"]
    content: (
        StrictStr
        | list[
            Annotated[_Text | _Thinking | _RedactedThinking | _ToolUse, Field(discriminator="type")]
        ]
    )

    def to_template(self) -> Iterator[dict[str, Any]]:
        blocks = self.content if isinstance(self.content, list) else []
        said = [block for block in blocks if isinstance(block, _Text)]
        words = self.content if isinstance(self.content, str) else _words(said)
        message: dict[str, Any] = {"role": "assistant", "content": words}
        if thoughts := [block.thinking for block in blocks if isinstance(block, _Thinking)]:
            message["reasoning_content"] = "".join(thoughts)
        if calls := [block.to_template() for block in blocks if isinstance(block, _ToolUse)]:
            message["tool_calls"] = calls
        yield message


class _Tool(Shape):
    type: Literal["custom"] = "custom"
    name: StrictStr
    description: StrictStr | None = None
    input_schema: dict[str, Any]
    strict: StrictBool = False
    eager_input_streaming: StrictBool = False  # arguments are told at once, being known
    defer_loading: Literal[False] = False
    allowed_callers: tuple[Literal["direct"], ...] = ("direct",)

    def to_template(self) -> dict[str, Any]:
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        return {"type": "function", "function": {**function, "parameters": self.input_schema}}


class _Choice(Shape):
    disable_parallel_tool_use: StrictBool = False

    @property
    def one_call(self) -> Asked | None:
        """What asks for one call at most, if anything does."""
        if not self.disable_parallel_tool_use:
            return None
        return Asked(field="tool_choice.disable_parallel_tool_use", value=True)


class _PlainChoice(_Choice):
    type: Literal["auto", "any", "none"] = "auto"

    def choice(self, asked: Asked) -> Choice:
        return Choice(asked=asked, calls=self.type != "none", must_call=self.type == "any")


class _NamedChoice(_Choice):
    type: Literal["tool"]
    name: StrictStr

    def choice(self, asked: Asked) -> Choice:
        return Choice(asked=asked, must_call=True, one_call=True, names=(self.name,))


class _ThinkingConfig(Shape):
    type: Literal["disabled", "adaptive"]
    display: Literal["summarized", "omitted"] = "summarized"


class _Format(Shape):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class _OutputConfig(Shape):
    format: _Format | None = None
    effort: None = None


class _Messages(Body):
    messages: Annotated[list[Any], Field(min_length=1)]
    system: Any = ""
    tools: tuple[_Tool, ...] = ()
    tool_choice: Annotated[_PlainChoice | _NamedChoice, Field(discriminator="type")] = (
        _PlainChoice()
    )
    output_config: _OutputConfig = _OutputConfig()
    thinking: _ThinkingConfig | None = None
    max_tokens: Positive | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    stop_sequences: tuple[StrictStr, ...] = ()
    stream: StrictBool = False


_MAY_BE_IGNORED = {"model", "temperature", "tool_choice", "thinking", "output_config"}
_PARTS = (
    _Text, _Thinking, _RedactedThinking, _ToolUse, _ToolResult, _UserMessage, _AssistantMessage,
    _Tool,
)  # fmt: skip
_NOT_HEEDED = {"strict", "citations", "defer_loading", "allowed_callers", "eager_input_streaming"}
_NESTED = {name for shape in _PARTS for name in shape.model_fields} - _NOT_HEEDED
_THINKS = "how long the policy thinks is its own choice"
_ANTHROPIC = Vocabulary(
    heeded=_Messages.model_fields.keys() - _MAY_BE_IGNORED,
    nested=_NESTED,
    neutral={
        "top_p": ((1,), SAMPLER),
        "top_k": ((0, -1), SAMPLER),
        "service_tier": (("auto", "standard_only"), "there is one tier"),
        "speed": (("standard",), "there is one speed"),
        "mcp_servers": (([],), "the agent calls its tools itself"),
        "container": ((), "nothing is run here"),
        "context_management": (({},), "the conversation is kept as it is sent"),
    },
    holders={"content", "system"},
    kinds={"text", "thinking", "redacted_thinking", "tool_use", "tool_result", "custom"},
    names={
        *_Messages.model_fields, *_NamedChoice.model_fields, *_ThinkingConfig.model_fields,
        *_OutputConfig.model_fields, "schema", *_NESTED, *_NOT_HEEDED,
    },
    remedies={
        "tool_choice": "send auto, any, none, or tool with a name, or have the door ignore it "
        "(agent.ignore)",
        "effort": f"{_THINKS}: leave it out, or have the door ignore output_config (agent.ignore)",
        "output_config": "send a format of the type json_schema, or have the door ignore it "
        "(agent.ignore)",
        "thinking": f"{_THINKS}: send disabled or adaptive, or have the door ignore it "
        "(agent.ignore)",
        "strict": f"true or false: {LEAVE_OUT}",
        "defer_loading": f"every tool is shown to the model: {LEAVE_OUT}",
        "allowed_callers": f"only the model calls tools: {LEAVE_OUT}",
        "citations": LEAVE_OUT,
        "type": "only text, thoughts, tools of the agent's own and their results are known here: "
        "leave it out, or have the door ignore such parts by their type (agent.ignore)",
    },
)  # fmt: skip


def parse_messages(body: Any, *, model: str, ignore: Container[str]) -> ChatAsk:
    """Of /v1/messages, or of its count of tokens, which has fewer fields.

    Raises ApiError, naming the field, for what can't be honoured.
    """
    if isinstance(body, dict) and body.get("thread") is not None:
        # Overlooked, it would leave the client to send what is new alone.
        raise ApiError(
            400, "thread: nothing of a conversation is kept here: send all of its messages",
            code="unsupported_value", param="thread",
            details={"error_code": "thread_unsupported_request", "unsupported": ["thread"]},
        )  # fmt: skip
    asked = _ANTHROPIC.body(_Messages, body, model=model, ignore=ignore)
    if "" in asked.stop_sequences:
        raise refused(
            "stop_sequences",
            list(asked.stop_sequences),
            "an empty one is in every text: leave it out",
        )
    system = _ANTHROPIC.part(_System, {"system": asked.system}, ignore=ignore, within=()).system
    messages = [{"role": "system", "content": _words(system)}] if system else []
    for number, given in enumerate(asked.messages):
        says = isinstance(given, dict) and given.get("role") == "assistant"
        shape: type[_AssistantMessage | _UserMessage]
        shape = _AssistantMessage if says else _UserMessage
        message = _ANTHROPIC.part(shape, given, ignore=ignore, within=("messages", number))
        messages += message.to_template()
    if messages[-1]["role"] == "assistant":
        raise refused(
            f"messages[{len(asked.messages) - 1}].role", "assistant",
            "the model begins its own answer, and goes on from none: end with the user's message",
        )  # fmt: skip
    tools = [tool.to_template() for tool in asked.tools]
    choice = asked.tool_choice.choice(Asked(field="tool_choice", value=body.get("tool_choice")))
    words = asked.output_config.format
    variables: dict[str, Any] = {}
    if asked.thinking is not None and asked.thinking.type == "disabled":
        variables["enable_thinking"] = False  # as the templates that know the choice have it
    return ChatAsk(
        n=1,
        max_tokens=asked.max_tokens,
        temperature=asked.temperature,
        stop=asked.stop_sequences,
        stream=asked.stream,
        include_usage=True,
        logprobs=False,
        messages=messages,
        tools=tools,
        parse_tools=bool(tools) and choice.calls,
        template_variables=variables,
        demand=demand_of(
            tools,
            choice,
            strict=strict_of((tool.name, tool.strict) for tool in asked.tools),
            one_call=asked.tool_choice.one_call,
            answer=None
            if words is None
            else (
                Asked(field="output_config.format", value=body["output_config"]["format"]),
                words.schema_,
            ),
        ),
        shows_thoughts=asked.thinking is None or asked.thinking.display == "summarized",
    )


def _words(content: str | Sequence[_Text]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


# ── the answers ──────────────────────────────────────────────────────────────────────────────


def _whole(exchange: Exchange, responses: Sequence[Response], model: str) -> dict[str, Any]:
    (response,) = responses
    reply = response.reply
    content: list[dict[str, Any]] = []
    if reply.reasoning:
        thought = reply.reasoning if _shows_thoughts(exchange) else ""
        content.append(_block("thinking", thinking=thought, signature=_SIGNATURE))
    if reply.content:
        content.append(_block("text", text=reply.content, citations=None))
    content += [_tool_use(call, _arguments(call)) for call in reply.tool_calls]
    return {**_head(exchange, model), **_end(response), "content": content,
            "usage": _usage(exchange, response)}  # fmt: skip


def _stream(exchange: Exchange, responses: Sequence[Response], model: str) -> Iterator[Frame]:
    """Each change from thoughts to words to calls begins another block."""
    (response,) = responses
    head = {**_head(exchange, model), "content": [], "stop_reason": None, "stop_sequence": None}
    usage = _usage(exchange, response)
    yield _frame("message_start", message={**head, "usage": {**usage, "output_tokens": 0}})
    yield _frame("ping")
    blocks = _Blocks()
    for deltas, _ in response.pieces:
        for delta in deltas:
            if words := delta.get("reasoning_content"):
                yield from blocks.go_on("thinking", words if _shows_thoughts(exchange) else "")
            elif words := delta.get("content"):
                yield from blocks.go_on("text", words)
            for call in delta.get("tool_calls", ()):
                yield from blocks.call(call)
    yield from blocks.end()
    yield _frame("message_delta", delta=_end(response), usage=usage)
    yield _frame("message_stop")


class _Blocks:
    """The blocks of a stream, one after the other."""

    def __init__(self) -> None:
        self._index = -1
        self._kind = ""

    def go_on(self, kind: str, words: str) -> Iterator[Frame]:
        """With words of that kind, in a new block if the present one is of another."""
        if kind != self._kind:
            empty = {"signature": ""} if kind == "thinking" else {"citations": None}
            yield from self._begin(kind, _block(kind, **{kind: "", **empty}))
        if words:
            yield self._delta(f"{kind}_delta", **{kind: words})

    def call(self, call: Mapping[str, Any]) -> Iterator[Frame]:
        yield from self._begin("tool_use", _tool_use(call, {}))
        arguments = json.dumps(_arguments(call), ensure_ascii=False)
        yield self._delta("input_json_delta", partial_json=arguments)

    def end(self) -> Iterator[Frame]:
        """Of the present block, if there is one."""
        if self._kind == "thinking":
            yield self._delta("signature_delta", signature=_SIGNATURE)
        if self._kind:
            yield _frame("content_block_stop", index=self._index)

    def _begin(self, kind: str, block: Mapping[str, Any]) -> Iterator[Frame]:
        yield from self.end()
        self._index += 1
        self._kind = kind
        yield _frame("content_block_start", index=self._index, content_block=block)

    def _delta(self, kind: str, **of_kind: Any) -> Frame:
        return _frame("content_block_delta", index=self._index, delta={"type": kind, **of_kind})


def _shows_thoughts(exchange: Exchange) -> bool:
    assert isinstance(exchange.ask, ChatAsk)
    return exchange.ask.shows_thoughts


def _frame(kind: str, **fields: Any) -> Frame:
    return kind, {"type": kind, **fields}


def _block(kind: str, **fields: Any) -> dict[str, Any]:
    return {"type": kind, **fields}


def _tool_use(call: Mapping[str, Any], arguments: Any) -> dict[str, Any]:
    return _block("tool_use", id=call["id"], name=call["function"]["name"], input=arguments)


def _arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    arguments = call["function"]["arguments"]
    try:
        value = json.loads(arguments)
    except ValueError:
        value = arguments
    return as_object(value)


def _head(exchange: Exchange, model: str) -> dict[str, Any]:
    name = f"msg_{uuid.uuid4().hex}"
    return {"id": name, "type": "message", "role": "assistant", "model": model}


def _end(response: Response) -> dict[str, Any]:
    if response.reply.stopped:
        return {"stop_reason": "stop_sequence", "stop_sequence": response.reply.stopped}
    return {"stop_reason": _STOP_REASONS[response.finish_reason], "stop_sequence": None}


def _usage(exchange: Exchange, response: Response) -> dict[str, int]:
    return {
        "input_tokens": len(exchange.prompt),
        "output_tokens": len(response.completion.token_ids),
    }


def error_body(error: ApiError) -> dict[str, Any]:
    other = "api_error" if error.status >= 500 else "invalid_request_error"
    told: dict[str, Any] = {
        "type": _ERRORS.get(error.status, other), "message": str(error),
    }  # fmt: skip
    if error.details is not None:
        told["details"] = error.details
    return {"type": "error", "error": told}


MESSAGES = Dialect(whole=_whole, stream=_stream, error=error_body)
