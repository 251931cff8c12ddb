"""Environments of OpenEnv: servers that speak JSON over a WebSocket, of which each is a session."""

import contextlib
import http.client
import json
import urllib.request
from typing import Any, Literal

import msgspec
from websockets.exceptions import ConnectionClosed, WebSocketException
from websockets.sync.client import ClientConnection, connect

from .of_package import PackageEnv, Split

_MAX_ANSWER_BYTES = 32_000_000
_CLOSE_TIMEOUT_S = 1.0
_APART = {"done", "reward", "metadata"}  # declared as of the observation, and told beside it


class _Answer(msgspec.Struct):
    type: str
    data: dict[str, Any]


class _Seen(msgspec.Struct):
    """What a server tells of an observation."""

    observation: dict[str, Any]
    reward: float | bool | None = None
    done: bool = False
    metadata: dict[str, Any] | None = None


class _Schema(msgspec.Struct):
    """JSON schemas of what the server takes and tells."""

    action: dict[str, Any]
    observation: dict[str, Any]


class _Refused(Exception):
    """The server takes no such action."""


class OpenEnv(PackageEnv):
    """An environment that an OpenEnv server plays, in a session of this instance's own.

    An action that does not have the form the server asks for earns 0 and is told what was wrong;
    the episode goes on. After any other failure the next episode has a new session.

    Args:
        url: the server, for example `http://127.0.0.1:8000`.
        action: what is sent, with `{text}` where the text goes: `{"message": "{text}"}`; or `json`,
            if the text is itself the object to send. Left out, the text is the one field that the
            server requires.
        observation: the field that is shown; left out, all of them as JSON.
        timeout_s: how long an answer may take.
        split: `train` or `heldout`; each has seeds of its own.
    """

    # Not "deterministic": nothing in the protocol promises it.

    def __init__(
        self,
        *,
        url: str,
        action: dict[str, Any] | Literal["json"] | None = None,
        observation: str | None = None,
        timeout_s: float = 60.0,
        split: Split = "train",
    ) -> None:
        super().__init__(split)
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url={url!r} must begin with http:// or https://")
        if not timeout_s > 0:
            raise ValueError(f"timeout_s={timeout_s!r} must be more than 0")
        self._url = url.rstrip("/")
        self._timeout_s = timeout_s
        self._session: ClientConnection | None = None
        self._leaving = contextlib.ExitStack()
        schema = self._schema()
        self._action = _action(action, schema.action)
        self._shown = observation
        fields = set(schema.observation.get("properties", {})) - _APART
        if observation is not None and observation not in fields:
            raise ValueError(f"observation={observation!r} must be one of {_listed(fields)}")

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        if self._session is None:
            self._session = self._opened()
        seen = self._ask(self._session, "reset", (options or {}) | {"seed": self.game_of(seed)})
        return self._told(seen)

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if self._session is None:
            raise RuntimeError("there is no session: reset first")
        try:
            seen = self._ask(self._session, "step", self._sent(action))
        except _Refused as refusal:
            return f"That is no action here: {refusal}", 0.0, False, False, {"refused": True}
        text, info = self._told(seen)
        reward = float(seen.reward or 0.0)
        if seen.done:
            info["success"] = reward >= 1.0
        return text, reward, seen.done, False, info

    def close(self) -> None:
        self._session = None
        self._leaving.close()

    def _sent(self, text: str) -> Any:
        if self._action != "json":
            return _filled(self._action, text)
        try:
            sent = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _Refused(f"it is no JSON: {error}") from error
        if not isinstance(sent, dict):
            raise _Refused("it is no JSON object")
        return sent

    def _told(self, seen: _Seen) -> tuple[str, dict[str, Any]]:
        # Newer servers have it in both places. It is not for the policy: it may hold the solution.
        metadata = seen.observation.pop("metadata", None) or seen.metadata or {}
        if self._shown is None:
            return json.dumps(seen.observation, ensure_ascii=False), {"metadata": metadata}
        if self._shown not in seen.observation:
            raise self._failed(f"told no {self._shown!r}, but {_listed(seen.observation)}")
        shown = seen.observation.pop(self._shown)
        text = shown if isinstance(shown, str) else json.dumps(shown, ensure_ascii=False)
        return text, {"observation": seen.observation, "metadata": metadata}

    def _schema(self) -> _Schema:
        try:
            with urllib.request.urlopen(f"{self._url}/schema", timeout=self._timeout_s) as answer:
                return msgspec.json.decode(answer.read(_MAX_ANSWER_BYTES), type=_Schema)
        except (OSError, http.client.HTTPException) as error:
            raise ValueError(
                f"url={self._url!r} can't be asked for its /schema: {error}: start the server, or "
                f"name another"
            ) from error
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise ValueError(f"url={self._url!r} is no OpenEnv server: {error}") from error

    def _opened(self) -> ClientConnection:
        try:
            return self._leaving.enter_context(
                connect(
                    f"ws{self._url.removeprefix('http')}/ws",
                    open_timeout=self._timeout_s,
                    ping_interval=None,  # a server that computes may answer none; timeout_s decides
                    close_timeout=_CLOSE_TIMEOUT_S,
                    max_size=_MAX_ANSWER_BYTES,
                )
            )
        except (OSError, WebSocketException) as error:
            raise ConnectionError(f"{self._url} opens no session: {error}") from error

    def _ask(self, session: ClientConnection, kind: str, data: Any) -> _Seen:
        try:
            with contextlib.suppress(ConnectionClosed):  # what it said before is there to be read
                session.send(json.dumps({"type": kind, "data": data}))
            answer = msgspec.json.decode(session.recv(self._timeout_s), type=_Answer)
            if answer.type != "error":
                return msgspec.convert(answer.data, _Seen)
        except TimeoutError as error:
            raise self._failed(f"did not answer {kind} within {self._timeout_s:g} s") from error
        except (OSError, WebSocketException) as error:
            raise self._failed(f"ended the session: {error}") from error
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise self._failed(f"answered {kind} as no OpenEnv server does: {error}") from error
        code, message = answer.data.get("code"), answer.data.get("message")
        if kind == "step" and code == "VALIDATION_ERROR":
            raise _Refused(_what_was_wrong(answer.data.get("errors")) or message)
        if code == "CAPACITY_REACHED":
            raise self._failed("has no session left: raise its max_concurrent_envs, or play fewer")
        raise self._failed(f"answered {kind} with {code}: {message}")

    def _failed(self, what: str) -> RuntimeError:
        """Ends the session too: its next answer might be to what was asked before it."""
        with contextlib.suppress(OSError, WebSocketException):
            self.close()
        return RuntimeError(f"{self._url} {what}")


def _action(given: Any, schema: dict[str, Any]) -> dict[str, Any] | Literal["json"]:
    """What to send; ValueError if the server would take it for no text at all."""
    fields = set(schema.get("properties", {}))
    required = set(schema.get("required", ()))
    if given is None:
        if len(required) != 1:
            raise ValueError(
                f"action must say where the text goes, as {{field: '{{text}}'}}, or be json: the "
                f"server's actions have {_listed(fields)}, and need {_listed(required)}"
            )
        return {required.pop(): "{text}"}
    if given == "json":
        return "json"
    if not isinstance(given, dict) or "{text}" not in json.dumps(given):
        raise ValueError(f"action={given!r} must have '{{text}}' in a field, or be json")
    if schema.get("additionalProperties") is False and (unknown := set(given) - fields):
        raise ValueError(f"action has {_listed(unknown)}: the server's have {_listed(fields)}")
    if lacking := required - set(given):
        raise ValueError(f"action={given!r} lacks {_listed(lacking)}, which the server needs")
    return given


def _filled(template: Any, text: str) -> Any:
    match template:
        case str():
            return template.replace("{text}", text)
        case dict():
            return {name: _filled(value, text) for name, value in template.items()}
        case list():
            return [_filled(value, text) for value in template]
    return template


def _what_was_wrong(errors: Any) -> str:
    """Of pydantic's errors, as servers send them."""
    return "; ".join(
        f"{'.'.join(map(str, error.get('loc', ())))}: {error.get('msg')}"
        for error in (errors if isinstance(errors, list) else [])
        if isinstance(error, dict)
    )


def _listed(names: Any) -> str:
    return ", ".join(sorted(names)) or "none"
