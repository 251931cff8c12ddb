"""Keys of ROLL (alibaba/ROLL): pipelines of RLVR and of agents.

There a step is a batch, as here. rollout_batch_size counts prompts in RLVR, each of which has
num_return_sequences_in_group responses, and episodes with agents; a batch here counts samples.
"""

import re
from typing import Any

from flash.convert.counterparts import (
    MODEL,
    OF_FILES,
    OF_QUESTIONS,
    OF_TRAINER,
    OF_WORKERS,
    RATE,
    REPETITION,
    SEED,
    TOP_K,
    TOP_P,
    aggregation,
    clip,
    clips,
    dtype,
    environment,
    frequency,
    no_environment,
    of_advantages,
    of_gae,
    placed,
    questions_of,
    run_name,
    server_args,
)
from flash.convert.rules import (
    Answer,
    Becomes,
    Default,
    Depends,
    Given,
    Missing,
    NoMeaning,
    Rule,
    System,
    by_name,
    is_field,
)
from flash.convert.source import Source

_ADVANTAGES = {
    "gae": "gae",
    "grpo": "grpo",
    "reinforce": "reinforce",
    "gigpo": "gigpo",
    "step_reinforce": "turn_returns",
    "agentic_reinforce": "turn_returns",
}
_VARIANTS = ("vanilla", "ppo", "tis", "topr", "cispo", "kimi15")
_DEVICES = re.compile(r"\s*list\(\s*range\(\s*(\d+)\s*(?:,\s*(\d+)\s*)?\)\s*\)\s*")
_INFER = "actor_infer.strategy_args.strategy_config."


def devices(value: Any) -> list[int] | None:
    """The GPUs of a device_mapping: a list, or list(range(a,b)), or a sum of these."""
    if isinstance(value, list):
        return [int(gpu) for gpu in value]
    found: list[int] = []
    for part in str(value).split("+"):
        if ranged := _DEVICES.fullmatch(part):
            start, end = (int(ranged[1]), int(ranged[2])) if ranged[2] else (0, int(ranged[1]))
            found += range(start, end)
        elif listed := re.fullmatch(r"\s*\[([\d\s,]*)\]\s*", part):
            found += [int(gpu) for gpu in listed[1].split(",") if gpu.strip()]
        else:
            return None
    return found


def _responses(source: Source) -> int:
    return source.count("num_return_sequences_in_group", default=1)


def _batch_size(source: Source) -> int:
    return source.count("rollout_batch_size", default=128) * _responses(source)


def _objective(source: Source) -> str:
    given = source.text("pg_variant", "actor_train.pg_variant")
    if given in _VARIANTS:
        return given
    return "topr" if source.get("use_topr_loss") else "decoupled_ppo"


def _advantages(source: Source) -> str:
    return _ADVANTAGES.get(source.text("adv_estimator", default="gae"), "grpo")


def _is_async(source: Source) -> bool:
    return bool(source.get("async_generation_ratio"))


def _variant(given: Given) -> Answer:
    if given.value not in _VARIANTS:
        return Missing(f"{given.value}: there is no such objective: see docs/objectives.md")
    stale = {"trainer.objective.allow_stale": True}
    return {"trainer.objective.name": given.value} | (
        stale if given.value == "vanilla" and _is_async(given.source) else {}
    )


def _of_range(field: str) -> Becomes:
    """pg_clip_low and pg_clip_high count if use_pg_clip_range says so."""
    inner = clips(_objective, field)

    def how(given: Given) -> Answer:
        if not given.source.get("use_pg_clip_range"):
            return NoMeaning("use_pg_clip_range is not set: pg_clip says both")
        return inner.how(given)

    return Becomes(inner.fields, inner.unit, how)


def _dual_clip(given: Given) -> Answer:
    """There it is 1 + 2·pg_clip."""
    name = _objective(given.source)
    if name != "ppo":
        return Depends(
            (False,), "off", f"{name} has no dual clip: only the objective ppo has"
        ).answer(given)
    bound = 1 + 2 * given.source.number("pg_clip", default=0.2)
    return {"trainer.objective.dual_clip": bound if given.value else None}


def _advantage(field: str, *kinds: str) -> Becomes:
    """A setting of the advantages; of `kinds` alone, if they are named."""

    def how(given: Given) -> Answer:
        name = _advantages(given.source)
        if kinds and name not in kinds:
            return NoMeaning(f"it is of {', '.join(kinds)}, and adv_estimator is another")
        return of_advantages(field, name, given.value)

    return Becomes((f"trainer.advantages.{field}",), "as there", how)


def _kl_loss(given: Given) -> Answer:
    if not given.source.get("use_kl_loss"):
        return NoMeaning("use_kl_loss is not set, so it is not used")
    return {"trainer.kl.coefficient": given.value, "trainer.kl.place": "loss"}


def _kl_reward(given: Given) -> Answer:
    if not given.source.get("add_token_level_kl"):
        return NoMeaning("add_token_level_kl is not set, so it is taken from no reward")
    return {"trainer.kl.coefficient": given.value, "trainer.kl.place": "reward"}


def _kl_estimator(given: Given) -> Answer:
    source = given.source
    if not (source.get("add_token_level_kl") or source.get("use_kl_loss")):
        return NoMeaning("no divergence is used")
    return by_name(
        "trainer.kl.estimator", "", {"kl": "k1", "mse": "k2"}, "there are k1, k2 and k3"
    ).answer(given)


def _gpus(given: Given) -> Answer:
    source = given.source
    trainer = devices(source.get("actor_train.device_mapping"))
    workers = devices(source.get("actor_infer.device_mapping"))
    if not trainer or not workers:
        return Missing(
            "it takes actor_train's and actor_infer's, as lists or list(range(a,b)): set "
            "trainer.ranks and engine.workers"
        )
    places = placed(
        trainer=len(trainer),
        workers=len(workers),
        per_node=source.count("num_gpus_per_node", default=8),
        per_worker=source.count(f"{_INFER}tensor_parallel_size", f"{_INFER}tp_size", default=1),
        shared=bool(set(trainer) & set(workers)),
    )
    if not isinstance(places, dict):
        return places
    of_trainer = given.key.startswith("actor_train")
    return {name: value for name, value in places.items() if (name in OF_TRAINER) == of_trainer}


def _mini_batches(given: Given) -> Answer:
    """Optimizer steps of a batch: its samples over those of one step on all data-parallel ranks."""
    source, config = given.source, "actor_train.strategy_args.strategy_config."
    ranks = len(devices(source.get("actor_train.device_mapping")) or [0])
    for split in ("tensor_model", "pipeline_model", "context"):
        ranks //= source.count(f"{config}{split}_parallel_size", default=1)
    of_step = source.count("actor_train.training_args.per_device_train_batch_size", default=8)
    of_step *= source.count("actor_train.training_args.gradient_accumulation_steps", default=1)
    return {"trainer.mini_batches": max(1, _batch_size(source) // (of_step * max(1, ranks)))}


def _micro_batch(given: Given) -> Answer:
    source = given.source
    length = source.count("sequence_length", default=0) or (
        source.count("prompt_length", default=1024) + source.count("response_length", default=0)
    )
    return {"trainer.tokens_per_micro_batch": int(given.value) * length}


def _sequence(given: Given) -> Answer:
    """prompt_length and response_length, where no sequence_length is given."""
    source = given.source
    if "sequence_length" in source:
        return NoMeaning("sequence_length says what is left for a response")
    prompt = source.count("prompt_length", default=1024)
    found: dict[str, Any] = {}
    if response := source.count("response_length", default=0):
        found["agent.max_sequence_tokens"] = prompt + response
        if given.key == "response_length":
            found["agent.max_tokens"] = response
    return found or Missing("it takes response_length: set agent.max_sequence_tokens")


def _world(source: Source, tag: str) -> str | None:
    """The environment of a tag, by what the file says that it is, or else by its name."""
    kinds = (f"custom_envs.{tag}.env_type", f"custom_env.{tag}.env_type")
    return environment(source.text(*kinds, default=tag))


def _played(source: Source) -> list[str] | None:
    tags = source.get("train_env_manager.tags")
    return [str(tag) for tag in tags] if isinstance(tags, list) else None


def _tags(given: Given) -> Answer:
    """One environment, or a task set for each tag, by its part of the groups."""
    source = given.source
    tags = _played(source) or [str(given.value)]
    names = {tag: _world(source, tag) for tag in tags}
    for tag in (tag for tag, name in names.items() if name is None):
        return no_environment(
            f"{tag}: no environment is registered for it: name yours, module:Class"
        )
    if len(names) == 1:
        return {"env.name": names[tags[0]]}
    shares = source.get("train_env_manager.num_groups_partition")
    weights = shares if isinstance(shares, list) and len(shares) == len(tags) else [1] * len(tags)
    sets = {
        tag: {"weight": weight, "env": {"name": names[tag]}}
        for tag, weight in zip(tags, weights, strict=True)
    }
    return {"env.name": names[tags[0]], "task_sets": sets}


def _of_tag(rule: Becomes | NoMeaning | Missing) -> Becomes:
    """A rule for what an environment has, if it is one of those that are played."""

    def how(given: Given) -> Answer:
        played = _played(given.source)
        if played is not None and given.key.split(".")[1] not in played:
            return NoMeaning("train_env_manager.tags does not name it")
        return rule.answer(given) if isinstance(rule, Becomes) else rule

    if isinstance(rule, Becomes):
        return Becomes(rule.fields, rule.unit, how)
    return Becomes((), rule.why, how)


def _files(given: Given) -> Answer:
    if "train_env_manager.tags" in given.source:
        return NoMeaning("train_env_manager.tags names the environments")
    return questions_of(given)


def _slippery(given: Given) -> Answer:
    tag = given.key.split(".")[1]
    if _played(given.source) != [tag] or _world(given.source, tag) != "frozen_lake":
        return Missing("options of several environments: give them in task_sets.NAME.env.options")
    return {"env.options": {"slippery": given.value}}


_LENGTHS = ("agent.max_tokens", "agent.max_sequence_tokens")
_MAX_TURNS = is_field("agent.max_turns", "actions of an episode, likewise", int)
_MAX_TOKENS = is_field("agent.max_tokens", "tokens of a response, likewise", int)
_MEGATRON = NoMeaning("FSDP2 shards a model over all ranks, whatever its parallelism was")
_ROLE = NoMeaning("one model is the policy, the reference is a copy of it on the same ranks")

_RULES: dict[str, Rule] = {
    "exp_name": is_field("name", "the run's folder", run_name),
    "seed": SEED,
    "pretrain": MODEL,
    "actor_train.model_args.model_name_or_path": MODEL,
    "async_generation_ratio": is_field(
        "alpha",
        "there batches that may begin ahead; here also the bound, in versions, on each token's age",
    ),
    "rollout_batch_size": Becomes(
        ("batch_size",),
        "prompts (RLVR) or episodes (agents), here samples: times num_return_sequences_in_group",
        lambda given: {"batch_size": _batch_size(given.source)},
    ),
    "num_return_sequences_in_group": is_field("group_size", "responses of a prompt, likewise", int),
    "train_env_manager.group_size": is_field("group_size", "episodes of one seed, likewise", int),
    "train_env_manager.group_size_redundancy": is_field(
        "rollout.redundant_episodes", "episodes of a group beyond its size, likewise", int
    ),
    "train_env_manager.tags": Becomes(
        ("env.name", "task_sets"), "names of environments; several are task sets", _tags
    ),
    "train_env_manager.num_groups_partition": NoMeaning(
        "the weights of the task sets, where there are several tags"
    ),
    "train_env_manager.num_env_groups": NoMeaning(
        "alpha says how many episodes are under way: (1 + alpha) · batch_size"
    ),
    "train_env_manager.max_env_num_per_worker": NoMeaning(
        "environments need no processes of their own; those that block do: env.hosts"
    ),
    "train_env_manager.max_traj_per_env": NoMeaning("an episode has an environment of its own"),
    "train_env_manager.hung_timeout": is_field(
        "rollout.stall_timeout_s", "seconds; there it logs, here the run acts (rollout.on_stall)"
    ),
    "train_env_manager.format_penalty": Missing("a reward of your own can take it: reward.run"),
    "train_env_manager.group_filter_cls": Missing(
        "write a function of a group, and name it: rollout.filters=module:function"
    ),
    "train_env_manager.llm_proxy.*": NoMeaning("the hub is the proxy"),
    "train_env_manager.worker_cls": NoMeaning("environments have no workers of their own"),
    "val_env_manager.num_env_groups": NoMeaning("eval.tasks says how many episodes there are"),
    "val_env_manager.group_size": Missing("an evaluation plays each task once"),
    "val_env_manager.tags": NoMeaning(
        "an evaluation plays the run's environments, on held-out tasks: env.eval_options"
    ),
    "val_env_manager.num_groups_partition": NoMeaning("task sets have their part of eval.tasks"),
    "val_env_manager.max_env_num_per_worker": NoMeaning("an episode has its own environment"),
    "val_env_manager.max_traj_per_env": NoMeaning("an episode has its own environment"),
    "custom_env*.*.env_type": _of_tag(
        NoMeaning("what a tag means: train_env_manager.tags has become it")
    ),
    "custom_env*.*.env_config.max_steps": _of_tag(_MAX_TURNS),
    "custom_env*.*.max_steps": _of_tag(_MAX_TURNS),
    "max_actions_per_traj": _MAX_TURNS,
    "custom_env*.*.env_config.is_slippery": Becomes(
        ("env.options",), "whether a step may go astray: slippery", _slippery
    ),
    "custom_env*.*.max_tokens_per_step": _of_tag(_MAX_TOKENS),
    "max_tokens_per_step": _MAX_TOKENS,
    "custom_env*.*.env_manager_cls": _of_tag(
        by_name(
            "agent.samples",
            "what an episode is trained as: one sample, or one for each turn",
            {
                "roll.pipeline.agentic.env_manager.traj_env_manager.TrajEnvManager": "whole",
                "roll.pipeline.agentic.env_manager.step_env_manager.StepEnvManager": "turns",
            },
            "there are whole and turns; an agent of your own is agent.run",
        )
    ),
    "custom_env*.*.use_thread_lock": NoMeaning("an environment is driven by one episode alone"),
    "custom_env*.*.agent_*template": _of_tag(
        Missing("with agent.style=chat: agent.style_options; or a style of your own, agent.style")
    ),
    "custom_env*.*": _of_tag(
        Missing("options of an environment here have other names: env.options")
    ),
    "*agent_system_template": Missing("with agent.style=chat: agent.style_options.system"),
    "*agent_template": Missing("a prompt style of your own is agent.style=module:Class"),
    "*action_pattern": Missing("with agent.style=chat: agent.style_options.answer"),
    "env_manager_cls": NoMeaning("a text that environments refer to"),
    "actor_infer.generating_args.max_new_tokens": is_field(
        "agent.max_tokens", "tokens of a response, likewise", int
    ),
    "response_length": Becomes(_LENGTHS, "tokens of a response, likewise", _sequence),
    "prompt_length": Becomes(_LENGTHS, "tokens before the response, of a sequence's", _sequence),
    "sequence_length": is_field(
        "agent.max_sequence_tokens", "tokens of a whole episode, likewise", int
    ),
    "actor_infer.generating_args.temperature": is_field(
        "agent.temperature", "of sampling; the trainer accounts for it"
    ),
    "actor_infer.generating_args.top_p": TOP_P,
    "actor_infer.generating_args.top_k": TOP_K,
    "actor_infer.generating_args.num_beams": Depends(
        (1,), "responses are sampled, one each", "policies are not trained on beams: leave it"
    ),
    "actor_infer.generating_args.num_return_sequences": NoMeaning(
        "a request has one response; num_return_sequences_in_group, or group_size, says how many"
    ),
    "actor_infer.generating_args.repetition_penalty": REPETITION,
    "actor_infer.generating_args.logprobs": NoMeaning("the engine tells what it sampled, always"),
    "actor_infer.generating_args.*stop*": Missing(
        "a response ends where the model's chat template ends one; a prompt style of your own "
        "(agent.style) has its stop_token_ids"
    ),
    "is_num_return_sequences_expand": is_field(
        "rollout.replicate", "whether a prompt's responses are requests of their own"
    ),
    "is_use_additional_prompts": NoMeaning("rollout.redundant_groups says it: 0 is none"),
    "max_additional_running_prompts": Becomes(
        ("rollout.redundant_groups",),
        "prompts begun beyond a batch, likewise",
        lambda given: (
            {"rollout.redundant_groups": int(given.value)}
            if given.source.get("is_use_additional_prompts")
            else NoMeaning("is_use_additional_prompts is not set")
        ),
    ),
    "max_running_requests": is_field("engine.max_running", "requests at one worker, likewise", int),
    "generate_opt_level": by_name(
        "rollout.schedule", "how requests begin", {0: "batch", 1: "queue"}, "0 or 1"
    ),
    "router_args.*": NoMeaning("the hub sends a request to the worker with the least to do"),
    "actor_train.device_mapping": Becomes(
        OF_TRAINER, "global numbers of GPUs; here how many: ranks of the trainer", _gpus
    ),
    "actor_infer.device_mapping": Becomes(
        OF_WORKERS, "global numbers of GPUs; here how many: workers, of tensor_parallel each", _gpus
    ),
    "num_gpus_per_node": NoMeaning("ranks and workers were placed by it: see device_mapping"),
    "num_nodes": NoMeaning("ranks and workers were placed by device_mapping"),
    "*.device_mapping": NoMeaning("the reference and the critic are on the trainer's ranks"),
    "*.num_gpus_per_worker": NoMeaning("a worker has engine.tensor_parallel GPUs"),
    "*.world_size": NoMeaning("ranks and workers follow from device_mapping"),
    "actor_infer.strategy_args.strategy_name": by_name(
        "engine.kind",
        "what serves",
        {"vllm": "vllm", "sglang": "sglang", "hf_infer": "embedded"},
        "there are vllm, sglang and embedded",
    ),
    f"{_INFER}gpu_memory_utilization": is_field("engine.gpu_memory", "share of a GPU's memory"),
    f"{_INFER}mem_fraction_static": is_field("engine.gpu_memory", "share of a GPU's memory"),
    f"{_INFER}tensor_parallel_size": is_field("engine.tensor_parallel", "GPUs of a worker", int),
    f"{_INFER}tp_size": is_field("engine.tensor_parallel", "GPUs of a worker", int),
    f"{_INFER}max_num_seqs": is_field("engine.max_running", "requests at one worker", int),
    f"{_INFER}block_size": server_args("block-size"),
    f"{_INFER}enforce_eager": server_args("enforce-eager"),
    f"{_INFER}enable_prefix_caching": server_args("enable-prefix-caching"),
    f"{_INFER}max_num_batched_tokens": server_args("max-num-batched-tokens"),
    f"{_INFER}load_format": NoMeaning("workers load the model, then what is published"),
    f"{_INFER}sleep_level": NoMeaning("servers on the trainer's GPUs sleep: engine.colocated"),
    f"{_INFER}max_model_len": NoMeaning("agent.max_sequence_tokens says it"),
    f"{_INFER}*": Missing("an option of the servers: engine.vllm_args or engine.sglang_args"),
    "actor_infer.model_args.dtype": dtype("engine.dtype"),
    "actor_infer.model_args.*": NoMeaning("workers load the policy as it is"),
    "actor_infer.data_args.*": NoMeaning("the model's own chat template is used"),
    "actor_train.model_args.dtype": dtype("trainer.dtype"),
    "actor_train.model_args.disable_gradient_checkpointing": is_field(
        "trainer.gradient_checkpointing", "whether activations are recomputed", lambda off: not off
    ),
    "actor_train.strategy_args.strategy_config.recompute_granularity": is_field(
        "trainer.gradient_checkpointing",
        "whether activations are recomputed, of whole layers here",
        lambda kind: kind is not None,
    ),
    "actor_train.model_args.ulysses_size": is_field(
        "trainer.sequence_ranks", "ranks that share a sequence, likewise", int
    ),
    "actor_train.strategy_args.strategy_config.context_parallel_size": is_field(
        "trainer.sequence_ranks", "ranks that share a sequence; here as Ulysses does", int
    ),
    "actor_train.model_args.lora_rank": is_field("trainer.lora.rank", "of the adapters", int),
    "actor_train.model_args.lora_alpha": is_field("trainer.lora.alpha", "over the rank", int),
    "actor_train.model_args.lora_target": is_field(
        "trainer.lora.targets", "modules, by the ends of their names"
    ),
    "actor_train.model_args.attn_implementation": NoMeaning(
        "packed sequences attend by torch's own kernels"
    ),
    "actor_train.model_args.flash_attn": NoMeaning(
        "packed sequences attend by torch's own kernels"
    ),
    "actor_train.model_args.model_type": NoMeaning("the model's config.json says it"),
    "actor_train.strategy_args.strategy_name": NoMeaning("the trainer is FSDP2, always"),
    "actor_train.strategy_args.strategy_config.*offload*": Missing(
        "weights and optimizer stay on the trainer's GPUs; with engine.colocated they make room"
    ),
    "actor_train.strategy_args.*": _MEGATRON,
    "actor_train.training_args.learning_rate": is_field(
        "trainer.learning_rate", "of AdamW, likewise", float
    ),
    "actor_train.training_args.weight_decay": is_field(
        "trainer.weight_decay", "of AdamW, likewise"
    ),
    "actor_train.training_args.warmup_steps": is_field(
        "trainer.warmup_steps", "optimizer steps, likewise", int
    ),
    "actor_train.training_args.lr_scheduler_type": RATE,
    "actor_train.training_args.per_device_train_batch_size": Becomes(
        ("trainer.tokens_per_micro_batch",),
        "sequences of a pass; here tokens, of the longest sequences",
        _micro_batch,
    ),
    "actor_train.training_args.gradient_accumulation_steps": Becomes(
        ("trainer.mini_batches",),
        "passes of an optimizer step; here optimizer steps of a batch",
        _mini_batches,
    ),
    "actor_train.max_tokens_per_microbatch_in_train": is_field(
        "trainer.tokens_per_micro_batch", "tokens of a pass, likewise", int
    ),
    "actor_train.training_args.num_train_epochs": NoMeaning("max_steps ends the run"),
    "actor_train.training_args.*": Missing("see flash train --help trainer for what there is"),
    "actor_train.data_args.file_name": Becomes(OF_QUESTIONS, OF_FILES, _files),
    "actor_train.data_args.template": NoMeaning("the model's own chat template is used"),
    "actor_train.data_args.domain_interleave_probs.*": Missing(
        "several kinds of tasks are task_sets.NAME, each with a weight"
    ),
    "actor_train.data_args.*": NoMeaning("an environment gives the tasks, one by one"),
    "actor_train.use_dynamic_batching_in_train": NoMeaning("passes are packed by tokens, always"),
    "actor_train.use_sequence_packing": NoMeaning("sequences are packed, always"),
    "actor_train.pg_variant": Becomes(
        ("trainer.objective.name", "trainer.objective.allow_stale"), "the loss", _variant
    ),
    "pg_variant": Becomes(
        ("trainer.objective.name", "trainer.objective.allow_stale"), "the loss", _variant
    ),
    "use_topr_loss": Becomes(
        ("trainer.objective.name",),
        "the loss",
        lambda given: {"trainer.objective.name": "topr"} if given.value else NoMeaning("off"),
    ),
    "use_topr_neg_loss_coef": Depends((0,), "off", "the objective topr has both signs: topr"),
    "pos*tive_loss_coef": Depends((0,), "off", "the objective topr has both signs: topr"),
    "rl_loss_coef": Depends((1,), "1, as here", "there is one loss: trainer.objective"),
    "use_policy_loss_type": Depends(
        ("PPO",), "the clip of PPO, unless pg_variant says otherwise", "name it as pg_variant does"
    ),
    "importance_sampling": Depends(
        ("token",), "ratios are of tokens", "gspo and masked_is take ratios of sequences"
    ),
    "ratio_type": Depends(
        ("token",), "ratios are of tokens", "gspo and masked_is take ratios of sequences"
    ),
    "difficulty_*": Depends((False,), "off", "a loss of your own is trainer.objective.run"),
    "length_loss_weight": Depends((False,), "off", "a loss of your own: trainer.objective.run"),
    "*max_len_*": Depends((False,), "off", "what drops groups is rollout.filters"),
    "mask_type": NoMeaning("masks of difficulty and length are not there"),
    "balance_length": NoMeaning("samples are shared out by their tokens, always"),
    "minibatch_data_iter_num": Depends((1,), "a batch is trained once", "see rollout.reuse.uses"),
    "tis_upper_bound": Becomes(
        ("trainer.objective.cap",),
        "cap of a token's weight",
        lambda given: clip("cap", _objective(given.source), given.value),
    ),
    "tis_lower_bound": Depends((0,), "none", "tis has no lower bound: masked_is leaves out"),
    "*topr_*_weight": Depends((1,), "both count alike, as here", "topr weighs by the ratio alone"),
    "actor_train.worker_cls": NoMeaning("trainer.objective names the loss"),
    "*.worker_cls": NoMeaning("parts are chosen by name, not by class"),
    "*.infer_batch_size": NoMeaning(
        "requests are sent one by one, and what ranks compute is packed by tokens"
    ),
    "*_in_infer": NoMeaning("what ranks compute is packed by tokens"),
    "*.sequence_length_round_in_train": NoMeaning("what ranks compute is packed by tokens"),
    "*.sequence_packing_args.*": NoMeaning("what ranks compute is packed by tokens"),
    "*.logits_in_fp32": NoMeaning("logprobs are of logits in float32, always"),
    "*.model_update_frequency": is_field(
        "publish_every", "steps between publishes, likewise; alpha at least one less", int
    ),
    "*.max_concurrency": NoMeaning("parts are no actors of Ray with threads"),
    "*.backend_timeout": NoMeaning("each of the trainer's calls has a deadline: step_timeout_s"),
    "use_pg_clip_range": NoMeaning("says whether pg_clip or pg_clip_low and _high count"),
    "pg_clip_low": _of_range("clip_low"),
    "pg_clip_high": _of_range("clip_high"),
    "pg_clip": clips(_objective, "clip_low", "clip_high"),
    "dual_clip_loss": Becomes(
        ("trainer.objective.dual_clip",), "bound of a bad token's loss: 1 + 2·pg_clip", _dual_clip
    ),
    "loss_agg_mode": aggregation("response_length", "sequence_length"),
    "ppo_epochs": Depends(
        (1,),
        "a batch is trained once",
        "a batch is trained once; groups can be trained again in later ones: rollout.reuse.uses",
    ),
    "adv_estimator": by_name(
        "trainer.advantages.name", "how rewards become advantages", _ADVANTAGES, "there is no such"
    ),
    "whiten_advantages": _advantage("whiten"),
    "advantage_clip": _advantage("clip"),
    "gamma": of_gae(_advantages, "trainer.advantages.gamma", "discount, a token", float),
    "lambd": of_gae(_advantages, "trainer.advantages.lam", "λ, likewise", float),
    "step_reward_gamma": _advantage("gamma", "gigpo", "turn_returns"),
    "step_reward_weight": _advantage("omega", "gigpo"),
    "episode_reward_weight": Depends((1,), "1, as here", "1 here: change the other, omega"),
    "reward_normalization.*": NoMeaning("trainer.advantages says what is compared with what"),
    "norm_mean_type": NoMeaning("trainer.advantages says what is compared with what"),
    "norm_std_type": NoMeaning("trainer.advantages says what is compared with what"),
    "whiten_rewards": Depends((False,), "off", "advantages can be: trainer.advantages.whiten"),
    "l2": Depends((0,), "none", "AdamW has trainer.weight_decay"),
    "add_len_reward": Depends((False,), "off", "a reward of your own is reward.run"),
    "reward_clip": Missing("clip the reward where it is made: reward.run; or advantage_clip"),
    "use_reward_*": Depends((False,), "off", "scale the reward where it is made: reward.run"),
    "use_kl_loss": NoMeaning("kl_loss_coef becomes trainer.kl.coefficient if it is set"),
    "kl_loss_coef": Becomes(
        ("trainer.kl.coefficient", "trainer.kl.place"), "of KL(π ‖ π_ref), likewise", _kl_loss
    ),
    "add_token_level_kl": NoMeaning("init_kl_coef becomes trainer.kl.coefficient if it is set"),
    "init_kl_coef": Becomes(
        ("trainer.kl.coefficient", "trainer.kl.place"), "taken from rewards, likewise", _kl_reward
    ),
    "kl_penalty": Becomes(("trainer.kl.estimator",), "how KL is estimated", _kl_estimator),
    "target_kl": Missing("trainer.kl.coefficient stays as it is"),
    "kl_horizon": Missing("trainer.kl.coefficient stays as it is"),
    "entropy_loss_coef": is_field("trainer.entropy_bonus", "times the entropy, likewise"),
    "max_grad_norm": is_field("trainer.max_grad_norm", "norm of the gradients, likewise"),
    "train_infer_correction.is_weight.upper_bound": Becomes(
        ("trainer.objective.max_behaviour_weight",),
        "cap of a token's weight π_prox/π_behaviour",
        lambda given: clip("max_behaviour_weight", _objective(given.source), given.value),
    ),
    "train_infer_correction.is_weight.*": NoMeaning(
        "decoupled_ppo weighs each token by π_prox/π_behaviour, always"
    ),
    "train_infer_correction.*": Missing(
        "the objectives icepop and masked_is leave out by low and high"
    ),
    "critic.training_args.learning_rate": of_gae(
        _advantages, "trainer.critic.learning_rate", "of the critic's AdamW, likewise", float
    ),
    "value_clip": of_gae(
        _advantages, "trainer.critic.clip", "how far a value may move, likewise", float
    ),
    "critic_warmup": of_gae(
        _advantages, "trainer.critic.warmup_batches", "batches that teach the critic alone", int
    ),
    "critic.*": NoMeaning("the critic of gae is a copy of the policy, on its ranks"),
    "reward_pretrain": NoMeaning("the critic of gae begins as a copy of the policy"),
    "enable_reference": NoMeaning("there is a reference where trainer.kl.coefficient is not 0"),
    "reference.*": _ROLE,
    "rewards.*.judge_*": Missing("a judge is reward.name=judge, with reward.url and reward.prompt"),
    "rewards.*.query_filter_config.*": Missing("groups are filtered by rollout.filters"),
    "rewards.*": Missing("a reward of your own is reward.name=process and reward.run"),
    "reward.*": Missing("a judge is reward.name=judge, a reward of your own reward.name=process"),
    "max_steps": Becomes(
        ("steps",),
        "batches, likewise",
        lambda given: (
            {"steps": int(given.value)}
            if given.value > 0
            else Missing("a run here has an end: steps")
        ),
    ),
    "save_steps": frequency("checkpoint.every"),
    "eval_steps": frequency("eval_every"),
    "logging_steps": NoMeaning("every step is logged"),
    "val_batch_size": is_field("eval.tasks", "episodes of an evaluation, likewise", int),
    "val_*_length": Missing("an evaluation has the run's lengths: agent.max_sequence_tokens"),
    "val_greedy": Depends((False,), "an evaluation samples", "eval.temperature is above 0"),
    "val_n_sample": Depends((1,), "once", "an evaluation plays a task once: eval.tasks"),
    "validation.generating_args.temperature": is_field("eval.temperature", "of sampling"),
    "validation.generating_args.*": Missing("an evaluation samples as rollout does"),
    "validation.*": NoMeaning("an evaluation plays held-out tasks: env.eval_options"),
    "max_ckpt_to_keep": Depends((0,), "all are kept", "all of checkpoint.every are kept"),
    "resume_from_checkpoint": NoMeaning("flash train --resume goes on with a run"),
    "checkpoint_config.*": NoMeaning("checkpoints are in the run's folder"),
    "output_dir": is_field("runs_dir", "where runs are"),
    "*_dir": NoMeaning("all that a run writes is in its folder"),
    "track_with": Depends(
        ("tensorboard", "stdout", None),
        "a run writes TensorBoard's files, and a line for each step",
        "a run's folder has TensorBoard's files and metrics.jsonl, which such trackers can read",
    ),
    "tracker_kwargs*": NoMeaning("a run's folder has TensorBoard's files and metrics.jsonl"),
    "*system_envs.*": NoMeaning("set variables where the run is started"),
    "*rpc_timeout": NoMeaning("each wait has a deadline of its own: see fields ending in _s"),
    "is_offload_*": NoMeaning("with engine.colocated the trainer makes room while workers sample"),
    "*old_logprobs_recompute": NoMeaning("decoupled_ppo recomputes what it needs: proximal"),
    "report_length_and_rewards": NoMeaning("metrics have lengths and rewards of each step"),
    "rollout_mock.*": Missing("flash replay --retrain trains logged batches again"),
    "user_defined_rollout_loop_cls": Missing("an agent of your own is agent.run"),
    "alive_check_interval": NoMeaning("a worker that fails is told by its requests and health"),
    "global_template": NoMeaning("the model's own chat template is used"),
    "dataset_filter.*": Missing("write a file of the questions that are wanted"),
    "vlm_filter.*": Missing("policies here read texts"),
    "agent_config_common.*": Missing("an agent that is a command: agent.run, agent.env"),
    "*format_penalty": Missing("a reward of your own can take it: reward.run"),
    "actor_*.name": NoMeaning("parts are named by what they do"),
    "*.offload_nccl": NoMeaning("groups of NCCL stay as they are"),
    "*.apply_loss_scale": NoMeaning("means are over the whole batch, on any number of ranks"),
    "batch_adjust_mode": NoMeaning("a batch has batch_size samples, whatever came"),
    "model_name": NoMeaning("a run is called by its name"),
    "model_update_buffer_size_mb": NoMeaning("engine.transport says how weights travel"),
    "model_download_type": NoMeaning("models are the hub's, or directories"),
    "local_rank": NoMeaning("ranks are started by the run"),
    "*profiler*": Missing("status, metrics and the watchdog tell where time goes: flash status"),
    "hydra*": NoMeaning("a configuration is one file, or a preset"),
    "defaults": Missing("what these files set is not here: convert the configuration as hydra "
                        "composes it"),
}  # fmt: skip


ROLL = System(
    name="roll",
    title="ROLL",
    signs=(
        "actor_train.*", "actor_infer.*", "async_generation_ratio", "rollout_batch_size",
        "train_env_manager.*", "adv_estimator", "pretrain",
    ),
    rules=_RULES,
    defaults=(
        Default("alpha", lambda source: 0, "async_generation_ratio is 0 there"),
        Default("batch_size", _batch_size, "rollout_batch_size is 128 there"),
        Default("agent.style", lambda source: "chat", "ROLL speaks by the model's chat template"),
        Default("trainer.advantages.name", _advantages, "adv_estimator is gae there"),
        Default("trainer.betas", lambda source: [0.9, 0.999], "AdamW's betas are so there"),
        Default("trainer.warmup_steps", lambda source: 0, "there is no warm-up there"),
        Default(
            "trainer.aggregation", lambda source: "sequence_mean",
            "loss_agg_mode is seq-mean-token-mean there",
        ),
        Default(
            "trainer.objective.clip_high",
            lambda source: 0.2 if _objective(source) in ("ppo", "decoupled_ppo") else None,
            "pg_clip is 0.2 there, on both sides",
        ),
    ),
)  # fmt: skip
