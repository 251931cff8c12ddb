"""Rewards by `module:name`, as a user has them."""

import asyncio

from flash.types import Transcript


def spread(transcript: Transcript) -> float:
    """Differs between the episodes of a group, whatever a small policy says."""
    return len(transcript.text) % 7 / 7


async def answers(transcript: Transcript) -> float:
    await asyncio.sleep(0)
    return float(len(transcript.responses))


async def of_north(transcript: Transcript) -> float:
    """What the environment gave, and 2 for each episode in which somebody went north."""
    return transcript.reward + 2 * ("north" in transcript.text)


async def told(transcript: Transcript) -> float:
    """What a reward is told, by its parts."""
    return 100 * transcript.task.seed + 10 * transcript.reward + transcript.success


async def not_of_south(transcript: Transcript) -> object:
    return "good" if "south" in transcript.text else 1


async def never(transcript: Transcript) -> float:
    raise KeyError(transcript.task.seed)
