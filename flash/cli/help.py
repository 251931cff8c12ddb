"""What the commands say of themselves: their texts, and every field from the models."""

import textwrap
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr
from pydantic_core import PydanticUndefined

from flash import config as configuration
from flash.command_line import nearest
from flash.replay.fields import Retraining
from flash.simulate.distributions import Distribution
from flash.simulate.hardware import GPUS
from flash.simulate.scenario import NOT_SIMULATED, Scenario

_WIDTH = 100
_INDENT = 38

_TRAIN = """\
  flash train alfworld                         the preset as it is
  flash train frozen_lake --steps 4 --alpha 1 --name try
  flash train frozen_lake --steps 60 --name try --resume
  flash train alfworld --model Qwen/Qwen2.5-0.5B-Instruct --agent.style chat
  flash train my_run.yaml --env.options.max_turns 12
  flash train my_run.yaml --cluster ray --cluster.explorers.min 4
  flash train --env my_package.my_env:MyEnv --env.eval_options '{}'
  flash train --agent.run my_agent:act --model Qwen/Qwen2.5-0.5B-Instruct --env my_world

Results are in runs/<name>/. Ctrl-C ends the run after its step, with a checkpoint.
"""
_EVAL = """\
  flash eval runs/alfworld
  flash eval runs/alfworld/checkpoints/step_000010 --eval.tasks 256
  flash eval --env frozen_lake --env my_env:MyEnv --model http://host:8000 --eval.samples 8
  flash eval gsm8k --model Qwen/Qwen2.5-0.5B-Instruct --json results.json
  flash eval --compare before.json after.json

  --env NAME              an environment, or a preset or YAML file with its settings; several are
                          played at the same time, in the place of those that are configured
  --model MODEL|URL       in the place of a checkpoint: a model's name or folder; or a server of
                          vLLM or SGLang, or of /v1/completions with token ids, as it is
  --tokenizer NAME        or a folder: of a server's model, if the server does not say it
  --json FILE             the results as data, with each episode; -: to stdout, and no table
  --compare FILE FILE     plays nothing: how two such results differ, task by task

A run's folder, a preset or a YAML file says how; fields given here change it, and without any of
these agent.style is chat. A server's key: --engine.api_key '$NAME', of a variable. Nothing is
trained, and nothing written to a run. Ctrl-C ends it, and prints what there is.
"""
_SHOW = """\
  flash show runs/alfworld
  flash show runs/alfworld --step 20

  --step N                those of that step [the last one]
  --task-set NAME         those of that task set only

What the policy read and said, and its rewards, as the run's transcripts.jsonl has it; `transcripts`
in the run's configuration says of how many episodes of a step.
"""
_REPLAY = """\
  flash replay runs/alfworld                   the newest episode that was trained
  flash replay runs/alfworld --episode 17 --colour version
  flash replay runs/alfworld --dropped stale --json
  flash replay runs/alfworld --rescore my_rewards:brief
  flash replay runs/alfworld --retrain --trainer.learning_rate 1e-4
  flash replay runs/alfworld --retrain --from step_000010

  --episode N             that episode
  --group N               all of that group
  --worst                 the trained one of the lowest reward
  --dropped [REASON]      the newest that was dropped, for that reason or any
  --task-set NAME         of that task set only; also with --worst and --dropped
  --colour WHAT           of sampled tokens in a terminal: logprob or version [logprob]
  --rescore MODULE:NAME   a reward, a function of the episode (flash.types.Transcript), on all that
                          were played: what it would have changed
  --retrain               the logged batches through the trainer again, with its settings as they
                          were or as they are given; numbers beside those logged
  --from CHECKPOINT       where --retrain begins, as step_000010 [the first model]
  --json                  the same as data
  --log.url URL           of the run's log, where its folder does not keep it

A run that is going on may be looked at, and nothing is written to its folder.
"""
_EXPLORE = """\
  flash explore runs/alfworld                  of a run on this machine, or a shared disk
  flash explore http://host:8765 --token '$TOKEN' --name spot-7 --engine.workers 8

  --token TOKEN           of the run, as its explorers.json has it; $NAME: of a variable
  --name NAME             what the run calls it; what it finished alone is handed in by the next
                          start of that name [host and process]
  --folder DIR            for logs, and for what it finished alone [explorers/NAME, in the run's
                          folder if it is given]
  --ca FILE               the controller's certificate, or who vouches for it, in PEM
  --relay ADDRESS         of this machine, at which other explorers take weights from this one, so
                          that the trainer need not send them to each: 10.0.0.7, or 10.0.0.7:8766
  --drain_s SECONDS       for episodes to come to their ends when it leaves [120]
  --wait_s SECONDS        for a controller that is away or not there yet; it leaves after that, with
                          exit code 1; inf: it waits for ever [3600]
  --evaluates             it plays evaluations alone, each with the weights of its step
  --tasks FILE            YAML with task sets that it brings, NAME: {env, agent, reward}; the run
                          has task_sets.NAME.brought=true
  --tasks-only            it plays no other tasks than those

The run must let explorers in: --explorers.expected 1. They may start before it. SIGTERM or Ctrl-C
ends what is played, or hands it back, and leaves; once more hands back at once. The run's
configuration says all but: engine, env.hosts, reward.concurrency, reward.api_key, reward.url.
"""
_STATUS = """\
  flash status runs/alfworld

  --json                  the same as data

A line for each role: where it is, the version it has, what it does a second, what it is at and
what it waits for. The run writes it to status.json every two seconds.
"""
_CONVERT = """\
  flash convert rlvr_config.yaml --out mine.yaml
  flash convert run_qwen.sh > mine.yaml
  flash convert config.yaml --from verl --json

  --from SYSTEM           roll, trinity, verl or gerl [told by the keys]
  --out FILE              a file to be made [standard output]
  --json                  all of it as data, in place of YAML and table

A YAML file, or a script with words section.key=value, becomes a configuration that loads. A table
on standard error tells of each key what it has become, why it has no meaning here, or what is
missing; the file begins with what must be decided before it trains. docs/coming-from.md says more.
"""
_EXPORT = """\
  flash export runs/alfworld/checkpoints/step_000100 --out trained --dtype bfloat16
  flash export runs/alfworld --format parquet
  flash export runs/alfworld --format jsonl --episodes all --out episodes.jsonl

A checkpoint becomes a Hugging Face model with its tokenizer, adapters merged:

  --out DIR               a folder to be made
  --dtype WHAT            float32 or bfloat16 [float32]

Of a run's folder, episodes become a dataset:

  --format WHAT           jsonl or parquet
  --episodes WHICH        trained, or all that ended [trained]
  --out FILE              [dataset_trained.parquet, and so on, in the run's folder]
  --log.url URL           of the run's log, where its folder does not keep it

A row is an episode: its task, outcome, reward and versions; what was read and said in turns and as
messages; tokens, logprobs, versions and loss mask of each sequence.
"""
_SIMULATE = """\
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
  flash plan scenario.yaml --gpus 128
  flash plan scenario.yaml --gpus 64 --gpu h100 --model 8e9
  flash plan --calibrate runs/alfworld --gpus 8

  --gpus N                the whole cluster's
  --gpu NAME, --model M   compute the times of workers and trainer from a GPU (GPU_NAMES) and a
                          model: its number of parameters, or a directory with its config.json
  --alphas A,B,…          to choose from [0,1,2,4]
  --calibrate RUN         in place of a file: fit the scenario to a run
  --out DIR               where the files go [runs/plans/NAME]
"""
_USAGE = {
    "train": ("[PRESET|FILE.yaml] [--field.sub value …]", _TRAIN),
    "eval": (
        "[RUN|CHECKPOINT|PRESET|FILE.yaml] [--env NAME …] [--model MODEL|URL] "
        "| --compare FILE FILE",
        _EVAL,
    ),
    "show": ("RUN [--step N]", _SHOW),
    "replay": (
        "RUN [--episode N|--group N|--worst|--dropped [REASON]|--rescore …|--retrain]",
        _REPLAY,
    ),
    "explore": ("RUN|URL [--field value …]", _EXPLORE),
    "status": ("RUN [--json]", _STATUS),
    "convert": ("FILE [--from SYSTEM] [--out FILE] [--json]", _CONVERT),
    "export": ("CHECKPOINT --out DIR | RUN --format jsonl|parquet", _EXPORT),
    "simulate": ("FILE.yaml [--field.sub value …]", _SIMULATE),
    "plan": ("FILE.yaml --gpus N [--field.sub value …]", _PLAN),
}

_FIELDS: dict[str, type[BaseModel]] = {"simulate": Scenario, "plan": Scenario, "replay": Retraining}
_NO_FIELDS = ("show", "export", "convert")


def of(command: str, about: str, words: Sequence[str]) -> str:
    """What a command takes; with a section's name, the fields of that section alone."""
    model = _FIELDS.get(command, configuration.Config)
    if words:
        return _section_help(model, words[0].removeprefix("--"))
    usage, text = _USAGE[command]
    text = text.replace("GPU_NAMES", ", ".join(GPUS))
    fields = "" if command in _NO_FIELDS else f"\n{fields_help(model)}"
    return f"usage: flash {command} {usage}\n\n{about}\n\n{text}{fields}"


def _section_help(model: type[BaseModel], section: str) -> str:
    """ValueError for a section that there is not."""
    known = [name for name, _ in configuration.fields(model)]
    if section not in known:
        sections = dict.fromkeys(name.partition(".")[0] for name in known if "." in name)
        hint = nearest(section, known, f"there are {', '.join(sections)}")
        raise ValueError(f"--help {section!r} is no section: {hint}")
    return fields_help(model, section)


def fields_help(model: type[BaseModel], section: str = "") -> str:
    """Every field with its type, what it is for, and its default; those of one section, if named.

    All of it comes from the models.
    """
    lines = ["fields (nested in a YAML file, dotted here; defaults in brackets):"]
    inside: tuple[str, ...] = ()  # of fields that are shown as one
    refused = tuple(f"rollout.{name}" for name in NOT_SIMULATED) if model is Scenario else ()
    for name, info in configuration.fields(model):
        if section and not f"{name}.".startswith(f"{section}."):
            continue
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
    elif model is configuration.Config and not section:
        lines += ["", "presets: " + ", ".join(sorted(configuration.presets()))]
    return "\n".join(lines)


def _kind(kind: Any) -> str:
    """A field's type as it is written on a command line."""
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
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
    names[SecretStr] = "text"
    return names.get(kind) or str(kind.__name__)


def _default(default: Any) -> str:
    if default is PydanticUndefined or default in ("", None, (), {}, SecretStr("")):
        return ""
    if isinstance(default, tuple):
        default = list(default)
    if isinstance(default, Distribution):
        default = f"{default.mean:g}"
    return f" [{str(default).lower() if isinstance(default, bool) else default}]"
