"""The small policy: made from an environment's vocabulary, taught by its expert, then kept.

With a real model there is nothing to do here. With `model=small` the same settings give the same
directory, so the second run starts at once.
"""

import asyncio
import functools
import hashlib
import itertools
import json
import logging
import os
import random
import reprlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from flash.errors import TrainerFailure
from flash.registry import said_and_where
from flash.seeds import DEMONSTRATION_SEEDS
from flash.trainer.config import TrainerConfig
from flash.trainer.objectives.settings import Supervised
from flash.trainer.trainer import Trainer
from flash.types import Batch, PromptStyle, Sample, Task, Teachable, Turn
from flash.warm_start import small_policy
from flash.warm_start.config import PolicyConfig, WarmStartConfig
from flash.warm_start.demonstrations import TeachingStyle, to_sample

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
OnProgress = Callable[[str, int, int, Mapping[str, float]], None]


async def small_model(
    *,
    envs: Sequence[object],
    env_key: Sequence[Mapping[str, Any]],
    make_style: Callable[[Any], PromptStyle],
    policy: PolicyConfig,
    warm_start: WarmStartConfig,
    threads: int,
    seed: int,
    cache_dir: Path,
    on_progress: OnProgress,
) -> Path:
    """The directory of the small policy for these environments; made and trained unless it is
    there. It has the words of all, and each teaches in its turn.

    Args:
        envs: each must be Teachable.
        env_key: see `key_of`; with the settings and the seed it names the directory.
        make_style: the prompt style for a tokenizer; must be a TeachingStyle.
        on_progress: called with what is done, how much of it, of how much, and metrics.

    Raises ValueError if an environment or the style can't teach.
    """
    for env, method in itertools.product(envs, ("vocabulary", "demonstrate")):
        if not hasattr(env, method):
            raise ValueError(
                f"model=small: {type(env).__name__} has no method {method!r} to teach a policy "
                f"with; set model to a path or a hub name instead"
            )
    teachers = cast(Sequence[Teachable], envs)
    kept = cache_dir / folder_name(env_key, policy, warm_start, seed)
    if kept.exists():
        logger.info("the small policy of these settings is there already: %s", kept)
        return kept
    working = kept.with_name(f"{kept.name}.{os.getpid()}")
    shutil.rmtree(working, ignore_errors=True)
    try:
        model = working / "untaught"
        create = functools.partial(small_policy.create, seed=seed, **policy.model_dump())
        words = [word for each in teachers for word in _asked(each, "vocabulary", of=str)]
        await _in_thread(create, model, words)
        if warm_start.steps:
            config = TrainerConfig(
                objective=Supervised(),
                learning_rate=warm_start.learning_rate,
                warmup_steps=max(1, warm_start.steps // 20),
                decay_steps=warm_start.steps,
                threads=threads,
            )
            model = await _teach(model, teachers, make_style, warm_start, config, seed, on_progress)
        # Renamed only now, so that a run that is stopped leaves nothing half-taught behind.
        try:
            model.rename(kept)
        except OSError:
            if not kept.exists():  # if it does, another run was there first, with the same
                raise
    except TrainerFailure:
        raise  # the log that it names is in there
    except BaseException:
        shutil.rmtree(working, ignore_errors=True)
        raise
    shutil.rmtree(working)
    return kept


def _asked(teacher: Teachable, method: str, *arguments: object, of: type[_T]) -> list[_T]:
    """What the environment's method gives. ValueError if it raises, or gives no list `of` those."""
    name = f"model=small: {type(teacher).__name__}.{method}"
    remedy = "mend it, or set model to a path or a hub name instead"
    try:
        given = getattr(teacher, method)(*arguments)
        listed = [] if isinstance(given, str) or given is None else list(given)
    except (Exception, SystemExit) as error:  # the boundary to the environment's code
        raise ValueError(f"{name} failed: {said_and_where(error)}: {remedy}") from error
    if not listed or not all(isinstance(one, of) for one in listed):
        raise ValueError(f"{name} gave no list of {of.__name__}: {reprlib.repr(given)}: {remedy}")
    return listed


async def _in_thread(function: Callable[..., object], *arguments: object) -> None:
    """Waits for the thread even if it is cancelled: what it writes late, nobody would remove."""
    thread = asyncio.ensure_future(asyncio.to_thread(function, *arguments))
    try:
        await asyncio.shield(thread)
    except asyncio.CancelledError:
        await asyncio.wait((thread,))
        raise


async def _teach(
    model: Path,
    teachers: Sequence[Teachable],
    make_style: Callable[[Any], PromptStyle],
    settings: WarmStartConfig,
    config: TrainerConfig,
    seed: int,
    on_progress: OnProgress,
) -> Path:
    """Supervised training on expert episodes; returns the directory of the taught model."""
    from transformers import AutoTokenizer  # noqa: PLC0415  (seconds to import)

    style = make_style(AutoTokenizer.from_pretrained(model))
    if not hasattr(style, "spell"):
        raise ValueError(
            f"model=small: the style {type(style).__name__} has no method 'spell' to write "
            f"demonstrations with; set agent.style=plain"
        )
    samples: list[Sample] = []
    for index in range(settings.demonstrations):
        teacher = teachers[index % len(teachers)]
        # In a thread, because an expert's episode takes milliseconds to seconds.
        turns = await asyncio.to_thread(
            _asked, teacher, "demonstrate", Task(DEMONSTRATION_SEEDS[index]), of=Turn
        )
        sample = to_sample(
            turns,
            cast(TeachingStyle, style),
            observation_weight=settings.observation_weight,
            episode=index,
        )
        samples.append(sample)
        on_progress("demonstrations", index + 1, settings.demonstrations, {})
    batches = _batches(samples, settings.batch_tokens, random.Random(seed))
    async with Trainer(model=model, config=config, run_dir=model.parent, seed=seed) as trainer:
        for done in range(settings.steps):
            batch = Batch(samples=next(batches), version=trainer.version)
            metrics = await trainer.step(batch)
            on_progress("supervised steps", done + 1, settings.steps, metrics)
        taught = model.parent / "taught"
        await trainer.save_model(taught)
    return taught


def _batches(
    samples: Sequence[Sample], batch_tokens: int, rng: random.Random
) -> Iterator[list[Sample]]:
    """Endless passes over the samples, each in a new order, cut every `batch_tokens` or so."""
    batch: list[Sample] = []
    while True:
        order = list(samples)
        rng.shuffle(order)
        for sample in order:
            batch.append(sample)
            if sum(s.num_tokens for s in batch) >= batch_tokens:
                yield batch
                batch = []


def key_of(envs: Iterable[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    """What a small policy is made from: `name` and `options` of environments, each once, in an
    order that is always the same."""
    found = [{"name": env["name"], "options": env.get("options", {})} for env in envs]
    by_text = {json.dumps(env, sort_keys=True, default=str): env for env in found}
    return tuple(by_text[text] for text in sorted(by_text))


def folder_name(
    env_key: Sequence[Mapping[str, Any]],
    policy: PolicyConfig,
    warm_start: WarmStartConfig,
    seed: int,
) -> str:
    """Of the small policy of these settings, among those that are kept."""
    settings = {
        "env": dict(env_key[0]) if len(env_key) == 1 else [dict(env) for env in env_key],
        "chat_template": small_policy.CHAT_TEMPLATE,  # is saved with the tokenizer
        "policy": policy.model_dump(mode="json"),
        "warm_start": warm_start.model_dump(mode="json"),
        "seed": seed,
    }
    # An option may be what JSON does not know: a date, as YAML has them.
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
    return f"{'+'.join(dict.fromkeys(env['name'] for env in env_key))}-{digest[:12]}"
