"""How tests call tools."""

import json

from flash.tools.tool import ToolCall


async def asked(box, name, **arguments):
    """The result of one call."""
    (result,) = await box.answer([ToolCall(id="call1", name=name, arguments=json.dumps(arguments))])
    return result
