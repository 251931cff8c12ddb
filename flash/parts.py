"""From a configuration to the parts of a run: model, workers, environments, agents, tasks."""

import contextlib
import functools
import itertools
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp

from flash import registry
from flash.config import SMALL, Config
from flash.door import Door
from flash.door.command import CommandAgent
from flash.environments.hosts import EnvHosts, InlineEnvs
from flash.hub.http_worker import HttpWorker
from flash.hub.hub import InferenceHub
from flash.hub.nccl_worker import NcclPool, NcclWorker, nccl_sender
from flash.hub.pool import EmbeddedPool, ProcessPool
from flash.hub.vllm_pool import VllmPool
from flash.hub.worker import Worker
from flash.machine import Gpu, gpus, has_vllm
from flash.reward.config import EnvReward, FunctionReward, ProcessReward
from flash.reward.judge import PROMPT, Judge, ask_hub, ask_url
from flash.reward.processes import RewardProcesses
from flash.reward.stage import FunctionScorer, RewardStage, Scorer
from flash.rollout.adaptive import AdaptiveAlpha
from flash.rollout.episode import AgentFactory
from flash.types import EnvSource, PromptStyle, Task, Weights
from flash.warm_start.teach import Progress, small_model

_DOOR_FILE = "door.json"
_TASKS_FILE = "tasks.json"
_TASKS_PER_SEED = 1 << 24


async def prepared_model(config: Config, on_progress: Progress) -> str:
    """The model to start from: as given, or the small policy, made and taught if need be."""
    if config.model != SMALL:
        local = Path(config.model).expanduser()
        return str(local) if local.is_dir() else config.model
    env_key = {"name": config.env.name, "options": config.env.options}
    path = await small_model(
        env=registry.environment(config.env.name)(**config.env.options),
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
    """The tokenizer that comes with the model. ValueError if there is none to be had."""
    from transformers import AutoTokenizer  # noqa: PLC0415  (seconds to import)

    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())
        raise ValueError(
            f"model={model!r} can't be loaded: check its name and the connection to the hub, or "
            f"give a directory ({why})"
        ) from error


def make_style(config: Config, tokenizer: Any) -> PromptStyle:
    """The prompt style of the configuration, for a tokenizer."""
    try:
        style: PromptStyle
        style = registry.style(config.agent.style)(tokenizer, **config.agent.style_options)
    except Exception as error:  # the boundary to the style's code
        raise ValueError(
            f"agent.style={config.agent.style!r} with the tokenizer of model={config.model!r}: "
            f"{error}"
        ) from error
    return style


@contextlib.asynccontextmanager
async def open_hub(
    config: Config,
    *,
    model: str,
    version: int,
    weights: Callable[[], Awaitable[Weights]],
    log_dir: Path,
    say: Callable[[str], None],
) -> AsyncIterator[InferenceHub]:
    """The hub, over workers that run already or over a pool that it starts; `say` is told which.

    A pool's workers start with `model`. Those that run already may have any weights, of another
    run too, so they are given `weights` before they are asked anything.
    """
    engine = config.engine
    workers, why = _workers(config, model=model, version=version, log_dir=log_dir)
    say(f"engine: {why}")
    async with InferenceHub(
        workers,
        max_running=engine.max_running,
        version=version,
        weights=await weights() if engine.urls else None,
        request_timeout_s=engine.request_timeout_s,
        progress_timeout_s=engine.progress_timeout_s,
        # Long enough for all of a pool to be started anew.
        recovery_timeout_s=60.0 + (0 if isinstance(workers, list) else engine.start_timeout_s),
        gap_limit=gap_limit(config),
    ) as hub:
        yield hub


def gap_limit(config: Config) -> float:
    """As configured, or what the coarser precision of worker and trainer makes of logprobs."""
    dtypes = {config.engine.dtype, config.trainer.dtype}
    half = "bfloat16" in dtypes or ("auto" in dtypes and bool(gpus()))
    return config.engine.gap_limit or (0.1 if half else 1e-3)


def _workers(
    config: Config, *, model: str, version: int, log_dir: Path
) -> tuple[list[Worker | str] | ProcessPool, str]:
    """The workers of the configuration, and one line that says which and why."""
    engine = config.engine
    if engine.urls:
        urls: list[Worker | str]
        urls = [_client(config, number, url, log_dir) for number, url in enumerate(engine.urls)]
        running = _count(len(urls), "worker")
        return urls, f"{running} that ran before, because engine.urls names them"
    devices = engine.devices or worker_gpus(config.trainer.ranks)
    if engine.kind == "vllm" or (engine.kind == "auto" and has_vllm() and devices):
        start: Callable[..., VllmPool] = VllmPool
        if engine.transport == "nccl":
            start = functools.partial(NcclPool, trainer_gpus=config.trainer.ranks)
        vllm = start(
            model,
            size=engine.workers,
            max_running=engine.max_running,
            max_tokens=config.agent.max_sequence_tokens,
            cache_tokens=engine.cache_tokens,
            tensor_parallel=engine.tensor_parallel,
            devices=devices,
            gpu_memory=engine.gpu_memory,
            dtype=_dtype(engine.dtype, devices),
            threads=engine.threads,
            seed=config.seed,
            arguments=engine.vllm_args,
            log_dir=log_dir,
            start_timeout_s=engine.start_timeout_s,
        )
        why = "as engine.kind says" if engine.kind == "vllm" else "because it is installed"
        where = _where(devices, engine.workers * engine.tensor_parallel)
        return vllm, f"{_count(engine.workers, 'vLLM server')} on {where}, {why}"
    embedded = EmbeddedPool(
        model,
        size=engine.workers,
        devices=devices,
        max_running=engine.max_running,
        cache_tokens=engine.cache_tokens,
        threads=engine.threads,
        dtype=engine.dtype,
        version=version,
        seed=config.seed,
        log_dir=log_dir,
        start_timeout_s=engine.start_timeout_s,
    )
    if engine.kind == "embedded":
        why = "as engine.kind says"
    elif has_vllm():
        why = "because vLLM has no GPU here"
    else:
        why = "because vLLM is not installed (`make setup-vllm`)"
    where = _where(devices, engine.workers)
    return embedded, f"{_count(engine.workers, 'embedded worker')} on {where}, {why}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number > 1 else ''}"


def _where(devices: Sequence[Gpu], wanted: int) -> str:
    """Where the workers of a pool are that take so many GPUs, and which GPUs nobody uses."""
    used, rest = devices[:wanted], devices[wanted:]
    where = f"GPU {', '.join(map(str, used))}" if used else "the CPU"
    idle = f" (idle: {', '.join(map(str, rest))}; engine.workers may be more)" if rest else ""
    return where + idle


def _client(config: Config, number: int, url: str, log_dir: Path) -> HttpWorker:
    """Of a worker that runs already."""
    engine = config.engine
    if engine.transport == "disk":
        return HttpWorker(url, api_key=engine.api_key)
    start_sender = nccl_sender(
        number % config.trainer.ranks,
        name=f"sender {number}",
        log_path=log_dir / f"sender_{number}.log",
    )
    return NcclWorker(url, api_key=engine.api_key, start_sender=start_sender)


def worker_gpus(ranks: int) -> list[Gpu]:
    """The GPUs that the trainer's ranks leave to the workers; all of them if they leave none."""
    present = gpus()
    return present[ranks:] or present


def _dtype(dtype: str, devices: Sequence[Gpu]) -> str:
    """What the trainer computes in, so that the two agree."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if devices else "float32"


@contextlib.asynccontextmanager
async def open_door(
    config: Config, hub: InferenceHub, *, tokenizer: Any, log_dir: Path | None = None
) -> AsyncIterator[Door | None]:
    """The door through which an agent of the user's own reaches the policy, if it is wanted.

    With a `log_dir` it is the run's door: at the configured port, and while it is open its URL
    and token are in a file there that only its owner can read.
    """
    port = config.engine.door_port if log_dir is not None else None
    if not config.agent.run and port is None:
        yield None
        return
    if config.agent.run and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"model={config.model!r} has no chat template, so an agent can't chat with it "
            f"(agent.run): use an instruction-tuned model"
        )
    # Whatever it takes the model for, there is one only.
    ignore = {"model", *config.agent.ignore}
    async with Door(
        hub, tokenizer=tokenizer, model="policy", ignore=ignore, port=port or 0
    ) as door:
        if log_dir is None:
            yield door
            return
        log_dir.mkdir(parents=True, exist_ok=True)
        told = log_dir / _DOOR_FILE
        told.unlink(missing_ok=True)
        told.touch(mode=0o600)
        told.write_text(json.dumps({"url": door.url, "token": door.token}))
        try:
            yield door
        finally:
            told.unlink(missing_ok=True)


@contextlib.asynccontextmanager
async def open_envs(
    config: Config, log_dir: Path, *, heldout: bool = False
) -> AsyncIterator[EnvSource | None]:
    """Environments of the training or the held-out kind; in hosts if any are configured.

    None for an agent of the user's own, which brings its world along.
    """
    if config.agent.run:
        yield None
        return
    options = env_options(config, heldout=heldout)
    make: Callable[..., Any] = registry.environment(config.env.name)
    if config.env.hosts == 0:
        yield InlineEnvs(lambda: make(**options))
        return
    async with EnvHosts(
        config.env.name,
        options,
        hosts=config.env.hosts,
        call_timeout_s=config.agent.step_timeout_s,
        log_dir=log_dir,
    ) as hosts:
        yield hosts


def env_options(config: Config, *, heldout: bool) -> dict[str, Any]:
    """What the environment is made with; an agent of the user's own is told."""
    return config.env.options | (config.env.eval_options if heldout else {})


@contextlib.asynccontextmanager
async def open_reward(
    config: Config, hub: InferenceHub, *, tokenizer: Any, log_dir: Path
) -> AsyncIterator[RewardStage | None]:
    """The reward stage, if the reward is not the environment's own."""
    reward = config.reward
    if isinstance(reward, EnvReward):
        yield None
        return
    async with contextlib.AsyncExitStack() as parts:
        scorer: Scorer
        if isinstance(reward, FunctionReward):
            scorer = FunctionScorer(registry.function(reward.run, "reward.run"))
        elif isinstance(reward, ProcessReward):
            scorer = await parts.enter_async_context(
                RewardProcesses(reward.run, processes=reward.concurrency, log_dir=log_dir)
            )
        else:
            if reward.url:
                ask = ask_url(
                    await parts.enter_async_context(aiohttp.ClientSession()),
                    reward.url,
                    model=reward.model,
                    api_key=reward.api_key,
                    max_tokens=reward.max_tokens,
                )
            elif getattr(tokenizer, "chat_template", None):
                ask = ask_hub(hub, tokenizer, max_tokens=reward.max_tokens)
            else:
                raise ValueError(
                    f"model={config.model!r} has no chat template, so it can't judge (reward.name="
                    f"judge): use an instruction-tuned model, or another's reward.url"
                )
            scorer = Judge(ask, prompt=reward.prompt or PROMPT, max_score=reward.max_score)
        yield RewardStage(
            scorer,
            decode=tokenizer.decode,
            concurrency=reward.concurrency,
            timeout_s=reward.timeout_s,
            retries=reward.retries,
        )


def agent_factory(
    config: Config,
    *,
    envs: EnvSource | None,
    style: PromptStyle,
    door: Door | None,
    log_dir: Path,
    heldout: bool = False,
    reward: RewardStage | None = None,
) -> AgentFactory:
    """Makes agents; found by name, because `flash` does not import `flash.agents`."""
    settings = config.agent
    common = {
        "max_tokens": settings.max_tokens,
        "max_sequence_tokens": settings.max_sequence_tokens,
        "temperature": config.eval.temperature if heldout else settings.temperature,
        "episode_timeout_s": settings.episode_timeout_s,
        "reward_stage": reward,
    }
    if settings.run:
        assert door is not None, "it is open wherever an agent of the user's own runs"
        external = registry.agent("external")
        options = env_options(config, heldout=heldout)
        if isinstance(settings.run, str):
            act = registry.function(settings.run, "agent.run")
        else:
            name = "heldout_agent" if heldout else "agent"
            act = CommandAgent(settings.run, log_dir=log_dir, name=name)
        return lambda: external(door=door, act=act, options=options, **common)
    agent = registry.agent("environment")
    return lambda: agent(
        envs=envs,
        style=style,
        max_turns=settings.max_turns,
        samples=settings.samples,
        # A host that hangs is found by its own deadline first, which can tell who was working.
        step_timeout_s=settings.step_timeout_s * (2 if config.env.hosts else 1),
        **common,
    )


def adaptive_alpha(config: Config) -> AdaptiveAlpha:
    """What decides α after each step; without thresholds it stays what is configured."""
    return AdaptiveAlpha(
        config.alpha,
        least=config.publish_every - 1,  # or the batches between two publishes had no room
        **config.rollout.adaptive_alpha.model_dump(),
    )


class Tasks:
    """The endless tasks of a run: consecutive seeds, from a start that the run's seed decides.

    A checkpoint keeps which ones were begun and not trained; a resumed run begins with those.
    """

    def __init__(self, seed: int) -> None:
        self._first = seed * _TASKS_PER_SEED
        self._next = itertools.count(self._first)
        self._unfinished: list[int] = []
        self.given = 0

    def __iter__(self) -> Iterator[Task]:
        while True:
            if self._unfinished:
                yield Task(self._unfinished.pop(0))
            else:
                self.given += 1
                yield Task(next(self._next))

    def save(self, checkpoint: Path, unfinished: list[Task]) -> None:
        seeds = [task.seed for task in unfinished] + self._unfinished
        state = {"given": self.given, "unfinished": seeds}
        (checkpoint / _TASKS_FILE).write_text(json.dumps(state))

    def restore(self, checkpoint: Path) -> None:
        state = json.loads((checkpoint / _TASKS_FILE).read_text())
        self.given, self._unfinished = state["given"], state["unfinished"]
        self._next = itertools.count(self._first + self.given)


def heldout_tasks(config: Config) -> list[Task]:
    """The same for every run, so that runs can be compared."""
    return [Task(seed) for seed in range(config.eval.tasks)]
