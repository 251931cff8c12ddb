"""The workers that a configuration means, and the hub over them."""

import asyncio
import contextlib
import functools
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import msgspec

from flash.config import Config
from flash.errors import first_error
from flash.hub.embedded_pool import EmbeddedPool
from flash.hub.gpus import worker_gpus
from flash.hub.http_worker import HttpWorker
from flash.hub.hub import InferenceHub
from flash.hub.nccl_worker import NcclPool, NcclWorker
from flash.hub.pool import LOOPBACK, ProcessPool
from flash.hub.probe import Probe
from flash.hub.sender import SenderProcess, StartSender, address_towards, nccl_sender
from flash.hub.sglang_nccl import SglangNcclPool, SglangNcclWorker
from flash.hub.sglang_pool import SglangPool
from flash.hub.sglang_worker import SglangWorker
from flash.hub.turns import MakeRoom
from flash.hub.vllm_pool import VllmPool
from flash.hub.worker import Worker
from flash.parts.engine import Choice, choose_engine
from flash.parts.model import parameters_of
from flash.section import revealed
from flash.system.machine import Gpu, gpus, has_vllm
from flash.types import Weights

_ASK_TIMEOUT_S = 10.0

# Limits of the probe, see docs/engines.md. What float32 rounds is thousandths of this.
_OF_FLOAT32 = 1e-3
# In half precision nine tenths of the logits of sound models are within 4 units of the largest, the
# deepest and sharpest of them (benchmarks/probe.py).
_ROUNDING = 8.0
_OF_BFLOAT16, _OF_FP8 = 2**-8, 2**-4
# Of servers: weights or keys in 8 bits, or 4.
_COARSE_ARGS = ("quantization", "q", "kv-cache-dtype")


@contextlib.asynccontextmanager
async def open_hub(
    config: Config,
    *,
    model: str,
    version: int,
    weights: Callable[[], Awaitable[Weights]],
    log_dir: Path,
    say: Callable[[str], None],
    senders: Callable[[int], StartSender] | None = None,
    make_room: MakeRoom | None = None,
    fixed: Worker | None = None,
) -> AsyncIterator[InferenceHub]:
    """The hub, over workers that run already or over a pool that it starts; `say` is told which.

    A pool's workers start with `model`. Those that run already may have any weights, of another
    run too, so they are given `weights` before they are asked anything. `senders` starts what sends
    weights to a worker, by its number; by default these are on the trainer's GPUs, here.
    `make_room` has the trainer make room for workers on its own GPUs, if they share these; they are
    given `weights` too, because they lose what they have. So are those that take adapters: a
    request that begins without one would go on without the next. A `fixed` worker takes the place
    of all these, and keeps the weights that it has.
    """
    engine = config.engine
    shared = make_room is not None
    adapters = config.trainer.lora.publish == "adapters"
    devices = engine.devices or worker_gpus(gpus(), config.trainer.ranks, shared=shared)
    parameters = None
    if engine.kind == "auto" and not engine.urls and devices and has_vllm():
        parameters = await parameters_of(model)
    if fixed is not None:
        workers: list[Worker | str] | ProcessPool = [fixed]
        why = f"{fixed.name}, with the weights that it has"
    else:
        workers, why = _workers(
            config,
            choose_engine(engine, devices=devices, vllm=has_vllm(), parameters=parameters),
            shared=shared,
            model=model,
            devices=devices,
            version=version,
            log_dir=log_dir,
            senders=senders or functools.partial(_sender, config, log_dir),
            say=say,
        )
    say(f"engine: {why}")
    with first_error():
        async with asyncio.TaskGroup() as asking:
            for url in engine.urls:
                asking.create_task(_check_room(config, url), name=f"ask {url}")
    async with InferenceHub(
        workers,
        max_running=engine.max_running,
        update_mode=engine.update_mode,
        version=version,
        weights=await weights() if not fixed and (engine.urls or shared or adapters) else None,
        make_room=make_room,
        request_timeout_s=engine.request_timeout_s,
        progress_timeout_s=engine.progress_timeout_s,
        # Long enough for all of a pool to be started anew.
        recovery_timeout_s=60.0 + (0 if isinstance(workers, list) else engine.start_timeout_s),
        probe=probe_of(config),
    ) as hub:
        yield hub


async def _check_room(config: Config, url: str) -> None:
    """ValueError if a worker that runs already says that it takes no sequence as long as ours."""
    tokens, api_key = config.agent.max_sequence_tokens, revealed(config.engine.api_key)
    option = "context-length" if config.engine.kind == "sglang" else "max-model-len"
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = aiohttp.ClientTimeout(total=_ASK_TIMEOUT_S)
    try:
        async with (
            aiohttp.ClientSession(headers=headers, timeout=timeout) as session,
            session.get(f"{url.rstrip('/')}/v1/models") as response,
        ):
            cards = msgspec.json.decode(await response.read(), type=_Cards).data
    except (aiohttp.ClientError, OSError, TimeoutError, msgspec.MsgspecError):
        return  # it may start later, or not tell
    for card in cards:
        if card.max_model_len is not None and card.max_model_len < tokens:
            raise ValueError(
                f"agent.max_sequence_tokens={tokens} exceeds the {card.max_model_len} tokens that "
                f"the worker at {url} takes: set it to {card.max_model_len} or less, or start the "
                f"worker with --{option}={tokens}"
            )


class _Card(msgspec.Struct):
    max_model_len: int | None = None


class _Cards(msgspec.Struct):
    """What is read of /v1/models, as vLLM and SGLang have it."""

    data: list[_Card]


def probe_of(config: Config) -> Probe:
    """What workers are asked, with the limit that is configured, or that of the coarser precision
    of worker and trainer."""
    of_largest = 0.0
    if config.engine.gap_limit is None:
        of_largest = _ROUNDING * max(_worker_unit(config), _trainer_unit(config))
    probe = Probe(gap_limit=config.engine.gap_limit or _OF_FLOAT32, of_largest=of_largest)
    return probe.fitting(config.agent.max_sequence_tokens)


def _worker_unit(config: Config) -> float:
    """Half of the step from a number near 1 to the next, of workers; 0 of float32."""
    engine = config.engine
    arguments = arguments_of(engine.server_args)
    if any(arguments.get(name, "auto") not in ("auto", "bfloat16") for name in _COARSE_ARGS):
        return _OF_FP8
    return _unit(arguments.get("dtype", engine.dtype), known=not engine.urls and not _apart(config))


def _trainer_unit(config: Config) -> float:
    return _unit(config.trainer.dtype, known=not _apart(config))


def _apart(config: Config) -> bool:
    """Whether workers or trainer may be on other machines, which have GPUs or not."""
    return config.explorers.may_come or config.cluster.kind != "none"


def _unit(dtype: str, *, known: bool) -> float:
    """`known`: whether what is automatic is settled on this machine."""
    if dtype == "auto":
        dtype = "float32" if known and not gpus() else "bfloat16"
    return 0.0 if dtype in ("float32", "float") else _OF_BFLOAT16


def arguments_of(words: Sequence[str]) -> dict[str, str]:
    """Names and values of a command line, `--name=value` or `--name value`."""
    found = {}
    for word, following in itertools.zip_longest(words, words[1:], fillvalue=""):
        name, is_one, value = word.partition("=")
        if name.startswith("-"):
            found[name.lstrip("-").replace("_", "-")] = value if is_one else following
    return found


def _workers(
    config: Config,
    choice: Choice,
    *,
    shared: bool,
    model: str,
    devices: Sequence[Gpu],
    version: int,
    log_dir: Path,
    senders: Callable[[int], StartSender],
    say: Callable[[str], None],
) -> tuple[list[Worker | str] | ProcessPool, str]:
    """The workers of the configuration, and one line that says which and why."""
    engine = config.engine
    if engine.urls:
        urls: list[Worker | str]
        urls = [_client(config, url, senders(number)) for number, url in enumerate(engine.urls)]
        running = _count(len(urls), "worker")
        return urls, f"{running} that ran before, because engine.urls names them"
    if choice.kind != "embedded":
        servers, name = _server_pool(
            config, choice, shared=shared, model=model, devices=devices, log_dir=log_dir,
            senders=senders, say=say,
        )  # fmt: skip
        where = _where(devices, engine.workers * engine.tensor_parallel)
        turns = ", in turns with the trainer" if shared else ""
        return servers, f"{_count(engine.workers, name)} on {where}{turns}, {choice.why}"
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
        routed_experts=config.trainer.router_replay,
        log_dir=log_dir,
        start_timeout_s=engine.start_timeout_s,
    )
    where = _where(devices, engine.workers)
    return embedded, f"{_count(engine.workers, 'embedded worker')} on {where}, {choice.why}"


def _server_pool(
    config: Config,
    choice: Choice,
    *,
    shared: bool,
    model: str,
    devices: Sequence[Gpu],
    log_dir: Path,
    senders: Callable[[int], StartSender],
    say: Callable[[str], None],
) -> tuple[ProcessPool, str]:
    """Servers of vLLM or SGLang, and what one of them is called."""
    engine = config.engine
    of_both: dict[str, Any] = {
        "size": engine.workers,
        "max_running": engine.max_running,
        "max_tokens": config.agent.max_sequence_tokens,
        "cache_tokens": engine.cache_tokens,
        "tensor_parallel": engine.tensor_parallel,
        "devices": devices,
        "gpu_memory": engine.gpu_memory,
        "dtype": _dtype(engine.dtype, devices),
        "threads": engine.threads,
        "seed": config.seed,
        "log_dir": log_dir,
        "start_timeout_s": engine.start_timeout_s,
        "sleeps": shared,
        "routed_experts": config.trainer.router_replay,
        "say": say,
    }
    sends = engine.transport == "nccl"
    start: Callable[..., ProcessPool]
    if choice.kind == "sglang":
        start = functools.partial(SglangNcclPool, senders=senders) if sends else SglangPool
        keeps_stale = engine.update_mode == "keep_stale_kv"
        sglang = start(model, keeps_stale=keeps_stale, arguments=engine.sglang_args, **of_both)
        return sglang, "SGLang server"
    start = functools.partial(NcclPool, senders=senders) if sends else VllmPool
    lora = config.trainer.lora
    adapter_rank = lora.rank if lora.publish == "adapters" else 0
    vllm = start(model, arguments=engine.vllm_args, adapter_rank=adapter_rank, **of_both)
    return vllm, "vLLM server"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number > 1 else ''}"


def _where(devices: Sequence[Gpu], wanted: int) -> str:
    """Where the workers of a pool are that take so many GPUs."""
    used = devices[:wanted]
    return f"GPU {', '.join(map(str, used))}" if used else "the CPU"


def _client(config: Config, url: str, start_sender: StartSender) -> Worker:
    """Of a worker that runs already."""
    api_key = revealed(config.engine.api_key)
    is_sglang = config.engine.kind == "sglang"
    if config.engine.transport == "disk":
        return (SglangWorker if is_sglang else HttpWorker)(url, api_key=api_key)
    client = SglangNcclWorker if is_sglang else NcclWorker
    return client(url, api_key=api_key, start_sender=start_sender)


def _sender(config: Config, log_dir: Path, number: int) -> StartSender:
    """To worker `number`; they take turns on the trainer's GPUs."""
    engine = config.engine

    async def start() -> SenderProcess:
        address = None
        if engine.kind == "sglang":
            address = await address_towards(engine.urls[number]) if engine.urls else LOOPBACK
        return await nccl_sender(
            number % config.trainer.ranks,
            name=f"sender {number}",
            log_path=log_dir / f"sender_{number}.log",
            address=address,
        )()

    return start


def _dtype(dtype: str, devices: Sequence[Gpu]) -> str:
    """What the trainer computes in, so that the two agree."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if devices else "float32"
