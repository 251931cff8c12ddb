"""What keys of the four systems become, with values worked by hand; and what is told of them."""

from pathlib import Path

import pytest

from flash.config import parse
from flash.convert.conversion import SYSTEMS, convert, recognised
from flash.convert.source import Source, read
from flash.system import machine

GUIDES = Path(__file__).parents[3] / "shared" / "data" / "configs"

ROLL = {
    "async_generation_ratio": 2,
    "rollout_batch_size": 16,
    "num_return_sequences_in_group": 4,
    "pretrain": "org/model",
}
TRINITY = {"algorithm.algorithm_type": "grpo", "algorithm.repeat_times": 4, "buffer.batch_size": 8}
APART = {"actor_rollout_ref.hybrid_engine": False}
VERL = APART | {"data.train_batch_size": 32, "actor_rollout_ref.rollout.n": 4}
ACTOR, ROLLOUT = "actor_rollout_ref.actor.", "actor_rollout_ref.rollout."


def made(system: str, **leaves) -> dict:
    """Our settings, by dotted name; they have loaded."""
    return dict(converted(system, leaves).settings)


def converted(system: str, leaves):
    return convert(Source(leaves), SYSTEMS[system], name="run")


def row_of(system: str, leaves, key: str):
    return next(row for row in converted(system, leaves).rows if row.key == key)


@pytest.mark.parametrize(
    ("system", "leaves", "field", "value"),
    [
        # Counted in prompts there, in samples here.
        ("roll", ROLL, "batch_size", 64),
        ("roll", ROLL, "group_size", 4),
        ("verl", VERL, "batch_size", 128),
        ("verl", VERL, "group_size", 4),
        ("trinity", TRINITY, "batch_size", 32),
        ("trinity", TRINITY | {"buffer.train_batch_size": 64}, "batch_size", 64),
        ("trinity", TRINITY | {"buffer.train_batch_size": 66}, "batch_size", 32),
        # Of turns a trainer's batch would count others than here.
        (
            "trinity",
            TRINITY
            | {"buffer.train_batch_size": 640, "algorithm.algorithm_type": "multi_step_grpo"},
            "batch_size",
            32,
        ),
        # Episodes are counted with agents, likewise.
        (
            "roll",
            {"rollout_batch_size": 64, "train_env_manager.group_size": 16},
            "batch_size",
            64,
        ),
        # How far apart sampler and trainer may be, in versions.
        ("roll", ROLL, "alpha", 2),
        ("roll", {"rollout_batch_size": 64}, "alpha", 0),
        ("trinity", TRINITY, "alpha", 0),
        ("trinity", TRINITY | {"synchronizer.sync_interval": 4}, "alpha", 3),
        ("trinity", TRINITY | {"synchronizer.sync_interval": 4}, "publish_every", 4),
        ("trinity", TRINITY | {"synchronizer.sync_offset": 2}, "alpha", 2),
        (
            "trinity",
            TRINITY | {"synchronizer.sync_interval": 3, "synchronizer.sync_offset": 1},
            "alpha",
            3,
        ),
        ("verl", {"data.train_batch_size": 32}, "alpha", 0),
        ("verl", VERL, "alpha", 1),
        ("verl", VERL, "rollout.schedule", "batch"),
        ("verl", APART | {"async_training.staleness_threshold": 0.5}, "alpha", 5),
        # Two mini-batches of 8 prompts with 4 responses each.
        (
            "verl",
            VERL | {"async_training.require_batches": 2, f"{ACTOR}ppo_mini_batch_size": 8},
            "batch_size",
            64,
        ),
        ("gerl", {"actor_rollout_ref.async_strategy": "one-step-off"} | APART, "alpha", 1),
        ("gerl", {"data.train_batch_size": 8} | APART, "trainer.advantages.name", "grpo"),
        ("gerl", {"actor_rollout_ref.async_strategy": "naive"} | APART, "alpha", 0),
        ("gerl", {"data.train_batch_size": 8} | APART, "batch_size", 64),
        # Optimizer steps of a batch: 64 samples over 2 · 8 on each of two data-parallel ranks.
        (
            "roll",
            ROLL
            | {
                "actor_train.training_args.per_device_train_batch_size": 2,
                "actor_train.training_args.gradient_accumulation_steps": 8,
                "actor_train.strategy_args.strategy_config.tensor_model_parallel_size": 2,
                "actor_train.device_mapping": "list(range(0,4))",
            },
            "trainer.mini_batches",
            2,
        ),
        ("verl", VERL | {f"{ACTOR}ppo_mini_batch_size": 8}, "trainer.mini_batches", 4),
        # A pass, in tokens.
        (
            "roll",
            {
                "actor_train.training_args.per_device_train_batch_size": 2,
                "prompt_length": 100,
                "response_length": 400,
            },
            "trainer.tokens_per_micro_batch",
            1000,
        ),
        (
            "verl",
            VERL
            | {
                f"{ACTOR}ppo_micro_batch_size_per_gpu": 3,
                "data.max_prompt_length": 100,
                "data.max_response_length": 400,
            },
            "trainer.tokens_per_micro_batch",
            1500,
        ),
        (
            "verl",
            VERL
            | {
                f"{ACTOR}use_dynamic_bsz": True,
                f"{ACTOR}ppo_micro_batch_size_per_gpu": 3,
                f"{ACTOR}ppo_max_token_len_per_gpu": 7000,
            },
            "trainer.tokens_per_micro_batch",
            7000,
        ),
        # Losses.
        (
            "roll",
            ROLL | {"pg_variant": "tis", "tis_upper_bound": 1.5},
            "trainer.objective.cap",
            1.5,
        ),
        ("roll", ROLL | {"actor_train.pg_variant": "topr"}, "trainer.objective.name", "topr"),
        ("roll", ROLL | {"pg_variant": "vanilla"}, "trainer.objective.allow_stale", True),
        ("roll", ROLL | {"pg_clip": 0.1}, "trainer.objective.clip_high", 0.1),
        (
            "roll",
            ROLL | {"pg_clip": 0.1, "pg_clip_high": 0.3, "use_pg_clip_range": True},
            "trainer.objective.clip_high",
            0.3,
        ),
        (
            "roll",
            ROLL | {"pg_variant": "ppo", "dual_clip_loss": True, "pg_clip": 0.25},
            "trainer.objective.dual_clip",
            1.5,
        ),
        ("trinity", TRINITY, "trainer.objective.clip_high", 0.2),
        (
            "trinity",
            TRINITY | {"algorithm.policy_loss_fn_args.clip_range_high": 0.4},
            "trainer.objective.clip_high",
            0.4,
        ),
        (
            "trinity",
            TRINITY | {"algorithm.policy_loss_fn": "gspo"},
            "trainer.objective.name",
            "gspo",
        ),
        ("verl", VERL, "trainer.objective.clip_high", 0.2),
        (
            "verl",
            VERL | {f"{ACTOR}policy_loss.loss_mode": "gspo"},
            "trainer.objective.name",
            "gspo",
        ),
        (
            "verl",
            VERL
            | {
                "algorithm.rollout_correction.bypass_mode": True,
                f"{ACTOR}clip_ratio_c": 10.0,
            },
            "trainer.objective.dual_clip",
            10.0,
        ),
        (
            "verl",
            VERL | {"algorithm.rollout_correction.rollout_is_threshold": 4.0},
            "trainer.objective.max_behaviour_weight",
            4.0,
        ),
        (
            "verl",
            VERL
            | {
                f"{ACTOR}loss_agg_mode": "seq-mean-token-sum-norm",
                "data.max_response_length": 400,
                "data.max_prompt_length": 100,
            },
            "trainer.fixed_length",
            400,
        ),
        # A divergence counts where it is switched on.
        (
            "verl",
            VERL | {f"{ACTOR}use_kl_loss": True, f"{ACTOR}kl_loss_coef": 0.01},
            "trainer.kl.coefficient",
            0.01,
        ),
        (
            "roll",
            ROLL | {"adv_estimator": "grpo", "add_token_level_kl": True, "init_kl_coef": 0.3},
            "trainer.kl.place",
            "reward",
        ),
        # Worlds.
        ("roll", ROLL | {"train_env_manager.tags": ["FrozenLake"]}, "env.name", "frozen_lake"),
        (
            "trinity",
            TRINITY
            | {"buffer.explorer_input.default_workflow_type": "step_wise_alfworld_workflow"},
            "env.name",
            "alfworld",
        ),
        (
            "verl",
            VERL | {"data.train_files": ["a.parquet", "b.parquet"], "data.prompt_key": "asked"},
            "env.options",
            {
                "path": ["a.parquet", "b.parquet"],
                "question": "asked.0.content",
                "answer": "reward_model.ground_truth",
            },
        ),
        (
            "verl",
            VERL | {"data.train_files": "a.parquet", "data.val_files": "b.parquet"},
            "env.options",
            {
                "path": "a.parquet",
                "question": "prompt.0.content",
                "answer": "reward_model.ground_truth",
                "split": "all",
            },
        ),
        (
            "verl",
            VERL | {"data.train_files": "a.parquet", "data.val_files": "b.parquet"},
            "env.eval_options",
            {"path": "b.parquet"},
        ),
        (
            "trinity",
            TRINITY
            | {
                "buffer.explorer_input.taskset.path": "openai/gsm8k",
                "buffer.explorer_input.taskset.subset_name": "main",
                "buffer.explorer_input.taskset.split": "train",
                "buffer.explorer_input.taskset.format.prompt_key": "question",
                "buffer.explorer_input.taskset.format.response_key": "answer",
            },
            "env.options",
            {
                "path": "openai/gsm8k",
                "subset": "main",
                "data_split": "train",
                "question": "question",
                "answer": "answer",
            },
        ),
        ("verl", VERL | {"data.train_files": "sums.jsonl"}, "agent.max_turns", 1),
        (
            "verl",
            VERL | {"algorithm.filter_groups.enable": True},
            "rollout.filters",
            ["equal_rewards"],
        ),
        ("trinity", TRINITY | {"name": "<my run>"}, "name", "my_run"),
        ("trinity", TRINITY | {"explorer.max_retry_times": 2}, "rollout.max_attempts", 3),
        # A worker holds a whole episode, however long.
        ("trinity", TRINITY | {"model.max_model_len": 131072}, "engine.cache_tokens", 131072),
    ],
)  # fmt: skip
def test_a_key_becomes_a_field_with_the_value_that_means_the_same(system, leaves, field, value):
    assert made(system, **leaves)[field] == value


@pytest.mark.parametrize(
    ("system", "leaves", "key", "outcome", "note"),
    [
        ("roll", {"actor_infer.generating_args.top_p": 0.9}, None, "missing here", "refused: logp"),
        ("roll", {"actor_infer.generating_args.top_p": 1}, None, "no meaning here", "whole"),
        ("roll", {"logging_steps": 1}, None, "no meaning here", "every step"),
        ("roll", {"roll_out_batch": 1}, None, "unknown", "spelt"),
        ("roll", {"actor_infer.model_args.dtype": "fp16"}, None, "missing here", "fp16 is refused"),
        ("roll", ROLL | {"kl_loss_coef": 0.1}, "kl_loss_coef", "no meaning here", "use_kl_loss"),
        ("roll", {"ppo_epochs": 2}, None, "missing here", "rollout.reuse.uses"),
        ("roll", {"max_steps": "soon"}, None, "missing here", "'soon'"),
        ("roll", {"pg_variant": "newer"}, None, "missing here", "no such objective"),
        ("roll", {"device_mapping": 1}, None, "unknown", "spelt"),
        ("verl", VERL | {f"{ROLLOUT}val_kwargs.temperature": 0}, None, "missing here", "above 0"),
        ("verl", VERL | {"trainer.logger": ["console"]}, None, "no meaning here", "TensorBoard"),
        ("verl", VERL | {"trainer.logger": ["console", "wandb"]}, None, "missing here", "metrics"),
        ("verl", VERL | {f"{ACTOR}clip_ratio_c": 3.0}, None, "missing here", "no dual_clip"),
        ("gerl", {f"{ROLLOUT}sde_type": "cps"}, None, "missing here", "no worker makes images"),
        # Keys that verl has too, otherwise.
        ("gerl", {"actor_rollout_ref.model.path": "a/b"}, None, "missing here", "makes images"),
        # The loader refuses it, as it would in a file: its words, and the rest loads.
        (
            "roll",
            {"actor_infer.generating_args.temperature": -1},
            None,
            "missing here",
            "refused: ag",
        ),
        ("trinity", {"trainer.grad_clip": 0}, None, "missing here", "refused: trainer.max_grad"),
        # Two keys of one field: the first in the table counts, and the other says so.
        (
            "roll",
            {"num_return_sequences_in_group": 4, "train_env_manager.group_size": 2},
            "train_env_manager.group_size",
            "no meaning here",
            "group_size is num_return_sequences_in_group's, which counts",
        ),
    ],
)
def test_what_is_not_mapped_is_told_with_a_reason(system, leaves, key, outcome, note):
    row = row_of(system, leaves, key or list(leaves)[-1])
    assert row.outcome == outcome
    assert note in row.note


def test_gpus_of_one_node_are_ranks_and_workers():
    found = made(
        "roll",
        **{
            "actor_train.device_mapping": "list(range(0,2))+[5]",
            "actor_infer.device_mapping": [2, 3],
        },
    )
    assert (found["trainer.ranks"], found["engine.workers"]) == (3, 2)
    assert "cluster.kind" not in found


def test_a_node_may_be_full():
    found = made(
        "roll",
        **{
            "actor_train.device_mapping": "list(range(4))",
            "actor_infer.device_mapping": "list(range(4,6))",
            "num_gpus_per_node": 6,
        },
    )
    assert (found["trainer.ranks"], found["engine.workers"]) == (4, 2)
    assert "cluster.kind" not in found


def test_gpus_of_several_nodes_are_a_clusters():
    found = made(
        "roll",
        **{
            "actor_train.device_mapping": "list(range(0,16))",
            "actor_infer.device_mapping": "list(range(16,32))",
            "actor_infer.strategy_args.strategy_config.tensor_parallel_size": 2,
        },
    )
    trainer, explorers = "cluster.trainer.", "cluster.explorers."
    assert (found[f"{trainer}nodes"], found[f"{trainer}gpus"], found["trainer.ranks"]) == (2, 8, 16)
    assert (found[f"{explorers}min"], found[f"{explorers}gpus"]) == (2, 8)
    assert (found["engine.workers"], found["engine.tensor_parallel"]) == (4, 2)


def test_gpus_that_both_have_are_colocated_or_that_is_refused_where_nothing_can_sleep():
    leaves = {
        "actor_train.device_mapping": "list(range(0,4))",
        "actor_infer.device_mapping": "list(range(0,4))",
        "actor_infer.strategy_args.strategy_name": "vllm",
    }
    found = converted("roll", leaves)
    assert found.settings["trainer.ranks"] == found.settings["engine.workers"] == 4
    if machine.has_vllm():
        assert found.settings["engine.colocated"] is True
    else:
        kind = next(row for row in found.rows if row.key.endswith("strategy_name"))
        assert "vLLM, which is not installed here" in kind.note


def test_a_key_of_which_a_part_is_refused_says_so():
    same = {"actor_train.device_mapping": [0, 1], "actor_infer.device_mapping": [0, 1]}
    row = row_of("roll", same, "actor_infer.device_mapping")
    assert (row.outcome, row.fields) == ("mapped", {"engine.workers": 2})
    assert "; engine.colocated refused: engine.colocated=true with engine.kind=auto" in row.note


def test_engines_leave_the_trainer_the_other_gpus():
    leaves = TRINITY | {
        "cluster.node_num": 1,
        "cluster.gpu_per_node": 8,
        "explorer.rollout_model.engine_num": 3,
        "explorer.rollout_model.tensor_parallel_size": 2,
    }
    found = made("trinity", **leaves)
    assert (found["trainer.ranks"], found["engine.workers"]) == (2, 3)
    alone = made("trinity", **leaves | {"mode": "train"})
    assert (alone["trainer.ranks"], alone["engine.workers"]) == (8, 0)
    assert alone["explorers.expected"] == 1


def test_several_tags_are_task_sets_with_their_part_of_the_groups():
    found = made(
        "roll",
        **{
            "rollout_batch_size": 32,
            "train_env_manager.group_size": 4,
            "train_env_manager.tags": ["FrozenLake", "Household"],
            "train_env_manager.num_groups_partition": [6, 2],
            "custom_envs.Household.env_type": "alfworld",
        },
    )
    assert found["task_sets"] == {
        "FrozenLake": {"weight": 6, "env": {"name": "frozen_lake"}},
        "Household": {"weight": 2, "env": {"name": "alfworld"}},
    }


def test_several_tasksets_are_task_sets_with_environments_or_questions():
    sets, workflow = "buffer.explorer_input.tasksets", "default_workflow_type"
    leaves = TRINITY | {
        f"{sets}.0.name": "house work",
        f"{sets}.0.{workflow}": "alfworld_workflow",
        f"{sets}.1.name": "sums",
        f"{sets}.1.path": "sums.jsonl",
        f"{sets}.1.{workflow}": "math_workflow",
    }
    found = converted("trinity", leaves)
    worlds = found.settings["task_sets"]
    assert worlds["house_work"] == {"env": {"name": "alfworld"}}
    assert worlds["sums"]["env"] == {"name": "questions", "options": {"path": "sums.jsonl"}}
    assert worlds["sums"]["agent"]["max_turns"] == 1
    assert not any("sums" in what for what in found.decide)
    how = {f"{sets}.1.subset_name": "main", f"{sets}.1.format.prompt_key": "asked"}
    elsewhere = made("trinity", **leaves | how | {f"{sets}.1.path": "org/sums"})
    assert elsewhere["task_sets"]["sums"]["env"]["options"] == {
        "path": "org/sums",
        "subset": "main",
        "question": "asked",
    }
    assert "env.options" not in elsewhere
    del leaves[f"{sets}.1.path"]
    nowhere = converted("trinity", leaves)
    assert nowhere.settings["task_sets"]["sums"]["env"] == {"name": "questions"}
    assert any("give task_sets.sums.env.options.path" in what for what in nowhere.decide)


def test_files_that_variables_name_are_to_decide():
    found = converted("verl", VERL | {"data.train_files": "$DATA/a.parquet"})
    assert found.settings["env.name"] == "questions"
    assert "env.options" not in found.settings
    assert any("$DATA/a.parquet names a variable that is not set" in what for what in found.decide)
    leaves = VERL | {"data.train_files": "a.parquet", "data.val_files": "$DATA/b.parquet"}
    assert "split" not in made("verl", **leaves)["env.options"]
    assert row_of("verl", leaves, "data.val_files").note.endswith("give env.eval_options.path")


def test_environments_that_are_not_played_change_nothing():
    leaves = {
        "custom_envs.Other.max_steps": 99,
        "custom_envs.Ice.env_type": "frozen_lake",
        "custom_envs.Ice.max_steps": 7,
        "custom_envs.Ice.env_config.is_slippery": True,
        "train_env_manager.tags": ["Ice"],
    }
    found = converted("roll", leaves)
    assert found.settings["agent.max_turns"] == 7
    assert found.settings["env.options"] == {"slippery": True}
    row = row_of("roll", leaves, "custom_envs.Other.max_steps")
    assert (row.outcome, row.note) == (
        "no meaning here",
        "train_env_manager.tags does not name it",
    )


def test_files_of_problems_have_no_meaning_beside_environments():
    leaves = {
        "train_env_manager.tags": ["FrozenLake"],
        "custom_envs.FrozenLake.env_config.is_slippery": True,
        "actor_train.data_args.file_name": "sums.jsonl",
    }
    found = made("roll", **leaves)
    assert (found["env.name"], found["env.options"]) == ("frozen_lake", {"slippery": True})
    assert "agent.max_turns" not in found
    alone = made("roll", **{"actor_train.data_args.file_name": "sums.jsonl"})
    assert alone["env.options"] == {"path": "sums.jsonl"}


def test_keys_for_others_are_not_shown():
    found = converted("roll", ROLL | {"tracker_kwargs.api_key": "hunter2"})
    assert "hunter2" not in repr(found)


def test_what_nothing_here_stands_for_is_to_decide_and_starts_no_run():
    found = converted(
        "roll", {"train_env_manager.tags": ["MyOwnWorld"], "pretrain": "/no/model-7b"}
    )
    assert found.settings["env.name"] == "questions"  # which refuses to start without a file
    assert "env.options" not in found.settings
    assert found.settings["model"] == "model-7b"
    model, world = found.decide[:2]
    assert "MyOwnWorld: no environment is registered for it" in world
    assert "/no/model-7b: there is no such directory" in model


def test_a_system_prompt_takes_the_place_of_the_presets():
    found = made(
        "trinity",
        **TRINITY
        | {
            "buffer.explorer_input.taskset.default_workflow_type": "math_workflow",
            "buffer.explorer_input.taskset.path": "org/dataset",
            "buffer.explorer_input.taskset.format.system_prompt": "Think.",
        },
    )
    assert found["agent.style_options"] == {"system": "Think.", "answer": "last_line"}


def test_what_is_set_without_a_key_is_told_and_what_is_refused_of_it_too():
    found = converted("trinity", TRINITY)
    assert "trainer.learning_rate" in {one.field for one in found.added}
    kinds = {one.field: one.value for one in found.added} | found.settings
    if not machine.has_vllm():
        assert any("engine.kind: " in what and "refused" in what for what in found.decide)
    else:
        assert kinds["engine.kind"] == "vllm"


@pytest.mark.parametrize(
    ("leaves", "says"),
    [
        (
            {"lr": 1},
            r"no key is of a system that is known \(roll, trinity, verl, gerl\): say --from",
        ),
        ({"alpha": 1}, "alpha is a field of flash's own, which flash train takes"),
        (
            {"actor_infer.x": 1, "synchronizer.sync_interval": 1},
            "several systems: actor_infer.x of ROLL, and synchronizer.sync_interval of Trinity-RFT",
        ),
    ],
)
def test_a_file_of_no_system_and_one_of_several_are_refused(leaves, says):
    with pytest.raises(ValueError, match=says):
        recognised(Source(leaves))


@pytest.mark.skipif(not GUIDES.exists(), reason="needs ../shared/data/configs")
def test_the_guides_own_examples_load_and_leave_no_key_unknown():
    files = sorted(GUIDES.iterdir())
    assert len(files) >= 7
    for file in files:
        source = read(file)
        found = convert(source, recognised(source), name=file.stem)
        parse(found.nested())
        counts = found.counts()
        assert counts["unknown"] == 0, file.name
        assert counts["mapped"] >= len(source) // 2, file.name
