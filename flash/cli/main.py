"""The `flash` command: train, eval, simulate, plan, worker."""

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flash import config as configuration
from flash import machine
from flash.cli import help
from flash.cli.event_loop import run_loop
from flash.cli.words import listed, only, split_words, swept
from flash.errors import FlashError
from flash.simulate.hardware import GPUS, on_hardware
from flash.simulate.scenario import Scenario
from flash.simulate.scenario import load as load_scenario
from flash.worker.config import parse as parse_worker


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exit code 2 for what the user got wrong, 3 for a stall, 1 for other failures."""
    # Outside of a loop, which has its own answer, there is nothing to close: imports, the end.
    signal.signal(signal.SIGINT, lambda number, _: os._exit(128 + number))
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
        ("train", help.TRAIN, _train, config, "[PRESET|FILE.yaml] [--field.sub value …]"),
        ("eval", help.EVAL, _eval, config, "RUN|CHECKPOINT [--field.sub value …]"),
        ("simulate", help.SIMULATE, _simulate, scenario, "FILE.yaml [--field.sub value …]"),
        ("plan", help.PLAN, _plan, scenario, "FILE.yaml --gpus N [--field.sub value …]"),
    ):
        sub = commands.add_parser(
            name,
            help=text.splitlines()[0],
            usage=f"flash {name} {words}",
            description=text,
            epilog=help.fields_help(model),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.set_defaults(command=command)
    worker = commands.add_parser("worker", help=help.WORKER, add_help=False, allow_abbrev=False)
    worker.set_defaults(command=_worker)
    # argparse finds the command and shows help; fields are the configuration's to understand.
    first, rest = list(arguments[:1]), arguments[1:]
    if first and first[0] != "worker" and {"-h", "--help"} & set(rest):
        first.append("--help")
    return parser.parse_args(first).command, rest


# ── the commands ─────────────────────────────────────────────────────────────────────────────


def _train(arguments: Sequence[str]) -> None:
    sources, overrides = split_words(arguments)
    config = configuration.load(only(sources, "a preset or a YAML file"), overrides)
    if config.uses_environment:
        configuration.try_environment(config.env)
    if port := config.engine.door_port:
        machine.check_port("127.0.0.1", port, f"engine.door_port={port}")
    from flash.train import train  # noqa: PLC0415  (help and mistakes must not wait for it)

    stop = asyncio.Event()
    summary = run_loop(train(config, stop=stop), stop=stop)
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
    sources, overrides = split_words(arguments)
    source = only(sources, "a run's folder or a checkpoint")
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
    sources, changes = split_words(words, Scenario)
    source = only(sources, "a scenario's YAML file")
    if (source is None) == (options.calibrate is None):
        raise ValueError("flash simulate what? Give a scenario's YAML file, or --calibrate RUN")
    if options.seeds < 1:
        raise ValueError(f"--seeds {options.seeds}: must be at least 1")
    values: dict[str, list[Any]] = {}
    for text in options.sweep:
        name, listed = swept(text)
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
    sources, changes = split_words(words, Scenario)
    source = only(sources, "a scenario's YAML file")
    if options.gpus is None or (source is None) == (options.calibrate is None):
        raise ValueError(
            "flash plan what? Give a scenario's YAML file or --calibrate RUN, and --gpus N"
        )
    if (options.gpu is None) != (options.model is None):
        raise ValueError("--gpu and --model go together: the times follow from both")
    if not (alphas := listed("alphas", options.alphas)):
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


def _worker(arguments: Sequence[str]) -> None:
    config = parse_worker(arguments, prog="flash worker")
    from flash.worker.server import main as serve  # noqa: PLC0415  (imports torch)

    serve(config)
