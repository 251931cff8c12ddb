"""The model of a run, its tokenizer, and the prompt style for it."""

import asyncio
import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flash import registry
from flash.config import SMALL, Config
from flash.config.model import check_heads
from flash.positions import check_positions
from flash.tools.environment import offered_by
from flash.tools.tool import PROBE, CallingStyle, Schema
from flash.trainer.config import LoraConfig
from flash.types import PromptStyle
from flash.warm_start.teach import OnProgress, key_of, small_model


async def prepared_model(config: Config, on_progress: OnProgress) -> str:
    """The model to start from: as given, or the small policy, made and taught if need be.

    ValueError for one whose files are not whole, don't fit together, or can't be trained.
    """
    if (lora := config.trainer.lora).rank:
        from flash.trainer.lora import check_installed  # noqa: PLC0415  (seconds to import)

        check_installed(lora)
    reference = config.trainer.kl.reference
    sequence_ranks = config.trainer.sequence_ranks
    if reference is not None and config.trainer.kl.coefficient:
        await check_model_files(
            reference, field="trainer.kl.reference", sequence_ranks=sequence_ranks
        )
    if config.model != SMALL:
        model, local = config.model, Path(config.model).expanduser()
        if local.is_dir():
            model = str(local)
        else:
            settings, engine = _hub_config(model), config.engine
            longest = config.agent.max_sequence_tokens
            check_positions(settings, model=model, max_sequence_tokens=longest)
            if not engine.urls:
                check_heads(settings, model=model, tensor_parallel=engine.tensor_parallel)
        replays = config.trainer.router_replay
        await check_model_files(model, lora=lora, sequence_ranks=sequence_ranks, replays=replays)
        return model
    env_key = key_of(of_set.env.model_dump() for of_set in config.sets.values())
    path = await small_model(
        envs=[registry.environment(env["name"])(**env["options"]) for env in env_key],
        env_key=env_key,
        make_style=lambda tokenizer: make_style(config, tokenizer),
        policy=config.policy,
        warm_start=config.warm_start,
        threads=config.trainer.threads,
        seed=config.seed,
        cache_dir=config.runs_dir / ".small_policies",
        on_progress=on_progress,
    )
    return str(path)


def load_tokenizer(model: str) -> Any:
    """The tokenizer that comes with the model. ValueError if there is none that fits it."""
    from transformers import AutoConfig, AutoTokenizer  # noqa: PLC0415  (seconds to import)

    from flash.trainer.model_files import check_vocabulary  # noqa: PLC0415

    with _told_by_name(model):
        tokenizer = AutoTokenizer.from_pretrained(model)
        config = AutoConfig.from_pretrained(model)
    check_vocabulary(tokenizer, config, source=model)
    return tokenizer


def vocabulary_of(model: str) -> int:
    """How many tokens the model knows."""
    from transformers import AutoConfig  # noqa: PLC0415  (seconds to import)

    return int(AutoConfig.from_pretrained(model).get_text_config().vocab_size)


async def parameters_of(model: str) -> int:
    """How many parameters the model has, by its files' headers."""
    from flash.trainer.model_files import count_parameters  # noqa: PLC0415  (seconds to import)

    return await asyncio.to_thread(count_parameters, model)


async def check_model_files(
    model: str,
    *,
    field: str = "model",
    lora: LoraConfig | None = None,
    sequence_ranks: int = 1,
    replays: bool = False,
) -> None:
    """ValueError for a model whose files are not whole, don't fit together, or can't be trained, or
    not with those adapters, or not by so many ranks to a sequence, or not with experts that others
    chose."""
    from flash.trainer.model_files import check_files  # noqa: PLC0415  (seconds to import)

    await asyncio.to_thread(
        check_files, model, field=field, lora=lora, sequence_ranks=sequence_ranks, replays=replays
    )


def self_test_text(model: str, *, at_most: int) -> list[int]:
    """Token ids, more of them than any layer of the model looks back on, if that may be."""
    from transformers import AutoConfig  # noqa: PLC0415  (seconds to import)

    from flash.trainer.self_test import texts  # noqa: PLC0415

    return texts(AutoConfig.from_pretrained(model), at_most=at_most)[0]


def _hub_config(model: str) -> Mapping[str, Any]:
    """The config.json of a hub's model. ValueError if there is none to be had."""
    from transformers import PreTrainedConfig  # noqa: PLC0415  (seconds to import)

    with _told_by_name(model):
        return PreTrainedConfig.get_config_dict(model)[0]


@contextlib.contextmanager
def _told_by_name(model: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())
        raise ValueError(
            f"model={model!r} can't be loaded: check its name and the connection to the hub, or "
            f"give a directory ({why})"
        ) from error


def env_tools(config: Config) -> list[Schema]:
    """What the environment offers to the agent that plays it."""
    return [] if config.agent.run else offered_by(config.env.name)


def make_style(config: Config, tokenizer: Any) -> PromptStyle:
    """The prompt style of the configuration, for a tokenizer."""
    try:
        style: PromptStyle
        style = registry.style(config.agent.style)(tokenizer, **config.agent.style_options)
        has_tools = config.agent.has_tools or bool(env_tools(config))
        if has_tools and isinstance(style, CallingStyle):
            style.calling([PROBE])  # which says at once if the model calls no tools
    except Exception as error:  # the boundary to the style's code
        raise ValueError(
            f"agent.style={config.agent.style!r} with the tokenizer of model={config.model!r}: "
            f"{error}"
        ) from error
    return style
