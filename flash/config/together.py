"""What the sections of a run must agree on; each error names the fields, and what to change."""

import math
from collections.abc import Mapping
from typing import Any

from flash import registry
from flash.config.callables import check_arguments, check_run, check_tools
from flash.config.fields import RunFields
from flash.config.model import SMALL, check_heads, check_model, read_config
from flash.hub.config import ADAPTER_RANKS
from flash.positions import check_positions
from flash.system import machine
from flash.trainer.config import TrainerConfig
from flash.trainer.objectives.settings import SETTINGS, Supervised


def check_together(config: RunFields) -> None:
    """ValueError for the first of the sections' disagreements."""
    if not config.task_sets and config.batch_size % config.group_size:
        below = config.batch_size - config.batch_size % config.group_size
        raise ValueError(
            f"batch_size={config.batch_size} is not divisible by group_size={config.group_size}: "
            f"use {below or config.group_size} or {below + config.group_size}"
        )
    if config.trainer.mini_batches > config.batch_size:
        raise ValueError(
            f"trainer.mini_batches={config.trainer.mini_batches} exceeds batch_size="
            f"{config.batch_size}: use fewer"
        )
    _check_share(config)
    _check_workers(config)
    if config.engine.colocated:
        _check_turns(config)
    _check_adapters(config)
    _check_replay(config)
    if config.cluster.kind != "none":
        _check_cluster(config)
    _check_rollout(config)
    check_staleness(config.trainer, alpha=config.alpha)
    if (reference := config.trainer.kl.reference) is not None:
        try:
            check_model(reference)
        except ValueError as error:
            raise ValueError(f"trainer.kl.reference={reference!r}: {error}") from None
    if config.engine.transport == "nccl" and config.explorers.certificate is not None:
        raise ValueError(
            "engine.transport=nccl with explorers.certificate: NCCL sends weights in the clear: "
            "use engine.transport=disk, or leave the certificate out"
        )
    _check_parallel(config)
    if config.model == SMALL:
        _check_small_heads(config)
    _check_brought(config)
    for name, of_set in config.sets.items():
        try:
            _check_set(of_set, longest=config.agent.max_sequence_tokens)
            if name not in config.brought:
                _check_played_with(of_set)
        except ValueError as error:
            if not name:
                raise
            raise ValueError(f"task_sets.{name}: {error}") from None


def _check_set(config: RunFields, *, longest: int) -> None:
    """What the tasks of a set must agree on, or those of a run that has one only."""
    if config.group_size < 2 and config.trainer.advantages.compares:
        raise ValueError(
            f"group_size={config.group_size} with trainer.advantages.name="
            f"{config.trainer.advantages.name}, which compares the episodes of a group: use 2 or "
            f"more, or trainer.advantages=reinforce, which compares those of the batch"
        )
    if config.group_size < 2 and "equal_rewards" in config.rollout.filters:
        raise ValueError(
            f"rollout.filters=equal_rewards with group_size={config.group_size} would drop every "
            f"group: use a group_size of 2 or more, or leave the filter out"
        )
    groups = config.batch_size // config.group_size
    config.rollout.reuse.check(alpha=config.alpha, groups_per_batch=groups)
    if config.agent.max_sequence_tokens > longest:
        raise ValueError(
            f"agent.max_sequence_tokens={config.agent.max_sequence_tokens} exceeds the run's, "
            f"{longest}, which the workers are made for: raise that one"
        )
    _check_lengths(config)
    _check_roles(config)


def _check_roles(config: RunFields) -> None:
    """That those who play an episode together can be told apart, and that an earlier policy has
    a worker."""
    roles = config.agent.roles
    if roles and config.trainer.advantages.name == "gae":
        raise ValueError(
            f"trainer.advantages.name=gae with agent.roles={list(roles)}: a critic's values are of "
            f"one player's tokens: use grpo, rloo or reinforce"
        )
    for name, earlier in ((n, role.earlier) for n, role in roles.items() if role.earlier):
        for given, is_so in (
            ("engine.colocated=true", config.engine.colocated),
            (f"explorers.expected={config.explorers.expected}", config.explorers.may_come),
            (f"cluster.kind={config.cluster.kind}", config.cluster.kind != "none"),
        ):
            if is_so:
                raise ValueError(
                    f"agent.roles.{name}.earlier={earlier} with {given}: an earlier policy has a "
                    f"worker of its own beside those of the run: leave one of them out"
                )


def _check_played_with(config: RunFields) -> None:
    """That what its tasks are played with is there."""
    check_run(config)
    check_tools(config.agent, config.env)
    if config.uses_environment:
        make = registry.environment(config.env.name)
        check_arguments(make, config.env.options, "env.options")
        check_arguments(make, config.env.options | config.env.eval_options, "env.eval_options")
    style = registry.style(config.agent.style)
    check_arguments(style, config.agent.style_options, "agent.style_options")


def _check_small_heads(config: RunFields) -> None:
    """That those of the small policy are what workers and ranks can compute."""
    policy, sequence_ranks = config.policy, config.trainer.sequence_ranks
    width = policy.hidden_size // policy.heads
    if _starts_vllm_on_cpu(config) and width % 32:
        raise ValueError(
            f"policy.hidden_size={policy.hidden_size} with policy.heads={policy.heads} gives heads "
            f"of {width}; vLLM on a CPU takes 32, 64, 96, …: change one of them"
        )
    if policy.heads % sequence_ranks:
        raise ValueError(
            f"trainer.sequence_ranks={sequence_ranks} does not divide policy.heads={policy.heads}, "
            f"of which each rank computes as many: use a divisor of it"
        )


def _starts_vllm_on_cpu(config: RunFields) -> bool:
    """Explorers and a cluster's nodes, which may have GPUs, see to theirs themselves."""
    starts_here = config.engine.workers > 0 and config.cluster.kind == "none"
    return starts_here and config.engine.kind == "vllm" and not machine.gpus()


def _check_workers(config: RunFields) -> None:
    """That somebody plays."""
    if config.explorers.evaluate and config.eval.mode == "beside":
        raise ValueError(
            "eval.mode=beside with explorers.evaluate=true: evaluations are beside rollout by that "
            "already, on no workers of the run's: leave eval.mode out"
        )
    if config.engine.workers or config.engine.urls:
        return
    if not config.explorers.may_come and config.cluster.kind == "none":
        raise ValueError(
            "engine.workers=0 with explorers.expected=0: nobody would play: start workers, or let "
            "explorers come"
        )
    if config.engine.door_port is not None:
        raise ValueError(
            f"engine.door_port={config.engine.door_port} with engine.workers=0: behind that door "
            f"would be no worker: leave it out"
        )


def _check_turns(config: RunFields) -> None:
    """That whoever trains or samples can wait while the other one does."""
    for given, is_so, why in (
        (
            "stream=true",
            config.stream,
            "groups would be trained while others are sampled, and the GPUs are one's at a time: "
            "use stream=false",
        ),
        (
            "eval.mode=beside",
            config.eval.mode == "beside",
            "workers of an evaluation would sleep with the others: use eval.mode=pause",
        ),
        (
            f"explorers.expected={config.explorers.expected}",
            config.explorers.may_come,
            "explorers have GPUs of their own, and wait for nobody's turn: leave one of them out",
        ),
        (
            f"cluster.kind={config.cluster.kind}",
            config.cluster.kind != "none",
            "there explorers have all workers: leave one of them out",
        ),
    ):
        if is_so:
            raise ValueError(f"engine.colocated=true with {given}: {why}")


def _check_adapters(config: RunFields) -> None:
    """That all who would get adapters can take them."""
    if config.trainer.lora.publish != "adapters":
        return
    engine, rank, largest = config.engine, config.trainer.lora.rank, ADAPTER_RANKS[-1]
    for given, is_so, why in (
        (
            f"engine.kind={engine.kind}",
            engine.kind != "vllm",
            "only vLLM servers that the run starts take adapters: use engine.kind=vllm, or",
        ),
        (
            f"engine.transport={engine.transport}",
            engine.transport != "disk",
            "adapters come as files: use engine.transport=disk, or",
        ),
        (
            "engine.colocated=true",
            engine.colocated,
            "servers that slept have no weights, and adapters are not all of them: use",
        ),
        (
            f"explorers.expected={config.explorers.expected}",
            config.explorers.may_come,
            "explorers get whole weights: use",
        ),
        (
            f"cluster.kind={config.cluster.kind}",
            config.cluster.kind != "none",
            "there explorers have all workers, and get whole weights: use",
        ),
        (
            f"trainer.lora.rank={rank}",
            rank > largest,
            f"vLLM takes ranks up to {largest}: use a lower one, or",
        ),
    ):
        if is_so:
            raise ValueError(
                f"trainer.lora.publish=adapters with {given}: {why} trainer.lora.publish=merged"
            )


def _check_replay(config: RunFields) -> None:
    """That routers can take what workers chose."""
    if config.trainer.router_replay and config.model == SMALL:
        raise ValueError(
            "trainer.router_replay=true with model=small, which is no mixture of experts: give a "
            "model that is one, or leave it out"
        )
    if config.trainer.router_replay and _starts_vllm_on_cpu(config):
        raise ValueError(
            "trainer.router_replay=true with engine.kind=vllm, which tells no experts on a CPU: "
            "use engine.kind=embedded, or leave it out"
        )


def _check_brought(config: RunFields) -> None:
    """That task sets which explorers bring can be brought, and nothing here needs them."""
    if not config.brought:
        return
    given = f"task_sets.{min(config.brought)}.brought=true"
    if not config.explorers.may_come and config.cluster.kind == "none":
        raise ValueError(f"{given} with explorers.expected=0: nobody could bring it: let them come")
    if config.model == SMALL:
        raise ValueError(
            f"{given} with model=small, which is made of the words of all tasks, and those are "
            f"not here: give a model"
        )
    if config.eval.mode == "beside":
        raise ValueError(
            f"{given} with eval.mode=beside, which is played by workers of the run's: use "
            f"eval.mode=pause, or explorers.evaluate=true"
        )
    if not config.own_sets and (config.engine.workers or config.engine.urls):
        raise ValueError(
            f"{given}, as of all sets, with workers of the run's, which would play nothing: set "
            f"engine.workers=0, and leave engine.urls out"
        )


def _check_parallel(config: RunFields) -> None:
    """That the model can be shared out to the GPUs of a server."""
    parallel = config.engine.tensor_parallel
    if parallel == 1 or config.engine.urls:
        return
    settings: Mapping[str, Any] | None = {"num_attention_heads": config.policy.heads}
    if config.model != SMALL:
        settings = read_config(config.model)
    if settings is not None:
        check_heads(settings, model=config.model, tensor_parallel=parallel)
    gpus = config.cluster.explorers.gpus
    if gpus and parallel > gpus:
        raise ValueError(
            f"engine.tensor_parallel={parallel} with cluster.explorers.gpus={gpus}: the GPUs of a "
            f"server are its explorer's: ask for {parallel} or more there, or use fewer"
        )


def _check_cluster(config: RunFields) -> None:
    """That nothing needs workers beside the controller: on a cluster explorers have them all."""
    kind, asked, ranks = config.cluster.kind, config.cluster.trainer, config.trainer.ranks
    nodes = f" and cluster.trainer.nodes={asked.nodes}" if asked.nodes > 1 else ""
    if asked.gpus and ranks not in (1, asked.nodes * asked.gpus):
        raise ValueError(
            f"trainer.ranks={ranks} with cluster.trainer.gpus={asked.gpus}{nodes}: a rank has one "
            f"GPU: leave trainer.ranks out"
        )
    if not asked.gpus and ranks % asked.nodes:
        raise ValueError(
            f"trainer.ranks={ranks} with cluster.trainer.nodes={asked.nodes}: nodes have as many "
            f"ranks each: use a multiple of {asked.nodes}"
        )
    if (cpus := config.cluster.hosts.cpus) and not config.hosted:
        raise ValueError(
            f"cluster.hosts.cpus={cpus} with env.hosts=0, and no rewards in processes: there is "
            f"nothing to place: set env.hosts or reward.name=process, or leave it out"
        )
    if config.engine.transport == "nccl" and not (asked.gpus and config.cluster.explorers.gpus):
        raise ValueError(
            f"engine.transport=nccl with cluster.trainer.gpus={asked.gpus} and "
            f"cluster.explorers.gpus={config.cluster.explorers.gpus}: it is between GPUs: "
            f"ask for some on either side, or use engine.transport=disk"
        )
    for field, given, remedy in (
        ("eval.mode=beside", config.eval.mode == "beside", "use eval.mode=pause"),
        ("engine.urls", bool(config.engine.urls), "leave it out, or use cluster.kind=none"),
        (
            f"engine.door_port={config.engine.door_port}",
            config.engine.door_port is not None,
            "leave it out, or use cluster.kind=none",
        ),
    ):
        if given:
            raise ValueError(
                f"{field} with cluster.kind={kind}: the workers are those that explorers start: "
                f"{remedy}"
            )


def _check_lengths(config: RunFields) -> None:
    """That the model can read what may be said, and workers can hold it."""
    longest = config.agent.max_sequence_tokens
    if config.engine.cache_tokens < longest:
        raise ValueError(
            f"engine.cache_tokens={config.engine.cache_tokens} can't hold one episode of "
            f"agent.max_sequence_tokens={longest}: raise the former"
        )
    if config.model == SMALL and config.policy.max_tokens < longest:
        raise ValueError(
            f"policy.max_tokens={config.policy.max_tokens} can't read one episode of "
            f"agent.max_sequence_tokens={longest}: raise the former"
        )
    if config.model != SMALL and (settings := read_config(config.model)) is not None:
        check_positions(settings, model=config.model, max_sequence_tokens=longest)
    if config.agent.max_tokens >= longest:
        raise ValueError(
            f"agent.max_tokens={config.agent.max_tokens} leaves no room for a prompt in "
            f"agent.max_sequence_tokens={longest}: raise the latter"
        )


def _check_rollout(config: RunFields) -> None:
    """That episodes can end in batches, and be fresh enough for them."""
    if config.rollout.adaptive_alpha.is_on and not config.alpha:
        raise ValueError(
            "rollout.adaptive_alpha with alpha=0: there is nothing to follow: set alpha to the "
            "most it may be, or leave min_ess and max_kl out"
        )
    if config.stream and config.trainer.mini_batches > 1:
        raise ValueError(
            f"stream=true with trainer.mini_batches={config.trainer.mini_batches}: a later "
            f"mini-batch needs weights that the first has changed, so it can't come in parts: "
            f"set trainer.mini_batches=1, or stream=false"
        )
    if config.stream and config.trainer.advantages.needs_batch:
        raise ValueError(
            f"stream=true with trainer.advantages.name={config.trainer.advantages.name}: these "
            f"advantages take the whole batch (its baseline, its whitening, or a critic), so "
            f"no group can be trained before the last has finished: use grpo or rloo without "
            f"whiten, or stream=false"
        )
    expert = config.rollout.expert
    if expert.file is not None and expert.episodes < config.trainer.mini_batches:
        raise ValueError(
            f"rollout.expert.episodes={expert.episodes} with trainer.mini_batches="
            f"{config.trainer.mini_batches}: each of these imitates some: use "
            f"{config.trainer.mini_batches} episodes or more, or fewer mini-batches"
        )
    if config.publish_every - 1 > config.alpha:
        raise ValueError(
            f"publish_every={config.publish_every} with alpha={config.alpha:g}: at the last step "
            f"before a publish every token is {config.publish_every - 1} versions old or older: "
            f"set alpha to {config.publish_every - 1} or more, or publish more often"
        )


def check_staleness(trainer: TrainerConfig, *, alpha: float) -> None:
    """An objective that is wrong for stale tokens gets none, unless that is asked for."""
    objective = trainer.objective
    name = f"trainer.objective.name={objective.name}"
    if isinstance(objective, Supervised):
        raise ValueError(
            f"{name}: {objective.cannot_correct}: it is for warm starts; use another of "
            f"{', '.join(sorted(set(SETTINGS) - {objective.name}))}"
        )
    if objective.allows_stale:
        return
    remedy = (
        "use an objective that corrects (tis, decoupled_ppo, …), or "
        "trainer.objective.allow_stale=true to study what that does"
    )
    if alpha >= 1:
        raise ValueError(
            f"{name} with alpha={alpha:g}: tokens up to {math.floor(alpha)} versions "
            f"old would be trained as if they were new, because {objective.cannot_correct}: "
            f"set alpha=0, {remedy}"
        )
    if trainer.mini_batches > 1:
        raise ValueError(
            f"{name} with trainer.mini_batches={trainer.mini_batches}: all but the first "
            f"mini-batch come from weights before its own, because "
            f"{objective.cannot_correct}: set trainer.mini_batches=1, {remedy}"
        )


def _check_share(config: RunFields) -> None:
    """Of the workers, for evaluation beside rollout."""
    workers = len(config.engine.urls) or config.engine.workers
    if config.eval.mode == "beside" and config.eval.workers >= workers:
        raise ValueError(
            f"eval.workers={config.eval.workers} with eval.mode=beside leaves none of "
            f"{workers} workers to rollout: set engine.workers to "
            f"{config.eval.workers + 1} or more, or use eval.mode=pause"
        )
