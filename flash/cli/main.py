"""The `flash` command: which one is meant, help and version; nothing here is slow to import."""

import atexit
import contextlib
import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import metadata

from flash.command_line import ended, nearest

COMMANDS = {
    "train": "Train a policy by asynchronous reinforcement learning.",
    "eval": "Measure a run, a checkpoint of it, or any model, on held-out tasks.",
    "show": "Print what was said in some episodes of a run.",
    "replay": "Look at a run's episodes turn by turn; score or train them again, otherwise.",
    "export": "Write a checkpoint as a Hugging Face model, or a run's episodes as a dataset.",
    "explore": "Play episodes for a run, from this machine: join it, and leave it, at any time.",
    "status": "Print what every part of a run does now, and what it waits for.",
    "convert": "Turn a configuration of ROLL, Trinity-RFT, verl or GeRL into one of ours.",
    "simulate": "Simulate a run on a cluster: the engine's own hub, loop and agents in virtual "
    "time.",
    "plan": "Search how to split GPUs between workers and trainer, and the alpha to allow, by "
    "simulating.",
    "worker": "Serve one embedded inference worker.",
}
_HELP = ("-h", "--help")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exit code 2 for what the user got wrong, 3 for a stall, 1 for other failures."""
    as_process(lambda: run(sys.argv[1:] if arguments is None else arguments))


def as_process(command: Callable[[], int]) -> None:
    """Runs a command as all that this process is for, and ends with the exit code it returns."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may know no α
    # Outside of a loop, which has its own answer, there is nothing to close: imports, the end.
    signal.signal(signal.SIGINT, lambda number, _: os._exit(128 + number))
    code: int | str | None = 1
    atexit.register(lambda: _leave(code))  # as the first it is called last
    try:
        code = command()
    except SystemExit as end:
        code = end.code
    sys.exit(code)


def _leave(code: int | str | None) -> None:
    """Ends the process: an ordinary end searches torch and all for garbage, for seconds."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # somebody has closed it
            stream.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


def run(arguments: Sequence[str]) -> int:
    """The exit code of the command."""
    return ended(lambda: _run(arguments))


def _run(arguments: Sequence[str]) -> None:
    known = ", ".join(COMMANDS)
    if not arguments:
        raise ValueError(f"flash what? Give a command: {known}; or --help")
    name, *rest = arguments
    if name in _HELP:
        print(_overview())
    elif name == "--version":
        print(f"flash {metadata.version('flash-rl')}")
    elif name not in COMMANDS:
        hint = nearest(name, (*COMMANDS, *_HELP, "--version"), f"there are {known}, and --help")
        raise ValueError(f"{name!r} is no command: {hint}")
    else:
        _command(name, rest)


def _command(name: str, rest: Sequence[str]) -> None:
    if name != "worker" and (asked := [index for index, word in enumerate(rest) if word in _HELP]):
        from flash.cli import help  # noqa: PLC0415  (so is all below: mistakes must not wait)

        sections = [word for word in rest[asked[0] :] if word not in _HELP]
        print(help.of(name, COMMANDS[name], sections))
        return
    from flash.cli import commands  # noqa: PLC0415

    log_to_stderr()
    commands.BY_NAME[name](rest)


def log_to_stderr() -> None:
    """As every command does."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("huggingface_hub").propagate = False  # it prints by a handler of its own


def _overview() -> str:
    commands = "\n".join(f"  {name:10}{about}" for name, about in COMMANDS.items())
    return (
        "usage: flash COMMAND …\n\nAsynchronous RL post-training of LLMs.\n\ncommands:\n"
        f"{commands}\n\n"
        "flash COMMAND --help            tells what it takes, with every field\n"
        "flash COMMAND --help SECTION    one section's fields alone, as in --help engine\n"
        "flash --version                 the version that is installed"
    )
