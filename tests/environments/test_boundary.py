"""What an environment may answer, the same in this process and in a host."""

import logging

import numpy as np
import pytest

from flash.conversation import MAX_CHARS
from flash.environments import boundary
from flash.environments.hosts import EnvHosts
from flash.environments.inline import InlineEnvs
from flash.errors import EnvFailure
from flash.types import Task

# An environment whose actions are Python: what they are worth is its answer.
ECHO = """
import asyncio, sys
from decimal import Decimal
import numpy as np

NAN = float("nan")

def leave():
    sys.exit(3)

def throw(error):
    raise error

async def later():
    return "x", 1.0, False, False, {}

def says(text="x", reward=1.0, terminated=False, truncated=False, **info):
    return text, reward, terminated, truncated, info

class Itself(list):
    def __repr__(self):
        raise RuntimeError("it has no looks")

class Echo:
    def reset(self, *, seed=None, options=None):
        return eval(options["say"]) if options else ("look", {})

    def step(self, action):
        return eval(action)

    def close(self):
        leave()
"""

WRONG = {
    "says(None)": "observation=None: it must be a text",
    "says(7)": "observation=7: it must be a text",
    "says(np.arange(3))": "observation=array([0, 1, 2]): it must be a text",
    "says({'text': 'x'})": "observation={'text': 'x'}: it must be a text",
    "says(b'x')": "observation=b'x': it must be a text",
    "says('a ' * 99 + chr(0xdcff))": r"a a a \udcff': it must be a text that is Unicode",
    "says(Itself())": "it must be a text",
    "says(reward=NAN)": "reward=nan: it must be a finite number",
    "says(reward=np.float32('inf'))": "reward=np.float32(inf): it must be a finite",
    "says(reward=1e39)": "reward=1e+39: it must be a finite",
    "says(reward=10**400)": "it must be a finite",
    "says(reward='1.0')": "reward='1.0': it must be a finite",
    "says(reward=np.str_('1.0'))": "reward=np.str_('1.0'): it must be a finite",
    "says(reward=None)": "reward=None: it must be a finite",
    "says(reward=[1.0])": "reward=[1.0]: it must be a finite",
    "says(reward=1j)": "reward=1j: it must be a finite",
    "says(terminated='False')": "terminated='False': it must be true or false",
    "says(terminated=1)": "terminated=1: it must be true or false",
    "says(truncated=None)": "truncated=None: it must be true or false",
    "('x', 1.0, False, False, None)": "info=None: it must be a mapping",
    "('x', 1.0, False, False, [])": "info=[]: it must be a mapping",
    "says(success='False')": "info['success']='False': it must be true or false",
    "says(goal={'put': 'mug'})": "info['goal']={'put': 'mug'}: it must be a text",
    "says(goal=chr(0xd800))": r"info['goal']='\ud800': it must be a text that is Unicode",
    "says(admissible_commands='go')": "info['admissible_commands']='go': it must be a list of",
    "says(admissible_commands=['go'] * 200_000)": "a list of at most 100000 texts",
    "says(admissible_commands=['g' * 50] * 90_000)": "of at most 4000000 characters in all",
    "says(admissible_commands=[1])": "info['admissible_commands']=[1]: it must be a list of",
    "('x', 1.0, False, {})": "answered ('x', 1.0, False, {}): it must be (observation, reward, ",
    "None": "answered None: it must be (observation, reward, terminated, truncated, info)",
    "later()": "is async: write def",
    "1 / 0": "raised ZeroDivisionError('division by zero')",
    "leave()": "raised SystemExit(3)",
    "throw(KeyboardInterrupt())": "raised KeyboardInterrupt()",
    "throw(asyncio.CancelledError())": "raised CancelledError()",
    "throw(GeneratorExit())": "raised GeneratorExit()",
    "throw(ValueError(chr(0xd800)))": r"raised ValueError('\ud800')",
}

RIGHT = {
    "says(np.str_('x'), np.float32(0.5), np.bool_(True), np.False_)": ("x", 0.5, True, False, {}),
    "says(reward=True)": ("x", 1.0, False, False, {}),
    "says(reward=np.array(2))": ("x", 2.0, False, False, {}),
    "says(reward=Decimal('0.5'))": ("x", 0.5, False, False, {}),
    "['x', -1, False, True, {}]": ("x", -1.0, False, True, {}),
    "says(goal=None, success=np.True_, admissible_commands=('go', np.str_('stay')))": (
        "x", 1.0, False, False, {"success": True, "admissible_commands": ["go", "stay"]},
    ),
    "says(plain=[1, 'a', None, {'b': 2.5}], array=np.eye(2), count=np.int64(3))": (
        "x", 1.0, False, False,
        {"plain": [1, "a", None, {"b": 2.5}], "array": [[1.0, 0.0], [0.0, 1.0]], "count": 3},
    ),
    # What is no plain data is left out.
    "says(env=Echo(), text_of=chr(0xd800), call=says, big='x' * 5_000_000, huge=10**30)": (
        "x", 1.0, False, False, {},
    ),
}  # fmt: skip


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "echo_env.py").write_text(ECHO)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


@pytest.fixture(params=["inline", "host"])
async def env(request, module):
    import echo_env  # noqa: PLC0415  (it was written just now)

    if request.param == "inline":
        yield await InlineEnvs(echo_env.Echo).open()
        return
    async with EnvHosts(
        "echo_env:Echo", {}, hosts=1, call_timeout_s=60, log_dir=module / "logs"
    ) as hosts:
        yield await hosts.open()
        assert hosts.replaced == 0, "a wrong answer costs its episode alone"


async def test_what_is_no_answer_is_the_environments_failure_and_names_field_and_value(env):
    told = {}
    for action in WRONG:
        with pytest.raises(EnvFailure) as failure:
            await env.step(action)
        told[action] = str(failure.value)
    assert {action: text for action, text in told.items() if WRONG[action] not in text} == {}
    assert all("step(" in text for text in told.values())
    assert "echo_env.py, line " in told["leave()"]
    assert max(map(len, told.values())) < 1000


async def test_what_is_an_answer_is_plain_data(env):
    for action, (text, reward, terminated, truncated, info) in RIGHT.items():
        seen = await env.step(action)
        assert (seen.text, seen.reward) == (text, reward)
        assert (seen.terminated, seen.truncated, dict(seen.info)) == (terminated, truncated, info)
        assert {type(seen.text), type(seen.reward), type(seen.terminated)} == {str, float, bool}


async def test_of_a_text_that_nobody_reads_no_more_is_kept_than_shows_its_length(env):
    seen = await env.step("says('word ' * 11_000_000)")
    assert len(seen.text) == MAX_CHARS + 1


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("'look'", "reset answered 'look': it must be (observation, info)"),
        ("7, {}", "reset answered observation=7: it must be a text"),
        ("'look', None", "reset answered info=None: it must be a mapping"),
        ("later()", "reset is async: write def"),
        ("leave()", "reset raised SystemExit(3)"),
    ],
)
def test_a_first_observation_is_a_text_and_an_info(module, answer, says):
    import echo_env  # noqa: PLC0415  (it was written just now)

    with pytest.raises(EnvFailure) as failure:
        boundary.reset(echo_env.Echo(), Task(0, {"say": answer}))
    assert says in str(failure.value)


def test_a_reset_without_options_is_called_without_them():
    class Plain:
        def reset(self, seed=None):
            return f"look {seed}", {}

    assert boundary.reset(Plain(), Task(3)).text == "look 3"
    with pytest.raises(EnvFailure, match=r"reset takes no options, and the task has \{'level': 2"):
        boundary.reset(Plain(), Task(3, {"level": 2}))


async def test_an_environment_is_deterministic_only_if_it_says_so(env):
    class Declares:
        metadata = {"deterministic": True}  # noqa: RUF012

    class DeclaresOf:
        def __init__(self, metadata):
            self.metadata = metadata

    class Raises:
        @property
        def metadata(self):
            raise RuntimeError("no metadata")

    assert (await InlineEnvs(Declares).open()).deterministic
    assert (await InlineEnvs(lambda: DeclaresOf({"deterministic": np.True_})).open()).deterministic
    for metadata in ({}, {"deterministic": False}, {"deterministic": "True"}, None):
        opened = await InlineEnvs(lambda told=metadata: DeclaresOf(told)).open()
        assert not opened.deterministic
    assert not (await InlineEnvs(Raises).open()).deterministic
    assert not env.deterministic


async def test_a_constructor_that_raises_fails_its_episode():
    def make():
        raise SystemExit("no display")

    with pytest.raises(EnvFailure, match=r"its constructor raised SystemExit\('no display'\)"):
        await InlineEnvs(make).open()


async def test_a_close_that_raises_is_told_once_and_harms_nobody(module, caplog):
    import echo_env  # noqa: PLC0415  (it was written just now)

    envs = InlineEnvs(echo_env.Echo)
    for _ in range(3):
        (await envs.open()).close()
    async with EnvHosts(
        "echo_env:Echo", {}, hosts=1, call_timeout_s=60, log_dir=module / "logs"
    ) as hosts:
        for _ in range(3):
            (await hosts.open()).close()
        assert await (await hosts.open()).step("says()")
        assert hosts.replaced == 0
    told = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert ["close raised SystemExit(3)" in record.getMessage() for record in told] == [True, True]


FORGES = """
import os, pickle, socket, struct
import msgspec

class Evil:
    def __reduce__(self):
        return open, ("forged", "w")

def send(payload, length=None):
    socket.socket(fileno=os.dup(int(os.environ["FLASH_CHILD_FD"]))).sendall(
        struct.pack("!Q", len(payload) if length is None else length) + payload
    )

def observation(**changes):
    fields = {"text": "x", "reward": 1.0, "terminated": False, "truncated": False, "info": {}}
    return msgspec.msgpack.encode([2, True, fields | changes])

class Forger:
    def reset(self, *, seed=None, options=None):
        return "look", {}

    def step(self, action):
        eval(action)
        return "honest", 1.0, False, False, {}

    def close(self): ...
"""


@pytest.mark.parametrize(
    "action",
    [
        "send(pickle.dumps((2, True, Evil())))",
        "send(b'rubbish')",
        "send(b'', 1 << 60)",
        "send(observation(reward='1.0'))",
        "send(observation(text=None))",
        "send(msgspec.msgpack.encode([99, True, None]))",
        "send(bytes([0x91]) * 1_000_000)",
    ],
)
async def test_a_host_that_sends_what_is_no_answer_is_replaced(
    action, tmp_path, monkeypatch, caplog
):
    (tmp_path / "forger_env.py").write_text(FORGES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    async with EnvHosts(
        "forger_env:Forger", {}, hosts=1, call_timeout_s=60, log_dir=tmp_path / "logs"
    ) as hosts:
        env = await hosts.open()
        with pytest.raises(EnvFailure, match="environment host 0(?s:.)*can't be read here"):
            await env.step(action)
        assert not (tmp_path / "forged").exists()
        assert hosts.replaced == 1
        again = await hosts.open()
        assert (await again.step("None")).text == "honest"


async def test_a_forged_answer_of_the_right_kind_is_checked_here_too(tmp_path, monkeypatch):
    (tmp_path / "forger_env.py").write_text(FORGES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    async with EnvHosts(
        "forger_env:Forger", {}, hosts=1, call_timeout_s=60, log_dir=tmp_path / "logs"
    ) as hosts:
        env = await hosts.open()
        with pytest.raises(EnvFailure, match="reward=nan: it must be a finite number"):
            await env.step("send(observation(reward=float('nan')))")
