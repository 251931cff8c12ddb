"""What memory a rank keeps from step to step, by the model's size: before anything is loaded."""

from flash.trainer.config import TrainerConfig

# Of a parameter.
FLOAT32_BYTES, MOMENTS_BYTES, HALF_BYTES = 4, 8, 2


def least_kept(parameters: int, config: TrainerConfig) -> float:
    """Bytes of a rank, of a model of so many parameters: its share of the weights, and of the
    gradients and AdamW's moments of what is trained, without activations and what is gathered.

    With adapters the weights alone, which are in float32 while they are loaded.
    """
    trained = 0 if config.lora.rank else FLOAT32_BYTES + MOMENTS_BYTES
    return (FLOAT32_BYTES + trained) * shared_out(parameters, config)


def shared_out(parameters: int, config: TrainerConfig) -> float:
    """How many of a model's parameters a rank has, and of its critic's."""
    return parameters / (config.shard_size or config.ranks) * (1 + config.has_critic)
