"""`python -m flash.worker --model DIR`: the embedded worker as a process of its own."""

import argparse
from dataclasses import fields

from flash.worker.server import WorkerConfig, main


def parse() -> WorkerConfig:
    """Every field of WorkerConfig is an option of the same name."""
    parser = argparse.ArgumentParser(prog="python -m flash.worker", description=__doc__)
    for field in fields(WorkerConfig):
        option = "--" + field.name.replace("_", "-")
        if field.name == "model":
            parser.add_argument(option, required=True, help="a directory or a hub name")
        else:
            parser.add_argument(option, type=type(field.default), default=field.default)
    return WorkerConfig(**vars(parser.parse_args()))


if __name__ == "__main__":
    main(parse())
