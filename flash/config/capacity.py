"""Whether a machine has the cores, the memory and the GPUs for what a run would start on it.

Known before anything starts; each figure below is the least that such a thing takes, so that what
is refused can't run, and what is absurd is not tried.
"""

from collections.abc import Iterator, Sequence

from flash.config.model import SMALL
from flash.config.run import Config
from flash.hub.gpus import check_parallel, worker_gpus
from flash.reward.config import ProcessReward
from flash.system.machine import Capacity, Gpu, has_vllm
from flash.trainer.memory import TRAINED_BYTES
from flash.worker.config import CACHED_TOKEN_BYTES, MASK_BYTES, THREADS_PER_CORE

# Bytes, measured where it says so.
_TORCH_PROCESS = 400e6  # a worker or a rank after its imports: 404 and 406 MB
_PLAIN_PROCESS = 25e6  # an environment's host or a reward's process: 30 and 22 MB
_EPISODE = 10e3  # its task, its agent, and what it has said
_RECORD = 1e3  # a demonstration, a held-out task with its outcome
_SAMPLE_TOKEN = 36  # of a sample's arrays: ids, mask, logprobs, versions, temperatures, turns

_PER_CORE = {"engine.workers": 8, "trainer.ranks": 8, "env.hosts": 100, "reward.concurrency": 100}
_OPEN_FILES = 64  # of a run: its files, its logs, its children's sockets


def check_capacity(
    config: Config, has: Capacity, *, trains: bool = True, nodes: int = 1, hosts: bool = True
) -> None:
    """ValueError for the first size that it can't hold. An evaluation trains nothing.

    The trainer's ranks are on so many `nodes` like this one, as many each. `hosts`: whether this
    one has the environment hosts and reward processes.
    """
    for field, count, bytes_each in _processes(config, trains=trains, nodes=nodes, hosts=hosts):
        most = min(has.cores * _PER_CORE[field], int(has.memory_bytes / bytes_each))
        if count > most:
            raise ValueError(f"{field}={count}: {has} is enough for {most}: take no more")
    if config.engine.colocated and trains and has.gpus:
        _check_turns(config)
    _check_gpus(config, has, trains=trains, nodes=nodes)
    if config.engine.transport == "nccl":
        _check_nccl(config, has.gpus, trains=trains)
    for field, threads in (
        ("engine.threads", config.engine.threads),
        ("trainer.threads", config.trainer.threads),
    ):
        if threads > has.cores * THREADS_PER_CORE:
            raise ValueError(f"{field}={threads}: {has} runs {has.cores} at a time: take no more")
    for fields, wanted in _memory(config, has, trains=trains):
        if wanted > has.memory_bytes:
            raise ValueError(
                f"{fields} need {wanted / 1e9:,.1f} GB of memory, more than {has} can give: "
                f"lower one of them"
            )
    requests = min(config.engine.max_running * _workers(config), _episodes(config))
    if requests + _OPEN_FILES > has.open_files:
        raise ValueError(
            f"engine.max_running={config.engine.max_running} with batch_size={config.batch_size} "
            f"is {requests} connections at a time, and this machine allows a process "
            f"{has.open_files} open files: lower one of them, or allow more (ulimit -Hn)"
        )


def _processes(
    config: Config, *, trains: bool, nodes: int, hosts: bool
) -> Iterator[tuple[str, int, float]]:
    """Of each kind: the field, how many are started, and the bytes of one."""
    if not config.engine.urls:
        yield "engine.workers", config.engine.workers, _TORCH_PROCESS
    if trains:
        yield "trainer.ranks", config.trainer.ranks // nodes, _TORCH_PROCESS
    if not hosts:
        return
    sets = config.own_sets.values()
    yield "env.hosts", sum(of_set.env.hosts for of_set in sets), _PLAIN_PROCESS
    rewards = [of_set.reward for of_set in sets if isinstance(of_set.reward, ProcessReward)]
    if rewards:
        yield "reward.concurrency", sum(each.concurrency for each in rewards), _PLAIN_PROCESS


def _check_gpus(config: Config, has: Capacity, *, trains: bool, nodes: int) -> None:
    engine, gpus = config.engine, has.gpus
    if missing := sorted({*engine.devices} - {*gpus}, key=str):
        raise ValueError(
            f"engine.devices={list(engine.devices)}: {has} shows no GPU {missing}: name others, or "
            f"leave it out"
        )
    if trains and gpus and config.trainer.ranks > nodes * len(gpus):
        raise ValueError(
            f"trainer.ranks={config.trainer.ranks}: each takes a GPU of {has}: take {len(gpus)} or "
            f"fewer"
        )
    if not engine.workers or engine.urls:
        return
    if engine.tensor_parallel > 1 and engine.kind == "auto" and not (gpus and has_vllm()):
        raise ValueError(
            f"engine.tensor_parallel={engine.tensor_parallel} with engine.kind=auto, which means "
            f"embedded workers here, of one GPU each: use engine.kind=vllm or sglang, or leave it "
            f"out"
        )
    shared = engine.colocated and trains
    left = worker_gpus(gpus, config.trainer.ranks // nodes, shared=shared)
    check_parallel(engine.tensor_parallel, engine.devices or left)


def _check_turns(config: Config) -> None:
    """That each server has GPUs of the trainer's, and no two the same."""
    engine, ranks = config.engine, config.trainer.ranks
    if engine.workers * engine.tensor_parallel > ranks:
        raise ValueError(
            f"engine.colocated=true with engine.workers={engine.workers} of engine.tensor_parallel="
            f"{engine.tensor_parallel} GPUs each: the trainer has {ranks} (trainer.ranks): take "
            f"fewer, or more ranks"
        )


def _check_nccl(config: Config, gpus: Sequence[Gpu], *, trains: bool) -> None:
    """It is between GPUs, and no two processes of a group may use the same."""
    engine, ranks = config.engine, config.trainer.ranks
    if not gpus:
        raise ValueError(
            "engine.transport=nccl needs NVIDIA GPUs, and this machine shows none: use "
            "engine.transport=disk"
        )
    if trains and (shared := sorted({*gpus[:ranks]} & {*engine.devices}, key=str)):
        raise ValueError(
            f"engine.devices={list(engine.devices)} and the trainer ({ranks} trainer.ranks) share "
            f"GPUs {shared}, which engine.transport=nccl can't: name others, or use "
            f"engine.transport=disk"
        )
    starts = engine.kind in ("vllm", "sglang") and engine.workers and not engine.urls
    if starts and not engine.devices and len(gpus) <= ranks:
        raise ValueError(
            f"engine.transport=nccl needs GPUs for servers beside the trainer's: "
            f"trainer.ranks={ranks} take all {len(gpus)}: use fewer, or engine.transport=disk"
        )


def _memory(config: Config, has: Capacity, *, trains: bool) -> Iterator[tuple[str, float]]:
    """What takes memory by its numbers: the fields with their values, and the bytes at least."""
    policy, rollout, engine = config.policy, config.rollout, config.engine
    if trains:
        yield (
            f"batch_size={config.batch_size} samples of up to agent.max_sequence_tokens="
            f"{config.agent.max_sequence_tokens}",
            config.batch_size * config.agent.max_sequence_tokens * _SAMPLE_TOKEN,
        )
        yield (
            f"batch_size={config.batch_size} with alpha={config.alpha:g}, "
            f"rollout.redundant_groups={rollout.redundant_groups} and "
            f"rollout.redundant_episodes={rollout.redundant_episodes}",
            _episodes(config) * _EPISODE,
        )
    yield (
        f"eval.tasks={config.eval.tasks} with eval.samples={config.eval.samples}",
        config.eval.tasks * config.eval.samples * len(config.sets) * _RECORD,
    )
    small = config.model == SMALL
    if small:
        yield (
            f"policy.layers={policy.layers} with policy.hidden_size={policy.hidden_size}",
            12 * policy.layers * policy.hidden_size**2 * TRAINED_BYTES,
        )
        if trains:
            demonstrations = config.warm_start.demonstrations
            yield f"warm_start.demonstrations={demonstrations}", demonstrations * _RECORD
    if not has.gpus and not engine.urls:
        token = 2 * policy.layers * policy.hidden_size * 4 if small else CACHED_TOKEN_BYTES
        yield (
            f"engine.cache_tokens={engine.cache_tokens} with engine.workers={engine.workers}",
            engine.cache_tokens * engine.workers * token,
        )
        yield (
            f"engine.max_running={engine.max_running} with engine.workers={engine.workers}",
            engine.max_running**2 * engine.workers * MASK_BYTES,
        )


def _episodes(config: Config) -> int:
    """How many are under way, or kept for reuse, at most."""
    return sum(_episodes_of_set(of_set) for of_set in config.sets.values())


def _episodes_of_set(config: Config) -> int:
    groups = config.batch_size // config.group_size + config.rollout.redundant_groups
    per_group = config.group_size + config.rollout.redundant_episodes
    kept = (1 + config.alpha) * config.batch_size if config.rollout.reuse.is_on else 0
    return int(groups * per_group + config.alpha * config.batch_size + kept)


def _workers(config: Config) -> int:
    return len(config.engine.urls) or config.engine.workers
