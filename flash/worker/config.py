"""How an embedded worker runs, and its command line; imports no torch."""

import argparse
import os
import secrets
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, get_type_hints

from flash.command_line import Options
from flash.system import machine
from flash.system.machine import Capacity

_CHOICES = {"device": ("auto", "cpu", "cuda"), "dtype": ("auto", "float32", "bfloat16")}
# The least that a worker needs, and the most that helps it.
CACHED_TOKEN_BYTES = 256  # keys and values of the smallest head there is, in bfloat16
MASK_BYTES = 4  # of attention, for each pair of the tokens in a step
THREADS_PER_CORE = 8
_LEAST = {"max_running": 1, "cache_tokens": 64, "threads": 0, "version": 0, "seed": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """An embedded worker. The API key comes from `$FLASH_WORKER_API_KEY`, or is made."""

    model: Annotated[str, "a directory or a hub name"]
    host: Annotated[str, "address to listen on"] = "127.0.0.1"
    port: Annotated[int, "0 lets the system choose"] = 0
    device: Annotated[str, "auto, cpu or cuda"] = "auto"
    dtype: Annotated[str, "auto, float32 or bfloat16"] = "auto"
    max_running: Annotated[int, "requests in one step"] = 64
    cache_tokens: Annotated[int, "room for keys and values"] = 65_536
    threads: Annotated[int, "CPU threads; 0 leaves it to torch"] = 0
    routed_experts: Annotated[bool, "tell which experts tokens were routed to"] = False
    version: Annotated[int, "policy version of the model"] = 0
    seed: Annotated[int, "of sampling"] = 0
    api_key: str = ""


def parse(arguments: Sequence[str], prog: str) -> WorkerConfig:
    """The configuration of a command line; tells a key on stderr that was made for it.

    Without one any user of this machine could have the worker load weights. Raises
    ValueError for a port that is taken, a model that is not there, a number that can't be.
    """
    parser = Options(
        prog,
        description="Serve one embedded inference worker: vLLM's token-in-token-out HTTP routes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    hints = get_type_hints(WorkerConfig, include_extras=True)
    for field in fields(WorkerConfig):
        if field.name == "api_key":
            # Not an option, because command lines are for all to read.
            parser.set_defaults(api_key=os.environ.get("FLASH_WORKER_API_KEY", ""))
            continue
        kind, about = hints[field.name].__origin__, hints[field.name].__metadata__[0]
        names = ["--" + field.name.replace("_", "-")]
        if "_" in field.name:
            names.append("--" + field.name)
        if kind is bool:
            parser.add_argument(*names, action="store_true", help=about)
        elif field.name == "model":
            parser.add_argument(*names, type=kind, help=about, required=True)
        else:
            parser.add_argument(
                *names,
                type=kind,
                help=about,
                default=field.default,
                choices=_CHOICES.get(field.name),
            )
    given = vars(parser.options_only(arguments))
    given["model"] = os.path.expanduser(given["model"])  # no shell does it in --model=~/x
    config = WorkerConfig(**given)
    for name, least in _LEAST.items():
        if getattr(config, name) < least:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} {getattr(config, name)}: must be at least {least}")
    _check_machine(config, machine.capacity())
    _check_model(config.model)
    machine.check_port(config.host, config.port, f"--port {config.port}")
    if not config.api_key:
        config = replace(config, api_key=secrets.token_urlsafe(16))
        print(f"no $FLASH_WORKER_API_KEY, so the key is {config.api_key}", file=sys.stderr)
    return config


def _check_machine(config: WorkerConfig, has: Capacity) -> None:
    """What the machine has not would be found out by torch, after it is loaded."""
    if config.device == "cuda" and not has.gpus:
        raise ValueError(f"--device cuda: {has} shows none: use --device cpu")
    if config.threads > (most := has.cores * THREADS_PER_CORE):
        raise ValueError(f"--threads {config.threads}: {has} takes {most} at most")
    for option, given, wanted in (
        ("cache-tokens", config.cache_tokens, config.cache_tokens * CACHED_TOKEN_BYTES),
        ("max-running", config.max_running, config.max_running**2 * MASK_BYTES),
    ):
        if not has.gpus and wanted > has.memory_bytes:
            raise ValueError(
                f"--{option} {given} needs {wanted / 1e9:,.1f} GB of memory, more than {has} can "
                f"give: lower it"
            )


def _check_model(model: str) -> None:
    """A directory that is not there would be looked for on the hub, and the error be the hub's."""
    if Path(model).is_dir():
        if not (Path(model) / "config.json").is_file():
            raise ValueError(
                f"--model {model}: the directory holds no config.json, so it is not a model"
            )
    elif model.startswith((".", "/")) or model.count("/") > 1:
        raise ValueError(
            f"--model {model}: there is no such directory; a hub name has the form org/model"
        )
