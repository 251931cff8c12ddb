"""Tools that an environment offers, here and in hosts: what they answer, and how they fail."""

import pytest

from examples.tools.shelf import ShelfEnv
from flash.environments.hosts import EnvHosts
from flash.environments.inline import InlineEnvs
from flash.errors import EnvFailure
from flash.tools.environment import EnvTools, offered_by
from flash.tools.tool import PROBE, Toolbox, ToolCall
from flash.types import Task, ToolUse

ODD = """
import time

class OddEnv:
    tools = ("echo", "parts", "steps", "raises", "leaves", "thing", "surrogate", "huge", "wrong")

    def reset(self, *, seed):
        return "", {}

    def step(self, action):
        return "", 0.0, False, False, {}

    def echo(self, what: str, function: str) -> str:
        '''Says it.

        Args:
            what: it
            function: it, too
        '''
        return what + function

    def parts(self) -> list:
        '''Five.'''
        return ["a", 1, True, False, {}]

    def steps(self) -> tuple:
        '''Is one.'''
        return "done", 2, True, False, {"success": True}

    def raises(self) -> str:
        '''Raises.'''
        raise RuntimeError("a bug")

    def leaves(self) -> str:
        '''Exits.'''
        raise SystemExit("enough")

    def thing(self) -> str:
        '''No data.'''
        return object()

    def surrogate(self) -> str:
        '''Half a pair.'''
        return chr(0xD800)

    def huge(self) -> str:
        '''Without end.'''
        return "x" * 5_000_000

    def wrong(self) -> tuple:
        '''A step that is none.'''
        return "", "much", True, False, {}

    def hangs(self) -> str:
        '''For ever.'''
        time.sleep(3600)

    def close(self): ...
"""


@pytest.fixture(params=["inline", pytest.param("hosts", marks=pytest.mark.slow)])
async def opened(request, tmp_path, monkeypatch):
    """An environment of which all is odd, in this process or in another, and its tools."""
    (tmp_path / "odd_env.py").write_text(ODD)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    import odd_env  # noqa: PLC0415

    schemas = offered_by("odd_env:OddEnv")
    if request.param == "inline":
        yield EnvTools(await InlineEnvs(odd_env.OddEnv).open(), schemas, timeout_s=20)
        return
    async with EnvHosts(
        "odd_env:OddEnv", {}, hosts=1, call_timeout_s=30, log_dir=tmp_path
    ) as hosts:
        yield EnvTools(await hosts.open(), schemas, timeout_s=20)


def call(name, arguments="{}"):
    return ToolCall(id="call1", name=name, arguments=arguments)


def box_of(tools, **options):
    return Toolbox(tools.tools, **{"timeout_s": 20, "max_chars": 100} | options)


async def test_calls_are_answered_in_their_order_up_to_one_that_ends_the_episode(opened):
    box = box_of(opened)
    said = await box.answer([call("echo", '{"what": "a", "function": "b"}'), call("parts")])
    assert said == ["ab", '["a",1,true,false,{}]']
    assert opened.take_steps() == []
    said = await box.answer([call("steps"), call("parts"), call("steps")])
    assert said == ["done", "Error: the episode is over", "Error: the episode is over"]
    (step,) = opened.take_steps()
    assert (step.reward, step.terminated, step.info) == (2.0, True, {"success": True})
    assert opened.take_steps() == []


WRONG = {
    "raises": r"tool 'raises' raised RuntimeError\('a bug'\).*odd_env.py, line",
    "leaves": r"tool 'leaves' raised SystemExit\('enough'\)",
    "thing": r"tool 'thing' answered <object.*: it must be a text or plain data",
    "surrogate": r"tool 'surrogate' answered result='.*: it must be a text that is Unicode",
    "wrong": r"tool 'wrong' answered reward='much': it must be a finite number",
}


async def test_what_is_wrong_with_a_tool_is_a_failure_of_its_environment(opened):
    box = box_of(opened)
    for tool, why in WRONG.items():
        with pytest.raises(EnvFailure, match=why):
            await box.answer([call(tool)])
    assert opened.take_steps() == []
    (said,) = await box.answer([call("echo", '{"what": 1, "function": "b"}')])
    assert said == "Error: wrong arguments of 'what': 1 is not of type 'string'"
    (said,) = await box.answer([call("huge")])
    assert len(said) < 200


class Hangs:
    deterministic = False

    async def reset(self, task): ...

    async def step(self, action): ...

    async def call(self, tool, arguments):
        raise TimeoutError

    def close(self): ...


async def test_a_tool_that_takes_longer_than_a_step_may_fails_its_environment():
    tools = EnvTools(Hangs(), offered_by("examples.tools.shelf:ShelfEnv"), timeout_s=3)
    with pytest.raises(EnvFailure, match=r"tool 'look' took longer than step_timeout_s=3"):
        await box_of(tools).answer([call("look", '{"box": 1}')])


async def test_calls_are_counted_by_tool_with_those_that_went_wrong():
    env = await InlineEnvs(ShelfEnv).open()
    await env.reset(Task(3))
    tools = EnvTools(env, offered_by("examples.tools.shelf:ShelfEnv"), timeout_s=3)
    uses: dict[str, ToolUse] = {}
    await box_of(tools, uses=uses).answer(
        [call("look", '{"box": 0}'), call("look"), call("take"), call("drop")]
    )
    counts = {tool: (use.calls, use.errors, use.late) for tool, use in uses.items()}
    assert counts == {"look": (2, 1, 0), "_unknown": (2, 2, 0)}


class Late:
    schema = PROBE

    async def call(self, arguments, *, timeout_s):
        raise TimeoutError


async def test_calls_past_their_deadline_are_counted_as_such():
    uses: dict[str, ToolUse] = {}
    box = Toolbox([Late()], timeout_s=3, max_chars=100, uses=uses)
    await box.answer([call("probe", '{"argument": "a"}')])
    assert (uses["probe"].calls, uses["probe"].errors, uses["probe"].late) == (1, 0, 1)


class NotATuple:
    tools = "look"


class Missing:
    tools = ("look",)
    look = 3


class Untold:
    tools = ("look",)

    def look(self, box) -> str:
        """Of a box it says nothing."""


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("NotATuple", "has tools='look': it must be a tuple of names of its methods"),
        ("Missing", r"has 'look' among its tools, which is none of its methods: write def look"),
        ("Untold", r"env\.name='.*:Untold\.look' does not say what it takes"),
    ],
)
def test_what_is_no_tool_is_told_by_the_name_of_its_environment(name, why):
    with pytest.raises(ValueError, match=why):
        offered_by(f"{__name__}:{name}")
