"""Keys of Trinity-RFT (agentscope-ai/Trinity-RFT).

There explorer and trainer have steps of their own, and weights are synchronised each sync_interval
of them; buffer.batch_size counts tasks of an explorer's step, train_batch_size experiences of a
trainer's. A step here is a batch of samples trained.
"""

import re
from typing import Any

from flash.convert.counterparts import (
    AGGREGATIONS,
    MODEL,
    OF_GPUS,
    OF_QUESTIONS,
    QUESTIONS,
    RATE,
    REPETITION,
    SEED,
    TOP_K,
    TOP_P,
    clips,
    dtype,
    environment,
    frequency,
    no_environment,
    of_advantages,
    of_gae,
    placed,
    questions,
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

# By algorithm_type: advantages, objective, and settings of the latter.
_ALGORITHMS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ppo": ("gae", "ppo", {"clip_high": 0.2}),
    "grpo": ("grpo", "ppo", {"clip_high": 0.2}),
    "multi_step_grpo": ("grpo", "ppo", {"clip_high": 0.2}),
    "dapo": ("grpo", "ppo", {"clip_high": 0.28}),
    "rloo": ("rloo", "ppo", {"clip_high": 0.2}),
    "reinforceplusplus": ("reinforce_pp", "ppo", {"clip_high": 0.2}),
    "gigpo": ("gigpo", "ppo", {"clip_high": 0.2}),
    "gspo": ("grpo", "gspo", {}),
    "cispo": ("grpo", "cispo", {}),
    "opmd": ("grpo", "opmd", {}),
    "topr": ("reinforce", "topr", {}),
}
_LOSSES = {
    "ppo": "ppo", "gspo": "gspo", "cispo": "cispo", "opmd": "opmd", "topr": "topr",
}  # fmt: skip
_ADVANTAGES = {
    "ppo": "gae", "grpo": "grpo", "rloo": "rloo", "reinforceplusplus": "reinforce_pp",
    "step_wise_grpo": "grpo", "gigpo": "gigpo",
}  # fmt: skip
_WORKFLOWS_OF_QUESTIONS = ("math", "boxed", "gsm8k", "simple_workflow", "rm_gallery")
# What is said of a data set, and the option that it is here.
_OF_DATASET = {
    "subset_name": "subset", "split": "data_split", "format.prompt_key": "question",
    "format.response_key": "answer",
}  # fmt: skip
_ONE_TASKSET = "buffer.explorer_input.taskset"
_TASKSET = "buffer.explorer_input.taskset*"
_TASKSETS = "buffer.explorer_input.tasksets.*"
_MODEL = "explorer.rollout_model."


def _algorithm(source: Source) -> tuple[str, str, dict[str, Any]]:
    given = source.text("algorithm.algorithm_type", default="ppo")
    advantages, objective, settings = _ALGORITHMS.get(given, _ALGORITHMS["grpo"])
    named = _LOSSES.get(source.text("algorithm.policy_loss_fn"), objective)
    return advantages, named, settings if named == objective else {}


def _objective(source: Source) -> str:
    return _algorithm(source)[1]


def _advantages(source: Source) -> str:
    return _algorithm(source)[0]


def _alpha(source: Source) -> int:
    interval = source.count("synchronizer.sync_interval", default=1)
    return interval - 1 + max(0, int(source.number("synchronizer.sync_offset")))


def _algorithm_type(given: Given) -> Answer:
    if given.value not in _ALGORITHMS:
        return Missing(
            f"{given.value}: there is no such algorithm: trainer.objective and trainer.advantages "
            f"name what there is; what others wrote is imitated by rollout.expert"
        )
    advantages, objective, settings = _algorithm(given.source)
    found: dict[str, Any] = {
        "trainer.advantages.name": advantages,
        "trainer.objective.name": objective,
    }
    found |= {f"trainer.objective.{name}": value for name, value in settings.items()}
    if objective == "opmd" and _alpha(given.source) >= 1:
        found["trainer.objective.allow_stale"] = True
    if given.value.startswith("multi_step"):
        found["agent.samples"] = "turns"
    return found


def _loss(given: Given) -> Answer:
    if given.value not in _LOSSES:
        return Missing(f"{given.value}: there is no such objective: see docs/objectives.md")
    return {"trainer.objective.name": _LOSSES[given.value]}


def _batch_size(given: Given) -> Answer:
    """The trainer's, if it is given and whole groups; of turns it would count others than here."""
    source = given.source
    group = source.count("algorithm.repeat_times", default=1)
    tasks = source.count("buffer.batch_size", default=0)
    samples = source.count("buffer.train_batch_size", default=0)
    of_turns = source.text("algorithm.algorithm_type").startswith("multi_step")
    if samples and samples % group == 0 and not (of_turns and tasks):
        return {"batch_size": samples}
    if tasks:
        return {"batch_size": tasks * group}
    return Missing(f"{samples} experiences are no whole groups of {group}: set batch_size")


def _kl_loss(given: Given) -> Answer:
    names = {"k1": "k1", "k2": "k2", "k3": "k3", "low_var_kl": "k3"}
    if given.value == "none":
        return {"trainer.kl.coefficient": 0.0}
    if given.value not in names:
        return Missing(f"{given.value}: trainer.kl.estimator is k1, k2 or k3")
    return {"trainer.kl.estimator": names[given.value], "trainer.kl.place": "loss"}


def _kl_coefficient(given: Given) -> Answer:
    loss = given.source.text("algorithm.kl_loss_fn")
    return NoMeaning("kl_loss_fn is none") if loss == "none" else {
        "trainer.kl.coefficient": given.value
    }  # fmt: skip


def _entropy(given: Given) -> Answer:
    loss = given.source.text("algorithm.entropy_loss_fn")
    return NoMeaning("entropy_loss_fn is none") if loss == "none" else {
        "trainer.entropy_bonus": given.value
    }  # fmt: skip


def _advantages_setting(field: str) -> Becomes:
    def how(given: Given) -> Answer:
        return of_advantages(field, _advantages(given.source), given.value)

    return Becomes((f"trainer.advantages.{field}",), "as there", how)


def _workflow(given: Given) -> Answer:
    """The environment that a workflow plays; one of questions takes a file of them."""
    if (name := environment(str(given.value))) is not None:
        return {"env.name": name, "agent.style": "chat"}
    if any(part in str(given.value) for part in _WORKFLOWS_OF_QUESTIONS):
        return questions()
    return no_environment(
        f"{given.value}: no environment is registered for it: name yours, module:Class"
    )


def _path(given: Given) -> Answer:
    """Where the tasks come from: a file of questions, or an environment's own data."""
    source = given.source
    workflow = source.text(
        f"{given.key.rpartition('.')[0]}.default_workflow_type",
        "buffer.explorer_input.default_workflow_type",
    )
    if environment(workflow) is not None:
        return Missing("an environment makes its own tasks; games are env.options.games")
    return questions_of(given)


def _task_set(given: Given) -> Answer:
    """One of several tasksets, with its environment, or its questions."""
    source, section = given.source, given.key.rpartition(".")[0]
    index = section.rpartition(".")[2]
    named = source.first(f"{section}.name", default=f"set_{index}")
    name = re.sub(r"[^A-Za-z0-9_-]+", "_", str(named))[:40] or f"set_{index}"
    workflow = source.text(
        f"{section}.default_workflow_type", "buffer.explorer_input.default_workflow_type"
    )
    if (world := environment(workflow)) is not None:
        return {"task_sets": {name: {"env": {"name": world}}}, "env.name": world}
    asked = questions()
    agent = {field: asked[f"agent.{field}"] for field in ("style_options", "max_turns")}
    options = {
        option: source[f"{section}.{key}"]
        for key, option in {"path": "path", **_OF_DATASET}.items()
        if source.get(f"{section}.{key}") is not None
    }
    env: dict[str, Any] = {"name": QUESTIONS} | ({"options": options} if options else {})
    fields = {"task_sets": {name: {"env": env, "agent": agent}}, "env.name": QUESTIONS}
    if "path" not in options:
        return Placeholder(fields, f"{named} has no path: give task_sets.{name}.env.options.path")
    return fields


def _reads(key: str) -> Becomes:
    """How a taskset's data set is read."""

    def how(given: Given) -> Answer:
        source, section = given.source, given.key.removesuffix(f".{key}")
        if section != _ONE_TASKSET:
            return _task_set(Given(f"{section}.path", given.value, source))
        workflow = source.text(
            f"{section}.default_workflow_type", "buffer.explorer_input.default_workflow_type"
        )
        if environment(workflow) is not None:
            return NoMeaning("an environment makes its own tasks")
        return {"env.options": {_OF_DATASET[key]: given.value}}

    return Becomes(("env.options", "task_sets", "env.name"), "of a data set, likewise", how)


def _gpus(given: Given) -> Answer:
    source = given.source
    per_node = source.count("cluster.gpu_per_node", default=8)
    total = source.count("cluster.node_num", default=1) * per_node
    per_worker = source.count(f"{_MODEL}tensor_parallel_size", default=1)
    workers = source.count(f"{_MODEL}engine_num", default=1) * per_worker
    mode = source.text("mode", default="both")
    if mode == "train":
        return {"trainer.ranks": total} if total <= per_node else Missing(
            "ranks on several nodes are placed by cluster.kind=ray: cluster.trainer.nodes and gpus"
        )  # fmt: skip
    if mode == "explore":
        return {"engine.workers": max(1, min(workers, total) // per_worker)}
    if workers >= total:
        return Missing(
            f"of {total} GPUs the engines take {workers}, and none is left to the trainer: set "
            f"engine.workers and trainer.ranks"
        )
    return placed(
        trainer=total - workers, workers=workers, per_node=per_node, per_worker=per_worker,
        shared=False,
    )  # fmt: skip


def _mode(given: Given) -> Answer:
    if given.value == "both":
        return NoMeaning("flash train does both")
    if given.value == "train":
        return {"explorers.expected": 1, "engine.workers": 0}
    if given.value == "explore":
        return NoMeaning(
            "a run has one configuration, the trainer's: convert that one, and join the run with "
            "flash explore, which takes engine fields: --engine.workers"
        )
    return Missing(f"{given.value}: flash eval measures a run, engine.door_port serves the policy")


def _style(given: Given) -> Answer:
    if given.value == "fully_async":
        return Missing("alpha bounds the age of what is trained, always")
    return NoMeaning("a publish follows a trainer's step: publish_every")


def _over_rollout(given: Given) -> Answer:
    if not given.value:
        return NoMeaning("off")
    groups = given.source.count("buffer.batch_size", default=1)
    return {"rollout.redundant_groups": max(1, round(float(given.value) * groups))}


def _replay(given: Given) -> Answer:
    """Whether groups are trained again, twice as a start."""
    return {"rollout.reuse.uses": 2} if given.value else NoMeaning("off")


_OF_SETS = Becomes(
    ("task_sets", "env.name"), "one of several kinds of tasks: a task set", _task_set
)

_RULES: dict[str, Rule] = {
    "mode": Becomes(("explorers.expected", "engine.workers"), "who plays and trains", _mode),
    "project": NoMeaning("a run is called by its name"),
    "group": NoMeaning("a run is called by its name"),
    "name": is_field("name", "the run's folder", run_name),
    "checkpoint_root_dir": is_field("runs_dir", "where runs' folders are"),
    "continue_from_checkpoint": NoMeaning("flash train --resume goes on with a run"),
    "checkpoint_job_dir": NoMeaning("a run's folder is runs_dir/name"),
    "buffer.cache_dir": NoMeaning("all that a run writes is in its folder"),
    "ray_namespace": NoMeaning("parts are found by the run's folder, or a URL"),
    "algorithm.repeat_times": is_field("group_size", "runs of a task, likewise", int),
    "algorithm.optimizer.lr": is_field("trainer.learning_rate", "of AdamW, likewise", float),
    "algorithm.optimizer.lr_warmup_steps": is_field(
        "trainer.warmup_steps", "optimizer steps; below 0: none", lambda steps: max(0, int(steps))
    ),
    "algorithm.optimizer.lr_warmup_steps_ratio": Depends(
        (0,), "none", "a share of the run: trainer.warmup_steps counts optimizer steps"
    ),
    "algorithm.optimizer.lr_scheduler_type": RATE,
    "algorithm.optimizer.warmup_style": RATE,
    "algorithm.optimizer.min_lr_ratio": NoMeaning("a linear decay ends at 0"),
    "algorithm.optimizer.weight_decay": is_field("trainer.weight_decay", "of AdamW, likewise"),
    "algorithm.optimizer.betas": is_field("trainer.betas", "of AdamW, likewise"),
    "algorithm.optimizer.clip_grad": is_field("trainer.max_grad_norm", "norm of the gradients"),
    "algorithm.optimizer.optimizer_type": Depends(
        ("adam", "adamw"), "AdamW, always", "the optimizer is AdamW"
    ),
    "algorithm.policy_loss_fn": Becomes(("trainer.objective.name",), "the loss", _loss),
    "algorithm.policy_loss_fn_args.clip_range": clips(_objective, "clip_low", "clip_high"),
    "algorithm.policy_loss_fn_args.clip_range_low": clips(_objective, "clip_low"),
    "algorithm.policy_loss_fn_args.clip_range_high": clips(_objective, "clip_high"),
    "algorithm.policy_loss_fn_args.clip_ratio_c": clips(_objective, "dual_clip"),
    "algorithm.policy_loss_fn_args.tau": clips(_objective, "tau"),
    "algorithm.policy_loss_fn_args.loss_agg_mode": by_name(
        "trainer.aggregation", "how losses are added up", AGGREGATIONS,
        "fixed_length takes trainer.fixed_length, the longest response",
    ),
    "algorithm.policy_loss_fn_args.*": Missing("see docs/objectives.md for what a loss takes"),
    "algorithm.loss_agg_mode": by_name(
        "trainer.aggregation", "how losses are added up", AGGREGATIONS,
        "fixed_length takes trainer.fixed_length, the longest response",
    ),
    "algorithm.advantage_fn": by_name(
        "trainer.advantages.name", "how rewards become advantages", _ADVANTAGES, "there is no such"
    ),
    "algorithm.advantage_fn_args.gamma": _advantages_setting("gamma"),
    "algorithm.advantage_fn_args.lam": _advantages_setting("lam"),
    "algorithm.advantage_fn_args.*": Missing("see docs/objectives.md for what advantages take"),
    "algorithm.algorithm_type": Becomes(
        (
            "trainer.advantages.name", "trainer.objective.name", "trainer.objective.clip_high",
            "trainer.objective.allow_stale", "agent.samples",
        ),
        "advantages and loss",
        _algorithm_type,
    ),
    "algorithm.kl_loss_fn": Becomes(
        ("trainer.kl.coefficient", "trainer.kl.estimator", "trainer.kl.place"),
        "how KL is estimated, in the loss", _kl_loss,
    ),
    "algorithm.kl_loss_fn_args.kl_coef": Becomes(
        ("trainer.kl.coefficient",), "of KL(π ‖ π_ref), likewise", _kl_coefficient
    ),
    "algorithm.kl_penalty_fn": Depends(
        ("none",), "no divergence is taken from rewards",
        "set trainer.kl.coefficient with trainer.kl.place=reward",
    ),
    "algorithm.kl_penalty_fn_args.*": Missing(
        "set trainer.kl.coefficient with trainer.kl.place=reward"
    ),
    "algorithm.entropy_loss_fn": NoMeaning("trainer.entropy_bonus says it; 0 is none"),
    "algorithm.entropy_loss_fn_args.entropy_coef": Becomes(
        ("trainer.entropy_bonus",), "times the entropy, likewise", _entropy
    ),
    "algorithm.sample_strategy": Depends(
        ("default",), "a batch takes finished groups, oldest first",
        "a batch takes finished groups, oldest first; trained ones again by rollout.reuse, what "
        "others wrote by rollout.expert",
    ),
    "algorithm.sample_strategy_args.*": Missing("see rollout.reuse and rollout.expert"),
    "algorithm.bypass_old_logprobs": NoMeaning(
        "the objective says which logprobs a ratio is against: ppo's are the engine's"
    ),
    "algorithm.enable_router_replay": is_field("trainer.router_replay", "of mixtures of experts"),
    "algorithm.rollout_correction.*": Missing(
        "trainer.objective: decoupled_ppo weighs, masked_is and icepop leave out"
    ),
    "model.model_path": MODEL,
    "model.critic_model_path": NoMeaning("the critic of gae begins as a copy of the policy"),
    "model.max_response_tokens": is_field("agent.max_tokens", "tokens of a response", int),
    "model.max_model_len": is_field(
        "agent.max_sequence_tokens", "tokens of a whole episode, likewise", int
    ),
    "model.max_prompt_tokens": NoMeaning("agent.max_sequence_tokens is of prompt and responses"),
    "model.min_response_tokens": Depends((0, 1), "none", "a response ends where the model ends it"),
    "model.temperature": is_field("agent.temperature", "of sampling; the trainer accounts for it"),
    "model.top_p": TOP_P,
    "model.top_k": TOP_K,
    "model.repetition_penalty": REPETITION,
    "model.enable_thinking": Missing("a prompt style of your own: agent.style"),
    "model.custom_chat_template": Missing("a prompt style of your own: agent.style"),
    "model.chat_template_path": Missing("a prompt style of your own: agent.style"),
    "model.trust_remote_code": Depends((False,), "off", "no code of a model's repository is run"),
    "model.logprobs": NoMeaning("the engine tells the logprob of what it sampled, always"),
    "model.lora_configs.*.lora_rank": is_field("trainer.lora.rank", "of the adapters", int),
    "model.lora_configs.*.lora_alpha": is_field("trainer.lora.alpha", "over the rank", int),
    "model.lora_configs.*.target_modules": is_field("trainer.lora.targets", "modules, by name"),
    "model.lora_configs.*": NoMeaning("adapters are made at the start of a run"),
    "model.fully_sharded_loras": NoMeaning("workers get merged weights, or trainer.lora.publish"),
    "model.max_cpu_loras": NoMeaning("a worker has the one adapter that is trained"),
    "model.enable_prompt_truncation": Depends(
        (False,), "off", "an observation that leaves no room to answer ends the episode"
    ),
    "model.rope_*": Missing("set it in the model's config.json"),
    "model.tinker.*": Missing("the trainer is FSDP2 here"),
    "model.external_model.*": Missing("workers that run already are engine.urls"),
    "cluster.ray_address": Depends(("auto",), "none is named", "cluster.address names a cluster"),
    "cluster.*": Becomes(OF_GPUS, "GPUs in all; here ranks and workers", _gpus),
    f"{_MODEL}engine_num": Becomes(OF_GPUS, "engines; here workers, the rest are ranks", _gpus),
    f"{_MODEL}tensor_parallel_size": is_field("engine.tensor_parallel", "GPUs of a worker", int),
    f"{_MODEL}engine_type": by_name(
        "engine.kind", "what serves",
        {"vllm": "vllm", "vllm_async": "vllm", "sglang": "sglang"}, "there are vllm and sglang",
    ),
    f"{_MODEL}gpu_memory_utilization": is_field("engine.gpu_memory", "share of a GPU's memory"),
    f"{_MODEL}dtype": dtype("engine.dtype"),
    f"{_MODEL}enforce_eager": server_args("enforce-eager"),
    f"{_MODEL}enable_prefix_caching": server_args("enable-prefix-caching"),
    f"{_MODEL}enable_chunked_prefill": server_args("enable-chunked-prefill"),
    f"{_MODEL}max_model_len": NoMeaning("agent.max_sequence_tokens says it"),
    f"{_MODEL}max_*_tokens": NoMeaning("agent.max_tokens and max_sequence_tokens say it"),
    f"{_MODEL}seed": NoMeaning("seed is of tasks and sampling"),
    f"{_MODEL}use_v1": NoMeaning("it is vLLM's own affair"),
    f"{_MODEL}enable_history": NoMeaning("what was sampled is recorded, always"),
    f"{_MODEL}enable_openai_api": NoMeaning("the door opens for agent.run, or engine.door_port"),
    f"{_MODEL}*": Missing("an option of the servers: engine.vllm_args or engine.sglang_args"),
    "explorer.auxiliary_models.*": Missing("a judge is reward.name=judge, at a URL"),
    "explorer.name": NoMeaning("an explorer is named by flash explore --name"),
    "explorer.runner_per_model": Missing(
        "alpha says how many episodes are under way, engine.max_running how many requests a worker"
    ),
    "explorer.runner_num": NoMeaning("alpha says how many episodes are under way"),
    "explorer.max_repeat_times_per_runner": NoMeaning("each episode is a coroutine of its own"),
    "explorer.concurrent_mode": NoMeaning("each episode is a coroutine of its own"),
    "explorer.max_timeout": is_field("agent.episode_timeout_s", "seconds of an episode, likewise"),
    "explorer.max_retry_times": is_field(
        "rollout.max_attempts", "tries after the first; here with the first",
        lambda times: int(times) + 1,
    ),
    "explorer.eval_interval": frequency("eval_every"),
    "explorer.eval_on_startup": Depends(
        (True,), "a run evaluates at its start and end", "a run evaluates at its start and end"
    ),
    "explorer.bench_on_latest_checkpoint": NoMeaning("flash eval takes the run, or a checkpoint"),
    "explorer.over_rollout.ratio": Becomes(
        ("rollout.redundant_groups",), "a share of a step's tasks; here groups", _over_rollout
    ),
    "explorer.over_rollout.*": NoMeaning("the slowest are cancelled when a batch has enough"),
    "explorer.dynamic_timeout.*": Missing("agent.episode_timeout_s is one for all"),
    "explorer.proxy_port": Missing("engine.door_port serves OpenAI's protocol"),
    "explorer.listen_address": Missing("engine.door_port serves OpenAI's protocol, locally"),
    "explorer.service_status_check_interval": NoMeaning("workers are watched, always"),
    "explorer.min_running_model_num": NoMeaning("workers load one after the other, never all"),
    "explorer.runner_state_report_interval": NoMeaning("flash status tells what each part does"),
    "explorer.runner_prepare_*": NoMeaning("each episode is a coroutine of its own"),
    "explorer.max_inflight_batches": NoMeaning("alpha says how many episodes are under way"),
    "explorer.db_url": NoMeaning("what was sampled is in the run's log: log.url"),
    "explorer.env_vars.*": NoMeaning("set variables where the run is started, or agent.env"),
    "buffer.batch_size": Becomes(
        ("batch_size",), "tasks; here samples: times repeat_times", _batch_size
    ),
    "buffer.train_batch_size": Becomes(
        ("batch_size",), "experiences of a trainer's step; of turns, here episodes", _batch_size
    ),
    "buffer.total_steps": is_field("steps", "steps; here batches trained", int),
    "trainer.total_steps": is_field("steps", "steps; here batches trained", int),
    "buffer.total_epochs": Missing(
        "steps ends a run, 100 unless it is set: epochs × tasks / buffer.batch_size is as long"
    ),
    f"{_TASKSET}.format.system_prompt": Becomes(
        ("agent.style_options",), "what comes before a question",
        lambda given: {"agent.style_options": {"system": given.value}},
    ),
    "buffer.explorer_input.system_prompt": Becomes(
        ("agent.style_options",), "what comes before a question",
        lambda given: {"agent.style_options": {"system": given.value}},
    ),
    f"{_TASKSETS}.name": _OF_SETS,
    f"{_TASKSETS}.path": _OF_SETS,
    f"{_TASKSETS}.default_workflow_type": _OF_SETS,
    f"{_TASKSET}.default_workflow_type": Becomes(
        OF_QUESTIONS, "how a task is played: an environment", _workflow
    ),
    "buffer.explorer_input.default_workflow_type": Becomes(
        OF_QUESTIONS, "how a task is played: an environment", _workflow
    ),
    "buffer.explorer_input.default_eval_workflow_type": NoMeaning(
        "an evaluation plays the run's environment, on held-out tasks"
    ),
    f"{_TASKSET}.path": Becomes(OF_QUESTIONS, "a file, or a dataset of the hub", _path),
    f"{_TASKSET}.name": NoMeaning("tasks are named by their seeds"),
    f"{_TASKSET}.storage_type": Depends(
        ("file",), "an environment reads its file", "an environment makes tasks from seeds"
    ),
    **{f"{_TASKSET}.{key}": _reads(key) for key in _OF_DATASET},
    f"{_TASKSET}.format.*": Missing("an environment of your own reads what it likes: env.name"),
    f"{_TASKSET}.rollout_args.temperature": is_field(
        "agent.temperature", "of sampling; the trainer accounts for it"
    ),
    f"{_TASKSET}.rollout_args.top_p": TOP_P,
    f"{_TASKSET}.rollout_args.top_k": TOP_K,
    f"{_TASKSET}.rollout_args.logprobs": NoMeaning("the engine tells what it sampled, always"),
    f"{_TASKSET}.rollout_args.max_tokens": is_field("agent.max_tokens", "of a response", int),
    f"{_TASKSET}.workflow_args.max_env_steps": is_field(
        "agent.max_turns", "actions of an episode, likewise", int
    ),
    f"{_TASKSET}.workflow_args.*": Missing("options of an environment are env.options"),
    f"{_TASKSET}.default_reward_fn_type": Missing(
        "the environment's reward counts; another is reward.name=process with reward.run"
    ),
    f"{_TASKSET}.reward_fn_args.*": Missing("a reward of your own is reward.run"),
    f"{_TASKSET}.data_selector.*": Missing("tasks are drawn by seed, each as often as the others"),
    f"{_TASKSET}.task_selector.*": Missing("tasks are drawn by seed, each as often as the others"),
    f"{_TASKSET}.repeat_times": NoMeaning("algorithm.repeat_times says it"),
    f"{_TASKSET}.enable_progress_bar": NoMeaning("a run shows how far it is"),
    f"{_TASKSET}.max_retry_*": NoMeaning("tasks are made from seeds, or read once"),
    f"{_TASKSET}.index": NoMeaning("a resume goes on where tasks stopped"),
    "buffer.explorer_input.default_reward_fn_type": Missing(
        "the environment's reward counts; another is reward.name=process with reward.run"
    ),
    "buffer.explorer_input.eval_tasksets.*.rollout_args.temperature": is_field(
        "eval.temperature", "of sampling"
    ),
    "buffer.explorer_input.eval_tasksets*": Missing(
        "an evaluation plays the run's environment, on held-out tasks: env.eval_options"
    ),
    "buffer.trainer_input.experience_buffer.replay_buffer.enable": Becomes(
        ("rollout.reuse.uses",), "whether groups are trained again; here how often", _replay
    ),
    "buffer.trainer_input.experience_buffer.replay_buffer.priority_fn_args.decay": is_field(
        "rollout.reuse.priority.decay", "versions that each use makes a group older by"
    ),
    "buffer.trainer_input.experience_buffer.replay_buffer.*": NoMeaning(
        "rollout.reuse.priority says which groups are trained again first"
    ),
    "buffer.trainer_input.experience_buffer.path": NoMeaning(
        "what was sampled is in the run's log; PostgreSQL is log.url"
    ),
    "buffer.trainer_input.experience_buffer.max_read_timeout": is_field(
        "rollout.stall_timeout_s", "seconds; there a batch is cut, here the run says why it waits"
    ),
    "buffer.trainer_input.experience_buffer.*": NoMeaning(
        "finished groups wait in memory, and in the log: at most (1 + alpha) · batch_size samples"
    ),
    "buffer.trainer_input.auxiliary_buffers.*": Missing(
        "trajectories of others are rollout.expert.file"
    ),
    "buffer.trainer_input.sft_warmup_*": Missing(
        "a small policy has warm_start; another model is tuned before"
    ),
    "data_processor.*": Missing("groups are filtered by rollout.filters"),
    "synchronizer.sync_interval": Becomes(
        ("publish_every", "alpha"),
        "steps between synchronisations; alpha is sync_interval - 1 + sync_offset versions",
        lambda given: {"publish_every": int(given.value), "alpha": _alpha(given.source)},
    ),
    "synchronizer.sync_offset": Becomes(
        ("alpha",), "steps that the explorer is ahead; a part of alpha",
        lambda given: {"alpha": _alpha(given.source)},
    ),
    "synchronizer.sync_method": by_name(
        "engine.transport", "how weights travel",
        {"nccl": "nccl", "checkpoint": "disk", "memory": "disk"}, "there are disk and nccl",
    ),
    "synchronizer.sync_style": Becomes((), "who asks for weights", _style),
    "synchronizer.sync_timeout": NoMeaning("trainer.step_timeout_s is a publish's, too"),
    "synchronizer.*": NoMeaning("a publish follows a trainer's step: publish_every"),
    "trainer.trainer_type": NoMeaning("the trainer is FSDP2, always"),
    "trainer.trainer_strategy": NoMeaning("the trainer is FSDP2, always"),
    "trainer.name": NoMeaning("a run has one trainer"),
    "trainer.save_interval": frequency("checkpoint.every"),
    "trainer.save_hf_checkpoint": NoMeaning("flash export makes a model of any checkpoint"),
    "trainer.save_strategy": NoMeaning("a checkpoint is written while training goes on"),
    "trainer.max_checkpoints_to_keep": Depends((0,), "all", "all of checkpoint.every are kept"),
    "trainer.grad_clip": is_field("trainer.max_grad_norm", "norm of the gradients, likewise"),
    "trainer.actor_grad_clip": is_field("trainer.max_grad_norm", "norm of the gradients, likewise"),
    "trainer.use_dynamic_bsz": Depends(
        (True,), "passes are packed by tokens, always", "passes are packed by tokens, always"
    ),
    "trainer.max_token_len_per_gpu": is_field(
        "trainer.tokens_per_micro_batch", "tokens of a pass on a GPU, likewise", int
    ),
    "trainer.ulysses_sequence_parallel_size": is_field(
        "trainer.sequence_ranks", "ranks that share a sequence, likewise", int
    ),
    "trainer.critic_warmup": of_gae(
        _advantages, "trainer.critic.warmup_batches", "batches that teach the critic alone", int
    ),
    "trainer.*offload*": Depends(
        (False,), "off", "weights and optimizer stay on the trainer's GPUs; engine.colocated"
    ),
    "trainer.megatron.*": NoMeaning("FSDP2 shards a model over all ranks"),
    "trainer.use_remove_padding": NoMeaning("sequences are packed, always"),
    "trainer.balance_batch": NoMeaning("sequences are shared out by their tokens, always"),
    "trainer.enable_preview": NoMeaning("transcripts says of how many episodes texts are kept"),
    "trainer.trainer_config*": Missing("convert that file as verl's: --from verl"),
    "trainer.fix_actor_microbatch_loss_scale": NoMeaning("means are over the whole batch"),
    "monitor.monitor_type": Depends(
        ("tensorboard",), "a run writes TensorBoard's files",
        "a run's folder has TensorBoard's files and metrics.jsonl, which such trackers can read",
    ),
    "monitor.*": NoMeaning("a run's folder has TensorBoard's files and metrics.jsonl"),
    "log.*": NoMeaning("logs are in the run's folder"),
    "service.*": Missing("groups are filtered by rollout.filters"),
    "stages.*": Missing("a run has one stage; a small policy has warm_start"),
    "seed": SEED,
}  # fmt: skip


TRINITY = System(
    name="trinity",
    title="Trinity-RFT",
    signs=(
        "buffer.*", "synchronizer.*", "explorer.*", "algorithm.algorithm_type",
        "algorithm.repeat_times", "checkpoint_root_dir", "model.model_path",
    ),
    rules=_RULES,
    defaults=(
        Default("engine.kind", lambda source: "vllm", "explorers' engines are vLLM there"),
        Default("alpha", _alpha, "sync_interval is 1 and sync_offset 0 there"),
        Default("agent.style", lambda source: "chat", "workflows speak as in a chat"),
        Default("trainer.learning_rate", lambda source: 1e-6, "optimizer.lr is 1e-6 there"),
        Default("trainer.weight_decay", lambda source: 0.01, "optimizer.weight_decay is so there"),
        Default("trainer.betas", lambda source: [0.9, 0.999], "optimizer.betas are so there"),
        Default("trainer.warmup_steps", lambda source: 0, "there is no warm-up there"),
        Default("eval_every", lambda source: 100, "explorer.eval_interval is 100 there"),
    ),
)  # fmt: skip
