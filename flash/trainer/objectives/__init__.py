"""Objectives: from what is known of each token to its loss. One pure function each, by name.

docs/objectives.md has all of them in a table: loss, source, settings, what stale samples become.

r = π/π_b of a token: π is the policy that is trained, π_b (behaviour) the weights that sampled it,
by the engine's own logprobs; π_p (proximal) are the weights at the start of the step. Never is a
ratio taken against logprobs recomputed at the start of a step and called old: it would be 1, and
correct nothing.

To add one: a function of a TokenBatch, its settings in `settings.py`, its line in `choose.py`, its
rows in docs/objectives.md.
"""
