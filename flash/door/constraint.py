"""Demands as workers take them: structural tags of XGrammar's, in one model's own format.

How the model writes a call is found by having its chat template write one, which must be read as
what it was. Of a model that thinks, the thought comes first, and is as the policy likes it.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from flash.conversation import USER, ChatTemplate
from flash.door.demand import Demand
from flash.door.errors import LEAVE_OUT, refused
from flash.door.reply import REASONING, Reply, load_template

Format = dict[str, Any]

_NAME, _IDS = "probe", ("call00001", "call00002")
_ARGUMENTS = {"argument": "call-words"}
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "",
        "parameters": {"type": "object", "properties": {"argument": {"type": "string"}}},
    },
}
SHOWN = {"tools": [_TOOL]}
# How arguments are written, in XGrammar's words.
_STYLES = {
    "json": re.compile(r'\{\s*"argument"\s*:\s*"call-words"\s*\}'),
    "qwen_xml": re.compile(r"<parameter=argument>\s*call-words\s*</parameter>"),
}
_PROMPT_TOKENS = 16  # more than open a thought
_SPACE: Format = {"type": "regex", "pattern": r"\s*"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _CallForm:
    """How a call is written: `begin` with the name in it, arguments in `style`, `end`.

    `separator` stands between two; None where an answer has one alone.
    """

    begin: str
    style: str
    end: str
    separator: str | None

    def tag(self, name: str, schema: Mapping[str, Any]) -> Format:
        content = {"type": "json_schema", "json_schema": schema, "style": self.style}
        begin = self.begin.replace(_NAME, name)
        return {"type": "tag", "begin": begin, "content": content, "end": self.end}

    @property
    def trigger(self) -> str:
        """What words that are no call do not have in them."""
        return self.begin.partition(_NAME)[0].split()[0]


class Constraints:
    """Makes constraints for one model.

    `response_template` is transformers' description of how it writes, None if nobody knows.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: ChatTemplate,
        response_template: Mapping[str, Any] | None,
        stop_token_ids: Sequence[int],
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._response_template = response_template
        self._stop_token_ids = stop_token_ids
        fields = {} if response_template is None else response_template["fields"]
        thoughts = [fields[name] for name in REASONING if name in fields]
        self._thinks = bool(thoughts)
        self._opens, self._closes = "", ""
        if thoughts and all(isinstance(thoughts[0].get(end), str) for end in ("open", "close")):
            self._opens, self._closes = (thoughts[0][end].strip() for end in ("open", "close"))

    def of(self, demand: Demand, prompt: Sequence[int]) -> str:
        """For an answer to that prompt. ApiError for a demand that can't be met."""
        try:
            form = {"type": "structural_tag", "format": self._after_thought(demand, prompt)}
        except ValueError as error:
            raise refused(
                demand.asked.field, demand.asked.value, f"{error}: {LEAVE_OUT}"
            ) from error
        return json.dumps(form)

    def _after_thought(self, demand: Demand, prompt: Sequence[int]) -> Format:
        answer = self._answer(demand)
        if not self._thinks:
            return answer
        if not self._opens:
            raise ValueError("where the model's thoughts end is not known in plain words")
        end = self._tokenizer.decode(list(prompt[-_PROMPT_TOKENS:])).rstrip()
        if end.endswith(self._closes):
            return answer
        begun = end.endswith(self._opens)
        thought = _sequence(
            {
                "type": "tag",
                "begin": "" if begun else self._opens,
                "content": {"type": "any_text"},
                "end": self._closes,
            },
            _SPACE,
        )
        return _sequence(thought if begun else {"type": "optional", "content": thought}, answer)

    def _answer(self, demand: Demand) -> Format:
        forms: list[Format] = []
        if demand.calls:
            call = self._call
            calls = {
                "tags": [call.tag(name, schema) for name, schema in demand.calls.items()],
                "at_least_one": demand.must_call or demand.answer is not None,
                "stop_after_first": demand.one_call or call.separator is None,
            }
            if not calls["at_least_one"]:
                return {"type": "triggered_tags", "triggers": [call.trigger], **calls}
            separator = call.separator or ""
            forms.append({"type": "tags_with_separator", "separator": separator, **calls})
        if demand.answer is not None and not demand.must_call:
            forms.append({"type": "json_schema", "json_schema": demand.answer})
        return forms[0] if len(forms) == 1 else {"type": "or", "elements": forms}

    # ── how the model calls ──────────────────────────────────────────────────────────────────

    @cached_property
    def _call(self) -> _CallForm:
        """ValueError if it is not known."""
        before, written = self._written(1)
        unknown = ValueError(
            f"how the model calls tools is not known: its chat template writes {written!r}"
        )
        matches = ((style, found.search(written)) for style, found in _STYLES.items())
        style, found = next((pair for pair in matches if pair[1] is not None), ("", None))
        if found is None:
            raise unknown
        begin, end = written[: found.start()], self._until_stop(written[found.end() :])
        named = begin.count(_NAME) == 1 and begin.partition(_NAME)[0].strip()
        if not named or any(other in begin + end for other in _IDS) or _NAME in end:
            raise unknown
        form = _CallForm(
            begin=begin, style=style, end=end, separator=self._separator(style, begin, end)
        )
        if not self._is_read(before, begin + found.group() + end):
            raise unknown
        return form

    def _written(self, calls: int) -> tuple[str, str]:
        """The prompt, and after it an answer of so many calls."""
        said = {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": _IDS[i], "type": "function",
                 "function": {"name": _NAME, "arguments": _ARGUMENTS}}
                for i in range(calls)
            ],
        }  # fmt: skip
        before = self._template.render([USER], SHOWN)
        whole = self._template.render([USER, said], {**SHOWN, "add_generation_prompt": False})
        start = before
        if self._opens and before.rstrip().endswith(self._opens):
            start = before.rstrip().removesuffix(self._opens)
        written = whole.removeprefix(start).lstrip()
        if self._opens and written.startswith(self._opens):
            written = written.partition(self._closes)[2].lstrip()
        return before, written

    def _until_stop(self, text: str) -> str:
        """The text up to a token that ends an answer."""
        stops = (self._tokenizer.decode([token]) for token in self._stop_token_ids)
        at = min((text.find(stop) for stop in stops if stop in text), default=len(text))
        return text[:at].rstrip()

    def _separator(self, style: str, begin: str, end: str) -> str | None:
        try:
            _, written = self._written(2)
        except ValueError:  # of templates that write one call at most
            return None
        first, *others = _STYLES[style].finditer(written)
        if len(others) != 1:
            return None
        between = written[first.end() : others[0].start()]
        if not (between.startswith(end) and between.endswith(begin)):
            return None
        return between.removeprefix(end).removesuffix(begin)

    def _is_read(self, before: str, call: str) -> bool:
        encode = self._tokenizer.encode
        reply = Reply(
            self._tokenizer,
            response_template=load_template(self._response_template, tools=True),
            prompt=encode(before, add_special_tokens=False),
            tools=[_TOOL],
        )
        reply.feed(encode(call, add_special_tokens=False))
        reply.finish()
        called = [call["function"] for call in reply.tool_calls]
        return [(of["name"], json.loads(of["arguments"])) for of in called] == [(_NAME, _ARGUMENTS)]


def _sequence(*elements: Format) -> Format:
    return {"type": "sequence", "elements": list(elements)}
