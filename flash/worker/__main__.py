"""`python -m flash.worker --model DIR`: the embedded worker as a process of its own."""

import sys

from flash.command_line import ended
from flash.system.process import die_with_parent, lasting
from flash.worker.config import parse


def main() -> None:
    """Serves until it is told to end."""
    config = parse(sys.argv[1:], prog="python -m flash.worker")
    with lasting():
        from flash.worker.server import main as serve  # noqa: PLC0415  (seconds to import)

    serve(config)


if __name__ == "__main__":
    die_with_parent()  # before the import of torch, which takes seconds
    sys.exit(ended(main))
