"""Environments in the event loop, or in host processes."""
