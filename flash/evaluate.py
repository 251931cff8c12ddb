"""`flash eval`: how a run, or one checkpoint of it, does on held-out tasks."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flash import config as configuration
from flash import parts
from flash.evaluation.play import Evaluation
from flash.evaluation.play import evaluate as play
from flash.telemetry.folder import newest_checkpoint
from flash.trainer.checkpoint import MODEL_FOLDER, checkpoint_version
from flash.types import Weights


async def evaluate(
    source: Path, overrides: Mapping[str, Any], say: Callable[[str], None] = print
) -> Evaluation:
    """Plays the held-out tasks with a checkpoint: the newest one if `source` is a run's folder.

    The run's own configuration says how; `overrides` change it. Raises ValueError if there is no
    checkpoint, and what `flash.rollout.evaluate` raises.
    """
    checkpoint = source if source.parent.name == "checkpoints" else newest_checkpoint(source)
    if checkpoint is None:
        raise ValueError(f"{source} holds no checkpoint: give a run's folder or a checkpoint of it")
    version = checkpoint_version(checkpoint)
    run = checkpoint.parent.parent
    config = configuration.load(str(run / "config.yaml"), overrides)
    model = str(checkpoint / MODEL_FOLDER)
    tokenizer = parts.load_tokenizer(model)
    style = parts.make_style(config, tokenizer)
    logs = run / "logs"

    async def weights() -> Weights:
        return Weights(version=version, path=(checkpoint / MODEL_FOLDER).resolve())

    async with (
        parts.open_hub(
            config, model=model, version=version, weights=weights, log_dir=logs, say=say
        ) as hub,
        parts.open_door(config, hub, tokenizer=tokenizer) as door,
        parts.open_envs(config, logs, heldout=True) as envs,
        parts.open_reward(config, hub, tokenizer=tokenizer, log_dir=logs) as reward,
    ):
        agent = parts.agent_factory(
            config, envs=envs, style=style, door=door, log_dir=logs, heldout=True, reward=reward
        )
        return await play(
            hub,
            agent,
            parts.heldout_tasks(config),
            concurrency=config.engine.max_running,
            max_attempts=config.rollout.max_attempts,
            stall_timeout_s=config.rollout.stall_timeout_s,
        )
