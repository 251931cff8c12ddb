"""The `flash` command: train, eval, simulate, plan, worker."""

import argparse
import asyncio
import gc
import logging
import signal
import sys
import textwrap
import types
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from flash import config as configuration
from flash import machine
from flash.errors import FlashError
from flash.simulate.distributions import Distribution
from flash.simulate.hardware import GPUS, on_hardware
from flash.simulate.scenario import NOT_SIMULATED, Scenario
from flash.simulate.scenario import load as load_scenario
from flash.worker.config import parse as parse_worker

_T = TypeVar("_T")
_GARBAGE_EVERY_S = 300.0

_TRAIN = """\
Train a policy by asynchronous reinforcement learning.

  flash train alfworld                         the preset as it is
  flash train frozen_lake --steps 4 --alpha 1 --name try
  flash train frozen_lake --steps 60 --name try --resume
  flash train alfworld --model Qwen/Qwen2.5-0.5B-Instruct --agent.style chat
  flash train my_run.yaml --env.options.max_turns 12
  flash train --env my_package.my_env:MyEnv --env.eval_options '{}'
  flash train --agent.run my_agent:act --model Qwen/Qwen2.5-0.5B-Instruct --env my_world

Results are in runs/<name>/. Ctrl-C ends the run after its step, with a checkpoint.
"""
_EVAL = """\
Measure a run, or one checkpoint of it, on held-out tasks.

  flash eval runs/alfworld
  flash eval runs/alfworld/checkpoints/step_000010 --eval.tasks 256

The run's own configuration says how; fields given here change it.
"""
_SIMULATE = """\
Simulate a run on a cluster: the engine's own hub, loop and agents in virtual time.

  flash simulate scenario.yaml
  flash simulate scenario.yaml --alpha 2 --workers.count 24 --timeline
  flash simulate scenario.yaml --sweep alpha=0,0.5,1,2,4 --sweep trainer.gpus=16,32 --seeds 3
  flash simulate --calibrate runs/alfworld --sweep alpha=0,1,2,4

  --calibrate RUN         in place of a file: fit the scenario to a run, and keep it as a file
  --sweep FIELD=V1,V2,…   simulate each value (of several: each combination); a list is written as
                          in YAML: rollout.filters=[],[equal_rewards]
  --seeds N               simulate each N times, with the seeds that follow `seed`
  --timeline              write a trace of the first one for https://ui.perfetto.dev
  --out DIR               where the files go [runs/simulations/NAME]
"""
_PLAN = """\
Search how to split GPUs between workers and trainer, and the alpha to allow, by simulating.

  flash plan scenario.yaml --gpus 128
  flash plan scenario.yaml --gpus 64 --gpu h100 --model 8e9
  flash plan --calibrate runs/alfworld --gpus 8

  --gpus N                the whole cluster's
  --gpu NAME, --model M   compute the times of workers and trainer from a GPU (GPU_NAMES) and a
                          model: its number of parameters, or a directory with its config.json
  --alphas A,B,…          to choose from [0,1,2,4]
  --calibrate RUN         in place of a file: fit the scenario to a run
  --out DIR               where the files go [runs/plans/NAME]
""".replace("GPU_NAMES", ", ".join(GPUS))
_WORKER = "Serve one embedded inference worker."

_WIDTH = 100
_INDENT = 38


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exit code 2 for what the user got wrong, 3 for a stall, 1 for other failures."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """The exit code of the command."""
    command, rest = _command(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("huggingface_hub").propagate = False  # it prints by a handler of its own
    try:
        command(rest)
    except ValueError as error:
        _complain(str(error), error)
        return 2
    except FlashError as error:
        _complain(f"{type(error).__name__}: {error}", error)
        return error.exit_code
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def _complain(message: str, error: Exception) -> None:
    for line in (*message.splitlines(), *getattr(error, "__notes__", ())):
        print(f"flash: {line}", file=sys.stderr)


def _command(arguments: Sequence[str]) -> tuple[Callable[[Sequence[str]], None], Sequence[str]]:
    parser = argparse.ArgumentParser(prog="flash", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    config, scenario = configuration.Config, Scenario
    for name, text, command, model, words in (
        ("train", _TRAIN, _train, config, "[PRESET|FILE.yaml] [--field.sub value …]"),
        ("eval", _EVAL, _eval, config, "RUN|CHECKPOINT [--field.sub value …]"),
        ("simulate", _SIMULATE, _simulate, scenario, "FILE.yaml [--field.sub value …]"),
        ("plan", _PLAN, _plan, scenario, "FILE.yaml --gpus N [--field.sub value …]"),
    ):
        sub = commands.add_parser(
            name,
            help=text.splitlines()[0],
            usage=f"flash {name} {words}",
            description=text,
            epilog=_config_help(model),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.set_defaults(command=command)
    worker = commands.add_parser("worker", help=_WORKER, add_help=False, allow_abbrev=False)
    worker.set_defaults(command=_worker)
    # argparse finds the command and shows help; fields are the configuration's to understand.
    first, rest = list(arguments[:1]), arguments[1:]
    if first and first[0] != "worker" and {"-h", "--help"} & set(rest):
        first.append("--help")
    return parser.parse_args(first).command, rest


# ── the commands ─────────────────────────────────────────────────────────────────────────────


def _train(arguments: Sequence[str]) -> None:
    sources, overrides = _words(arguments)
    config = configuration.load(_only(sources, "a preset or a YAML file"), overrides)
    if config.uses_environment:
        configuration.try_environment(config.env)
    if port := config.engine.door_port:
        machine.check_port("127.0.0.1", port, f"engine.door_port={port}")
    from flash.train import train  # noqa: PLC0415  (help and mistakes must not wait for it)

    async def until_stopped() -> dict[str, Any] | None:
        return await train(config, stop=_stop_on_signals())

    summary = run_loop(until_stopped())
    if summary is None:
        print("stopped before the first step: nothing was trained")
        return
    first, last = summary["eval_success_rate_first"], summary["eval_success_rate_last"]
    print(f"{summary['folder']}: {summary['steps']} steps in {summary['time_s']:.0f} s")
    if first is not None and last is not None:
        print(
            f"success rate on {summary['eval_tasks']} held-out tasks: "
            f"{first:.1%} → {last:.1%} ({100 * (last - first):+.1f} points), "
            f"alpha={config.alpha:g}, seed={config.seed}"
        )


def _eval(arguments: Sequence[str]) -> None:
    sources, overrides = _words(arguments)
    source = _only(sources, "a run's folder or a checkpoint")
    if source is None:
        raise ValueError("flash eval what? Give a run's folder or a checkpoint: runs/NAME")
    from flash.evaluate import evaluate  # noqa: PLC0415  (help and mistakes must not wait for it)

    evaluation = run_loop(evaluate(Path(source), overrides))
    for name, value in evaluation.metrics().items():
        print(f"{name:20} {value:.4g}")


def _simulate(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="flash simulate", add_help=False, allow_abbrev=False)
    parser.add_argument("--calibrate", type=Path)
    parser.add_argument("--sweep", action="append", default=[])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--timeline", action="store_true")
    parser.add_argument("--out", type=Path)
    options, words = parser.parse_known_args(arguments)
    sources, changes = _words(words, Scenario)
    source = _only(sources, "a scenario's YAML file")
    if (source is None) == (options.calibrate is None):
        raise ValueError("flash simulate what? Give a scenario's YAML file, or --calibrate RUN")
    if options.seeds < 1:
        raise ValueError(f"--seeds {options.seeds}: must be at least 1")
    values: dict[str, list[Any]] = {}
    for text in options.sweep:
        name, listed = _swept(text)
        if name in values:
            raise ValueError(f"--sweep {name} is given twice: write --sweep {name}=V1,V2,…")
        values[name] = listed
    from flash.simulate import command  # noqa: PLC0415  (help and mistakes must not wait for it)

    if source is not None:
        scenario = load_scenario(Path(source), changes)
    else:
        scenario = command.calibrated(options.calibrate, options.out).changed(changes)
        values = values or {"alpha": sorted({0.0, 1.0, scenario.alpha})}
    command.sweep(scenario, values, seeds=options.seeds, timeline=options.timeline, out=options.out)


def _plan(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="flash plan", add_help=False, allow_abbrev=False)
    parser.add_argument("--gpus", type=int)
    parser.add_argument("--gpu", choices=GPUS)
    parser.add_argument("--model")
    parser.add_argument("--alphas", default="0,1,2,4")
    parser.add_argument("--calibrate", type=Path)
    parser.add_argument("--out", type=Path)
    options, words = parser.parse_known_args(arguments)
    sources, changes = _words(words, Scenario)
    source = _only(sources, "a scenario's YAML file")
    if options.gpus is None or (source is None) == (options.calibrate is None):
        raise ValueError(
            "flash plan what? Give a scenario's YAML file or --calibrate RUN, and --gpus N"
        )
    if (options.gpu is None) != (options.model is None):
        raise ValueError("--gpu and --model go together: the times follow from both")
    if not (alphas := _listed("alphas", options.alphas)):
        raise ValueError("--alphas is empty: write --alphas A,B,…")
    # Help and mistakes must not wait for them.
    from flash.simulate import command, plan_command  # noqa: PLC0415

    if source is not None:
        scenario = load_scenario(Path(source), changes)
    else:
        scenario = command.calibrated(options.calibrate, options.out).changed(changes)
    if options.gpu is not None:
        scenario = on_hardware(scenario, options.model, options.gpu, keep=changes)
    plan_command.run(scenario, gpus=options.gpus, alphas=alphas, out=options.out)


def _swept(text: str) -> tuple[str, list[Any]]:
    """The field of `FIELD=V1,V2,…`, and its values."""
    name, _, values = text.partition("=")
    if not name or not values:
        raise ValueError(f"--sweep {text}: write --sweep FIELD=V1,V2,…")
    return name.replace("-", "_"), _listed("sweep", values)


def _listed(option: str, values: str) -> list[Any]:
    listed: list[Any] = _yaml(option, f"[{values}]")
    return listed


def _worker(arguments: Sequence[str]) -> None:
    config = parse_worker(arguments, prog="flash worker")
    from flash.worker.server import main as serve  # noqa: PLC0415  (imports torch)

    serve(config)


def run_loop(main: Coroutine[Any, Any, _T]) -> _T:
    """Runs a coroutine as the commands do: on uvloop, with garbage collected by the clock.

    Python counts what is made less what is dropped, so while old episodes go, new ones gather in
    its youngest generation, and a look at them holds the loop for 0.1 s. Next to nothing of a run
    is cyclic garbage: a full look at rare intervals finds it.
    """
    import uvloop  # noqa: PLC0415  (only a run needs it)

    async def collecting() -> _T:
        _collect_by_the_clock(asyncio.get_running_loop())
        return await main

    gc.disable()
    try:
        return uvloop.run(collecting())
    finally:
        gc.enable()


def _collect_by_the_clock(loop: asyncio.AbstractEventLoop) -> None:
    def collect() -> None:
        gc.collect()
        loop.call_later(_GARBAGE_EVERY_S, collect)

    loop.call_later(_GARBAGE_EVERY_S, collect)


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


# ── words of the command line ────────────────────────────────────────────────────────────────


def _words(
    arguments: Sequence[str], model: type[BaseModel] = configuration.Config
) -> tuple[list[str], dict[str, Any]]:
    """The plain words, and the fields: `--field.sub value`, `--field.sub=value`, `--switch`.

    Values are YAML, except where the field is a text.
    """
    kinds = {name: info.annotation for name, info in configuration.fields(model)}
    plain: list[str] = []
    fields: dict[str, Any] = {}
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            plain.append(word)
            continue
        name, given, value = word[2:].partition("=")
        name = name.replace("-", "_")
        name = "checkpoint.resume" if name == "resume" else name
        if not given:
            if kinds.get(name) is bool and (not words or words[0].lower() not in _SWITCH):
                value = "true"
            elif not words or words[0].startswith("--"):
                dashes = f", or --{name}='{words[0]}' if that is the value" if words else ""
                raise ValueError(f"--{name} has no value: write --{name} VALUE{dashes}")
            else:
                value = words.pop(0)
        fields[name] = value if kinds.get(name) is str else _yaml(name, value)
    return plain, fields


_SWITCH = ("true", "false", "yes", "no", "on", "off")


def _yaml(name: str, value: str) -> Any:
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        why = getattr(error, "problem", None) or str(error)
        raise ValueError(f"--{name} {value!r} is not a YAML value: {why}") from error


def _only(words: Sequence[str], what: str) -> str | None:
    if len(words) > 1:
        meant = next((f"; did you mean -{w}?" for w in words if w.startswith("-")), "")
        raise ValueError(
            f"{words[1]!r} is one word too many: give {what}, then --field value pairs{meant}"
        )
    return words[0] if words else None


# ── help ─────────────────────────────────────────────────────────────────────────────────────


def _config_help(model: type[BaseModel]) -> str:
    """Every field with its type, what it is for, and its default; from the models."""
    lines = ["fields (nested in a YAML file, dotted here; defaults in brackets):"]
    inside: tuple[str, ...] = ()  # of fields that are shown as one
    refused = tuple(f"rollout.{name}" for name in NOT_SIMULATED) if model is Scenario else ()
    for name, info in configuration.fields(model):
        kind = info.annotation
        if name.startswith(inside + refused):
            continue
        if kind is Distribution:
            inside += (f"{name}.",)
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            lines += ["", f"  {name}: {(kind.__doc__ or '').splitlines()[0]}"]
            continue
        if info.discriminator is not None:
            lines += ["", f"  {name}: {info.description}"]
            continue
        head = f"  --{name} {_kind(kind)}"
        about = f"{info.description or ''}{_default(info.default)}"
        wrapped = textwrap.wrap(about, _WIDTH - _INDENT, break_on_hyphens=False)
        if len(head) >= _INDENT:
            lines.append(head)
        else:
            first = wrapped.pop(0) if wrapped else ""
            lines.append(f"{head:{_INDENT}}{first}")
        lines += [" " * _INDENT + line for line in wrapped]
    if inside:
        lines += ["", "  what varies is a number, or a mapping of:"]
        lines += [f"    {n:10}{i.description}" for n, i in Distribution.model_fields.items()]
    else:
        lines += ["", "presets: " + ", ".join(sorted(configuration.presets()))]
    return "\n".join(lines)


def _kind(kind: Any) -> str:
    """A field's type as it is written on a command line."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "|".join(str(choice) for choice in inner)
    if origin in (types.UnionType, Union):
        return "|".join(_kind(one) for one in inner)
    if origin is tuple:
        return f"[{_kind(inner[0])}, …]"
    if origin is dict:
        return "{key: value}"
    if kind is Distribution:
        return "number|{kind: …}"
    names: dict[Any, str] = {str: "text", bool: "true|false", type(None): "null", Path: "path"}
    return names.get(kind) or str(kind.__name__)


def _default(default: Any) -> str:
    if default is PydanticUndefined or default in ("", None, (), {}):
        return ""
    if isinstance(default, tuple):
        default = list(default)
    if isinstance(default, Distribution):
        default = f"{default.mean:g}"
    return f" [{str(default).lower() if isinstance(default, bool) else default}]"
