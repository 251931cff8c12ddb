"""How models write tool calls: what they say is read, and answered, in their own chat template.

Calls are read by transformers' response templates: those that tokenizers bring, those that
transformers has by a model's type, and those of formats here; by `pythonic.py`; or by a parser of
vLLM's that is named. Which one is a model's is found by trial: a call that its chat template writes
must be read as what it was.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from flash.conversation import USER, ChatTemplate
from flash.door.reply import Reply, load_template, manners_of
from flash.tools.pythonic import pythonic_calls
from flash.tools.tool import PROBE, Said, Schema, ToolCall, name_of
from flash.tools.vllm_parsers import VllmParser
from flash.turn_check import check_results

_REMEDY = "leave agent.tools and agent.mcp out, or use a model that calls tools"
_UNREADABLE = "it is not in the format of calls"
_PROBE_ID = "call00001"
_RESULT = {"role": "tool", "tool_call_id": _PROBE_ID, "name": "probe", "content": "result-words"}
_OF_CALL = {"type": "function", "function": "{content}"}
_THOUGHT = {"open": "<think>", "close": "</think>", "content": "text"}
_ENDS = r"\s*(?:<\|im_end\|>|<\|endoftext\|>|<\|eot_id\|>|<\|eom_id\|>)"

# Response templates of formats that neither tokenizers nor transformers' table describe so far.
FORMATS: Mapping[str, Mapping[str, Any]] = {
    # {"name": …, "arguments": …} between tags, as Hermes and Qwen 2.5 and 3 write it.
    "hermes": {
        "defaults": {"role": "assistant"},
        "start_anchor_pattern": r"assistant(?:<\|end_header_id\|>\n)?\n",
        "fields": {
            "thinking": _THOUGHT,
            "tool_calls": {
                "open_pattern": r"\s*<tool_call>",
                "close": "</tool_call>",
                "repeats": True,
                "content": "json",
                "transform": _OF_CALL,
            },
            "content": {"close_pattern": _ENDS, "content": "text"},
        },
    },
    # <function=…><parameter=…> between tags, as Qwen3-Coder writes it.
    "qwen3_coder": {
        "defaults": {"role": "assistant"},
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {
            "thinking": _THOUGHT,
            "tool_calls": {
                "open_pattern": r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>",
                "close_pattern": r"</function>\s*</tool_call>",
                "repeats": True,
                "content": "xml-inline",
                "content_args": {
                    "tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)\n?</parameter>"
                },
                "transform": {
                    "type": "function",
                    "function": {"name": "{name}", "arguments": "{content}"},
                },
            },
            "content": {"close_pattern": _ENDS, "content": "text"},
        },
    },
    # One {"name": …, "parameters": …} in place of an answer, as Llama 3 writes it.
    "llama3_json": {
        "defaults": {"role": "assistant"},
        "start_anchor": "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "fields": {
            "tool_calls": {
                "open_pattern": r'\A\s*(?:<\|python_tag\|>)?\s*(?=\{\s*"name"\s*:)',
                "close_pattern": _ENDS,
                "content": "json",
                "transform": {
                    "type": "function",
                    "function": {"name": "{content.name}", "arguments": "{content.parameters}"},
                },
            },
            "content": {"close_pattern": _ENDS, "content": "text"},
        },
    },
    # Messages in channels, of which one to a function is a call, as gpt-oss writes them.
    "harmony": {
        "defaults": {"role": "assistant"},
        "start_anchor": "<|start|>assistant",
        "fields": {
            "thinking": {
                "open_pattern": r"(?:<\|start\|>assistant)?<\|channel\|>analysis<\|message\|>",
                "close": "<|end|>",
                "content": "text",
            },
            "tool_calls": {
                "open_pattern": r"(?:<\|start\|>assistant)?(?:\s*to=functions\.(?P<name>[\w.-]+)"
                r"\s*<\|channel\|>\w+|<\|channel\|>\w+\s+to=functions\.(?P<name>[\w.-]+))"
                r"\s*(?:<\|constrain\|>)?\w*<\|message\|>",
                "close": "<|call|>",
                "content": "json",
                "repeats": True,
                "transform": {
                    "type": "function",
                    "function": {"name": "{name}", "arguments": "{content}"},
                },
            },
            "content": {
                "open_pattern": r"(?:<\|start\|>assistant)?<\|channel\|>(?:final|commentary)"
                r"<\|message\|>",
                "close_pattern": r"<\|end\|>|<\|return\|>",
                "content": "text",
            },
        },
    },
}


Reads = Callable[[Sequence[Schema], Sequence[int], Sequence[int]], Said]
"""Of tools, a prompt, and what was sampled after it: what was said."""


class CallFormat:
    """Reads calls in what was sampled, and writes their results, for one model and its tools.

    `stop_token_ids` end an answer or a call. Raises ValueError for a model that does not call
    tools, or not in a way that is known, and for a template in which such a conversation can't
    grow. Reads files of the model: not for the event loop.

    Args:
        parser: one of vLLM's, in place of what is tried else.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: ChatTemplate,
        schemas: Sequence[Schema],
        *,
        parser: str = "",
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._schemas = list(schemas)
        self.shown: Mapping[str, Any] = {"tools": self._schemas}
        prompt = template.render([USER], self.shown)
        for name in map(name_of, self._schemas):
            if name not in prompt:
                raise ValueError(f"the model's chat template shows no tools: {_REMEDY}")
        call = _probe_call()
        end = template.end_of_call(call, self.shown)
        manners = manners_of(tokenizer)
        stops = (
            *template.stop_token_ids,
            *manners.stop_token_ids,
            *(() if end is None else (end,)),
        )
        self.stop_token_ids = tuple(dict.fromkeys(stops))
        self._reads = self._format(manners.response_template, parser)
        check_results(template, call, _RESULT, self.shown)

    def read(self, prompt: Sequence[int], sampled: Sequence[int]) -> Said:
        """What was said after `prompt`."""
        said = self._reads(self._schemas, prompt, sampled)
        if said.calls and sampled[-1] not in self.stop_token_ids:
            return Said(text=said.text, wrong="the answer was cut off, being too long")
        return said

    def results(
        self, calls: Sequence[ToolCall], results: Sequence[str], *, sampled: Sequence[int]
    ) -> list[int]:
        """Tokens between what was sampled, with these calls in it, and the next words.

        What was said before makes no difference to them, which is tried at the start. ValueError
        where the template does not take so many calls.
        """
        said = {
            "role": "assistant",
            "content": "",
            "tool_calls": [_call(call.name, {}, call.id) for call in calls],
        }
        messages = [
            {"role": "tool", "tool_call_id": call.id, "name": call.name, "content": result}
            for call, result in zip(calls, results, strict=True)
        ]
        between = self._template.between([USER], said, messages, sampled=sampled, shown=self.shown)
        assert between is not None, "calls are read in answers that have ended only"
        return between

    def _read(
        self,
        response_template: Any,
        schemas: Sequence[Schema],
        prompt: Sequence[int],
        sampled: Sequence[int],
    ) -> Said:
        reply = Reply(
            self._tokenizer,
            stop_token_ids=self.stop_token_ids,
            response_template=response_template,
            prompt=prompt,
            tools=schemas,
        )
        reply.feed(sampled)
        reply.finish()
        if not reply.kept_format:
            return Said(text=reply.content, wrong=_UNREADABLE)
        calls = [
            ToolCall(
                id=call["id"],
                name=call["function"]["name"],
                arguments=call["function"]["arguments"],
            )
            for call in reply.tool_calls
        ]
        return Said(text=reply.content, calls=calls)

    def _read_pythonic(
        self, schemas: Sequence[Schema], prompt: Sequence[int], sampled: Sequence[int]
    ) -> Said:
        try:
            calls = pythonic_calls(self._text(sampled))
        except ValueError as error:
            return Said(text="", wrong=f"{_UNREADABLE}: {error}")
        return Said(text="" if calls else self._text(sampled, special=False), calls=calls)

    def _read_with(
        self,
        parser: VllmParser,
        schemas: Sequence[Schema],
        prompt: Sequence[int],
        sampled: Sequence[int],
    ) -> Said:
        try:
            text, calls = parser.read(self._text(sampled), schemas)
        except ValueError as error:
            return Said(text="", wrong=f"{_UNREADABLE}: {error}")
        return Said(text=text if calls else self._text(sampled, special=False), calls=calls)

    def _text(self, sampled: Sequence[int], *, special: bool = True) -> str:
        """All of it but the token that ends it; with special tokens, as markers of calls may be."""
        ended = bool(sampled) and sampled[-1] in self.stop_token_ids
        said = list(sampled[:-1] if ended else sampled)
        text: str = self._tokenizer.decode(said, skip_special_tokens=not special)
        return text

    def _format(self, own: Mapping[str, Any] | None, parser: str) -> Reads:
        """What reads a call which the chat template has written."""
        if parser:
            reads: Reads = partial(self._read_with, VllmParser(self._tokenizer, parser))
            if self._reads_probe(reads, "call-words"):
                return reads
            raise ValueError(
                f"tool_parser={parser!r} does not read a call as the model's chat template writes "
                f"it, {self._written('call-words')[1]!r}: leave it out, or name another"
            )
        for described in (own, *FORMATS.values()):
            if described is None or "tool_calls" not in described["fields"]:
                continue
            reads = partial(self._read, load_template(described, tools=True))
            if self._reads_probe(reads, "call-words"):
                return reads
        # Templates may write texts without their quotes.
        if self._reads_probe(self._read_pythonic, 7):
            return self._read_pythonic
        raise ValueError(
            f"how the model calls tools is not known: its chat template writes "
            f"{self._written('call-words')[1]!r}, which is none of {', '.join(FORMATS)}, pythonic: "
            f"{_REMEDY}, name a parser of vLLM's as agent.style_options.tool_parser, or give its "
            f"tokenizer a response_template"
        )

    def _reads_probe(self, reads: Reads, argument: str | int) -> bool:
        """Whether a call with that argument is read as what it is."""
        before, written = self._written(argument)
        prompt = self._tokenizer.encode(before, add_special_tokens=False)
        sampled = self._tokenizer.encode(written, add_special_tokens=False)
        ends = [at for at, token in enumerate(sampled) if token in self.stop_token_ids]
        if not ends:
            return False
        said = reads([PROBE], prompt, sampled[: ends[-1] + 1])
        try:
            read = [(call.name, json.loads(call.arguments)) for call in said.calls]
        except ValueError:
            return False
        return read == [("probe", {"argument": argument})]

    def _written(self, argument: str | int) -> tuple[str, str]:
        """What the chat template writes before a call with that argument, and for it."""
        shown = {"tools": [PROBE]}
        call = _probe_call(argument)
        try:
            before = self._template.render([USER], shown)
            whole = self._template.render([USER, call], {**shown, "add_generation_prompt": False})
        except ValueError as error:
            raise ValueError(f"{error}: {_REMEDY}") from error
        return before, whole.removeprefix(before)


def _call(name: str, arguments: Mapping[str, Any], call_id: str) -> dict[str, Any]:
    function = {"name": name, "arguments": dict(arguments)}
    return {"id": call_id, "type": "function", "function": function}


def _probe_call(argument: str | int = "call-words") -> dict[str, Any]:
    calls = [_call("probe", {"argument": argument}, _PROBE_ID)]
    return {"role": "assistant", "content": "", "tool_calls": calls}
