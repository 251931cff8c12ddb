"""The durable log of a run: every episode, batch and step, committed before it counts."""
