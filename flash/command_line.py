"""What all our commands share: their options, and how they end, with a line for what went wrong."""

import argparse
import contextlib
import difflib
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

from flash.errors import FlashError, one_line
from flash.system import machine

_TRACEBACK = re.compile(r"\s*Traceback \(most recent call last\):\n(?:[ \t].*\n|\n(?=[ \t]))*")


def ended(command: Callable[[], None]) -> int:
    """Runs a command, and returns its exit code.

    2 for what the user got wrong, 3 for a stall, 1 for other failures, with a line of stderr for
    each. What else is raised is a defect of ours, and passes.
    """
    try:
        with _first_of_a_group():
            command()
            if sys.stdout is not None:  # it is where somebody closed it
                sys.stdout.flush()
    except FlashError as error:
        _complain(_with_remedy(f"{type(error).__name__}: {error}"), error)
        return error.exit_code
    except ValueError as error:
        _complain(str(error), error)
        return 2
    except Exception as error:
        return _end_of_the_machine(error)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def _end_of_the_machine(error: Exception) -> int:
    """The exit code of what the machine could not do. Raises what it has no part in."""
    if isinstance(error, BrokenPipeError) and _reader_is_gone():
        return 128 + signal.SIGPIPE  # as of other commands: `| head` has seen enough
    # Libraries wrap the machine's errors in their own.
    if not isinstance(error, OSError | MemoryError) and not machine.remedy(str(error)):
        raise error
    _complain(_with_remedy(one_line(error)), error)
    return 1


@contextlib.contextmanager
def _first_of_a_group() -> Iterator[None]:
    """What a task group raises may be groups in groups; one cause is told."""
    try:
        yield
    except BaseExceptionGroup as group:
        first: BaseException = group
        while isinstance(first, BaseExceptionGroup):
            for note in getattr(first, "__notes__", ()):
                first.exceptions[0].add_note(note)
            first = first.exceptions[0]
        raise first from group


def _complain(message: str, error: BaseException) -> None:
    for line in (*message.splitlines(), *getattr(error, "__notes__", ())):
        if line.strip():
            print(f"flash: {line}", file=sys.stderr)


def _reader_is_gone() -> bool:
    """Whether it is stdout's pipe that is broken; then what is left for it goes nowhere."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    gone = any(event & select.POLLERR for _, event in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def _with_remedy(message: str) -> str:
    """Without the frames of a child's traceback, which are for its log, and with what can be done
    about the machine, if that is at fault."""
    remedy = machine.remedy(message)
    return _TRACEBACK.sub(" ", message).rstrip() + (f": {remedy}" if remedy else "")


def nearest(word: str, known: Iterable[str], otherwise: str) -> str:
    """What a word may have meant, as a question; `otherwise` if it is like nothing known."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else otherwise


class Options(argparse.ArgumentParser):
    """Options of a command. A mistake is a ValueError in one line; none may be given twice."""

    def __init__(self, prog: str, **settings: Any) -> None:
        super().__init__(prog=prog, allow_abbrev=False, **settings)
        self.given: set[str] = set()
        self.register("action", None, _Once)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message.removeprefix('argument ')}; see {self.prog} --help")

    def names(self) -> list[str]:
        return [name for name in self._option_string_actions if name.startswith("--")]

    def options_only(self, words: Sequence[str]) -> argparse.Namespace:
        """The options, where there is nothing else to give."""
        options, rest = self.parse_known_args(words)
        if rest:
            name = rest[0].partition("=")[0]
            self.error(f"{name} is unknown: {nearest(name, self.names(), 'leave it out')}")
        return options


class _Once(argparse.Action):
    """Stores the value, as options do, but not over another."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        assert isinstance(parser, Options)
        if self.dest in parser.given:
            parser.error(f"{option_string} is given twice: give it once")
        parser.given.add(self.dest)
        setattr(namespace, self.dest, values)
