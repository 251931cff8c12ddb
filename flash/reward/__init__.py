"""The reward stage: what an ended episode was worth, computed beside everything else."""
