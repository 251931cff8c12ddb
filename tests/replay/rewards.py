"""Rewards by `module:name`, as a user has them."""

import asyncio

from flash.types import Transcript


def spread(transcript: Transcript) -> float:
    """Differs between the episodes of a group, whatever a small policy says."""
    return len(transcript.text) % 7 / 7


async def spread_in_a_coroutine(transcript: Transcript) -> float:
    await asyncio.sleep(0)
    return spread(transcript)
