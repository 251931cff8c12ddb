"""The embedded worker: transformers' continuous batching behind vLLM's HTTP routes."""
