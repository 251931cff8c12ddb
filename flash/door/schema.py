"""What a client may ask for in OpenAI's words, and how an error is told to it.

A field is honoured, means nothing here (`user`), or is refused by name, unless the door was told to
ignore it: none is dropped in silence, because a sampling field that is not honoured would train on
what nobody asked for.
"""

import json
from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr, ValidationError

LEAVE_OUT = "leave it out, or have the door ignore it (agent.ignore)"
_SAMPLER = "the workers sample from the whole distribution, as training needs it"
_NEUTRAL: Mapping[str, tuple[tuple[Any, ...], str]] = {
    # field: the values that change nothing, why there are no others
    "top_p": ((1,), _SAMPLER),
    "top_k": ((-1, 0), _SAMPLER),
    "min_p": ((0,), _SAMPLER),
    "repetition_penalty": ((1,), _SAMPLER),
    "frequency_penalty": ((0,), _SAMPLER),
    "presence_penalty": ((0,), _SAMPLER),
    "logit_bias": (({},), _SAMPLER),
    "seed": ((), "the workers have one stream of random numbers for all requests"),
    "top_logprobs": ((0,), "only the sampled token's logprob is known"),
    "response_format": (({"type": "text"},), "what is sampled is not constrained by a grammar"),
    "parallel_tool_calls": ((True,), "how many tools are called is the policy's choice"),
    "best_of": ((1,), "every response is given out"),
    "echo": ((False,), "the client has the prompt already"),
    "suffix": (("",), "the model writes on, and does not fill in"),
    "modalities": ((["text"],), "the model writes text"),
    "service_tier": (("auto", "default"), "there is one tier"),
    "store": ((False,), "nothing is kept for later calls"),
    "reasoning": ((), "how long the policy thinks is its own choice"),
    "reasoning_effort": ((), "how long the policy thinks is its own choice"),
    "verbosity": ((), "how much the policy writes is its own choice"),
}
# They tell who asks, or what a cache may do, and change no answer.
_LABELS = {
    "user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "prompt_cache_options", "cache_control",
}  # fmt: skip
_EVERYTHING = "*"
# Without these a request asks for something else, so they are ignored only by their own names.
_BY_NAME_ONLY = {
    "suffix", "echo", "best_of", "functions", "documents", "chat_template",
    "continue_final_message", "add_generation_prompt", "custom",
}  # fmt: skip

Positive = Annotated[int, Field(strict=True, ge=1)]


class ApiError(Exception):
    """An answer other than 200, in OpenAI's shape. `param` is the field at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        return {
            "error": {
                "message": str(self), "type": kind, "param": self.param, "code": self.code,
            }
        }  # fmt: skip


def refused(field: str, value: Any, why: str) -> ApiError:
    """A field's value that can't be honoured; `why` holds the remedy."""
    told = json.dumps(value)
    told = told if len(told) <= 80 else told[:77] + "..."
    return ApiError(400, f"{field}={told}: {why}", code="unsupported_value", param=field)


# ── the shapes ───────────────────────────────────────────────────────────────────────────────


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Function(_Shape):
    name: StrictStr
    arguments: StrictStr
    parsed_arguments: Any = None  # what a client made of them


class _ToolCall(_Shape):
    id: StrictStr
    type: Literal["function"] = "function"
    function: _Function
    index: int | None = None  # of a stream

    def to_template(self) -> dict[str, Any]:
        """Templates write the arguments as they like, so they take them as a mapping."""
        try:
            arguments = json.loads(self.function.arguments)
        except ValueError:
            arguments = self.function.arguments
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": self.type, "function": function}


class _TextPart(_Shape):
    type: Literal["text"]
    text: StrictStr


class _Message(_Shape):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: StrictStr | list[_TextPart] | None = None
    name: StrictStr | None = None
    tool_calls: list[_ToolCall] | None = None
    tool_call_id: StrictStr | None = None
    reasoning_content: StrictStr | None = None
    reasoning: StrictStr | None = None  # its newer name
    parsed: Any = None  # what a client made of the content
    # An answer's fields, which come back empty in the message that the client took from it.
    refusal: Literal[""] | None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    def to_template(self) -> dict[str, Any]:
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": content or ""}
        reasoning = self.reasoning if self.reasoning_content is None else self.reasoning_content
        for field, value in (
            ("name", self.name),
            ("tool_call_id", self.tool_call_id),
            ("reasoning_content", reasoning),
        ):
            if value is not None:
                message[field] = value
        if self.tool_calls:
            message["tool_calls"] = [call.to_template() for call in self.tool_calls]
        return message


class _ToolFunction(_Shape):
    name: StrictStr
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None
    strict: Annotated[Literal[False] | None, Field(exclude=True)] = None


class _Tool(_Shape):
    type: Literal["function"]
    function: _ToolFunction


class _StreamOptions(_Shape):
    include_usage: StrictBool = False
    include_obfuscation: Literal[False] = False


class _Body(_Shape):
    model: StrictStr
    n: Positive = 1
    max_tokens: Positive | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    stop: StrictStr | Annotated[list[StrictStr], Field(max_length=4)] | None = None
    stream: StrictBool = False
    stream_options: _StreamOptions | None = None


class _Chat(_Body):
    messages: Annotated[list[Any], Field(min_length=1)]  # of _Message, one after the other
    max_completion_tokens: Positive | None = None
    tools: list[_Tool] | None = None
    tool_choice: Literal["auto", "none"] = "auto"
    logprobs: StrictBool = False
    chat_template_kwargs: dict[str, Any] = {}


class _Text(_Body):
    prompt: StrictStr | list[Annotated[int, Field(strict=True, ge=0)]]
    # The number of other tokens whose logprobs are told; the sampled token's is told with 0.
    logprobs: Annotated[int, Field(strict=True, ge=0, le=0)] | None = None


_S = TypeVar("_S", bound=_Body)
_MAY_BE_IGNORED = {"model", "temperature", "tool_choice"}
_HEEDED = {*_Chat.model_fields, *_Text.model_fields} - _MAY_BE_IGNORED
_NESTED_SHAPES = (_Message, _ToolCall, _Function, _TextPart, _Tool, _ToolFunction)
_HEEDED_NESTED = {name for shape in _NESTED_SHAPES for name in shape.model_fields} - {
    "strict", "refusal", "audio", "function_call", "annotations",
}  # fmt: skip


class Ignore:
    """What requests may hold in vain: fields, in messages and tools too, and parts of messages by
    their type, such as image_url. "*" is all that is not honoured, but what has to be named.

    ValueError for what is honoured.
    """

    def __init__(self, names: Collection[str]) -> None:
        honoured = set(names) & (_HEEDED | _HEEDED_NESTED) - _NEUTRAL.keys()
        if honoured:
            raise ValueError(
                f"{sorted(honoured)} can't be ignored: without it a request asks for something "
                f"else; leave it out. Others can, by name, or nearly all of them as {_EVERYTHING!r}"
            )
        self._names = frozenset(names)

    def __contains__(self, name: object) -> bool:
        return name in self._names or (_EVERYTHING in self._names and name not in _BY_NAME_ONLY)


# ── the requests ─────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """A request that can be honoured. None means: as the session has it."""

    n: int
    max_tokens: int | None
    temperature: float | None
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    logprobs: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatAsk(Ask):
    """`messages` and `tools` as chat templates take them, and more variables for these."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    parse_tools: bool
    template_variables: dict[str, Any]

    @property
    def shown(self) -> dict[str, Any]:
        """What the template is given beside the messages."""
        return {**self.template_variables, **({"tools": self.tools} if self.tools else {})}


@dataclass(frozen=True, slots=True, kw_only=True)
class TextAsk(Ask):
    prompt: str | list[int]


def parse_chat(body: Any, *, model: str, ignore: Container[str]) -> ChatAsk:
    """Raises ApiError, naming the field, for what can't be honoured."""
    asked = _validated(_Chat, body, model=model, ignore=ignore)
    limits = (asked.max_completion_tokens, asked.max_tokens)
    if None not in limits and limits[0] != limits[1]:
        raise refused(
            "max_tokens", asked.max_tokens, "differs from max_completion_tokens: send one of them"
        )
    tools = [tool.model_dump(exclude_none=True) for tool in asked.tools or ()]
    return ChatAsk(
        **_common(asked, max_tokens=limits[0] or limits[1]),
        logprobs=asked.logprobs,
        messages=[
            _message(given, number, ignore).to_template()
            for number, given in enumerate(asked.messages)
        ],
        tools=tools,
        parse_tools=bool(tools) and asked.tool_choice == "auto",
        template_variables=asked.chat_template_kwargs,
    )


def parse_text(body: Any, *, model: str, ignore: Container[str]) -> TextAsk:
    """Raises ApiError, naming the field, for what can't be honoured."""
    asked = _validated(_Text, body, model=model, ignore=ignore)
    return TextAsk(
        **_common(asked, max_tokens=asked.max_tokens),
        logprobs=asked.logprobs is not None,
        prompt=asked.prompt,
    )


def _message(given: Any, number: int, ignore: Container[str]) -> _Message:
    """By itself, so that many take turns with whatever else runs in this process."""
    try:
        return _Message.model_validate(_without_vain(given, ignore))
    except ValidationError as error:
        raise _told(error, within=("messages", number)) from None


def _common(asked: _Body, *, max_tokens: int | None) -> dict[str, Any]:
    stop = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
    if "" in stop:
        raise refused("stop", asked.stop, "an empty string is in every text: leave it out")
    return {
        "n": asked.n,
        "max_tokens": max_tokens,
        "temperature": asked.temperature,
        "stop": tuple(stop),
        "stream": asked.stream,
        "include_usage": asked.stream_options is not None and asked.stream_options.include_usage,
    }


def _validated(shape: type[_S], body: Any, *, model: str, ignore: Container[str]) -> _S:
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    fields = {}
    for name, value in body.items():
        values, why = _NEUTRAL.get(name, (None, ""))
        # An absent field and null are the same to OpenAI's clients.
        if value is None or name in _LABELS:
            continue
        honoured = name in _HEEDED or (name == "tool_choice" and value in ("auto", "none"))
        if name in ignore and not honoured and name != "model":
            continue
        if values is None:
            fields[name] = value
        elif not any(type(value) is type(other) and value == other for other in values) and not (
            isinstance(value, float) and value in values
        ):
            raise refused(name, value, f"{why}; {LEAVE_OUT}")
    if "tools" in fields:
        fields["tools"] = _without_vain(fields["tools"], ignore)
    try:
        asked = shape.model_validate(fields)
    except ValidationError as error:
        raise _told(error) from None
    if asked.model != model and "model" not in ignore:
        raise ApiError(
            404, f"model={asked.model!r}: the model here is {model!r}",
            code="model_not_found", param="model",
        )  # fmt: skip
    return asked


def _without_vain(value: Any, ignore: Container[str]) -> Any:
    """A message, or tools, without what is null, says nothing here, or is to be ignored."""
    if isinstance(value, list):
        return [_without_vain(item, ignore) for item in value if not _is_vain_part(item, ignore)]
    if not isinstance(value, dict):
        return value
    # The arguments of a call and the parameters of a tool are not ours to change.
    return {
        name: _without_vain(inner, ignore) if name in _HOLDERS else inner
        for name, inner in value.items()
        if not (inner is None or name in _LABELS or (name in ignore and name not in _HEEDED_NESTED))
    }


_HOLDERS = {"content", "tool_calls", "function"}


def _is_vain_part(part: Any, ignore: Container[str]) -> bool:
    """Whether it is a part of a message that is to be ignored: an image, or a sound."""
    kind = part.get("type") if isinstance(part, dict) else None
    return isinstance(kind, str) and kind not in _KINDS and kind in ignore


_KINDS = {"text", "function"}  # of parts, and of tools and calls
_NAMES = {
    name for shape in (_Chat, _Text, _StreamOptions, *_NESTED_SHAPES) for name in shape.model_fields
}
_REMEDIES: Mapping[Any, str] = {
    "tool_choice": 'whether a tool is called is the policy\'s choice: send "auto" or "none", or '
    "have the door ignore it (agent.ignore)",
    "logprobs": "only the sampled token's logprob is known: true for chats, 0 for completions",
    "stop": "send one string, or a list of at most 4",
    "include_obfuscation": "nothing is padded here: leave it out",
    "prompt": "one string, or one list of token ids: send one request for each prompt",
    "strict": f"arguments are not constrained by their schema: {LEAVE_OUT}",
    "type": "only text and functions are known here: leave it out, or have the door ignore such "
    "parts by their type (agent.ignore)",
    **dict.fromkeys(("refusal", "audio", "function_call", "annotations"), LEAVE_OUT),
}


def _told(error: ValidationError, *, within: tuple[str | int, ...] = ()) -> ApiError:
    """The fault that lies deepest, with the field's path as OpenAI writes it: messages[0].role."""
    fault = max(error.errors(include_url=False), key=lambda fault: len(fault["loc"]))
    # Pydantic's path also names the branches of a union: str, list[_TextPart].
    path = (*within, *fault["loc"])
    names = [part for part in path if isinstance(part, int) or part in _NAMES]
    if fault["type"] == "extra_forbidden":
        names = [*(name for name in names if name != fault["loc"][-1]), fault["loc"][-1]]
    told = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in names)
    param = told.removeprefix(".")
    if fault["type"] == "missing":
        return ApiError(400, f"{param} is missing", code="missing_required_parameter", param=param)
    if fault["type"] == "extra_forbidden":
        why = f"this door does not know the field: {LEAVE_OUT}"
    else:
        why, _, _ = fault["msg"].partition(" or instance of ")
    remedy = next((_REMEDIES[name] for name in reversed(names) if name in _REMEDIES), "")
    return refused(param, fault["input"], "; ".join(filter(None, (why, remedy))))


def function_call(value: Mapping[str, Any], call_id: str) -> dict[str, Any]:
    """A parsed call as OpenAI tells it: the arguments are a JSON string."""
    function = value["function"]
    arguments = function["arguments"]
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {
        "id": call_id, "type": "function",
        "function": {"name": str(function["name"]), "arguments": arguments},
    }  # fmt: skip


def usage(*, prompt: int, sampled: Sequence[int]) -> dict[str, int]:
    """Tokens of a call; the prompt counts once however many responses it has."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": sum(sampled),
        "total_tokens": prompt + sum(sampled),
    }


def as_template(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as it was given out, as `parse_chat` will return it when it comes back."""
    return _Message.model_validate(message).to_template()
