"""What `flash replay --retrain` may change of a run."""

from flash.section import Section
from flash.trainer.config import TrainerConfig


class Retraining(Section):
    """The run's trainer."""

    trainer: TrainerConfig = TrainerConfig()
