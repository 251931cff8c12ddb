"""`python -m flash.worker.vllm_server …`: vLLM's API server, with the arguments of `vllm serve`.

That command is missing from vLLM's CPU build. The process of the engine imports this module too, as
Python's `spawn` has it.
"""

from typing import Any

from flash.system.process import lasting

with lasting():
    from vllm.entrypoints.launchers.api_server import entry

_server: Any = entry

if __name__ == "__main__":
    _server.main()
