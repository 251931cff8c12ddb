"""What each command does."""

import asyncio
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from flash import config as configuration
from flash.cli.event_loop import run_loop
from flash.cli.words import listed, only, split_words, swept
from flash.command_line import Options, nearest
from flash.section import revealed
from flash.system import machine
from flash.system.process import StartProcess
from flash.trainer.ranks import RankStarter

# Imported where they are needed: mistakes must not wait for torch, or for what simulates.
# ruff: noqa: PLC0415


def _train(arguments: Sequence[str]) -> None:
    sources, overrides = split_words(arguments)
    config = configuration.load(only(sources, "a preset or a YAML file"), overrides)
    if config.cluster.kind == "ray":
        _check(config)
        from flash.cluster.launch import launch

        if code := launch(config):
            raise SystemExit(code)
        return
    run_training(config)


def run_training(
    config: configuration.Config,
    opened: Callable[[Path], None] = lambda _: None,
    starter: RankStarter | None = None,
) -> None:
    """Trains here, and prints what came of it; `opened` is told the run's folder.

    `starter`: of the trainer's ranks; by default they are processes on this machine.

    Raises ValueError for what this machine, or what is around it, can't do.
    """
    nodes = 1 if starter is None else starter.nodes
    configuration.check_capacity(config, machine.capacity(), nodes=nodes)
    _check(config)
    from flash.parts.engine import keep_to_quickest_device
    from flash.train import train

    if told := keep_to_quickest_device(config):
        print(told)
    stop = asyncio.Event()
    summary = run_loop(train(config, stop=stop, opened=opened, starter=starter), stop=stop)
    if summary is None:
        print(_stopped_early(config))
        return
    first, last = summary["eval_success_rate_first"], summary["eval_success_rate_last"]
    print(f"{summary['folder']}: {summary['steps']} steps in {summary['time_s']:.0f} s")
    if first is not None and last is not None:
        print(
            f"success rate on {summary['eval_tasks']} held-out tasks: "
            f"{first:.1%} → {last:.1%} ({100 * (last - first):+.1f} points), "
            f"alpha={config.alpha:g}, seed={config.seed}"
        )


def _check(config: configuration.Config) -> None:
    """ValueError for what a configuration names and is not there, or is not as it must be."""
    configuration.try_environments(config)
    if url := revealed(config.log.url):
        from flash.log.store import open_engine

        open_engine(url).dispose()
    if port := config.engine.door_port:
        machine.check_port("127.0.0.1", port, f"engine.door_port={port}")
    if (expert := config.rollout.expert.file) is not None:
        from flash.rollout.expert_file import check_file

        check_file(expert)


def _stopped_early(config: configuration.Config) -> str:
    """What there is after a stop before a step of this start."""
    if not config.checkpoint.resume:
        return "stopped before the first step: nothing was trained"
    from flash.telemetry.folder import steps_done

    run = config.runs_dir / config.name
    step = steps_done(run)
    where = f"stands at step {step}" if step else "has no step yet"
    return f"stopped before it went on: {run} {where}, as before; --resume goes on from there"


def _eval(arguments: Sequence[str]) -> None:
    parser = Options("flash eval", add_help=False)
    parser.add_argument("--env", action="append", default=[])
    parser.add_argument("--tokenizer")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--compare", nargs=2, metavar="FILE")
    options, words = parser.parse_known_args(arguments)
    if options.json not in (None, "-"):
        _check_can_write(Path(options.json))
    if options.compare is not None:
        if words or options.env or options.tokenizer:
            raise ValueError("--compare plays nothing: give two files of --json, and no more")
        _compare(options.compare, options.json)
        return
    sources, overrides = split_words(words, options=parser.names())
    source = only(sources, "a run's folder, a checkpoint, a preset or a YAML file")
    from flash.evaluate import evaluate, plan

    planned = plan(source, overrides, envs=options.env, tokenizer=options.tokenizer)
    stop = asyncio.Event()

    def say(line: str) -> None:
        print(line, file=sys.stderr)  # the results alone are for a pipe

    report = run_loop(evaluate(planned, say, stop=stop), stop=stop, stopping="stopping here")
    from flash.evaluation.report import show

    show(report, options.json)
    if not report.complete:
        raise SystemExit(128 + signal.SIGINT)


def _compare(files: Sequence[str], json: str | None) -> None:
    from flash.evaluation.comparison import compare, read_report, show

    first, second = (read_report(Path(file)) for file in files)
    show(compare(first, second), json)


def _check_can_write(path: Path) -> None:
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"--json {path}: name a file in a folder that is there, or - for stdout")


def _show(arguments: Sequence[str]) -> None:
    parser = Options("flash show", add_help=False)
    parser.add_argument("--step", type=int)
    parser.add_argument("--task-set", dest="task_set")
    options, words = parser.parse_known_args(arguments)
    for name in (word for word in words if word.startswith("-")):
        parser.error(f"{name} is unknown: {nearest(name, parser.names(), 'leave it out')}")
    source = only(words, "a run's folder")
    if source is None:
        raise ValueError("flash show what? Give a run's folder: runs/NAME")
    from flash.telemetry.transcripts import shown

    print(shown(Path(source), options.step, options.task_set))


def _replay(arguments: Sequence[str]) -> None:
    parser = Options("flash replay", add_help=False)
    parser.add_argument("--episode", type=int)
    parser.add_argument("--group", type=int)
    parser.add_argument("--worst", action="store_true")
    parser.add_argument("--dropped", nargs="?", const="", metavar="REASON")
    parser.add_argument("--task-set", dest="task_set", metavar="NAME")
    parser.add_argument("--colour", choices=("logprob", "version"))
    parser.add_argument("--rescore", metavar="MODULE:FUNCTION")
    parser.add_argument("--retrain", action="store_true")
    parser.add_argument("--from", dest="checkpoint", metavar="CHECKPOINT")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--log.url", dest="url", default="")
    options, words = parser.parse_known_args(arguments)
    from flash.replay.fields import Retraining

    sources, changes = split_words(words, Retraining, parser.names())
    source = only(sources, "a run's folder")
    if source is None:
        first = ", and only then --dropped" if options.dropped else ""
        raise ValueError(f"flash replay what? Give a run's folder: runs/NAME{first}")
    _check_replay(options, changes)
    from flash.replay import command

    run, common = Path(source), {"url": options.url, "as_json": options.json}
    if options.rescore is not None:
        run_loop(command.rescore(run, options.rescore, **common))
    elif options.retrain:
        checkpoint = options.checkpoint or ""
        run_loop(command.retrain(run, changes, checkpoint=checkpoint, **common))
    else:
        command.show(run, _chosen(options), colour=options.colour or "logprob", **common)


def _check_replay(options: Any, changes: Mapping[str, Any]) -> None:
    """ValueError for options that are not of one replay."""
    given = [
        f"--{name}"
        for name in ("episode", "group", "worst", "dropped", "rescore", "retrain")
        if getattr(options, name) not in (None, False)
    ]
    if len(given) > 1:
        raise ValueError(f"{given[0]} and {given[1]}: give one of them")
    if options.colour and (options.json or options.retrain or options.rescore is not None):
        other = "--json" if options.json else given[0]
        raise ValueError(f"--colour {options.colour} with {other}, which has none: leave it out")
    if options.task_set is not None and given and given[0] not in ("--worst", "--dropped"):
        raise ValueError(f"--task-set {options.task_set} with {given[0]}: give one of them")
    if options.retrain:
        return
    if options.checkpoint is not None:
        raise ValueError(f"--from {options.checkpoint} is of --retrain: give that too")
    for name in changes:
        raise ValueError(f"--{name} is of --retrain: give that too, or leave it out")


def _chosen(options: Any) -> Callable[[Any], Any]:
    """What finds the episodes, of an EpisodeReader."""
    if options.episode is not None:
        return lambda reader: reader.episode(options.episode)
    if options.group is not None:
        return lambda reader: reader.group(options.group)

    def choose(reader: Any) -> Any:
        if options.task_set is not None:
            reader = reader.of_set(options.task_set)
        if options.dropped is not None:
            return reader.newest_dropped(options.dropped)
        return reader.worst_trained() if options.worst else reader.newest_trained()

    return choose


def _export(arguments: Sequence[str]) -> None:
    parser = Options("flash export", add_help=False)
    parser.add_argument("--format", choices=("jsonl", "parquet"))
    parser.add_argument("--episodes", choices=("trained", "all"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--log.url", dest="url")
    options, words = parser.parse_known_args(arguments)
    for name in (word.partition("=")[0] for word in words if word.startswith("-")):
        parser.error(f"{name} is unknown: {nearest(name, parser.names(), 'leave it out')}")
    source = only(words, "a run's folder or a checkpoint")
    of_model = options.format is None
    if source is None or (of_model and options.out is None):
        raise ValueError(
            "flash export what? Give a run's folder and --format jsonl or --format parquet, or a "
            "checkpoint and --out and a folder to be made"
        )
    of_other = ("episodes", "url") if of_model else ("dtype",)
    for name in (name for name in of_other if getattr(options, name) is not None):
        given = "--log.url" if name == "url" else f"--{name} {getattr(options, name)}"
        remedy = "give --format, too" if of_model else "leave out --format"
        raise ValueError(f"{given} is of {'episodes' if of_model else 'a model'}: {remedy}")
    if of_model:
        _export_model(Path(source), options.out, dtype=options.dtype or "float32")
        return
    from flash.replay import command

    command.export(
        Path(source), url=options.url or "", format=options.format,
        episodes=options.episodes or "trained", out=options.out,
    )  # fmt: skip


def _export_model(checkpoint: Path, out: Path, *, dtype: str) -> None:
    from flash.trainer.checkpoint import checkpoint_version

    if (kept := checkpoint / "checkpoints").is_dir():
        raise ValueError(
            f"{checkpoint} is a run's folder: give one of {kept} for its model, or --format jsonl "
            f"or --format parquet for its episodes"
        )
    checkpoint_version(checkpoint)  # before torch is waited for
    if out.exists():
        raise ValueError(f"--out {out} is there already: give a folder to be made")
    from flash.trainer.hugging_face import export_model

    export_model(checkpoint, out, dtype=dtype)


def _explore(arguments: Sequence[str]) -> None:
    run_explorer(arguments)


def run_explorer(
    arguments: Sequence[str],
    elsewhere: AbstractAsyncContextManager[StartProcess] | None = None,
) -> None:
    """`flash explore`; `elsewhere` as `explore` has it."""
    parser = Options("flash explore", add_help=False)
    parser.add_argument("--token", default="")
    parser.add_argument("--name", default="")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--ca", type=Path)
    parser.add_argument("--relay", default="")
    parser.add_argument("--drain_s", type=float, default=120.0)
    parser.add_argument("--wait_s", type=float, default=3600.0)
    parser.add_argument("--evaluates", action="store_true")
    parser.add_argument("--tasks", type=Path)
    parser.add_argument("--tasks-only", dest="tasks_only", action="store_true")
    options, words = parser.parse_known_args(arguments)
    sources, overrides = split_words(words, options=parser.names())
    source = only(sources, "a run's folder, or its controller's URL")
    if source is None:
        raise ValueError("flash explore what? Give a run's folder, runs/NAME, or a URL and --token")
    from flash.explorer.explore import checked, explore

    told = checked(
        source=source, token=options.token, name=options.name, folder=options.folder,
        ca=options.ca, relay=options.relay, drain_s=options.drain_s, wait_s=options.wait_s,
        evaluates=options.evaluates, tasks=options.tasks, tasks_only=options.tasks_only,
        overrides=overrides,
    )  # fmt: skip
    stop = asyncio.Event()
    exploring = explore(told, stop=stop, elsewhere=elsewhere)
    run_loop(exploring, stop=stop, stopping="leaving the run")


def _status(arguments: Sequence[str]) -> None:
    parser = Options("flash status", add_help=False)
    parser.add_argument("--json", action="store_true")
    options, words = parser.parse_known_args(arguments)
    for name in (word.partition("=")[0] for word in words if word.startswith("-")):
        parser.error(f"{name} is unknown: {nearest(name, parser.names(), 'leave it out')}")
    source = only(words, "a run's folder")
    if source is None:
        raise ValueError("flash status what? Give a run's folder: runs/NAME")
    from flash.telemetry.status import show

    show(Path(source), as_json=options.json)


def _convert(arguments: Sequence[str]) -> None:
    from flash.convert.conversion import SYSTEMS

    parser = Options("flash convert", add_help=False)
    parser.add_argument("--from", dest="of", choices=SYSTEMS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", action="store_true")
    options, words = parser.parse_known_args(arguments)
    for name in (word.partition("=")[0] for word in words if word.startswith("-")):
        parser.error(f"{name} is unknown: {nearest(name, parser.names(), 'leave it out')}")
    source = only(words, "a configuration's file")
    if source is None:
        raise ValueError("flash convert what? Give a YAML file or script of ROLL, Trinity-RFT, …")
    from flash.convert.command import run

    run(Path(source), of=options.of, out=options.out, as_json=options.json)


def _simulate(arguments: Sequence[str]) -> None:
    from flash.simulate.scenario import Scenario
    from flash.simulate.scenario import load as load_scenario

    parser = Options("flash simulate", add_help=False)
    parser.add_argument("--calibrate", type=Path)
    parser.add_argument("--sweep", action="append", default=[])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--timeline", action="store_true")
    parser.add_argument("--out", type=Path)
    options, words = parser.parse_known_args(arguments)
    sources, changes = split_words(words, Scenario, parser.names())
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
        if name in changes:
            raise ValueError(f"--{name} and --sweep {text}: {name} is given twice: give it once")
        values[name] = listed
    from flash.simulate import command

    if source is not None:
        scenario = load_scenario(Path(source), changes)
    else:
        scenario = command.calibrated(options.calibrate, options.out).changed(changes)
        values = values or {"alpha": sorted({0.0, 1.0, scenario.alpha})}
    command.sweep(scenario, values, seeds=options.seeds, timeline=options.timeline, out=options.out)


def _plan(arguments: Sequence[str]) -> None:
    from flash.simulate.hardware import GPUS, on_hardware
    from flash.simulate.scenario import Scenario
    from flash.simulate.scenario import load as load_scenario

    parser = Options("flash plan", add_help=False)
    parser.add_argument("--gpus", type=int)
    parser.add_argument("--gpu", choices=GPUS)
    parser.add_argument("--model")
    parser.add_argument("--alphas", default="0,1,2,4")
    parser.add_argument("--calibrate", type=Path)
    parser.add_argument("--out", type=Path)
    options, words = parser.parse_known_args(arguments)
    sources, changes = split_words(words, Scenario, parser.names())
    source = only(sources, "a scenario's YAML file")
    if options.gpus is None or (source is None) == (options.calibrate is None):
        raise ValueError(
            "flash plan what? Give a scenario's YAML file or --calibrate RUN, and --gpus N"
        )
    if (options.gpu is None) != (options.model is None):
        raise ValueError("--gpu and --model go together: the times follow from both")
    if not (alphas := listed("alphas", options.alphas)):
        raise ValueError("--alphas is empty: write --alphas A,B,…")
    from flash.simulate import command, plan_command

    if source is not None:
        scenario = load_scenario(Path(source), changes)
    else:
        scenario = command.calibrated(options.calibrate, options.out).changed(changes)
    if options.gpu is not None:
        scenario = on_hardware(scenario, options.model, options.gpu, keep=changes)
    plan_command.run(scenario, gpus=options.gpus, alphas=alphas, out=options.out)


def _worker(arguments: Sequence[str]) -> None:
    from flash.worker.config import parse as parse_worker

    config = parse_worker(arguments, prog="flash worker")
    from flash.worker.server import main as serve

    serve(config)


BY_NAME: dict[str, Callable[[Sequence[str]], None]] = {
    "train": _train,
    "eval": _eval,
    "show": _show,
    "replay": _replay,
    "export": _export,
    "explore": _explore,
    "status": _status,
    "convert": _convert,
    "simulate": _simulate,
    "plan": _plan,
    "worker": _worker,
}
