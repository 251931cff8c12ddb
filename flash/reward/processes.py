"""A reward function in processes of its own, which are killed when they take too long."""

from pathlib import Path
from typing import Any

from flash.errors import NodeLost, RewardFailure
from flash.reward.host import RewardHost
from flash.system.pool import ProcessPool
from flash.system.process import Child, StartProcess
from flash.types import Transcript


class RewardProcesses:
    """A scorer that calls `module:function` in one of its processes: see `ProcessPool`.

    The function takes a Transcript and may block, leak, or hang.

    Entering starts all processes, each by `start`; ValueError if they can't import the function,
    NodeLost if there is no place for them.
    """

    def __init__(
        self,
        function: str,
        *,
        processes: int = 2,
        log_dir: Path,
        start: StartProcess = Child.start,
    ) -> None:
        self._function = function
        self._pool = ProcessPool(
            "flash.reward.host",
            RewardHost,
            function,
            role="reward",
            failure=RewardFailure,
            processes=processes,
            log_dir=log_dir,
            start=start,
        )

    async def __aenter__(self) -> "RewardProcesses":
        try:
            await self._pool.__aenter__()
        except NodeLost:
            raise
        except Exception as error:  # the boundary: the function's module may raise anything
            raise ValueError(f"reward.run={self._function!r}: {error}") from error
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._pool.__aexit__(*exc_info)

    async def __call__(self, transcript: Transcript, *, timeout_s: float) -> Any:
        return await self._pool.call("score", transcript, timeout_s=timeout_s)
