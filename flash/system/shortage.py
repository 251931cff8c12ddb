"""What this machine lacks for a while is waited for."""

import asyncio
import errno
import logging
import math
from collections.abc import Awaitable, Callable
from typing import TypeVar

logger = logging.getLogger(__name__)

# Of sockets, files, processes or memory all are taken.
_SCARCE = {
    errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.EADDRNOTAVAIL, errno.EAGAIN, errno.ENOMEM,
}  # fmt: skip
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.05, 2.0
T = TypeVar("T")


async def when_there_is_room(
    attempt: Callable[[], Awaitable[T]], *, within_s: float = math.inf
) -> T:
    """What `attempt` gives, which is tried again as long as this machine lacks what it needs.

    It is nobody's failure but the machine's, and passes when something else ends. After `within_s`
    it is the caller's to hear of; without it the caller has a deadline of its own.
    """
    clock = asyncio.get_running_loop().time
    deadline = clock() + within_s
    wait_s = _FIRST_WAIT_S
    while True:
        try:
            return await attempt()
        except OSError as error:
            if error.errno not in _SCARCE or clock() >= deadline:
                raise
            logger.warning("this machine is short of something, which is waited for: %s", error)
        await asyncio.sleep(wait_s)
        wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
