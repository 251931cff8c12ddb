"""`python -m flash.worker --model DIR`: the embedded worker as a process of its own."""

import sys

from flash.worker.config import parse
from flash.worker.server import main

if __name__ == "__main__":
    main(parse(sys.argv[1:], prog="python -m flash.worker"))
