"""Which GPU serves whom, laid out and checked before trainer and workers are started."""

import asyncio
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from flash.config import Config
from flash.hub.gpus import gpus_of, worker_gpus
from flash.parts.engine import choose_engine
from flash.parts.model import parameters_of
from flash.parts.workers import arguments_of
from flash.system import machine
from flash.system.machine import Card, Gpu, card_of
from flash.trainer.memory import least_beside_others, least_kept

_BYTES = {"auto": 2, "bfloat16": 2, "float16": 2, "half": 2, "float32": 4, "float": 4}
_SMALLER_ARGS = {"quantization", "q", "cpu-offload-gb"}  # of servers that have less on a GPU
_HALF_CAPABILITY = (8, 0)  # GPUs before have no bfloat16, and servers refuse to do without


@dataclass(frozen=True, slots=True)
class Layout:
    """The GPUs of each of the trainer's ranks and of each worker that are started here, and all of
    those that could be theirs."""

    present: tuple[Gpu, ...]
    ranks: tuple[Gpu, ...]
    workers: tuple[tuple[Gpu, ...], ...]

    def lines(self) -> list[str]:
        """A table, with a line for GPUs that serve the same."""
        groups = itertools.groupby(self.present, key=lambda gpu: ", ".join(self._served_by(gpu)))
        return [
            f"GPU {', '.join(map(str, gpus))}: {whom or 'idle (engine.workers may be more)'}"
            for whom, gpus in groups
        ]

    def _served_by(self, gpu: Gpu) -> Iterator[str]:
        yield from (f"trainer rank {rank}" for rank, own in enumerate(self.ranks) if own == gpu)
        yield from (f"worker {number}" for number, own in enumerate(self.workers) if gpu in own)


async def check_devices(
    config: Config, model: str, *, say: Callable[[str], None], trains: bool = True, nodes: int = 1
) -> None:
    """Tells which GPU serves whom, if there are any; ValueError for one that is too small for it,
    or too old, and for a machine without GPUs that has no memory to train the model.

    Args:
        model: the one that all of them load.
        trains, nodes: as for `lay_out`.
    """
    present = machine.gpus()
    if not present:
        if trains:
            has = machine.capacity().memory_bytes
            check_host(config, has, parameters=await parameters_of(model), nodes=nodes)
        return
    layout = lay_out(config, present, trains=trains, nodes=nodes)
    for line in layout.lines():
        say(line)
    of_machine = await asyncio.to_thread(machine.cards)
    found = {gpu: card_of(gpu, of_machine) for gpu in present}
    check_cards(
        config,
        layout,
        {gpu: card for gpu, card in found.items() if card is not None},
        parameters=await parameters_of(model),
        vllm=machine.has_vllm(),
    )


def lay_out(
    config: Config, present: Sequence[Gpu], *, trains: bool = True, nodes: int = 1
) -> Layout:
    """Of what a configuration starts on this machine; the ranks are on so many `nodes` like it.

    What trains nothing leaves GPUs to a trainer that may be there.
    """
    engine, ranks = config.engine, config.trainer.ranks // nodes
    size = 0 if engine.urls else engine.workers
    devices = engine.devices or worker_gpus(present, ranks, shared=engine.colocated and trains)
    return Layout(
        tuple(present if trains else devices),
        tuple(present[:ranks]) if trains else (),
        tuple(gpus_of(devices, number, engine.tensor_parallel) for number in range(size)),
    )


def check_host(config: Config, memory_bytes: int, *, parameters: int, nodes: int = 1) -> None:
    """ValueError if what ranks keep is more than this machine's memory."""
    ranks = config.trainer.ranks // nodes
    kept = ranks * least_kept(parameters, config.trainer)
    if kept > memory_bytes:
        adapters = "" if config.trainer.lora.rank else "adapters (trainer.lora.rank=16) or "
        raise ValueError(
            f"trainer.ranks={config.trainer.ranks}: a model of {parameters / 1e9:.2f} billion "
            f"parameters takes {kept / 1e9:.1f} GB at least to be trained by the ranks that are on "
            f"this machine, which has {memory_bytes / 1e9:.1f} GB: use {adapters}a smaller model"
        )


def check_cards(
    config: Config, layout: Layout, cards: Mapping[Gpu, Card], *, parameters: int, vllm: bool
) -> None:
    """ValueError for a GPU that can't do what the layout has it do.

    Args:
        cards: what is known of the GPUs.
        parameters: of the model.
        vllm: whether it is installed.
    """
    engine = config.engine
    devices = layout.workers[0] if layout.workers else ()
    choice = choose_engine(engine, devices=devices, vllm=vllm, parameters=parameters)
    share = 0.0 if choice.kind == "embedded" else engine.gpu_memory
    for gpu in layout.present:
        servers = sum(gpu in own for own in layout.workers)
        if servers * share > 1:
            raise ValueError(
                f"engine.workers={engine.workers} with engine.gpu_memory={share:g}: GPU {gpu} "
                f"would have {servers} servers with that share each: start fewer, lower the share, "
                f"or name more GPUs (engine.devices)"
            )
        if (card := cards.get(gpu)) is None:
            continue
        if servers and share:
            _check_server(config, gpu, card, parameters)
        if gpu in layout.ranks and card.memory_bytes is not None:
            _check_rank(config, gpu, card.memory_bytes, parameters, servers * share)


def _check_server(config: Config, gpu: Gpu, card: Card, parameters: int) -> None:
    engine = config.engine
    arguments = arguments_of(engine.server_args)
    dtype = arguments.get("dtype", engine.dtype)
    if dtype in ("auto", "bfloat16") and card.capability < _HALF_CAPABILITY:
        raise ValueError(
            f"engine.dtype={engine.dtype}: GPU {gpu} ({card}) has no bfloat16: use "
            f"engine.dtype=float32, or other GPUs (engine.devices)"
        )
    if card.memory_bytes is None or _SMALLER_ARGS & arguments.keys():
        return
    weights = parameters * _BYTES.get(dtype, 1) / engine.tensor_parallel
    if weights > engine.gpu_memory * card.memory_bytes:
        raise ValueError(
            f"engine.tensor_parallel={engine.tensor_parallel}: the model's {parameters / 1e9:.2f} "
            f"billion parameters are {weights / 1e9:.1f} GB on each GPU of a server, more than "
            f"engine.gpu_memory={engine.gpu_memory:g} of the {card.memory_bytes / 1e9:.1f} GB of "
            f"GPU {gpu}: raise one of the two"
        )


def _check_rank(
    config: Config, gpu: Gpu, memory_bytes: int, parameters: int, servers: float
) -> None:
    """`servers`: the share of the GPU's memory that servers have, while they sample."""
    trainer = config.trainer
    training = least_kept(parameters, trainer)
    turns = [(training, servers)]
    if config.engine.colocated:
        turns = [(training, 0.0), (least_beside_others(parameters, trainer), servers)]
    for needed, taken in turns:
        left = (1 - taken) * memory_bytes
        if needed > left:
            field = "ranks" if trainer.shard_size is None else "shard_size"
            beside = f" beside engine.gpu_memory={config.engine.gpu_memory:g}" if taken else ""
            lower = "lower engine.gpu_memory, " if taken else ""
            adapters = "" if trainer.lora.rank else "train adapters (trainer.lora.rank=16), "
            raise ValueError(
                f"trainer.{field}={getattr(trainer, field)}: a rank takes {needed / 1e9:.1f} GB at "
                f"least for a model of {parameters / 1e9:.2f} billion parameters, and GPU {gpu} "
                f"has {left / 1e9:.1f} GB{beside}: raise trainer.{field}, {lower}{adapters}"
                f"or use a smaller model"
            )
