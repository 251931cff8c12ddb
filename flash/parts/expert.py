"""What a run's batches imitate, read from a file for the run's model."""

from flash.config import Config
from flash.parts.model import load_tokenizer, vocabulary_of
from flash.rollout.expert import ShuffledExpert


def expert_of(config: Config, model: str) -> ShuffledExpert | None:
    """None if nothing is imitated; blocks. ValueError for a file that is not for this model."""
    settings = config.rollout.expert
    if settings.file is None:
        return None
    from flash.rollout.expert_file import read_file  # noqa: PLC0415  (only where there is one)

    trajectories = read_file(
        settings.file,
        load_tokenizer(model),
        vocabulary=vocabulary_of(model),
        max_tokens=config.agent.max_sequence_tokens,
    )
    if settings.episodes > len(trajectories):
        raise ValueError(
            f"rollout.expert.episodes={settings.episodes} exceeds the {len(trajectories)} "
            f"trajectories of {settings.file} that can be imitated: use fewer"
        )
    return ShuffledExpert(
        trajectories, episodes=settings.episodes, weight=settings.weight, seed=config.seed
    )
