"""vLLM's parsers of tool calls, by their names: for formats that nothing else here reads."""

import importlib.util
from collections.abc import Sequence
from typing import Any

from flash.errors import one_line
from flash.system import machine
from flash.tools.tool import Schema, ToolCall


class VllmParser:
    """Reads the calls of whole responses, as vLLM's server does with `--tool-call-parser NAME`.

    What such a parser takes for no call is a text, also a call that is broken. Raises ValueError
    where vLLM is not installed, or has no parser of that name. Takes seconds to import.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        if importlib.util.find_spec("vllm") is None:
            raise ValueError(
                f"tool_parser={name!r} is vLLM's, which is not installed: run "
                f"{machine.how_to_install('vllm')}"
            )
        from vllm.tool_parsers import ToolParserManager  # noqa: PLC0415

        known = ToolParserManager.list_registered()
        if name not in known:
            raise ValueError(f"tool_parser={name!r} is none of vLLM's: {', '.join(known)}")
        self._parser: Any = ToolParserManager.get_tool_parser(name)
        self._tokenizer = tokenizer

    def read(self, text: str, schemas: Sequence[Schema]) -> tuple[str, Sequence[ToolCall]]:
        """What was said beside calls, and these. ValueError for what the parser fails at."""
        from vllm.entrypoints.openai.chat_completion.protocol import (  # noqa: PLC0415
            ChatCompletionRequest,
        )

        try:
            asked = ChatCompletionRequest(model="", messages=[], tools=list(schemas))
            parser = self._parser(self._tokenizer, asked.tools)
            read = parser.extract_tool_calls(text, asked)
        except Exception as error:  # the boundary to vLLM's parsers, which may raise anything
            raise ValueError(one_line(error)) from error
        return read.content or "", [
            ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments)
            for call in read.tool_calls
        ]
