"""`python -m flash.worker --model DIR`: the embedded worker as a process of its own."""

import sys

from flash.process import die_with_parent, lasting
from flash.worker.config import parse

if __name__ == "__main__":
    die_with_parent()  # before the import of torch, which takes seconds
    config = parse(sys.argv[1:], prog="python -m flash.worker")
    with lasting():
        from flash.worker.server import main

    main(config)
