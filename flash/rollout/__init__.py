"""Rollout: the loop, the episodes, the crew of agents, the ledger of outcomes."""

from flash.rollout.episode import Agent, AgentFactory, Episode
from flash.rollout.evaluation import Evaluation, evaluate
from flash.rollout.filters import GroupFilter
from flash.rollout.ledger import EpisodeRecord, Ledger
from flash.rollout.loop import RolloutLoop

__all__ = [
    "Agent",
    "AgentFactory",
    "Episode",
    "EpisodeRecord",
    "Evaluation",
    "GroupFilter",
    "Ledger",
    "RolloutLoop",
    "evaluate",
]
