"""What a client may ask for, in OpenAI's words, and which field is told to be at fault.

A field is honoured, means nothing here (`user`), or is refused by name, unless the door was told to
ignore it: none is dropped in silence, because a sampling field that is not honoured would train on
what nobody asked for.
"""

import fnmatch
import json
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated, Any, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictStr, ValidationError

from flash.door.demand import Asked, Choice, Demand, demand_of
from flash.door.errors import LEAVE_OUT, ApiError, refused

SAMPLER = "the workers sample from the whole distribution, as training needs it"
_NEUTRAL: Mapping[str, tuple[tuple[Any, ...], str]] = {
    # field: the values that change nothing, why there are no others
    "top_p": ((1,), SAMPLER),
    "top_k": ((-1, 0), SAMPLER),
    "min_p": ((0,), SAMPLER),
    "repetition_penalty": ((1,), SAMPLER),
    "frequency_penalty": ((0,), SAMPLER),
    "presence_penalty": ((0,), SAMPLER),
    "logit_bias": (({},), SAMPLER),
    "seed": ((), "the workers have one stream of random numbers for all requests"),
    "top_logprobs": ((0,), "only the sampled token's logprob is known"),
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
    "prompt_cache_options", "cache_control", "diagnostics", "inference_geo", "user_profile_id",
}  # fmt: skip
_EVERYTHING = "*"
# Without these a request asks for something else, so they are ignored only by their own names.
_BY_NAME_ONLY = {
    "suffix", "echo", "best_of", "functions", "documents", "chat_template",
    "continue_final_message", "add_generation_prompt", "custom",
}  # fmt: skip

PlainChoice = Literal["auto", "none", "required"]
Positive = Annotated[int, Field(strict=True, ge=1)]


# ── the shapes ───────────────────────────────────────────────────────────────────────────────


class Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Function(Shape):
    name: StrictStr
    arguments: StrictStr
    parsed_arguments: Any = None  # what a client made of them


class _ToolCall(Shape):
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


class _TextPart(Shape):
    type: Literal["text"]
    text: StrictStr


class _Message(Shape):
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


class _ToolFunction(Shape):
    name: StrictStr
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None
    strict: Annotated[StrictBool | None, Field(exclude=True)] = None


class _Tool(Shape):
    type: Literal["function"]
    function: _ToolFunction


class _Named(Shape):
    name: StrictStr


class _NamedTool(Shape):
    type: Literal["function"]
    function: _Named

    def choice(self, asked: Asked) -> Choice:
        return Choice(asked=asked, must_call=True, one_call=True, names=(self.function.name,))


class _AllowedTools(Shape):
    mode: Literal["auto", "required"]
    tools: Annotated[list[_NamedTool], Field(min_length=1)]


class _Allowed(Shape):
    type: Literal["allowed_tools"]
    allowed_tools: _AllowedTools

    def choice(self, asked: Asked) -> Choice:
        names = tuple(tool.function.name for tool in self.allowed_tools.tools)
        must_call = self.allowed_tools.mode == "required"
        return Choice(asked=asked, must_call=must_call, names=names)


class AnyText(Shape):
    """A format that is none."""

    type: Literal["text"] = "text"

    @property
    def schema_(self) -> None:
        return None


class AnyObject(Shape):
    type: Literal["json_object"]

    @property
    def schema_(self) -> dict[str, Any]:
        return {"type": "object"}


class JsonSchema(Shape):
    """A schema, with a name that says nothing here; words that keep to it do so strictly."""

    name: StrictStr
    description: StrictStr | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")] = {}
    strict: StrictBool | None = None


class _WithSchema(Shape):
    type: Literal["json_schema"]
    json_schema: JsonSchema

    @property
    def schema_(self) -> dict[str, Any]:
        return self.json_schema.schema_


class _StreamOptions(Shape):
    include_usage: StrictBool = False
    include_obfuscation: Literal[False] = False


class Body(Shape):
    model: StrictStr


class _OpenAIBody(Body):
    n: Positive = 1
    max_tokens: Positive | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    stop: StrictStr | Annotated[list[StrictStr], Field(max_length=4)] | None = None
    stream: StrictBool = False
    stream_options: _StreamOptions | None = None


class _Chat(_OpenAIBody):
    messages: Annotated[list[Any], Field(min_length=1)]  # of _Message, one after the other
    max_completion_tokens: Positive | None = None
    tools: list[_Tool] | None = None
    tool_choice: PlainChoice | Annotated[_NamedTool | _Allowed, Field(discriminator="type")] = (
        "auto"
    )
    parallel_tool_calls: StrictBool = True
    response_format: Annotated[AnyText | AnyObject | _WithSchema, Field(discriminator="type")] = (
        AnyText()
    )
    logprobs: StrictBool = False
    chat_template_kwargs: dict[str, Any] = {}


class _Text(_OpenAIBody):
    prompt: StrictStr | list[Annotated[int, Field(strict=True, ge=0)]]
    # The number of other tokens whose logprobs are told; the sampled token's is told with 0.
    logprobs: Annotated[int, Field(strict=True, ge=0, le=0)] | None = None


_B = TypeVar("_B", bound=Body)
_P = TypeVar("_P", bound=Shape)
_MAY_BE_IGNORED = {
    "model", "temperature", "tool_choice", "parallel_tool_calls", "response_format",
}  # fmt: skip
_HEEDED = {*_Chat.model_fields, *_Text.model_fields} - _MAY_BE_IGNORED
_NESTED_SHAPES = (_Message, _ToolCall, _Function, _TextPart, _Tool, _ToolFunction)
_CHOICE_SHAPES = (_Allowed, _AllowedTools, _Named, _WithSchema, JsonSchema)
_HEEDED_NESTED = {name for shape in _NESTED_SHAPES for name in shape.model_fields} - {
    "strict", "refusal", "audio", "function_call", "annotations",
}  # fmt: skip


class Ignore:
    """What requests may hold in vain: fields, in messages and tools too, and parts of messages by
    their type, such as image_url, or what a pattern fits, such as "x_*". No pattern is for what is
    honoured, or has to be named.

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
        self._patterns = [name for name in names if "*" in name]

    def __contains__(self, name: object) -> bool:
        return name in self._names or (
            name not in _BY_NAME_ONLY
            and any(fnmatch.fnmatchcase(str(name), pattern) for pattern in self._patterns)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """The words of a protocol: what is read of its bodies, and what is overlooked or refused.

    Args:
        heeded: the body's fields that are honoured; `nested`: those of what is in these.
        neutral: of others, the values that change nothing, and why there are no others.
        holders: fields in whose values others are nested.
        kinds: types of parts that are known.
        names: all fields that an error may name.
        remedies: by field, what to do about it.
    """

    heeded: Container[str]
    nested: Container[str]
    neutral: Mapping[str, tuple[tuple[Any, ...], str]]
    holders: Container[str]
    kinds: Container[str]
    names: Container[object]
    remedies: Mapping[Any, str]

    def body(self, shape: type[_B], body: Any, *, model: str, ignore: Container[str]) -> _B:
        """A whole body. ApiError for what can't be honoured, or for another model's name."""
        if not isinstance(body, dict):
            raise ApiError(400, "the body must be a JSON object")
        fields = {}
        for name, value in body.items():
            values, why = self.neutral.get(name, (None, ""))
            # An absent field and null are the same to the clients.
            if value is None or name in _LABELS:
                continue
            honoured = name in self.heeded or (name == "tool_choice" and value in ("auto", "none"))
            if name in ignore and not honoured and name != "model":
                continue
            if values is None:
                fields[name] = value
            elif not any(
                type(value) is type(other) and value == other for other in values
            ) and not (isinstance(value, float) and value in values):
                raise refused(name, value, f"{why}; {LEAVE_OUT}")
        if "tools" in fields:
            fields["tools"] = self._without_vain(fields["tools"], ignore)
        try:
            asked = shape.model_validate(fields)
        except ValidationError as error:
            raise self._told(error) from None
        if asked.model != model and "model" not in ignore:
            raise ApiError(
                404, f"model={asked.model!r}: the model here is {model!r}",
                code="model_not_found", param="model",
            )  # fmt: skip
        return asked

    def part(
        self, shape: type[_P], given: Any, *, ignore: Container[str], within: tuple[str | int, ...]
    ) -> _P:
        """A part of a body by itself, so that many take turns with whatever else runs here."""
        try:
            return shape.model_validate(self._without_vain(given, ignore))
        except ValidationError as error:
            raise self._told(error, within=within) from None

    def _without_vain(self, value: Any, ignore: Container[str]) -> Any:
        """A message, or tools, without what is null, says nothing here, or is to be ignored."""
        if isinstance(value, list):
            return [
                self._without_vain(item, ignore)
                for item in value
                if not self._is_vain_part(item, ignore)
            ]
        if not isinstance(value, dict):
            return value
        # The arguments of a call and the parameters of a tool are not ours to change.
        return {
            name: self._without_vain(inner, ignore) if name in self.holders else inner
            for name, inner in value.items()
            if not (
                inner is None or name in _LABELS or (name in ignore and name not in self.nested)
            )
        }

    def _is_vain_part(self, part: Any, ignore: Container[str]) -> bool:
        """Whether it is a part of a message that is to be ignored: an image, or a sound."""
        kind = part.get("type") if isinstance(part, dict) else None
        return isinstance(kind, str) and kind not in self.kinds and kind in ignore

    def _told(self, error: ValidationError, *, within: tuple[str | int, ...] = ()) -> ApiError:
        """The fault that lies deepest, with the field's path as clients write it:
        messages[0].role."""
        fault = max(error.errors(include_url=False), key=lambda fault: len(fault["loc"]))
        # Pydantic's path also names the branches of a union: str, list[_TextPart], and for a type
        # its name, which may be that of the field in it.
        path = [part for part, _ in groupby((*within, *fault["loc"]))]
        names = [part for part in path if isinstance(part, int) or part in self.names]
        if fault["type"] == "extra_forbidden":
            names = [*(name for name in names if name != fault["loc"][-1]), fault["loc"][-1]]
        told = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in names)
        param = told.removeprefix(".")
        if fault["type"] == "missing":
            return ApiError(
                400, f"{param} is missing", code="missing_required_parameter", param=param
            )
        if fault["type"] == "extra_forbidden":
            why = f"this door does not know the field: {LEAVE_OUT}"
        else:
            why, _, _ = fault["msg"].partition(" or instance of ")
        remedy = next((self.remedies[name] for name in names if name in self.remedies), "")
        return refused(param, fault["input"], "; ".join(filter(None, (why, remedy))))


_NAMES = {
    name
    for shape in (_Chat, _Text, _StreamOptions, *_NESTED_SHAPES, *_CHOICE_SHAPES)
    for name in shape.model_fields
} | {"schema"}
_REMEDIES: Mapping[Any, str] = {
    "tool_choice": "send auto, none, required, a named function or allowed_tools, or have the door "
    "ignore it (agent.ignore)",
    "response_format": "send the type text, json_object or json_schema, or have the door ignore it "
    "(agent.ignore)",
    "logprobs": "only the sampled token's logprob is known: true for chats, 0 for completions",
    "stop": "send one string, or a list of at most 4",
    "include_obfuscation": "nothing is padded here: leave it out",
    "prompt": "one string, or one list of token ids: send one request for each prompt",
    "strict": f"true or false: {LEAVE_OUT}",
    "type": "only text and functions are known here: leave it out, or have the door ignore such "
    "parts by their type (agent.ignore)",
    **dict.fromkeys(("refusal", "audio", "function_call", "annotations"), LEAVE_OUT),
}
_OPENAI = Vocabulary(
    heeded=_HEEDED,
    nested=_HEEDED_NESTED,
    neutral=_NEUTRAL,
    holders={"content", "tool_calls", "function"},
    kinds={"text", "function"},  # of parts, and of tools and calls
    names=_NAMES,
    remedies=_REMEDIES,
)


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
    demand: Demand | None
    shows_thoughts: bool = True

    @property
    def shown(self) -> dict[str, Any]:
        """What the template is given beside the messages."""
        return {**self.template_variables, **({"tools": self.tools} if self.tools else {})}


@dataclass(frozen=True, slots=True, kw_only=True)
class TextAsk(Ask):
    prompt: str | list[int]


def parse_chat(body: Any, *, model: str, ignore: Container[str]) -> ChatAsk:
    """Raises ApiError, naming the field, for what can't be honoured."""
    asked = _OPENAI.body(_Chat, body, model=model, ignore=ignore)
    limits = (asked.max_completion_tokens, asked.max_tokens)
    if None not in limits and limits[0] != limits[1]:
        raise refused(
            "max_tokens", asked.max_tokens, "differs from max_completion_tokens: send one of them"
        )
    tools = [tool.model_dump(exclude_none=True) for tool in asked.tools or ()]
    choice = choice_of(asked.tool_choice, body.get("tool_choice"))
    functions = [tool.function for tool in asked.tools or ()]
    return ChatAsk(
        **_common(asked, max_tokens=limits[0] or limits[1]),
        logprobs=asked.logprobs,
        messages=[
            _message(given, number, ignore).to_template()
            for number, given in enumerate(asked.messages)
        ],
        tools=tools,
        parse_tools=bool(tools) and choice.calls,
        template_variables=asked.chat_template_kwargs,
        demand=demand_of(
            tools,
            choice,
            strict=strict_of(((f.name, f.strict) for f in functions), within=".function"),
            one_call=one_call_of(asked.parallel_tool_calls),
            answer=answer_of("response_format", body.get("response_format"), asked.response_format),
        ),
    )


class HasChoice(Protocol):
    """One of a dialect's shapes for `tool_choice`."""

    def choice(self, asked: Asked) -> Choice: ...


class HasSchema(Protocol):
    """One of a dialect's shapes for the format of words; None for any."""

    @property
    def schema_(self) -> dict[str, Any] | None: ...


def choice_of(chosen: PlainChoice | HasChoice, value: Any) -> Choice:
    """Of `tool_choice`, which the client wrote as `value`."""
    asked = Asked(field="tool_choice", value=value)
    if not isinstance(chosen, str):
        return chosen.choice(asked)
    return Choice(asked=asked, calls=chosen != "none", must_call=chosen == "required")


def one_call_of(parallel_tool_calls: bool) -> Asked | None:
    """What asks for one call at most, if anything does."""
    return None if parallel_tool_calls else Asked(field="parallel_tool_calls", value=False)


def strict_of(tools: Iterable[tuple[str, bool | None]], *, within: str = "") -> dict[str, Asked]:
    """The strict ones of tools, by name, and what asks for it."""
    return {
        name: Asked(field=f"tools[{number}]{within}.strict", value=True)
        for number, (name, strict) in enumerate(tools)
        if strict
    }


def answer_of(field: str, value: Any, chosen: HasSchema) -> tuple[Asked, dict[str, Any]] | None:
    """The schema of the words, if they have one, and what asks for it."""
    schema = chosen.schema_
    return None if schema is None else (Asked(field=field, value=value), schema)


def parse_text(body: Any, *, model: str, ignore: Container[str]) -> TextAsk:
    """Raises ApiError, naming the field, for what can't be honoured."""
    asked = _OPENAI.body(_Text, body, model=model, ignore=ignore)
    return TextAsk(
        **_common(asked, max_tokens=asked.max_tokens),
        logprobs=asked.logprobs is not None,
        prompt=asked.prompt,
    )


def _message(given: Any, number: int, ignore: Container[str]) -> _Message:
    return _OPENAI.part(_Message, given, ignore=ignore, within=("messages", number))


def _common(asked: _OpenAIBody, *, max_tokens: int | None) -> dict[str, Any]:
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
