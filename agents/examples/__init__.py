"""Agents that know nothing of flash, to be trained through the door."""
