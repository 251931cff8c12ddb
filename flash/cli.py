"""The `flash` command: train, eval, worker."""

import argparse
import asyncio
import logging
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from flash import config as configuration
from flash.errors import FlashError
from flash.worker.config import parse as parse_worker

_T = TypeVar("_T")

_TRAIN = """\
Train a policy by asynchronous reinforcement learning.

  flash train alfworld                         the preset as it is
  flash train frozen_lake --steps 4 --alpha 1 --name try
  flash train alfworld --model Qwen/Qwen2.5-0.5B-Instruct --agent.style chat
  flash train my_run.yaml --env.options.max_turns 12
"""
_EVAL = """\
Measure a run, or one checkpoint of it, on held-out tasks.

  flash eval runs/alfworld
  flash eval runs/alfworld/checkpoints/step_000010 --eval.tasks 256
"""
_WORKER = "Serve one embedded inference worker."


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exit code 2 for what the user got wrong, 1 for a run that could not go on."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """The exit code of the command."""
    options, rest = _parser().parse_known_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        command: Callable[[argparse.Namespace, Sequence[str]], None] = options.command
        command(options, rest)
    except ValueError as error:
        print(f"flash: {error}", file=sys.stderr)
        return 2
    except FlashError as error:
        print(f"flash: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="flash", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, text, command, argument in (
        ("train", _TRAIN, _train, "PRESET|FILE.yaml"),
        ("eval", _EVAL, _eval, "RUN|CHECKPOINT"),
    ):
        sub = commands.add_parser(
            name,
            help=text.splitlines()[0],
            description=text,
            epilog=_config_help(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.add_argument("source", metavar=argument, help="what to run")
        sub.set_defaults(command=command)
    worker = commands.add_parser("worker", help=_WORKER, add_help=False, allow_abbrev=False)
    worker.set_defaults(command=_worker)
    return parser


# ── the commands ─────────────────────────────────────────────────────────────────────────────


def _train(options: argparse.Namespace, rest: Sequence[str]) -> None:
    config = configuration.load(options.source, _overrides(rest))
    from flash.train import train  # noqa: PLC0415  (help and mistakes must not wait for it)

    async def until_stopped() -> dict[str, Any]:
        return await train(config, stop=_stop_on_signals())

    summary = _run(until_stopped())
    first, last = summary["eval_success_rate_first"], summary["eval_success_rate_last"]
    print(f"{summary['folder']}: {summary['steps']} steps in {summary['time_s']:.0f} s")
    if first is not None and last is not None:
        print(
            f"success rate on {summary['eval_tasks']} held-out tasks: "
            f"{first:.1%} → {last:.1%} ({100 * (last - first):+.1f} points), "
            f"alpha={config.alpha:g}, seed={config.seed}"
        )


def _eval(options: argparse.Namespace, rest: Sequence[str]) -> None:
    from flash.evaluate import evaluate  # noqa: PLC0415  (help and mistakes must not wait for it)

    evaluation = _run(evaluate(Path(options.source), _overrides(rest)))
    for name, value in evaluation.metrics().items():
        print(f"{name:20} {value:.4g}")


def _worker(options: argparse.Namespace, rest: Sequence[str]) -> None:
    config = parse_worker(rest, prog="flash worker")
    from flash.worker.server import main as serve  # noqa: PLC0415  (imports torch)

    serve(config)


def _run(main: Coroutine[Any, Any, _T]) -> _T:
    import uvloop  # noqa: PLC0415  (where it does not build, asyncio's own loop would do)

    return uvloop.run(main)


def _stop_on_signals() -> asyncio.Event:
    """Set by the first SIGINT or SIGTERM; the second one ends the process as it always would."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def ask() -> None:
        print("stopping after this step; once more to stop at once", file=sys.stderr)
        stop.set()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, ask)
    return stop


# ── options ──────────────────────────────────────────────────────────────────────────────────


def _overrides(rest: Sequence[str]) -> dict[str, Any]:
    """`--field.sub value` and `--field.sub=value` pairs; values are YAML."""
    settings: dict[str, Any] = {}
    words = list(rest)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"{word!r} is no option: write --field value")
        name, given, value = word[2:].partition("=")
        if not given:
            if not words:
                raise ValueError(f"--{name} has no value: write --{name} VALUE")
            value = words.pop(0)
        try:
            settings[name.replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            problem = getattr(error, "problem", None) or error
            raise ValueError(f"--{name} {value!r} is no YAML value: {problem}") from error
    return settings


def _config_help() -> str:
    lines = ["fields (a YAML file nests them, the command line dots them):"]
    for name, info in configuration.fields():
        is_section = isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)
        if is_section:
            lines += ["", f"  {name}: {(info.annotation.__doc__ or '').splitlines()[0]}"]
            continue
        lines.append(f"  --{name:<34} {info.description or ''}{_default(info)}")
    lines += ["", "presets: " + ", ".join(sorted(configuration.presets()))]
    return "\n".join(lines)


def _default(info: Any) -> str:
    default = info.default
    if default is PydanticUndefined or isinstance(default, BaseModel):
        return ""
    return f" [{default}]" if default not in ("", None, (), {}) else ""
