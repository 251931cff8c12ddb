"""An agent as a command line: started for each episode, ended with everything it started."""

import contextlib
import heapq
import itertools
import json
import os
import shlex
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import msgspec

from flash.answers import shown
from flash.door.session import anthropic_base_url
from flash.errors import AgentFailure, RewardFailure
from flash.system.guarded import start_guarded
from flash.system.process import log_tail
from flash.types import Task

_PASSED = {
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TMPDIR", "VIRTUAL_ENV",
    "PYTHONPATH", "LD_LIBRARY_PATH", "SSL_CERT_FILE", "SSL_CERT_DIR",
}  # fmt: skip
_ANSWER_BYTES = 65_536


class CommandAgent:
    """Runs the command for one episode, with what it needs to know in its environment variables.

    OPENAI_BASE_URL and OPENAI_API_KEY, which OpenAI's clients read by themselves,
    ANTHROPIC_BASE_URL and ANTHROPIC_API_KEY, which Anthropic's do, and FLASH_TASK, as
    `{"seed": …, "options": {…}}`, with the `task_set` if the task is of one. Where several play,
    FLASH_ROLES in place of the first four: `{"planner": {"base_url": …, "api_key": …}, …}`. Of this
    process's environment it has where programs and files are and how people here write, and what
    `env` lists as NAME or NAME=value: no keys that it was not meant to have. The last line of its
    output is its answer, in JSON; what it writes to stderr goes to `<name>_<n>.log`, n below the
    number of those that run together.

    A cancelled call, and the end of this process whatever its cause, end the command with
    everything that it started, in sessions of their own too.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        log_dir: Path,
        name: str = "agent",
        env: Sequence[str] = (),
    ) -> None:
        self._command = tuple(command)
        self._env = environment_of(env)
        self._log_dir = log_dir
        self._name = name
        self._new_numbers = itertools.count()
        self._free_numbers: list[int] = []

    async def __call__(
        self,
        *,
        task: Task,
        base_url: str = "",
        api_key: str = "",
        roles: Mapping[str, Mapping[str, str]] | None = None,
    ) -> Any:
        """The answer. AgentFailure for an exit code but 0, RewardFailure for what is no JSON."""
        known: dict[str, Any] = {"seed": task.seed, "options": dict(task.options)}
        if task.task_set:
            known["task_set"] = task.task_set
        access = (
            {
                "OPENAI_BASE_URL": base_url,
                "OPENAI_API_KEY": api_key,
                "ANTHROPIC_BASE_URL": anthropic_base_url(base_url),
                "ANTHROPIC_API_KEY": api_key,
            }
            if roles is None
            else {"FLASH_ROLES": json.dumps(roles)}
        )
        variables = {**access, "FLASH_TASK": json.dumps(known, default=str)}
        with self._log() as log, tempfile.TemporaryFile() as output:
            before = log.tell()
            code = await self._run(variables, output, log)
            if code != 0:
                path = Path(log.name)
                raise AgentFailure(
                    f"{shlex.join(self._command)} ended with exit code {code}. "
                    f"The end of {path}:\n{log_tail(path, since=before)}"
                )
            line = _last_line(output)
        try:
            return msgspec.json.decode(line)
        except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
            raise RewardFailure(
                f'the last line of {shlex.join(self._command)} is not {{"reward": …}}: '
                f"{shown(line)}"
            ) from error

    @contextlib.contextmanager
    def _log(self) -> Iterator[IO[bytes]]:
        """A log that no other episode writes to at the same time."""
        free = self._free_numbers
        number = heapq.heappop(free) if free else next(self._new_numbers)
        self._log_dir.mkdir(parents=True, exist_ok=True)
        try:
            with (self._log_dir / f"{self._name}_{number}.log").open("ab") as log:
                yield log
        finally:
            heapq.heappush(free, number)

    async def _run(self, variables: dict[str, str], output: IO[bytes], log: IO[bytes]) -> int:
        process = await start_guarded(
            *self._command, stdout=output, stderr=log, env={**self._env, **variables}
        )
        try:
            return await process.wait()
        finally:
            await process.end()


def environment_of(listed: Sequence[str], *, but: Collection[str] = ()) -> dict[str, str]:
    """The environment variables of a command of the user's: what all have `but` these, and what is
    listed."""
    env = {
        name: value
        for name, value in os.environ.items()
        if (name in _PASSED and name not in but) or name.startswith("LC_")
    }
    for entry in listed:
        name, given, value = entry.partition("=")
        env[name] = value if given else os.environ[name]
    return env


def _last_line(output: IO[bytes]) -> str:
    """The last line that is not blank, of the last so many bytes."""
    end = output.seek(0, os.SEEK_END)
    output.seek(max(0, end - _ANSWER_BYTES))
    lines = output.read().decode(errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.strip()), "")
