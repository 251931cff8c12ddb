"""The boundary to an environment's code, in this process and in hosts: EnvFailure, nothing else.

What it answers is checked here, field by field. Text and `info` come out as plain data, so that an
environment is the same to its agent wherever it runs.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import gymnasium
import msgspec
import numpy as np

from flash.answers import is_ctrl_c, number, raised, shown, truth
from flash.conversation import MAX_CHARS
from flash.errors import EnvFailure
from flash.tools.functions import as_text
from flash.types import Observation, Task

TextEnv = gymnasium.Env[str, str]

_MAX_INFO_BYTES = 4_000_000
_MAX_COMMANDS = 100_000
_STEP = "(observation, reward, terminated, truncated, info)"
_RESET = "(observation, info)"


def make(constructor: Callable[[], TextEnv]) -> TextEnv:
    """A new environment."""
    env: TextEnv = _call("its constructor", constructor)
    return env


def deterministic(env: TextEnv) -> bool:
    """Whether its `metadata` says that seed, options and actions decide all that it answers."""
    return _says(env, "deterministic")


def blocks(env: TextEnv) -> bool:
    """Whether its `metadata` says that it waits for others, so that it needs a host."""
    return _says(env, "blocks")


def reset(env: TextEnv, task: Task) -> Observation:
    """The first observation of the task's episode."""
    options: dict[str, Any] = {"options": dict(task.options)}
    if not _takes_options(env):
        if task.options:
            raise EnvFailure(
                f"reset takes no options, and the task has {shown(dict(task.options))}: give "
                f"reset an `options` parameter"
            )
        options = {}
    answer = _call("reset", env.reset, seed=task.seed, **options)
    match answer:
        case [text, info]:
            return _observation("reset", text, 0.0, False, False, info)
    raise EnvFailure(f"reset answered {shown(answer)}: it must be {_RESET}")


def step(env: TextEnv, action: str) -> Observation:
    """What the environment answers to the action."""
    what = f"step({shown(action)})"
    answer = _call(what, env.step, action)
    match answer:
        case [text, reward, terminated, truncated, info]:
            return _observation(what, text, reward, terminated, truncated, info)
    raise EnvFailure(f"{what} answered {shown(answer)}: it must be {_STEP}")


def call(env: TextEnv, tool: str, arguments: Mapping[str, Any]) -> str | Observation:
    """What one of the environment's tools answers: a result, or what `step` would."""
    what = f"tool {tool!r}"
    answer = _call(what, partial(_call(what, getattr, env, tool), **arguments))
    match answer:
        case tuple((text, reward, terminated, truncated, info)):
            return _observation(what, text, reward, terminated, truncated, info)
    return check_result(tool, as_text(tool, answer))


def close(env: TextEnv) -> None:
    """Lets go of the environment."""
    _call("close", env.close)


def check_again(what: str, seen: Observation) -> Observation:
    """Of what came from another process, whose word alone is not enough."""
    return _observation(what, seen.text, seen.reward, seen.terminated, seen.truncated, seen.info)


def check_result(tool: str, text: str) -> str:
    """A result of that tool, as it is, if it is a text that can be read."""
    return _text(f"tool {tool!r}", "result", text)


def _says(env: TextEnv, name: str) -> bool:
    try:
        return truth(env.metadata[name]) is True
    except Exception:  # the boundary: what is no gymnasium.Env may have anything there, or nothing
        return False


def _call(what: str, function: Callable[..., Any], *args: Any, **named: Any) -> Any:
    try:
        answer = function(*args, **named)
    except BaseException as error:  # sys.exit too; a plain call is never cancelled
        if is_ctrl_c(error):
            raise
        raise EnvFailure(f"{what} {raised(error)}") from error
    if inspect.isawaitable(answer):
        if inspect.iscoroutine(answer):
            answer.close()
        raise EnvFailure(f"{what} is async: write def; what blocks belongs into env.hosts")
    return answer


def _takes_options(env: TextEnv) -> bool:
    try:
        parameters = inspect.signature(env.reset).parameters
    except (TypeError, ValueError):  # of a builtin, say
        return True
    kinds = {parameter.kind for parameter in parameters.values()}
    return "options" in parameters or inspect.Parameter.VAR_KEYWORD in kinds


def _observation(
    what: str, text: object, reward: object, terminated: object, truncated: object, info: object
) -> Observation:
    reward_given = number(reward)
    if reward_given is None:
        raise _wrong(what, "reward", reward, "a finite number")
    if not isinstance(info, Mapping):
        raise _wrong(what, "info", info, "a mapping, {} if there is nothing to tell")
    return Observation(
        text=_text(what, "observation", text),
        reward=reward_given,
        terminated=_truth(what, "terminated", terminated),
        truncated=_truth(what, "truncated", truncated),
        info=_info(what, _call(f"info of {what}", dict, info)),
    )


def _text(what: str, field: str, value: object) -> str:
    if not isinstance(value, str):
        raise _wrong(what, field, value, "a text: say in words what there is to see")
    text = str.__str__(value)[: MAX_CHARS + 1]  # enough to see that it is too long
    try:
        text.encode()
    except UnicodeEncodeError as error:
        near = text[max(0, error.start - 10) : error.start + 10]
        raise _wrong(
            what, field, near, "a text that is Unicode: decode bytes with errors='replace'"
        ) from error
    return text


def _truth(what: str, field: str, value: object) -> bool:
    told = truth(value)
    if told is None:
        raise _wrong(what, field, value, "true or false")
    return told


def _info(what: str, info: dict[Any, Any]) -> dict[str, Any]:
    """What of it is plain data; what a style or a metric reads of it must be of its kind."""
    plain: dict[str, Any] = {}
    if info.get("goal") is not None:
        plain["goal"] = _text(what, "info['goal']", info["goal"])
    if info.get("admissible_commands") is not None:
        plain["admissible_commands"] = _commands(what, info["admissible_commands"])
    if info.get("success") is not None:
        plain["success"] = _truth(what, "info['success']", info["success"])
    left = _MAX_INFO_BYTES
    for name in info.keys() - {"goal", "admissible_commands", "success"}:
        packed = _packed(info[name])
        if isinstance(name, str) and packed is not None and len(packed) <= left:
            left -= len(packed)
            plain[name] = msgspec.msgpack.decode(packed)
    return plain


def _commands(what: str, commands: Any) -> list[str]:
    field = "info['admissible_commands']"
    listed = commands.tolist() if isinstance(commands, np.ndarray) else commands
    if not isinstance(listed, list | tuple) or len(listed) > _MAX_COMMANDS:
        raise _wrong(what, field, commands, f"a list of at most {_MAX_COMMANDS} texts")
    if not all(isinstance(command, str) for command in listed):
        raise _wrong(what, field, commands, "a list of texts")
    if sum(map(len, listed)) > MAX_CHARS:
        raise _wrong(what, field, commands, f"of at most {MAX_CHARS} characters in all")
    return [_text(what, field, command) for command in listed]


def _packed(value: object) -> bytes | None:
    """As msgpack, or None if it is no plain data, or holds itself."""
    try:
        return msgspec.msgpack.encode(value, enc_hook=_numpy_as_python)
    except Exception:  # the boundary: an object's own attributes may raise anything
        return None


def _numpy_as_python(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is no plain data")


def _wrong(what: str, field: str, value: object, wanted: str) -> EnvFailure:
    return EnvFailure(f"{what} answered {field}={shown(value)}: it must be {wanted}")
