"""`flash eval`: how a model does on held-out tasks: a run's, a checkpoint's, or any other."""

import asyncio
import contextlib
import json
import re
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flash import config as configuration
from flash import registry
from flash.checkpoints import newest_checkpoint
from flash.errors import EpisodeFailure
from flash.evaluation.play import heldout_tasks, play
from flash.evaluation.report import EpisodeResult, Report, environment_result, episode_result
from flash.hub.chat_worker import framed
from flash.hub.worker import Worker
from flash.parts.devices import check_devices
from flash.parts.model import check_model_files, load_tokenizer
from flash.parts.open import open_parts
from flash.parts.served import Served, ask_server, server_url
from flash.rollout.episode import Episode
from flash.section import revealed
from flash.stop import unless
from flash.system import machine
from flash.system.own_logs import own_logs
from flash.trainer.checkpoint import checkpoint_version
from flash.types import Trajectory, Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is evaluated: one of a checkpoint, a model of `config`, or a server at `url`."""

    config: configuration.Config
    checkpoint: Path | None = None
    url: str = ""
    served: str = ""  # the name of the server's model, if it has several
    tokenizer: str | None = None  # of the server's model, if it does not say it


def plan(
    source: str | None,
    overrides: Mapping[str, Any],
    *,
    envs: Sequence[str] = (),
    tokenizer: str | None = None,
) -> Plan:
    """From the words of the command to what is evaluated; ValueError for what can't be.

    Args:
        source: a run's folder, a checkpoint of it, a preset or a YAML file: it says how.
        overrides: fields by name. `model` is a model's name or folder, or a server's URL, in the
            place of the source's.
        envs: environments, or presets and YAML files with their own settings, in the place of the
            source's. With no source the style is `chat`.
    """
    changes = dict(overrides)
    model = changes.get("model")
    checkpoint, settings = _source(source, wants_checkpoint=model is None)
    if source is None and (not envs or model is None):
        raise ValueError(
            "flash eval what? Give a run's folder or a checkpoint: runs/NAME; or --env NAME "
            "--model MODEL|URL"
        )
    if source is None:
        changes.setdefault("agent.style", "chat")
    changes |= _environments(envs)
    changes["trainer.lora.publish"] = "merged"  # it is one model
    is_server = isinstance(model, str) and "://" in model
    served = ""
    if is_server:
        _check_key(changes)
        url, served = server_url(str(changes.pop("model")))
        changes["engine.urls"] = [url]
    elif tokenizer is not None:
        raise ValueError(
            f"--tokenizer {tokenizer} is a server's: leave it out, or give --model URL"
        )
    config = configuration.load(settings, changes)
    if checkpoint is None and not is_server:
        _check_model(config)
    return Plan(
        config=config,
        checkpoint=checkpoint,
        url=config.engine.urls[0] if is_server else "",
        served=served,
        tokenizer=tokenizer,
    )


async def evaluate(
    planned: Plan, say: Callable[[str], None] = print, *, stop: asyncio.Event | None = None
) -> Report:
    """Plays the held-out tasks of all task sets, a few at a time, on one hub.

    Nothing is written to a run's folder, so that the run may be going on meanwhile; the model of a
    checkpoint is made elsewhere, for as long as it plays. When `stop` is set, the report is of what
    is there. Raises ValueError for what can't be played, and what `flash.evaluation.play` raises.
    """
    config = planned.config
    configuration.check_capacity(config, machine.capacity(), trains=False)
    configuration.try_environments(config)
    _tell_of_brought(config, say)
    async with _opened(planned, say) as (policy, served):
        return await _play(planned, policy, served, say, stop or asyncio.Event())


def _source(source: str | None, *, wants_checkpoint: bool) -> tuple[Path | None, str | None]:
    """The checkpoint that is meant, if one is, and where the settings come from."""
    if source is None:
        return None, None
    path = Path(source)
    if not path.is_dir() and (
        source in configuration.presets() or path.suffix in (".yaml", ".yml")
    ):
        return None, source
    if not wants_checkpoint:
        run = path.parent.parent if path.parent.name == "checkpoints" else path
        return None, str(run / "config.yaml")
    if path.parent.name == "checkpoints":
        checkpoint = path
    elif (newest := newest_checkpoint(path)) is not None:
        checkpoint = newest.path
    else:
        raise ValueError(f"{source} holds no checkpoint: give a run's folder or a checkpoint of it")
    checkpoint_version(checkpoint)  # it is one, and whole
    return checkpoint, str(checkpoint.parent.parent / "config.yaml")


def _environments(envs: Sequence[str]) -> dict[str, Any]:
    """What plays these; several, or one with settings of its own, as task sets."""
    if not envs:
        return {}
    if len(envs) == 1 and not _has_settings(envs[0]):
        return {"env": envs[0], "task_sets": {}}
    sets: dict[str, Any] = {}
    for env in envs:
        name = re.sub(r"[^A-Za-z0-9_-]", "-", Path(env).stem if _has_settings(env) else env)[-40:]
        if name in sets:
            raise ValueError(f"--env {env} is given twice: give it once")
        sets[name] = {"env": env}
        if _has_settings(env):
            preset = configuration.load(env)
            sets[name] = {
                "env": preset.env.model_dump(mode="json"),
                "agent": preset.agent.model_dump(mode="json", exclude_unset=True),
                "reward": preset.reward.model_dump(mode="json"),
            }
    return {
        "env": next(iter(sets.values()))["env"],
        "task_sets": sets,
        # A run's sizes have no meaning here, and need not fit so many sets.
        "batch_size": 2 * len(sets),
        "group_size": 2,
        "rollout.filters": "",
    }


def _has_settings(env: str) -> bool:
    """Whether it is a preset or a YAML file, which says how it is played."""
    if Path(env).suffix in (".yaml", ".yml"):
        return True
    return env in configuration.presets() and not registry.is_environment(env)


def _check_key(changes: Mapping[str, Any]) -> None:
    key = changes.get("engine.api_key", "")
    if key and not str(key).startswith("$"):
        raise ValueError(
            "engine.api_key: a key on a command line is for others to read: export it, and give "
            "--engine.api_key '$NAME'"
        )


def _check_model(config: configuration.Config) -> None:
    """ValueError for one that can't be played as it is."""
    if config.model == configuration.SMALL:
        raise ValueError(
            "model=small is what a run makes of it: give the run's folder, runs/NAME, or another "
            "--model"
        )
    if config.engine.urls and not Path(config.model).expanduser().is_dir():
        raise ValueError(
            f"model={config.model!r} with engine.urls, whose workers are given the weights in a "
            f"folder: give a folder, or --model {config.engine.urls[0]} for the model they have"
        )


def _check_chats(config: configuration.Config, url: str) -> None:
    """ValueError for agents that have no messages to send."""
    for of_set in config.own_sets.values():
        if not of_set.agent.run and of_set.agent.style != "chat":
            raise ValueError(
                f"agent.style={of_set.agent.style} with --model {url}, which has chat alone: use "
                f"--agent.style chat"
            )


@contextlib.asynccontextmanager
async def _opened(
    planned: Plan, say: Callable[[str], None]
) -> AsyncIterator[tuple[Weights, Served | None]]:
    """The weights that are played, in a folder or by name; or the server that has them."""
    config = planned.config
    if planned.url:
        api_key = revealed(config.engine.api_key)
        served = await ask_server(
            planned.url, name=planned.served, tokenizer=planned.tokenizer, api_key=api_key
        )
        try:
            tokenizer = await asyncio.to_thread(load_tokenizer, served.source)
        except ValueError as error:
            raise ValueError(
                f"--model {planned.url} serves {served.name}, of which no tokenizer is known here: "
                f"give --tokenizer NAME or a folder ({error})"
            ) from error
        if served.speaks != "chat":
            yield Weights(version=0, path=Path(served.source)), served
            return
        _check_chats(config, planned.url)
        with tempfile.TemporaryDirectory(prefix="flash-eval-") as folder:
            framed(tokenizer).save_pretrained(folder)
            its_model = {"model_type": "llama", "vocab_size": len(tokenizer)}  # for its size alone
            (Path(folder) / "config.json").write_text(json.dumps(its_model))
            yield Weights(version=0, path=Path(folder)), served
        return
    if planned.checkpoint is None:
        local = Path(config.model).expanduser()
        model = str(local) if local.is_dir() else config.model
        await check_model_files(model)
        await check_devices(config, model, say=say, trains=False)
        yield Weights(version=0, path=Path(model)), None
        return
    from flash.trainer.hugging_face import export_model  # noqa: PLC0415  (imports torch)

    with tempfile.TemporaryDirectory(prefix="flash-eval-") as folder:
        path = Path(folder) / "model"
        await asyncio.to_thread(export_model, planned.checkpoint, path, dtype="float32")
        await check_model_files(str(path))
        await check_devices(config, str(path), say=say, trains=False)
        yield Weights(version=checkpoint_version(planned.checkpoint), path=path), None


async def _play(
    planned: Plan,
    policy: Weights,
    served: Served | None,
    say: Callable[[str], None],
    stop: asyncio.Event,
) -> Report:
    config = planned.config
    results: dict[str, list[EpisodeResult]] = defaultdict(list)

    async def weights() -> Weights:
        return policy

    def note(episode: Episode, end: Trajectory | EpisodeFailure) -> None:
        results[episode.task.task_set].append(episode_result(episode, end))

    def fixed(tokenizer: Any) -> Worker:
        assert served is not None
        return served.worker(tokenizer, api_key=revealed(config.engine.api_key))

    clock = asyncio.get_running_loop().time
    with own_logs("flash-eval-") as log_dir:
        async with (
            open_parts(
                config,
                model=str(policy.path),
                version=policy.version,
                weights=weights,
                log_dir=log_dir,
                say=say,
                fixed=None if served is None else fixed,
            ) as parts,
            parts.agents(heldout=True) as agents,
        ):
            started = clock()
            playing = play(
                parts.hub,
                agents.make,
                heldout_tasks(config.eval, config.own_sets),
                concurrency=config.engine.max_running,
                max_attempts=config.rollout.max_attempts,
                stall_timeout_s=config.rollout.stall_timeout_s,
                told=note,
            )
            complete = await unless(stop, playing) is not None
            time_s = clock() - started
    return Report(
        model=_name(planned, policy, served),
        server=planned.url or None,
        tasks=config.eval.tasks,
        samples=config.eval.samples,
        temperature=config.eval.temperature,
        complete=complete,
        time_s=time_s,
        environments={
            name or of_set.env.name: environment_result(
                results[name], played_with=_played_with(of_set)
            )
            for name, of_set in config.own_sets.items()
        },
    )


def _name(planned: Plan, policy: Weights, served: Served | None) -> str:
    if served is not None:
        return served.name
    return str(planned.checkpoint or policy.path)


def _played_with(config: configuration.Config) -> dict[str, Any]:
    """What decides of the tasks and how they are played; no keys, and nothing of the machine."""
    agent = config.agent.model_dump(mode="json", include={
        "run", "style", "style_options", "max_turns", "max_tokens", "max_sequence_tokens",
    })  # fmt: skip
    options = config.env.options | config.env.eval_options
    return {"env": {"name": config.env.name, "options": options}, "agent": agent}


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
