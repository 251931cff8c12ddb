"""Rollout: the loop, the episodes, the crew of agents, the ledger of outcomes."""
