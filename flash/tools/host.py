"""A process that runs functions which are tools, one call at a time."""

from collections.abc import Mapping, Sequence
from typing import Any

from flash import registry
from flash.answers import raised
from flash.errors import EnvFailure, one_line
from flash.system.process import serve, written
from flash.tools.functions import FIELD, as_text


class ToolHost:
    """Answers the calls of `flash.tools.functions.ProcessTool`, with what these methods return."""

    def configure(self, names: Sequence[str]) -> None:
        self._functions = {name: registry.function(name, FIELD) for name in names}

    def call(self, name: str, arguments: Mapping[str, Any]) -> tuple[bool, str]:
        """Whether it returned, and what; else what it raised."""
        try:
            answer = self._functions[name](**arguments)
        except Exception as error:  # the boundary to the user's function; the policy is told
            return False, one_line(error)
        except BaseException as error:  # sys.exit
            raise EnvFailure(f"tool {name!r} {raised(error)}") from error
        return True, as_text(name, answer)


if __name__ == "__main__":
    serve(ToolHost(), write=written)
