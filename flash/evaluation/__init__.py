"""Evaluation on held-out tasks: played with rollout paused, or in the background."""
