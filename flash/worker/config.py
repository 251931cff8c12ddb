"""How an embedded worker runs, and its command line; imports no torch."""

import argparse
import errno
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated, get_type_hints


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """An embedded worker. The API key comes from `$FLASH_WORKER_API_KEY`."""

    model: Annotated[str, "a directory or a hub name"]
    host: Annotated[str, "address to listen on"] = "127.0.0.1"
    port: Annotated[int, "0 lets the system choose"] = 0
    device: Annotated[str, "auto, cpu or cuda"] = "auto"
    dtype: Annotated[str, "auto, float32 or bfloat16"] = "auto"
    max_running: Annotated[int, "requests in one step"] = 64
    cache_tokens: Annotated[int, "room for keys and values"] = 65_536
    threads: Annotated[int, "CPU threads; 0 leaves it to torch"] = 0
    version: Annotated[int, "policy version of the model"] = 0
    seed: Annotated[int, "of sampling"] = 0
    api_key: str = ""


def parse(arguments: Sequence[str], prog: str) -> WorkerConfig:
    """The configuration of a command line. ValueError for a port that is taken."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Serve one embedded inference worker: vLLM's token-in-token-out HTTP routes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
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
        if field.name == "model":
            parser.add_argument(*names, type=kind, help=about, required=True)
        else:
            parser.add_argument(*names, type=kind, help=about, default=field.default)
    config = WorkerConfig(**vars(parser.parse_args(arguments)))
    _check_free(config.host, config.port)
    return config


def _check_free(host: str, port: int) -> None:
    """Found out now, not after a model was loaded for minutes."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise ValueError(f"--host {host} --port {port}: {error.strerror}") from error
            raise ValueError(
                f"--port {port} is in use on {host}: choose another, or 0 for a free one"
            ) from error
