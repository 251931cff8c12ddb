"""Asynchronous RL post-training of LLMs: rollout and training at once, staleness bounded per token.

A whole run, top to bottom: flash/train.py. To embed the rollout in a script: `RolloutLoop`.

What is exported is listed in `__init__.pyi`, and docs/api.md tells of it. A name's module is
imported when the name is asked for: every child process imports this package, few need any of it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
