"""`python -m flash.worker --model DIR`: the embedded worker as a process of its own."""

import argparse
import os
from dataclasses import fields

from flash.worker.server import WorkerConfig, main


def parse() -> WorkerConfig:
    """Every field of WorkerConfig is an option; the API key is `$FLASH_WORKER_API_KEY`."""
    parser = argparse.ArgumentParser(prog="python -m flash.worker", description=__doc__)
    for field in fields(WorkerConfig):
        option = "--" + field.name.replace("_", "-")
        if field.name == "model":
            parser.add_argument(option, required=True, help="a directory or a hub name")
        elif field.name == "api_key":
            # From the environment, because command lines are for all to read.
            parser.set_defaults(api_key=os.environ.get("FLASH_WORKER_API_KEY", ""))
        else:
            parser.add_argument(option, type=type(field.default), default=field.default)
    return WorkerConfig(**vars(parser.parse_args()))


if __name__ == "__main__":
    main(parse())
