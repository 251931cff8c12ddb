"""`flash eval`: how a run, or one checkpoint of it, does on held-out tasks."""

import asyncio
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flash import config as configuration
from flash.checkpoints import newest_checkpoint
from flash.evaluation.play import heldout_tasks, play
from flash.evaluation.result import Evaluation
from flash.parts.devices import check_devices
from flash.parts.model import check_model_files
from flash.parts.open import open_parts
from flash.system import machine
from flash.system.own_logs import own_logs
from flash.trainer.checkpoint import checkpoint_version
from flash.types import Weights


async def evaluate(
    source: Path, overrides: Mapping[str, Any], say: Callable[[str], None] = print
) -> Evaluation:
    """Plays the held-out tasks with a checkpoint: the newest one if `source` is a run's folder.

    The run's own configuration says how; `overrides` change it. Nothing is written to the run's
    folder, so that the run may be going on meanwhile; the model is made elsewhere, for as long as
    it plays. Raises ValueError if there is no checkpoint, and what `flash.evaluation.play` raises.
    """
    if source.parent.name == "checkpoints":
        checkpoint = source
    elif (newest := newest_checkpoint(source)) is not None:
        checkpoint = newest.path
    else:
        raise ValueError(f"{source} holds no checkpoint: give a run's folder or a checkpoint of it")
    version = checkpoint_version(checkpoint)
    run = checkpoint.parent.parent
    whole = {"trainer.lora.publish": "merged"}  # it is one model
    config = configuration.load(str(run / "config.yaml"), {**overrides, **whole})
    configuration.check_capacity(config, machine.capacity(), trains=False)
    _tell_of_brought(config, say)
    from flash.trainer.hugging_face import export_model  # noqa: PLC0415  (imports torch)

    with tempfile.TemporaryDirectory(prefix="flash-eval-") as folder:
        model = Path(folder) / "model"
        await asyncio.to_thread(export_model, checkpoint, model, dtype="float32")
        await check_model_files(str(model))
        await check_devices(config, str(model), say=say, trains=False)
        return await _play(config, Weights(version=version, path=model), say)


async def _play(
    config: configuration.Config, policy: Weights, say: Callable[[str], None]
) -> Evaluation:
    async def weights() -> Weights:
        return policy

    with own_logs("flash-eval-") as log_dir:
        async with (
            open_parts(
                config,
                model=str(policy.path),
                version=policy.version,
                weights=weights,
                log_dir=log_dir,
                say=say,
            ) as parts,
            parts.agents(heldout=True) as agents,
        ):
            return await play(
                parts.hub,
                agents.make,
                heldout_tasks(config.eval, config.own_sets),
                concurrency=config.engine.max_running,
                max_attempts=config.rollout.max_attempts,
                stall_timeout_s=config.rollout.stall_timeout_s,
            )


def _tell_of_brought(config: configuration.Config, say: Callable[[str], None]) -> None:
    """Which tasks are not played. ValueError if none would be."""
    if not config.brought:
        return
    names = ", ".join(sorted(config.brought))
    name = min(config.brought)
    remedy = f"--task_sets.{name}.brought false and --task_sets.{name}.env NAME play {name} here"
    if not config.own_sets:
        raise ValueError(f"all task sets are brought by explorers ({names}): {remedy}")
    say(f"left out, because explorers bring it: {names}; {remedy}")
