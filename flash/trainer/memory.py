"""What memory a rank keeps from step to step, by the model's size: before anything is loaded."""

from flash.trainer.config import TrainerConfig

# Of a parameter.
FLOAT32_BYTES, MOMENTS_BYTES, HALF_BYTES = 4, 8, 2
TRAINED_BYTES = 2 * FLOAT32_BYTES + MOMENTS_BYTES  # itself, its gradient, AdamW's moments

# Of a layer that is a unit of FSDP: its buffer that it was gathered in, itself, and the buffer of
# the next; of its gradient in float32 what goes to the other ranks, of it and of the one before.
GATHERED_LAYERS, SENT_LAYERS = 3, 2


def least_kept(parameters: int, config: TrainerConfig) -> float:
    """Bytes of a rank, of a model of so many parameters: its share of the weights, and of the
    gradients and AdamW's moments of what is trained, without activations and what is gathered.

    With adapters the weights alone, which are in float32 while they are loaded.
    """
    each = FLOAT32_BYTES if config.lora.rank else TRAINED_BYTES
    return each * _shared_out(parameters, config)


def least_beside_others(parameters: int, config: TrainerConfig) -> float:
    """Likewise of a rank on a GPU that has made room for others: its share of the weights."""
    frozen_in_half = config.lora.rank and config.dtype != "float32"
    each = HALF_BYTES if frozen_in_half else FLOAT32_BYTES
    return each * _shared_out(parameters, config)


def _shared_out(parameters: int, config: TrainerConfig) -> float:
    """How many of a model's parameters a rank has, and of its critic's."""
    return parameters / (config.shard_size or config.ranks) * (1 + config.has_critic)
