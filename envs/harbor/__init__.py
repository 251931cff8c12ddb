"""Tasks in a shell, as folders of Harbor and terminal-bench describe them.

    Write how many lines /app/log.txt has to /app/count.txt.
    > ```bash
    > wc -l < log.txt > count.txt; cat count.txt
    > ```
    exit status 0
    3
    > ```bash
    > submit
    > ```

Only then are the task's tests brought into the sandbox, and run there.

folder.py     what a task's folder says
  dockerfile.py   what its Dockerfile says
build.py      the task's files in a sandbox
verdict.py    the tests, and the reward
"""

import fnmatch
import functools
import math
import re
import string
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import gymnasium
from gymnasium import spaces

from flash.sandbox import Limits, Outcome, open_sandbox
from flash.sandbox.blocking import BlockingSandbox
from flash.sandbox.choose import check_sandbox

from .build import HOME, build, writable_folders
from .dockerfile import Need
from .folder import TaskFolder, is_task, read_folder
from .verdict import verify

__all__ = ["HarborEnv"]

_RULES = """\
You are in a shell on Linux, without a network. Answer with one block of commands:

```bash
ls
```

Each block begins anew in {folder}, and what it starts ends with it. When the task is done, answer

```bash
submit
```"""
_LACKS: dict[Need, str] = {
    "image": "there are no images; this machine's system can stand in",
    "network": "there is none",
    "user": "there is one user, who can have all of it",
}
_BLOCK = re.compile(
    r"^[ \t]*```(\w*)(?:[ \t]*\n(.*?)^[ \t]*```|[ \t]+([^\n]*?)```)", re.DOTALL | re.MULTILINE
)
_SHELLS = ("bash", "sh", "shell", "")
_SUBMIT = "submit"
_HELDOUT_SHARE = 5  # one task of so many is held out
_NAMED_AT_ONCE = 10
_VERIFIER_CHARS = 20_000  # of what it says, for `info`
_TEXT: dict[str, Any] = {"max_length": 1_000_000, "charset": string.printable}


class HarborEnv(gymnasium.Env[str, str]):
    """One task after another, each in a sandbox of its own.

    The action is a text with one block of commands, or with the word `submit` in it. The reward is
    the verifier's, and comes at the end: after `submit`, the last turn, or the end of the task's
    time for commands. 1 or more is a success. Tests that fail to judge, or take too long, give 0.

    Args:
        path: a task's folder, or a folder of such.
        tasks: patterns of the names of those that are played.
        without: what tasks may ask for, and are played without: `image` (this machine's system
            stands in for it), `network`, `user` (all is one user's).
        split: `train` or `heldout`; a task belongs to one of them, by its name.
        max_turns: after so many actions the episode is truncated.
        command_s: for one block of commands.
        verifier_s: for the tests, in the place of each task's own time.
        output_chars: how many characters of what a block writes are shown.
        memory_mb, disk_mb: of a sandbox, unless the task asks for less.
        reward_key: which one counts of a verifier's several rewards.

    Raises ValueError for an option that can't be, and names the tasks that can't be played.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012  (gymnasium's own type)
    observation_space = spaces.Text(**_TEXT)
    action_space = spaces.Text(min_length=0, **_TEXT)

    def __init__(
        self,
        *,
        path: str = "",
        tasks: Sequence[str] = ("*",),
        without: Sequence[Need] = (),
        split: Literal["train", "heldout"] = "train",
        max_turns: int = 30,
        command_s: float = 30.0,
        verifier_s: float | None = None,
        output_chars: int = 10_000,
        memory_mb: int = 2048,
        disk_mb: int = 512,
        reward_key: str = "reward",
    ) -> None:
        if split not in ("train", "heldout"):
            raise ValueError(f"split={split!r} must be 'train' or 'heldout'")
        for name, texts in (("tasks", tasks), ("without", without)):
            if isinstance(texts, str):
                raise ValueError(f"{name}={texts!r} must be a list: [{texts}]")
        if unknown := set(without) - set(get_args(Need)):
            raise ValueError(
                f"without={sorted(unknown)} can't be left out: only {', '.join(get_args(Need))}"
            )
        for name, value in (
            *(("max_turns", max_turns), ("command_s", command_s), ("verifier_s", verifier_s)),
            *(("output_chars", output_chars), ("memory_mb", memory_mb), ("disk_mb", disk_mb)),
        ):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value!r} must be more than 0")
        played = _played(path, tuple(tasks), tuple(without))
        self._tasks = [task for task in played if _split(task.name) == split]
        if not self._tasks:
            raise ValueError(
                f"path={path!r} has no {split} tasks among its {len(played)}: give more, or leave "
                f"splits out of evaluation (--env.eval_options '{{}}')"
            )
        _check_sandbox()
        self._max_turns = max_turns
        self._command_s = command_s
        self._verifier_s = verifier_s
        self._output_chars = output_chars
        self._memory_mb = memory_mb
        self._disk_mb = disk_mb
        self._reward_key = reward_key
        self._sandbox: BlockingSandbox | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is None:
            seed = int(self.np_random.integers(2**31))
        self.close()
        task = self._task = self._tasks[seed % len(self._tasks)]
        self._turns, self._spent_s = 0, 0.0
        limits = Limits(
            memory_mb=min(self._memory_mb, task.memory_mb or self._memory_mb),
            disk_mb=min(self._disk_mb, task.disk_mb or self._disk_mb),
        )
        self._sandbox = BlockingSandbox(
            open_sandbox(limits=limits, writable=writable_folders(task))
        )
        build(self._sandbox, task)
        rules = _RULES.format(folder=task.folder)
        return f"{task.instruction.strip()}\n\n{rules}", {"task": task.name}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        if self._sandbox is None:
            raise RuntimeError("there is no task: reset first")
        self._turns += 1
        blocks = [
            lines or line for shell, lines, line in _BLOCK.findall(action) if shell in _SHELLS
        ]
        if [block.strip() for block in blocks] == [_SUBMIT]:
            return self._end(self._sandbox, "", truncated=False)
        if len(blocks) == 1:
            text = self._run(self._sandbox, blocks[0])
        else:
            are = f"are {len(blocks)}" if blocks else "is none"
            text = f"Nothing was run. There must be one block, ```bash … ```, and there {are}."
        agent_s = self._task.agent_s
        if self._turns >= self._max_turns or (agent_s is not None and self._spent_s >= agent_s):
            return self._end(self._sandbox, text, truncated=True)
        return text, 0.0, False, False, {"task": self._task.name}

    def close(self) -> None:
        if self._sandbox is not None:
            sandbox, self._sandbox = self._sandbox, None
            sandbox.close()

    def _run(self, sandbox: BlockingSandbox, commands: str) -> str:
        """What is told of them."""
        seconds = self._command_s
        if self._task.agent_s is not None:
            seconds = min(seconds, self._task.agent_s - self._spent_s)
        began = time.monotonic()
        outcome = sandbox.run(
            ["bash", "-c", f"exec 2>&1\n{commands}"],
            env={"HOME": HOME, **self._task.env},
            cwd=self._task.folder,
            seconds=seconds,
        )
        self._spent_s += time.monotonic() - began
        return _told(outcome, seconds, self._output_chars)

    def _end(
        self, sandbox: BlockingSandbox, text: str, *, truncated: bool
    ) -> tuple[str, float, bool, bool, dict[str, Any]]:
        task = self._task
        verdict, said = verify(
            sandbox,
            task,
            seconds=self._verifier_s or task.verifier_s,
            reward_key=self._reward_key,
        )
        self.close()
        info = {
            "task": task.name,
            "success": verdict.reward >= 1.0,
            "rewards": verdict.rewards,
            "verifier": {"said": said[-_VERIFIER_CHARS:], "wrong": verdict.wrong},
        }
        return text, verdict.reward, not truncated, truncated, info


def _told(outcome: Outcome, seconds: float, chars: int) -> str:
    """How commands ended and what they wrote; of much only its beginning and its end."""
    how = {
        "exited": f"exit status {outcome.returncode}",
        "deadline": f"stopped after {seconds:g} s",
        "memory": "out of memory",
        "killed": "killed",
    }[outcome.ended]
    # On stderr is only what the sandbox says of commands that can't be run.
    text = (outcome.stdout + outcome.stderr).decode(errors="replace")
    if len(text) > chars:
        half = chars // 2
        left_out = f"\n… {len(text) - 2 * half} characters …\n"
        text = text[:half] + left_out + text[len(text) - half :]
    cut = "\n… and more than is kept" if outcome.cut else ""
    return f"{how}\n{text}{cut}"


def _split(name: str) -> str:
    return "heldout" if zlib.crc32(name.encode()) % _HELDOUT_SHARE == 0 else "train"


@functools.lru_cache(maxsize=4)  # each episode makes an environment anew
def _played(path: str, patterns: tuple[str, ...], without: tuple[Need, ...]) -> list[TaskFolder]:
    """The tasks, by their names. ValueError names those that can't be played."""
    folder = Path(path).expanduser()
    if not path or not folder.is_dir():
        raise ValueError(f"path={path!r} is no folder: give a task's folder, or a folder of such")
    folders = [folder] if is_task(folder) else sorted(filter(is_task, folder.iterdir()))
    named = [task for task in folders if any(fnmatch.fnmatch(task.name, like) for like in patterns)]
    if not named:
        raise ValueError(
            f"path={path!r} has no task that tasks={list(patterns)} name, of {len(folders)} with "
            f"a task.toml or a task.yaml"
        )
    tasks, refused = [], []
    for one in named:
        try:
            tasks.append(_task(one, without))
        except ValueError as error:
            refused.append(f"{one.name}: {error}")
    if refused:
        some = refused[:_NAMED_AT_ONCE] + ["…"] * (len(refused) > _NAMED_AT_ONCE)
        raise ValueError(
            f"path={path!r}: {len(refused)} of {len(named)} tasks can't be played in a local "
            f"sandbox: {'; '.join(some)}: mend them, or name others as tasks"
        )
    return tasks


def _task(folder: Path, without: tuple[Need, ...]) -> TaskFolder:
    task = read_folder(folder)
    lacking = {need: words for need, words in task.needs.items() if need not in without}
    if lacking:
        asked = ", ".join(f"{words} ({_LACKS[need]})" for need, words in lacking.items())
        raise ValueError(f"{asked}: play it without: [{', '.join(lacking)}]")
    return task


@functools.cache
def _check_sandbox() -> None:
    check_sandbox("local")
