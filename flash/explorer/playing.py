"""An explorer at work: from when its workers are ready until it leaves, or the run has changed."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from flash.errors import first_error
from flash.explorer.connection import Connection
from flash.explorer.player import Player
from flash.hub.hub import InferenceHub
from flash.rollout.crew import AgentCrew
from flash.stop import unless

_SETTLES_S = 15.0  # for the controller to say that it has what was handed over


async def play(
    player: Player,
    connection: Connection,
    hub: InferenceHub,
    crew: AgentCrew,
    heldout: AgentCrew,
    *,
    stop: asyncio.Event,
    drain_s: float,
    say: Callable[[str], None],
    by_files: bool = True,
) -> None:
    """Plays with these crews until `stop` is set and what ran has ended, or the run has changed.

    `by_files`: how the hub's workers get weights, as for the connection.
    """
    player.use(
        {False: crew, True: heldout},
        room=lambda: hub.room - crew.starting - heldout.starting,
        version=lambda: hub.version,
        stats=hub.stats,
        on_fatal=connection.fail,
    )
    async with crew, heldout, _telling(player), connection.publishing_to(hub, by_files=by_files):
        try:
            if await unless(stop, connection.changes()) is None:
                await _drain(player, drain_s, say)
        finally:
            player.hand_back()
            await connection.flush()


async def _drain(player: Player, drain_s: float, say: Callable[[str], None]) -> None:
    """Finishes what runs, hands back what takes longer, and waits until all of it is safe."""
    player.leave()
    if player.running:
        say(f"leaving: {player.running} episodes come to their ends, for {drain_s:g} s at most")
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(drain_s):
            await player.until(lambda: player.running == 0)
    player.hand_back()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_SETTLES_S):
            await player.until(lambda: player.empty)
    if player.empty:
        player.say_goodbye()
    else:
        say("leaving: what was finished is on disk; start again with the same --name to hand it in")


@contextlib.asynccontextmanager
async def _telling(player: Player) -> AsyncIterator[None]:
    with first_error():
        async with asyncio.TaskGroup() as tasks:
            telling = tasks.create_task(player.tell_often(), name="how it stands")
            try:
                yield
            finally:
                telling.cancel()
