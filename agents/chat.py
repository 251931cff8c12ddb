"""The `chat` style: the model's own chat template, extended turn by turn."""

import copy
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

from flash.conversation import NOTHING, ChatTemplate
from flash.tools.tool import Said, Schema, ToolCall
from flash.turn_check import check_turns
from flash.types import Observation

if TYPE_CHECKING:
    from flash.tools.formats import CallFormat


class ChatStyle:
    """Conversations in the model's chat template; one user message for each observation.

    Sampled tokens stay as they were sampled: of each later turn only what the template puts
    after the assistant's words is tokenised.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        system: the system message; "" for none.
        instruction: ends each observation's message.
        commands: list the admissible commands, where the environment tells them.
        answer: what of the response the environment is given: `whole`; `last_line`, of which a
            line `Action: …` is what follows the colon; or `tag:NAME`, what stands in the last
            `<NAME>…</NAME>`, nothing if there is none.
        tool_parser: of vLLM, by its name, that reads calls of tools; by default none.

    Raises ValueError for a template in which a conversation can't grow: see `check_turns`.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        system: str = "You act in a text environment. Reply with one command and nothing else.",
        instruction: str = "",
        commands: bool = True,
        answer: str = "whole",
        tool_parser: str = "",
    ) -> None:
        self._tool_parser = tool_parser
        self._answer = _answers(answer)
        self._template = ChatTemplate(tokenizer)
        check_turns(self._template, system=bool(system))
        self._tokenizer = tokenizer
        self._system = [{"role": "system", "content": system}] if system else []
        self._instruction = instruction
        self._commands = commands
        self.stop_token_ids = self._template.stop_token_ids
        self._format: CallFormat | None = None
        self._shown: Mapping[str, Any] = NOTHING

    def calling(self, schemas: Sequence[Schema]) -> Self:
        from flash.tools.formats import CallFormat  # noqa: PLC0415  (imports a server)

        style = copy.copy(self)
        style._format = CallFormat(
            self._tokenizer, self._template, schemas, parser=self._tool_parser
        )
        style._shown = style._format.shown
        style.stop_token_ids = style._format.stop_token_ids
        check_turns(self._template, system=bool(self._system), shown=style._shown)
        return style

    def first(self, observation: Observation) -> list[int]:
        goal = observation.info.get("goal")
        text = self._message(observation)
        if goal and goal not in text:
            text = f"Your task: {goal}\n\n{text}"
        messages = [*self._system, {"role": "user", "content": text}]
        return self._template.prompt(messages, self._shown)

    def next(self, observation: Observation, sampled: Sequence[int]) -> list[int]:
        text = self._message(observation)
        return self._template.next_turn(self._system, text, sampled=sampled, shown=self._shown)

    def action(self, sampled: Sequence[int]) -> str:
        ended = bool(sampled) and sampled[-1] in self.stop_token_ids
        said = list(sampled[:-1] if ended else sampled)
        text: str = self._tokenizer.decode(said, skip_special_tokens=True)
        return self._answer(text).strip()

    def read(self, prompt: Sequence[int], sampled: Sequence[int]) -> Said:
        assert self._format is not None, "calling() gives a style that reads calls"
        said = self._format.read(prompt, sampled)
        return replace(said, text=self._answer(said.text).strip())

    def results(
        self, calls: Sequence[ToolCall], results: Sequence[str], sampled: Sequence[int]
    ) -> list[int]:
        assert self._format is not None, "calling() gives a style that reads calls"
        return self._format.results(calls, results, sampled=sampled)

    def _message(self, observation: Observation) -> str:
        parts = [observation.text]
        commands = observation.info.get("admissible_commands")
        if self._commands and commands:
            parts.append("You can: " + ", ".join(commands))
        if self._instruction:
            parts.append(self._instruction)
        return "\n".join(parts)


def _answers(name: str) -> Callable[[str], str]:
    """From all that was said to the answer."""
    if name == "whole":
        return str
    if name == "last_line":
        return _last_line
    if match := re.fullmatch(r"tag:([\w.-]+)", name):
        return functools.partial(_in_tag, match[1])
    raise ValueError(f"answer={name!r} must be whole, last_line or tag:NAME")


def _last_line(text: str) -> str:
    line = text.strip().rpartition("\n")[2]
    _, marker, after = line.rpartition("Action:")
    return after if marker else line


def _in_tag(tag: str, text: str) -> str:
    before, closed, _ = text.rpartition(f"</{tag}>")
    _, opened, inside = before.rpartition(f"<{tag}>")
    return inside if closed and opened else ""
