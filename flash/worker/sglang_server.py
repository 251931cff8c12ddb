"""`python -m flash.worker.sglang_server …`: SGLang's server, with `$SGLANG_API_KEY` as its key.

It is `python -m sglang.launch_server`, which takes the key as an argument: there the command line
would have it, for all of the machine to read.
"""

import os
import runpy
import sys

_SERVER = "sglang.launch_server"


def main(arguments: list[str]) -> None:
    """Serves until it is told to end."""
    sys.argv = [_SERVER, *arguments, f"--api-key={os.environ['SGLANG_API_KEY']}"]
    runpy.run_module(_SERVER, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
