"""Calls of tools: what is checked, what the policy is told, and what ends the episode."""

import asyncio
import json
import os

import pytest

from flash.errors import EnvFailure
from flash.tools.functions import CoroutineTool, schema_of
from flash.tools.tool import Toolbox, ToolCall
from flash.tools.toolset import Toolset
from flash.types import ToolUse
from flash.virtual_time import in_virtual_time
from tests.tools import functions


def call(name, number=1, **arguments):
    return ToolCall(id=f"call{number}", name=name, arguments=json.dumps(arguments))


def boxed(*made, **options):
    tools = [CoroutineTool(function.__name__, function) for function in made]
    return Toolbox(tools, **{"timeout_s": 5.0, "max_chars": 100} | options)


async def test_a_function_says_itself_what_it_takes():
    schema = schema_of("m:f", functions.add)["function"]
    assert (schema["name"], schema["description"]) == ("add", "Adds two numbers.")
    assert schema["parameters"] == {
        "type": "object",
        "properties": {
            "a": {"type": "integer", "description": "the one"},
            "b": {"type": "integer", "description": "the other"},
        },
        "required": ["a", "b"],
        "additionalProperties": False,
    }


@pytest.mark.parametrize("function", [functions.untyped, functions.undescribed])
def test_a_function_that_does_not_say_what_it_takes_is_refused(function):
    with pytest.raises(ValueError, match=r"agent\.tools='m:f' does not say.*'Args:'"):
        schema_of("m:f", function)


@pytest.mark.parametrize(
    ("made", "told"),
    [
        (call("add", a=2, b=3), "5"),
        (call("table"), '{"rows":[1,2]}'),
        (call("subtract", a=1), "Error: there is no tool 'subtract'; there are add, table, fails"),
        (ToolCall(id="1", name="add", arguments="{"), "Error: the arguments are no JSON: "),
        (ToolCall(id="1", name="add", arguments="[]"), "Error: the arguments must be a JSON obj"),
        (call("add", a="2", b=3), "Error: wrong arguments of 'a': '2' is not of type 'integer'"),
        (call("add", a=2), "Error: wrong arguments: 'b' is a required property"),
        (call("add", a=2, b=3, c=4), "Error: wrong arguments: Additional properties are not"),
        (call("fails", how="no \ud800"), "Error: ValueError: no ?"),
        (
            call("fails", how="x" * 200),
            "Error: ValueError: " + "x" * 81 + "… (119 more characters)",
        ),
    ],
)
async def test_what_goes_wrong_in_a_call_is_its_result(made, told):
    box = boxed(functions.add, functions.table, functions.fails)
    (result,) = await box.answer([made])
    assert result.startswith(told)


@in_virtual_time
async def test_calls_run_side_by_side_each_with_its_own_deadline():
    started = asyncio.Barrier(2)

    async def meets(whose: str) -> str:
        """Waits for another.

        Args:
            whose: to tell them apart
        """
        await started.wait()
        return whose

    async def sleeps() -> None:
        """Never ends."""
        await asyncio.Event().wait()

    uses: dict[str, ToolUse] = {}
    box = boxed(meets, sleeps, uses=uses)
    calls = [call("meets", whose="a"), call("sleeps"), call("meets", whose="b")]
    assert await box.answer(calls) == ["a", "Error: sleeps took longer than 5 s", "b"]
    assert uses["meets"] == ToolUse(calls=2)
    assert uses["sleeps"] == ToolUse(calls=1, late=1, seconds=5.0)


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (functions.surrogate, "tool 'surrogate' answered .*Unicode"),
        (functions.thing, "tool 'thing' answered .*plain data"),
        (functions.leaves, r"tool 'leaves' raised SystemExit\('enough'\)"),
        (functions.cancels, "tool 'cancels' cancelled itself"),
    ],
)
async def test_a_tool_that_is_at_fault_fails_the_episode_by_its_name(function, why):
    with pytest.raises(EnvFailure, match=why):
        await boxed(function).answer([call(function.__name__)])


async def test_a_schema_that_is_none_fails_the_episode_by_the_tools_name():
    tool = CoroutineTool("m:f", functions.table)
    tool.schema["function"]["parameters"] = {"$ref": "#/nowhere"}
    box = Toolbox([tool], timeout_s=5, max_chars=100)
    with pytest.raises(EnvFailure, match="tool 'table' has a schema that nothing can be checked"):
        await box.answer([call("table")])


async def test_two_tools_of_one_name_are_refused(tmp_path):
    names = ["tests.tools.functions:add", "tests.tools.functions:other_add"]
    with pytest.raises(ValueError, match="two tools named 'add'"):
        async with Toolset(names, [], log_dir=tmp_path):
            pass


@pytest.mark.slow
async def test_functions_that_block_have_processes_which_can_be_killed(tmp_path):
    names = [f"tests.tools.functions:{name}" for name in ("pid", "blocks", "dies", "add")]
    tools = Toolset(names, [], processes=1, timeout_s=0.5, log_dir=tmp_path)
    async with tools, tools.of_episode() as box:
        assert [s["function"]["name"] for s in tools.schemas] == ["pid", "blocks", "dies", "add"]
        (first,) = await box.answer([call("pid")])
        assert int(first) != os.getpid()
        assert await box.answer([call("blocks")]) == ["Error: blocks took longer than 0.5 s"]
        # The next call waits for another process, which its deadline does not count.
        (second,) = await box.answer([call("pid")])
        assert second != first
        with pytest.raises(EnvFailure, match="its process was lost"):
            await box.answer([call("dies")])
        assert await box.answer([call("pid", 1, fail=True), call("add", 2, a=1, b=1)]) == [
            "Error: ValueError: as asked",
            "2",
        ]
