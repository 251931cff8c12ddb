"""The small policy, made from an environment's vocabulary and taught by its expert."""
