"""The trainer: a handle in the controller, FSDP2 ranks in processes of their own."""

from flash.trainer.config import TrainerConfig
from flash.trainer.trainer import Trainer

__all__ = ["Trainer", "TrainerConfig"]
