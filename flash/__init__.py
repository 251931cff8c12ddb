"""Asynchronous RL post-training of LLMs; see flash/train.py for a whole run."""
