"""Keys of verl (volcengine/verl), its recipes one_step_off_policy and fully_async_policy included.

There train_batch_size and ppo_mini_batch_size count prompts, each with rollout.n responses; a batch
here counts samples. By default workers are on the trainer's own GPUs, in turns (hybrid_engine).
"""

import math
from collections.abc import Mapping
from typing import Any

from flash.convert.counterparts import (
    MODEL,
    OF_FILES,
    OF_GPUS,
    OF_QUESTIONS,
    RATE,
    REPETITION,
    SEED,
    TOP_K,
    TOP_P,
    aggregation,
    clip,
    clips,
    dtype,
    frequency,
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
    Placeholder,
    Rule,
    System,
    by_name,
    is_field,
)
from flash.convert.source import Source

ACTOR = "actor_rollout_ref.actor."
ROLLOUT = "actor_rollout_ref.rollout."
_MODEL = "actor_rollout_ref.model."
_CORRECTION = "algorithm.rollout_correction."
_ADVANTAGES = {
    "gae": "gae",
    "grpo": "grpo",
    "grpo_vectorized": "grpo",
    "flow_grpo": "grpo",
    "rloo": "rloo",
    "rloo_vectorized": "rloo",
    "reinforce_plus_plus": "reinforce_pp",
    "reinforce_plus_plus_baseline": "reinforce_pp",
}
_LOSSES = {"vanilla": "decoupled_ppo", "gspo": "gspo", "cispo": "cispo"}
_PACKED = NoMeaning("passes are packed by tokens, for all that ranks compute")
_OF_REFERENCE = NoMeaning("the reference is on the trainer's ranks, and computes as they do")
_NEW_RUN = NoMeaning("flash train --resume goes on with a run")


def is_hybrid(source: Source) -> bool:
    return source.first("actor_rollout_ref.hybrid_engine", default=True) is not False


def alpha(source: Source) -> int:
    """Versions: one-step-off is 1; fully asynchronous training synchronises each few steps, and
    runs ahead by a share of these."""
    strategy = source.get("actor_rollout_ref.async_strategy")
    if strategy is not None:
        return int(strategy == "one-step-off")
    if "async_training.staleness_threshold" in source:
        every = source.count("async_training.trigger_parameter_sync_step", default=4)
        ahead = max(0, source.number("async_training.staleness_threshold"))
        return every - 1 + math.ceil(ahead * every)
    return int(not is_hybrid(source))


def _responses(source: Source) -> int:
    return source.count(f"{ROLLOUT}n", "rollout.n", default=1)


def _prompts(source: Source) -> int:
    """Of a batch: fully asynchronous, of so many mini-batches."""
    mini = source.count(f"{ACTOR}ppo_mini_batch_size", default=256)
    if source.fitting("async_training.*"):
        return mini * source.count("async_training.require_batches", default=1)
    return source.count("data.train_batch_size", default=1024)


def batch_size(source: Source) -> int:
    return _prompts(source) * _responses(source)


def _mini_batches(given: Given) -> Answer:
    return {"trainer.mini_batches": max(1, _prompts(given.source) // max(1, int(given.value)))}


def _objective(source: Source) -> str:
    loss = _LOSSES.get(source.text(f"{ACTOR}policy_loss.loss_mode", default="vanilla"))
    if loss == "decoupled_ppo" and source.first(
        f"{_CORRECTION}bypass_mode", f"{_CORRECTION}bypass_old_logprob_for_rollout"
    ):
        return "ppo"
    return loss or "decoupled_ppo"


def _advantages(source: Source) -> str:
    return _ADVANTAGES.get(source.text("algorithm.adv_estimator", default="gae"), "grpo")


def _estimator(given: Given) -> Answer:
    if given.value not in _ADVANTAGES:
        return Missing(f"{given.value}: there are no such advantages: see docs/objectives.md")
    found: dict[str, Any] = {"trainer.advantages.name": _ADVANTAGES[given.value]}
    if given.value == "reinforce_plus_plus_baseline":
        found["trainer.advantages.baseline"] = "group"
    return found


def _loss_mode(given: Given) -> Answer:
    if given.value not in _LOSSES:
        return Missing(f"{given.value}: there is no such objective: see docs/objectives.md")
    return {"trainer.objective.name": _objective(given.source)}


def _of_prompt(key: Any) -> dict[str, Any]:
    return {"question": f"{key}.0.content"}  # a list of messages


def _train_files(given: Given) -> Answer:
    key = given.source.text("data.prompt_key", default="prompt")
    return questions_of(given, **_of_prompt(key), answer="reward_model.ground_truth")


def _val_files(given: Given) -> Answer:
    """Then all of the others are trained on."""
    held_out = questions_of(given)
    if isinstance(held_out, Placeholder):
        return Missing(held_out.why.replace("env.options", "env.eval_options"))
    assert isinstance(held_out, Mapping)
    return {"env.options": {"split": "all"}, "env.eval_options": held_out["env.options"]}


def _bypass(given: Given) -> Answer:
    if not given.value:
        return NoMeaning("decoupled_ppo recomputes π_prox, as there")
    return {"trainer.objective.name": _objective(given.source)}


def _is_weight(given: Given) -> Answer:
    if given.source.text(f"{_CORRECTION}rollout_is", default="token") != "token":
        return Missing("weights are of tokens (max_behaviour_weight); of sequences: masked_is")
    return clip("max_behaviour_weight", _objective(given.source), given.value)


def _kl(switch: str, place: str) -> Becomes:
    def how(given: Given) -> Answer:
        if not given.source.get(switch):
            return NoMeaning(f"{switch} is not set, so it is not used")
        return {"trainer.kl.coefficient": given.value, "trainer.kl.place": place}

    return Becomes(
        ("trainer.kl.coefficient", "trainer.kl.place"), "of KL(π ‖ π_ref), likewise", how
    )


def _kl_estimator(switch: str) -> Becomes:
    names = {"kl": "k1", "k1": "k1", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}

    def how(given: Given) -> Answer:
        if not given.source.get(switch):
            return NoMeaning(f"{switch} is not set, so it is not used")
        return by_name("trainer.kl.estimator", "", names, "there are k1, k2, k3").answer(given)

    return Becomes(("trainer.kl.estimator",), "how KL is estimated", how)


def _by_sequences(given: Given) -> Answer:
    source = given.source
    if source.get(f"{ACTOR}use_dynamic_bsz"):
        return NoMeaning("use_dynamic_bsz is set: ppo_max_token_len_per_gpu says it")
    longest = source.count("data.max_prompt_length", default=512)
    longest += source.count("data.max_response_length", default=512)
    return {"trainer.tokens_per_micro_batch": int(given.value) * longest}


def _by_tokens(given: Given) -> Answer:
    if not given.source.get(f"{ACTOR}use_dynamic_bsz"):
        return NoMeaning("use_dynamic_bsz is not set, so it is not used")
    return {"trainer.tokens_per_micro_batch": int(given.value)}


def _sequence(given: Given) -> Answer:
    source = given.source
    response = source.count("data.max_response_length", default=512)
    longest = source.count("data.max_prompt_length", default=512) + response
    return {"agent.max_sequence_tokens": longest, "agent.max_tokens": response}


def _hybrid(given: Given) -> Answer:
    if given.value:
        return {"engine.colocated": True}
    if given.source.fitting("async_training.*"):
        return {"engine.colocated": False}
    return {"engine.colocated": False, "alpha": alpha(given.source), "rollout.schedule": "batch"}


def _gpus(given: Given) -> Answer:
    source = given.source
    nodes = source.count("trainer.nnodes", default=1)
    per_node = source.count(f"{ACTOR}n_gpus_per_node", "trainer.n_gpus_per_node", default=8)
    of_workers = source.count(f"{ROLLOUT}nnodes", "rollout.nnodes", default=1) * source.count(
        f"{ROLLOUT}n_gpus_per_node", "rollout.n_gpus_per_node", default=per_node
    )
    shared = is_hybrid(source)
    return placed(
        trainer=nodes * per_node,
        workers=nodes * per_node if shared else of_workers,
        per_node=source.count("trainer.n_gpus_per_node", default=8),
        per_worker=source.count(f"{ROLLOUT}tensor_model_parallel_size", default=1),
        shared=shared,
    )


_LENGTHS = ("agent.max_tokens", "agent.max_sequence_tokens")
_GPUS = Becomes(OF_GPUS, "GPUs; here ranks of the trainer, and workers", _gpus)

RULES: dict[str, Rule] = {
    "trainer.experiment_name": is_field("name", "the run's folder", run_name),
    "trainer.project_name": NoMeaning("a run is called by its name"),
    "data.seed": SEED,
    f"{_MODEL}path": MODEL,
    "actor_rollout_ref.hybrid_engine": Becomes(
        ("engine.colocated", "alpha", "rollout.schedule"),
        "whether workers are on the trainer's GPUs; apart, a batch is sampled while the one before "
        "is trained",
        _hybrid,
    ),
    "async_training.staleness_threshold": Becomes(
        ("alpha",),
        "share of samples that may be ahead; here versions: "
        "trigger_parameter_sync_step · (1 + it) - 1",
        lambda given: {"alpha": alpha(given.source)},
    ),
    "async_training.trigger_parameter_sync_step": is_field(
        "publish_every", "steps between synchronisations, likewise", int
    ),
    "async_training.require_batches": Becomes(
        ("batch_size",),
        "mini-batches of a step; here samples, of all of them",
        lambda given: {"batch_size": batch_size(given.source)},
    ),
    "async_training.partial_rollout": by_name(
        "engine.update_mode",
        "what a publish does to responses under way",
        {True: "abort", False: "wait"},
        "true or false",
    ),
    "async_training.*": NoMeaning("a ratio is always against the engine's own logprobs"),
    "data.train_batch_size": Becomes(
        ("batch_size",),
        "prompts; here samples: times rollout.n",
        lambda given: (
            NoMeaning("require_batches and ppo_mini_batch_size say it")
            if given.source.fitting("async_training.*")
            else {"batch_size": batch_size(given.source)}
        ),
    ),
    "data.gen_batch_size": NoMeaning("episodes begin as soon as there is room, one by one"),
    f"{ROLLOUT}n": is_field("group_size", "responses of a prompt, likewise", int),
    "rollout.n": is_field("group_size", "responses of a prompt, likewise", int),
    f"{ACTOR}ppo_mini_batch_size": Becomes(
        ("trainer.mini_batches",),
        "prompts of an optimizer step; here optimizer steps of a batch",
        _mini_batches,
    ),
    f"{ACTOR}ppo_max_token_len_per_gpu": Becomes(
        ("trainer.tokens_per_micro_batch",), "tokens of a pass on a GPU, likewise", _by_tokens
    ),
    f"{ACTOR}ppo_micro_batch_size_per_gpu": Becomes(
        ("trainer.tokens_per_micro_batch",),
        "sequences of a pass; here tokens, of the longest sequences",
        _by_sequences,
    ),
    f"{ACTOR}ppo_micro_batch_size": Missing("of all GPUs: set trainer.tokens_per_micro_batch"),
    f"{ACTOR}use_dynamic_bsz": _PACKED,
    f"{ACTOR}ppo_epochs": Depends(
        (1,),
        "a batch is trained once",
        "a batch is trained once; groups can be trained again in later ones: rollout.reuse.uses",
    ),
    "data.max_response_length": Becomes(_LENGTHS, "tokens of a response, likewise", _sequence),
    "data.max_prompt_length": Becomes(
        _LENGTHS, "tokens before the response; here of a sequence's", _sequence
    ),
    f"{ROLLOUT}prompt_length": NoMeaning("data.max_prompt_length says it"),
    f"{ROLLOUT}response_length": NoMeaning("data.max_response_length says it"),
    f"{ROLLOUT}temperature": is_field(
        "agent.temperature", "of sampling; the trainer accounts for it"
    ),
    f"{ROLLOUT}top_p": TOP_P,
    f"{ROLLOUT}top_k": TOP_K,
    f"{ROLLOUT}repetition_penalty": REPETITION,
    f"{ROLLOUT}do_sample": Depends((True,), "all is sampled", "refused: a policy must sample"),
    f"{ROLLOUT}ignore_eos": Depends((False,), "off", "a response ends where the model ends it"),
    f"{ROLLOUT}val_kwargs.temperature": Becomes(
        ("eval.temperature",),
        "of sampling, above 0",
        lambda given: (
            {"eval.temperature": given.value}
            if given.value
            else Missing("an evaluation samples: eval.temperature must be above 0")
        ),
    ),
    f"{ROLLOUT}val_kwargs.n": Depends((1,), "once", "an evaluation plays a task once: eval.tasks"),
    f"{ROLLOUT}val_kwargs.*": Depends(
        (1, -1, True), "as rollout does", "an evaluation samples as rollout does"
    ),
    f"{ROLLOUT}multi_turn.max_assistant_turns": is_field(
        "agent.max_turns", "responses of an episode, likewise", int
    ),
    f"{ROLLOUT}multi_turn.max_user_turns": NoMeaning("agent.max_turns counts responses"),
    f"{ROLLOUT}multi_turn.enable": NoMeaning("the environment says whether an episode goes on"),
    f"{ROLLOUT}multi_turn.*": Missing("an environment gives what tools say: env.name"),
    f"{ROLLOUT}agent.num_workers": NoMeaning("agents are coroutines of one process"),
    f"{ROLLOUT}agent.*": Missing("an agent of your own is agent.run"),
    f"{ROLLOUT}name": by_name(
        "engine.kind",
        "what serves",
        {"vllm": "vllm", "sglang": "sglang", "hf": "embedded"},
        "there are vllm, sglang and embedded",
    ),
    f"{ROLLOUT}mode": NoMeaning("requests are sent one by one, always"),
    f"{ROLLOUT}tensor_model_parallel_size": is_field(
        "engine.tensor_parallel", "GPUs of a worker, likewise", int
    ),
    f"{ROLLOUT}gpu_memory_utilization": is_field("engine.gpu_memory", "share of a GPU's memory"),
    f"{ROLLOUT}max_num_seqs": is_field("engine.max_running", "requests at one worker", int),
    f"{ROLLOUT}dtype": dtype("engine.dtype"),
    f"{ROLLOUT}max_model_len": NoMeaning("agent.max_sequence_tokens says it"),
    f"{ROLLOUT}enforce_eager": server_args("enforce-eager"),
    f"{ROLLOUT}enable_chunked_prefill": server_args("enable-chunked-prefill"),
    f"{ROLLOUT}enable_prefix_caching": server_args("enable-prefix-caching"),
    f"{ROLLOUT}max_num_batched_tokens": server_args("max-num-batched-tokens"),
    f"{ROLLOUT}free_cache_engine": NoMeaning("colocated servers sleep in between"),
    f"{ROLLOUT}load_format": NoMeaning("workers load the model, then what is published"),
    f"{ROLLOUT}layered_summon": NoMeaning("ranks export whole tensors, each its share"),
    f"{ROLLOUT}calculate_log_probs": NoMeaning("the engine tells what it sampled, always"),
    f"{ROLLOUT}disable_log_stats": NoMeaning("a run asks its workers for their statistics"),
    f"{ROLLOUT}log_prob_*": _PACKED,
    f"{ROLLOUT}checkpoint_engine.*": NoMeaning("engine.transport says how weights travel"),
    f"{ROLLOUT}update_weights_bucket_megabytes": NoMeaning("engine.transport says how they travel"),
    f"{ROLLOUT}nnodes": _GPUS,
    f"{ROLLOUT}n_gpus_per_node": _GPUS,
    f"{ROLLOUT}over_sample_rate": Missing("redundant prompts are rollout.redundant_groups"),
    f"{ROLLOUT}engine_kwargs.*": Missing("further options: engine.vllm_args, engine.sglang_args"),
    f"{ROLLOUT}cudagraph_capture_sizes": Missing("an option of servers: engine.vllm_args"),
    f"{ROLLOUT}data_parallel_size": Depends((1,), "1", "start more workers: engine.workers"),
    f"{ROLLOUT}multi_stage_wake_up": NoMeaning("colocated servers wake when it is their turn"),
    f"{ROLLOUT}skip_rollout": Depends(
        (False,), "off", "flash replay --retrain trains logged batches again"
    ),
    f"{ROLLOUT}skip_dump_dir": NoMeaning("the run's log has every episode"),
    f"{ROLLOUT}trace.*": NoMeaning("transcripts and flash replay show what was said"),
    f"{ROLLOUT}*profiler*": Missing("flash status and metrics tell where time goes"),
    "rollout.nnodes": _GPUS,
    "rollout.n_gpus_per_node": _GPUS,
    "rollout.total_rollout_steps": Becomes(
        ("steps",),
        "prompts of a run; here batches trained",
        lambda given: {"steps": max(1, int(given.value) // _prompts(given.source))},
    ),
    "rollout.test_freq": frequency("eval_every"),
    "rollout.total_epochs": Missing("steps ends a run"),
    f"{ACTOR}n_gpus_per_node": _GPUS,
    "trainer.nnodes": _GPUS,
    "trainer.n_gpus_per_node": _GPUS,
    "trainer.device": NoMeaning("GPUs are used where there are any"),
    f"{ACTOR}strategy": NoMeaning("the trainer is FSDP2, always"),
    f"{ACTOR}optim.lr": is_field("trainer.learning_rate", "of AdamW, likewise", float),
    f"{ACTOR}optim.weight_decay": is_field("trainer.weight_decay", "of AdamW, likewise"),
    f"{ACTOR}optim.betas": is_field("trainer.betas", "of AdamW, likewise"),
    f"{ACTOR}optim.clip_grad": is_field("trainer.max_grad_norm", "norm of the gradients"),
    f"{ACTOR}optim.lr_warmup_steps": is_field(
        "trainer.warmup_steps", "optimizer steps; below 0: none", lambda steps: max(0, int(steps))
    ),
    f"{ACTOR}optim.lr_warmup_steps_ratio": Depends(
        (0,), "none", "a share of the run: trainer.warmup_steps counts optimizer steps"
    ),
    f"{ACTOR}optim.warmup_style": RATE,
    f"{ACTOR}optim.lr_scheduler_type": RATE,
    f"{ACTOR}optim.*": Missing("AdamW, with a linear decay to 0 at most: trainer.decay_steps"),
    f"{ACTOR}grad_clip": is_field("trainer.max_grad_norm", "norm of the gradients, likewise"),
    f"{ACTOR}clip_ratio_low": clips(_objective, "clip_low"),
    f"{ACTOR}clip_ratio_high": clips(_objective, "clip_high"),
    f"{ACTOR}clip_ratio": clips(_objective, "clip_low", "clip_high"),
    f"{ACTOR}clip_ratio_c": clips(_objective, "dual_clip"),
    f"{ACTOR}policy_loss.loss_mode": Becomes(
        ("trainer.objective.name",),
        "the loss: vanilla there is the clip on π/π_old, decoupled_ppo here",
        _loss_mode,
    ),
    f"{ACTOR}policy_loss.*": Missing("see docs/objectives.md for what a loss takes"),
    f"{ACTOR}loss_agg_mode": aggregation("data.max_response_length"),
    f"{ACTOR}entropy_coeff": is_field("trainer.entropy_bonus", "times the entropy, likewise"),
    f"{ACTOR}use_kl_loss": NoMeaning("kl_loss_coef becomes trainer.kl.coefficient if it is set"),
    f"{ACTOR}kl_loss_coef": _kl(f"{ACTOR}use_kl_loss", "loss"),
    f"{ACTOR}kl_loss_type": _kl_estimator(f"{ACTOR}use_kl_loss"),
    f"{ACTOR}ulysses_sequence_parallel_size": is_field(
        "trainer.sequence_ranks", "ranks that share a sequence, likewise", int
    ),
    f"{ACTOR}fsdp_config.fsdp_size": Becomes(
        ("trainer.shard_size",),
        "ranks that hold the weights once; -1: all",
        lambda given: (
            {"trainer.shard_size": int(given.value)} if given.value > 0 else NoMeaning("all ranks")
        ),
    ),
    f"{ACTOR}fsdp_config.dtype": dtype("trainer.dtype"),
    f"{ACTOR}fsdp_config.mixed_precision.param_dtype": dtype("trainer.dtype"),
    f"{ACTOR}fsdp_config.*dtype": NoMeaning(
        "weights, gradients and optimizer are in float32, whatever trainer.dtype computes in"
    ),
    f"{ACTOR}fsdp_config.*offload*": Depends(
        (False,), "off", "weights and optimizer stay on the trainer's GPUs; engine.colocated"
    ),
    f"{ACTOR}fsdp_config.*": NoMeaning("each layer is sharded over all ranks, and gathered alone"),
    f"{ACTOR}megatron.*": NoMeaning("FSDP2 shards a model over all ranks"),
    f"{ACTOR}use_torch_compile": NoMeaning(
        "it is of entropies and logprobs there; of layers: trainer.compile"
    ),
    f"{ACTOR}use_fused_kernels": NoMeaning("fused kernels are used where they are installed"),
    f"{ACTOR}use_remove_padding": _PACKED,
    f"{ACTOR}shuffle": NoMeaning("samples of a batch are shared out by their tokens"),
    f"{ACTOR}entropy_*": NoMeaning("logits are computed in chunks of tokens, always"),
    f"{ACTOR}checkpoint.*": NoMeaning("a checkpoint holds all that a resume needs"),
    f"{ACTOR}router_replay.*": Missing("trainer.router_replay=true, of mixtures of experts"),
    f"{_MODEL}enable_gradient_checkpointing": is_field(
        "trainer.gradient_checkpointing", "whether activations are recomputed, likewise"
    ),
    f"{_MODEL}lora_rank": is_field("trainer.lora.rank", "of the adapters, likewise", int),
    f"{_MODEL}lora_alpha": is_field("trainer.lora.alpha", "over the rank, likewise", int),
    f"{_MODEL}target_modules": is_field("trainer.lora.targets", "modules, by the ends of names"),
    f"{_MODEL}use_remove_padding": _PACKED,
    f"{_MODEL}use_shm": NoMeaning("weights travel in memory"),
    f"{_MODEL}use_liger": NoMeaning("fused kernels are used where they are installed and right"),
    f"{_MODEL}use_fused_kernels": NoMeaning("fused kernels are used where they are installed"),
    f"{_MODEL}trust_remote_code": Depends(
        (False,), "off", "no code of a model's repository is run"
    ),
    f"{_MODEL}enable_activation_offload": Depends(
        (False,), "off", "activations are recomputed: trainer.gradient_checkpointing"
    ),
    f"{_MODEL}override_config.*": Missing("set it in the model's config.json"),
    f"{_MODEL}*": Missing("a model is used as its files say"),
    "actor_rollout_ref.ref.*": _OF_REFERENCE,
    "actor_rollout_ref.nccl_timeout": NoMeaning("each of the trainer's calls has a deadline"),
    "critic.optim.lr": of_gae(
        _advantages, "trainer.critic.learning_rate", "of the critic's AdamW, likewise", float
    ),
    "critic.cliprange_value": of_gae(
        _advantages, "trainer.critic.clip", "how far a value may move, likewise", float
    ),
    "trainer.critic_warmup": of_gae(
        _advantages, "trainer.critic.warmup_batches", "batches that teach the critic alone", int
    ),
    "critic.*": NoMeaning("the critic of gae is a copy of the policy, on its ranks"),
    "algorithm.adv_estimator": Becomes(
        ("trainer.advantages.name", "trainer.advantages.baseline"),
        "how rewards become advantages",
        _estimator,
    ),
    "algorithm.norm_adv_by_std_in_grpo": Becomes(
        ("trainer.advantages.std",),
        "whether the group's deviation divides, likewise",
        lambda given: (
            {"trainer.advantages.std": given.value}
            if _advantages(given.source) == "grpo"
            else NoMeaning("it is of grpo, and adv_estimator is another")
        ),
    ),
    "algorithm.gamma": of_gae(_advantages, "trainer.advantages.gamma", "discount, a token", float),
    "algorithm.lam": of_gae(_advantages, "trainer.advantages.lam", "λ, likewise", float),
    "algorithm.use_kl_in_reward": NoMeaning("says whether kl_ctrl.kl_coef counts"),
    "algorithm.kl_ctrl.kl_coef": _kl("algorithm.use_kl_in_reward", "reward"),
    "algorithm.kl_penalty": _kl_estimator("algorithm.use_kl_in_reward"),
    "algorithm.kl_ctrl.*": Depends(
        ("fixed",), "fixed, always", "trainer.kl.coefficient stays as it is"
    ),
    "algorithm.filter_groups.enable": Becomes(
        ("rollout.filters",),
        "groups whose rewards are all equal are replaced",
        lambda given: (
            {"rollout.filters": ["equal_rewards"]} if given.value else NoMeaning("off")
        ),
    ),
    "algorithm.filter_groups.max_num_gen_batches": Becomes(
        ("rollout.max_filtered",),
        "batches' worth of groups that may be dropped",
        lambda given: (
            {"rollout.max_filtered": int(given.value)} if given.value > 0 else NoMeaning("no limit")
        ),
    ),
    "algorithm.filter_groups.*": NoMeaning("a group is judged by its rewards"),
    f"{_CORRECTION}rollout_is_threshold": Becomes(
        ("trainer.objective.max_behaviour_weight",),
        "cap of a token's weight π_prox/π_behaviour",
        _is_weight,
    ),
    f"{_CORRECTION}rollout_is": Depends(
        ("token",), "tokens are weighed, always", "weights are of tokens; of sequences: masked_is"
    ),
    f"{_CORRECTION}bypass_mode": Becomes(
        ("trainer.objective.name",), "the clip is then on π/π_behaviour: ppo", _bypass
    ),
    f"{_CORRECTION}bypass_old_logprob_for_rollout": Becomes(
        ("trainer.objective.name",), "the clip is then on π/π_behaviour: ppo", _bypass
    ),
    f"{_CORRECTION}*": Missing("the objectives masked_is and icepop leave out by low and high"),
    "algorithm.*": Missing("see docs/objectives.md for losses and advantages"),
    "data.train_files": Becomes(OF_QUESTIONS, OF_FILES, _train_files),
    "data.val_files": Becomes(
        ("env.eval_options", "env.options"), "files of held-out problems", _val_files
    ),
    "data.prompt_key": is_field(
        "env.options", "a prompt's first message is the question", _of_prompt
    ),
    "data.val_batch_size": Becomes(
        ("eval.tasks",), "episodes of an evaluation, likewise",
        lambda given: (
            {"eval.tasks": int(given.value)} if given.value > 0 else NoMeaning("all of val_files")
        ),
    ),
    "data.*_key": Missing("env.options.question and answer name the fields that are asked"),
    "data.custom_cls.*": Missing("an environment of your own is env.name=module:Class"),
    "data.tool_config_path": Missing("an environment of your own gives tools: env.name"),
    "data.*max_samples": Missing("write a shorter file"),
    "data.*": NoMeaning("an environment gives the tasks, one by one"),
    "custom_reward_function.*": Missing("name it as reward.name=process, reward.run=module:name"),
    "reward_model.enable": Depends((False,), "off", "a model that judges is reward.name=judge"),
    "reward_model.reward_manager": Missing("a reward of your own is reward.name=process"),
    "reward_model.launch_reward_fn_async": NoMeaning("generation never waits for rewards"),
    "reward_model.*": Missing("a judge is reward.name=judge, a reward of your own reward.run"),
    "reward.*": Missing("a judge is reward.name=judge, a reward of your own reward.run"),
    "trainer.total_training_steps": is_field("steps", "steps; here batches trained", int),
    "trainer.total_epochs": Missing(
        "steps ends a run, 100 unless it is set: epochs × prompts / train_batch_size is as long"
    ),
    "trainer.save_freq": frequency("checkpoint.every"),
    "trainer.test_freq": frequency("eval_every"),
    "trainer.val_before_train": Depends(
        (True,), "a run evaluates at its start", "a run evaluates at its start and end"
    ),
    "trainer.val_only": Depends((False,), "off", "flash eval measures a run"),
    "trainer.log_val_generations": is_field(
        "transcripts", "samples whose texts are kept; here episodes of a step", int
    ),
    "trainer.logger": Becomes(
        (),
        "trackers",
        lambda given: (
            NoMeaning("a run writes TensorBoard's files, and a line for each step")
            if set(given.value if isinstance(given.value, list) else [given.value])
            <= {"console", "tensorboard", "file"}
            else Missing(
                "a run's folder has TensorBoard's files and metrics.jsonl, which others can read"
            )
        ),
    ),
    "trainer.resume_*": _NEW_RUN,
    "trainer.default_*_dir": NoMeaning("a run's folder is runs_dir/name"),
    "trainer.*_data_dir": NoMeaning("the run's log has every episode: flash replay, flash export"),
    "trainer.max_*_ckpt_to_keep": Missing("all checkpoints of checkpoint.every are kept"),
    "trainer.balance_batch": NoMeaning("samples are shared out by their tokens, always"),
    "trainer.esi_redundant_time": NoMeaning("a run may be killed at any moment: --resume"),
    "trainer.del_local_ckpt_after_load": NoMeaning("checkpoints stay in the run's folder"),
    "trainer.use_legacy_worker_impl": NoMeaning("there is one trainer"),
    "trainer.ray_wait_register_center_timeout": NoMeaning("each wait has a deadline of its own"),
    "ray_kwargs.*": NoMeaning("a cluster is cluster.kind=ray with cluster.address"),
    "ray_init.*": NoMeaning("a cluster is cluster.kind=ray with cluster.address"),
    "transfer_queue.*": NoMeaning("finished groups wait in memory, and in the log"),
    "*profiler*": Missing("status, metrics and the watchdog tell where time goes: flash status"),
    "hydra.*": NoMeaning("a configuration is one file, or a preset"),
    "hydra": NoMeaning("a configuration is one file, or a preset"),
    "*_target_": NoMeaning("parts are chosen by name, not by class"),
    "defaults": Missing("what these files set is not here: convert what hydra composes of them"),
}  # fmt: skip

DEFAULTS = (
    Default("alpha", alpha, "training is synchronous there, unless it is told otherwise"),
    Default("batch_size", batch_size, "train_batch_size is 1024 there"),
    Default("group_size", _responses, "rollout.n is so there"),
    Default("agent.style", lambda source: "chat", "prompts are chats there"),
    Default("trainer.advantages.name", _advantages, "adv_estimator is so there"),
    Default("trainer.learning_rate", lambda source: 1e-6, "optim.lr is 1e-6 there"),
    Default("trainer.weight_decay", lambda source: 0.01, "optim.weight_decay is 0.01 there"),
    Default("trainer.betas", lambda source: [0.9, 0.999], "AdamW's betas are so there"),
    Default("trainer.warmup_steps", lambda source: 0, "there is no warm-up there"),
    Default("eval_every", lambda source: 0, "test_freq is -1 there"),
    Default(
        "trainer.objective.clip_high",
        lambda source: 0.2 if _objective(source) in ("ppo", "decoupled_ppo") else None,
        "clip_ratio is 0.2 there, on both sides",
    ),
    Default(
        "engine.colocated",
        lambda source: True if is_hybrid(source) else None,
        "hybrid_engine is true there",
    ),
)

VERL = System(
    name="verl",
    title="verl",
    signs=(
        "actor_rollout_ref.*", "data.train_batch_size", "data.train_files", "async_training.*",
        "trainer.n_gpus_per_node",
    ),
    rules=RULES,
    defaults=DEFAULTS,
)  # fmt: skip
