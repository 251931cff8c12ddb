"""The configuration: what is accepted, and one clear line for each mistake."""

import os
import re
import sys

import pytest

from flash.config import check_capacity, fields, load, parse, presets, try_environment
from flash.system.machine import Capacity
from flash.trainer.objectives.settings import SETTINGS, DecoupledPpo, Ppo, Tis


@pytest.mark.parametrize("preset", ["alfworld", "frozen_lake", "reasoning_gym"])
def test_every_preset_loads_and_is_named_after_itself(preset):
    assert preset in presets()
    assert load(preset).name == load(preset).env.name == preset


def test_options_are_set_by_dotted_name():
    config = load("frozen_lake", {"steps": 4, "alpha": 2, "env.options.size": 5, "name": "try"})
    assert (config.steps, config.alpha, config.name) == (4, 2.0, "try")
    assert config.env.options == {"size": 5, "max_turns": 12}


def test_env_and_engine_may_be_bare_names():
    assert load("alfworld", {"env": "frozen_lake"}).env.options == {}
    config = load("alfworld", {"engine": "embedded"})
    assert (config.engine.kind, config.engine.cache_tokens) == ("embedded", 32768)
    assert parse({"env": "frozen_lake", "engine": "auto"}).engine.kind == "auto"


def test_async_generation_ratio_is_another_name_for_alpha():
    assert parse({"env": "frozen_lake", "async_generation_ratio": 2}).alpha == 2
    assert load("frozen_lake", {"async_generation_ratio": 3}).alpha == 3
    with pytest.raises(ValueError, match="alpha=1 and async_generation_ratio=2 are two names"):
        parse({"env": "frozen_lake", "alpha": 1, "async_generation_ratio": 2})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_sise": 3}, "batch_sise: unknown field; did you mean batch_size?"),
        ({"trainer": {"lerning_rate": 1}}, "did you mean trainer.learning_rate?"),
        ({"clip_low": 0.1}, "clip_low: unknown field; did you mean trainer.objective.clip"),
        ({"steps": "many"}, "steps='many': must be a whole number"),
        ({"steps": 1.5}, "steps=1.5: must be a whole number"),
        ({"steps": 0}, "steps=0: must be at least 1"),
        ({"alpha": "x"}, "alpha='x': must be a number"),
        ({"name": 7}, "name=7: must be a text; write it in quotes"),
        ({"checkpoint": {"resume": "x"}}, "checkpoint.resume='x': must be true or false"),
        ({"env": {"name": "frozen_lake", "options": 3}}, "env.options=3: must be a mapping: {key:"),
        ({"runs_dir": 3}, "runs_dir=3: must be a path"),
        ({"rollout": {"on_stale": "x"}}, "rollout.on_stale='x': must be 'regenerate', 'wait' or"),
        ({"eval": {"mode": "beside"}}, "beside leaves none of 1 workers to rollout: set engine.wo"),
        (
            {"rollout": {"filters": "equal_rewardz"}},
            "rollout.filters: 'equal_rewardz' is not one of equal_rewards; name one of your own",
        ),
        (
            {
                "group_size": 1,
                "rollout": {"filters": "equal_rewards"},
                "trainer": {"advantages": "reinforce"},
            },
            "rollout.filters=equal_rewards with group_size=1 would drop every group: use a group",
        ),
        (
            {"publish_every": 3},
            "publish_every=3 with alpha=1: at the last step before a publish ev",
        ),
        (
            {"stream": True, "trainer": {"mini_batches": 2}},
            "stream=true with trainer.mini_batches=2: a later mini-batch needs weights that the",
        ),
        (
            {"stream": True, "trainer": {"advantages": "reinforce_pp"}},
            "stream=true with trainer.advantages.name=reinforce_pp: these advantages take the who",
        ),
        ({"rollout": {"redundant_groups": -1}}, "rollout.redundant_groups=-1: must be at least 0"),
        ({"agent": {1: 2}}, "agent.1: unknown field"),
        ({"agent": {"alpha": 2}}, "agent.alpha: unknown field; did you mean alpha?"),
        ({"async_generation_ration": 1}, "did you mean async_generation_ratio?"),
        ({"model": ""}, "model='': there is no such directory"),
        ({"env": ":Env"}, "env.name=':Env' can't be imported"),
        ({"env": {"options": {}}}, "env.name is missing: give it a value"),
        ({"env": None}, "env=None: must be a section; write --env.field value"),
        (
            {"agent": {"style_options": {"repeat_goals": True}}},
            "agent.style_options.repeat_goals is not an argument of the style: did you mean repeat",
        ),
        (
            {"agent": {"style_options": {"tokenizer": 1}}},
            "style_options.tokenizer is not an argument of the style: it takes action_start",
        ),
        ({"batch_size": 10, "group_size": 4}, "batch_size=10 is not divisible by group_size=4"),
        ({"group_size": 1}, "compares the episodes of a group: use 2 or more, or trainer.advan"),
        ({"group_size": 0}, "group_size=0: must be at least 1"),
        ({"trainer": {"advantages": "grop"}}, "trainer.advantages.name='grop': did you mean grpo?"),
        (
            {"trainer": {"advantages": {"name": "rloo", "gamma": 1}}},
            "trainer.advantages.gamma: unknown field of rloo (turn_returns, gigpo, gae have it)",
        ),
        ({"alpha": -1}, "alpha=-1: must be at least 0"),
        ({"alpha": float("nan")}, "alpha=nan: must be a finite number"),
        ({"alpha": float("inf")}, "alpha=inf: must be a finite number"),
        ({"model": "./not/there"}, "model='./not/there': there is no such directory"),
        ({"env": "alfwurld"}, "env.name='alfwurld' is not registered; there are alfworld,"),
        ({"env": "nowhere:Env"}, "env.name='nowhere:Env' can't be imported"),
        ({"agent": {"style": "chatty"}}, "agent.style='chatty' is not registered; there are chat,"),
        ({"engine": "urls"}, "engine.kind=urls needs engine.urls"),
        ({"engine": "warp"}, "engine.kind='warp': must be 'auto'"),
        ({"engine": {"cache_tokens": 100}}, "engine.cache_tokens=100 can't hold one episode"),
        ({"engine": {"kind": "vllm", "urls": ["http://a"]}}, "engine.kind=vllm starts workers"),
        ({"engine": {"urls": ["host:8000"]}}, "host:8000 is not a URL: write http://host:8000"),
        ({"engine": {"kind": "embedded", "urls": ["http://a"]}}, "leave one of them out"),
        ({"model": "flash/nowhere/model"}, "there is no such directory"),
        ({"name": "../x"}, "name='../x': must be a folder's name"),
        ({"name": ".."}, "must be a folder's name"),
        ({"steps": True}, "steps=True: must be a number"),
        ({"trainer": {"ranks": True}}, "trainer.ranks=True: must be a number"),
        ({"trainer": {"fixed_length": True}}, "trainer.fixed_length=True: must be a number"),
        (
            {"trainer": {"objective": {"name": "tis", "cap": True}}},
            "trainer.objective.cap=True: must be a number",
        ),
        (
            {"trainer": {"objective": {"name": "tis", "cap": float("inf")}}},
            "trainer.objective.cap=inf: must be a finite number",
        ),
        ({"trainer": {"kl": {"coefficient": True}}}, "trainer.kl.coefficient=True: must be a num"),
        ({"env": [1]}, "env=[1]: must be a section"),
        (
            {"trainer": {"objective": "function"}},
            "trainer.objective.run is missing: give it a value",
        ),
        (
            {"trainer": {"objective": {"name": "function", "run": "nowhere:loss"}}},
            "trainer.objective.run='nowhere:loss' can't be imported: No module named 'nowhere'",
        ),
        (
            {"trainer": {"objective": {"name": "function", "run": "math:atan2"}}},
            "trainer.objective.run='math:atan2' must take a TokenBatch: missing a ",
        ),
        ({"reward": {"run": "a:b"}}, "reward.name is missing: there are env, function, judge, pro"),
        ({"reward": None}, "reward=None: must be a name, or a section with a name"),
        ({"engine": {"devices": "one"}}, "engine.devices.0='one': must be a GPU's number, or"),
        ({"engine": {"vllm_args": 3}}, "engine.vllm_args=3: must be a list: [one, two]"),
        ({"traner": {"ranks": 1}}, "traner: unknown field"),
        (
            {"trainer": {"zeal": 1}},
            "trainer.zeal: unknown field; trainer has ranks, shard_size, sequence_ranks, agg",
        ),
        (
            {"trainer": {"lr": 1}},
            "trainer.lr: unknown field; did you mean trainer.learning_rate?",
        ),
        (
            {"policy": {"heads": 3}},
            "policy.hidden_size=128 is not a multiple of 2 × policy.heads = 6",
        ),
        ({"policy": {"max_tokens": 99}}, "policy.max_tokens=99 can't read one episode"),
        ({"agent": {"max_tokens": 9999}}, "leaves no room for a prompt"),
        (
            {"env": {"name": "frozen_lake", "options": {"sise": 3}}},
            "env.options.sise is not an argument of the environment: did you mean size?",
        ),
        (
            {"env": {"name": "frozen_lake", "eval_options": {"which": 3}}},
            "env.eval_options.which is not an argument of the environment: it takes size, ice",
        ),
        ({"agent": {"run": "python agent.py"}}, "agent.run='python agent.py': must be a coroutine"),
        ({"agent": {"run": ["python", 3]}}, "agent.run=['python', 3]: must be a coroutine functi"),
        (
            {"agent": {"ignore": "stop"}},
            "agent.ignore='stop': ['stop'] can't be ignored",
        ),
        ({"agent": {"run": []}}, "agent.run=[]: must be a coroutine function"),
        (
            {"agent": {"run": ["node", "a.js"], "env": "NO_SUCH_VARIABLE"}},
            "agent.env='NO_SUCH_VARIABLE': NO_SUCH_VARIABLE is not set here: export it",
        ),
        (
            {"agent": {"run": ["node", "a.js"], "env": ["A B=1"]}},
            "agent.env=['A B=1']: 'A B' is no name of a variable",
        ),
        (
            {"agent": {"run": ["node", "a.js"], "env": ["OPENAI_API_KEY"]}},
            "agent.env=['OPENAI_API_KEY']: OPENAI_API_KEY is each episode's own",
        ),
        (
            {"agent": {"env": ["A=1"]}},
            "agent.env=['A=1'] is for agents that are commands",
        ),
        (
            {"agent": {"run": ["no-such"]}},
            "agent.run=['no-such']: the command 'no-such' is not installed",
        ),
        ({"agent": {"run": "nowhere:act"}}, "agent.run='nowhere:act' can't be imported: No mod"),
        ({"agent": {"run": "json:dumps"}}, "agent.run='json:dumps' is not a coroutine function"),
        (
            {"agent": {"run": "asyncio:sleep"}},
            "agent.run='asyncio:sleep' must take base_url, api_key and task",
        ),
        (
            {"agent": {"run": ["sh"], "max_turns": 3}},
            "agent.max_turns is not for an agent of your own (agent.run): leave it out",
        ),
        (
            {"agent": {"run": ["sh"]}, "env": {"name": "frozen_lake", "hosts": 1}},
            "env.hosts is not for an agent of your own (agent.run): leave it out",
        ),
        (
            {"agent": {"run": ["sh"]}, "trainer": {"advantages": "gigpo"}},
            "trainer.advantages.name=gigpo takes the rewards of turns, and an agent of your own",
        ),
        ({"trainer": {"mini_batches": 99}}, "trainer.mini_batches=99 exceeds batch_size=64"),
        ({"trainer": {"objective": "tiss"}}, "trainer.objective.name='tiss': did you mean tis?"),
        ({"trainer": {"objective": "best"}}, "trainer.objective.name='best': there are cispo, dec"),
        (
            {"trainer": {"objective": {"name": "tis", "capp": 2}}},
            "trainer.objective.capp: unknown field of tis; did you mean cap?",
        ),
        (
            {"trainer": {"objective": {"name": "tis", "clip_low": 0.1}}},
            "trainer.objective.clip_low: unknown field of tis (cispo, ppo, decoupled_ppo,",
        ),
        (
            {"trainer": {"objective": {"name": "tis", "cap": 0}}},
            "trainer.objective.cap=0: must be greater than 0",
        ),
        (
            {"trainer": {"objective": {"name": "icepop", "low": 3}}},
            "trainer.objective.low=3 and high=5 must have 1 between them",
        ),
        (
            {"trainer": {"aggregation": "fixed_length"}},
            "trainer.aggregation=fixed_length with trainer.fixed_length=null: give both",
        ),
        (
            {"trainer": {"kl": {"estimator": "k1", "corrected": False}}},
            "trainer.kl.estimator=k1 with place=loss and corrected=false: the mean of its gradien",
        ),
        (
            {"trainer": {"kl": {"reference": "gpt2"}}},
            "trainer.kl.reference=gpt2 with coefficient=0 does nothing: give trainer.kl.coefficien",
        ),
        (
            {"trainer": {"kl": {"reference": "./nowhere", "coefficient": 0.1}}},
            "trainer.kl.reference='./nowhere': there is no such directory",
        ),
        (
            {"trainer": {"objective": "vanilla"}},
            "trainer.objective.name=vanilla with alpha=1: tokens up to 1 versions old would be",
        ),
        (
            {"alpha": 0, "trainer": {"objective": "opmd", "mini_batches": 2}},
            "name=opmd with trainer.mini_batches=2: all but the first mini-batch come from weights",
        ),
        (
            {"trainer": {"objective": "supervised"}},
            "trainer.objective.name=supervised: it imitates every sample, whatever its reward",
        ),
        (
            {"engine": {"vllm_args": "--api-key sesame"}},
            "--api-key: command lines and the run's config.yaml are for others to read: leave it",
        ),
        (
            {"engine": {"vllm_args": ["--logprobs_mode=raw_logprobs"]}},
            "--logprobs_mode=raw_logprobs changes what is sampled or which logprobs are returned",
        ),
        (
            {"engine": {"vllm_args": ["--max-model-len", "100"]}},
            "--max-model-len is agent.max_sequence_tokens: leave it out, and set that",
        ),
        (
            {"agent": {"top_p": 0.9}},
            "agent.top_p=0.9: the engine's logprobs would be those of a cut distribution",
        ),
    ],
)
def test_a_mistake_is_one_line_with_field_value_and_remedy(settings, message):
    with pytest.raises(ValueError) as caught:
        parse({"env": "frozen_lake", **settings})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_field_that_its_error_names_is_named_once():
    with pytest.raises(ValueError, match=r"^rollout\.filters: 'equal' is not one of equal_rewards"):
        parse({"env": "frozen_lake", "rollout": {"filters": "equal"}})


def test_an_agent_of_ones_own_brings_its_world_along_unless_a_small_policy_needs_a_teacher():
    run = {"run": ["sh", "agent.sh"]}
    config = parse({"env": "my_world", "model": "org/model", "agent": run})
    assert config.agent.run == ("sh", "agent.sh")
    assert not config.uses_environment
    run["ignore"] = "temperature,top_p"
    assert parse({"env": "frozen_lake", "agent": run}).agent.ignore == ("temperature", "top_p")
    del run["ignore"]
    assert parse({"env": "frozen_lake", "agent": run}).uses_environment
    with pytest.raises(ValueError, match="env.name='my_world' is not registered"):
        parse({"env": "my_world", "agent": run})


def test_a_missing_environment_is_asked_for():
    with pytest.raises(ValueError, match="env is missing"):
        parse({})


def test_a_source_that_is_no_preset_and_no_file_lists_the_presets(tmp_path):
    with pytest.raises(ValueError, match=r"neither a preset \(alfworld, code, "):
        load("alfred")
    (tmp_path / "config.yaml").write_text("env: frozen_lake")
    with pytest.raises(ValueError, match=r"nor a YAML file: of a run give .*/config\.yaml$"):
        load(str(tmp_path))
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1")
    with pytest.raises(ValueError, match="is not YAML"):
        load(str(broken))
    broken.write_text("- a\n- b")
    with pytest.raises(ValueError, match="must hold a mapping"):
        load(str(broken))
    broken.write_text("")
    with pytest.raises(ValueError, match="must hold a mapping of fields to values, at least env"):
        load(str(broken))
    broken.write_bytes(b"name: \xff\xfe")
    with pytest.raises(ValueError, match=r"broken\.yaml is no text in UTF-8 \(byte 6\)"):
        load(str(broken))


def test_a_file_that_is_no_file_of_settings_is_refused_unread(tmp_path):
    file = tmp_path / "weights.yaml"
    file.write_text("a: b\n" * 300_000)
    with pytest.raises(ValueError, match=r"has 1,500,000 bytes, and settings have 1,048,576 at m"):
        load(str(file))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"pipe is no regular file: name a YAML file"):
        load(str(tmp_path / "pipe"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 5000, "is not YAML: brackets in brackets, too deep to read: correct it there"),
        (
            "a: 1\nseed: " + "9" * 5000,
            "line 2, column 7: '99999999999999999999' is no value: Exceeds",
        ),
        ("a: 1\nb: 2026-13-01", "line 2, column 4: '2026-13-01' is no value: month must be in 1"),
        ("a: 1\nb: \x00", "line 2: no text has the character 0x00"),
        ("a: {b: 1, c: {d: 1, d: 2}}", "line 1, column 21: d is given twice, first in line 1"),
        ("a: [{b: 1, b: 2}]", "b is given twice"),
        ("a: &x {b: 1}\nc: {<<: *x, b: 2, b: 3}", "line 2, column 19: b is given twice"),
    ],
)
def test_what_yaml_can_not_be_is_one_line_with_its_place(text, message, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ValueError) as caught:
        load(str(file))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_merged_key_that_is_changed_is_not_given_twice(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "env: {name: frozen_lake, options: &a {size: 4}, eval_options: &b {<<: *a, size: 5}}\n"
    )
    assert load(str(file)).env.eval_options == {"size": 5}


def test_sections_are_set_before_what_they_hold_whatever_their_order():
    for changes in (
        {"env.options.size": 5, "env": "frozen_lake"},
        {"env": "frozen_lake", "env.options.size": 5},
    ):
        assert load("alfworld", {**changes, "env.eval_options": {}}).env.options == {"size": 5}
    changes = {"trainer.objective.cap": 3, "trainer.objective": "tis"}
    assert load("frozen_lake", changes).trainer.objective == Tis(cap=3)


def test_each_mistake_has_its_own_line():
    with pytest.raises(ValueError) as caught:
        parse({"env": "frozen_lake", "steps": "x", "alpha": -1, "trainer": {"lerning_rate": 1}})
    names = [re.split("[=:]", line)[0] for line in str(caught.value).splitlines()]
    assert names == ["alpha", "steps", "trainer.lerning_rate"]


def test_every_field_says_what_it_is():
    for name, info in fields():
        is_section = hasattr(info.annotation, "model_fields")
        assert info.description or is_section, name


def test_a_field_can_not_be_used_as_a_section():
    with pytest.raises(ValueError, match="steps.x: unknown field; steps is a value, not a section"):
        load("frozen_lake", {"steps.x": 3})


def test_one_name_of_alpha_on_the_command_line_overrides_the_other_in_a_file(tmp_path):
    file = tmp_path / "roll.yaml"
    file.write_text("env: frozen_lake\nasync_generation_ratio: 2\n")
    assert load(str(file)).alpha == 2
    assert load(str(file), {"alpha": 3}).alpha == 3
    assert load("frozen_lake", {"alpha": 2, "async_generation_ratio": 2}).alpha == 2
    with pytest.raises(ValueError, match="two names of one field"):
        load("frozen_lake", {"alpha": 1, "async_generation_ratio": 2})


def test_a_model_is_a_path_or_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load("frozen_lake", {"model": "gpt2"}).model == "gpt2"
    assert load("frozen_lake", {"model": "org/model-1.5B"}).model == "org/model-1.5B"
    (tmp_path / "models" / "mine").mkdir(parents=True)
    # `models/` is here, so models/other is meant as a path, though a hub name looks the same.
    with pytest.raises(ValueError, match="there is no such directory"):
        load("frozen_lake", {"model": "models/other"})
    with pytest.raises(ValueError, match="holds no config.json"):
        load("frozen_lake", {"model": "models/mine"})
    (tmp_path / "models" / "mine" / "config.json").write_text("{}")
    assert load("frozen_lake", {"model": "models/mine"}).model == "models/mine"


def test_an_environment_of_ones_own_may_lie_where_the_command_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    (tmp_path / "my_own_env.py").write_text("class MyEnv:\n    def __init__(self, size): ...\n")
    changes = {"env": {"name": "my_own_env:MyEnv", "options": {"size": 3}, "eval_options": {}}}
    assert load("frozen_lake", changes).env.options == {"size": 3}
    assert sys.path[-1] == str(tmp_path)


def test_nothing_else_in_that_folder_is_ever_imported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sys.path[:]
    (tmp_path / "h2.py").write_text("raise SystemExit('an unrelated script was run')")
    load("frozen_lake")
    load("frozen_lake", {"env": {"name": "flash.envs.frozen_lake:FrozenLakeTextEnv"}})
    with pytest.raises(ValueError, match="can't be imported"):
        load("frozen_lake", {"env": "not_there:Env"})
    assert sys.path == before


def test_urls_are_a_list_or_a_text_with_commas():
    urls = ("http://a:1", "https://b:2")
    assert load("frozen_lake", {"engine.urls": "http://a:1,https://b:2"}).engine.urls == urls
    assert load("frozen_lake", {"engine.urls": list(urls)}).engine.urls == urls


def test_gpus_are_numbers_with_commas_and_arguments_of_vllm_words_as_in_a_shell():
    for given, devices in (("0,3", (0, 3)), (2, (2,)), ([1, 0], (1, 0))):
        assert load("frozen_lake", {"engine.devices": given}).engine.devices == devices
    words = ("--max-num-batched-tokens", "4096", "--x=a b")
    given = "--max-num-batched-tokens 4096 '--x=a b'"
    assert load("frozen_lake", {"engine.vllm_args": given}).engine.vllm_args == words


class FromAFile:
    def __init__(self) -> None:
        raise KeyError("no such game")


class Scenery:
    """Lacks what makes an environment."""

    def reset(self) -> None: ...


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "FromAFile",
            r"can't be made with env\.options=\{\}: KeyError: 'no such game' in .*, line",
        ),
        (
            "Scenery",
            r"is not an environment: it lacks step, close; name a class with the methods of",
        ),
    ],
)
def test_an_environment_that_is_none_is_found_out_before_anything_starts(
    name, message, monkeypatch
):
    monkeypatch.setitem(sys.modules, "worlds", sys.modules[__name__])
    env = {"name": f"worlds:{name}", "eval_options": {}}
    with pytest.raises(ValueError, match=rf"env\.name='worlds:{name}' {message}"):
        try_environment(load("frozen_lake", {"env": env}).env)


def test_what_the_environments_constructor_objects_to_names_the_field():
    try_environment(load("frozen_lake").env)
    with pytest.raises(ValueError, match=r"env\.options: size=33 must be 2 to 9"):
        try_environment(load("frozen_lake", {"env.options.size": 33}).env)
    with pytest.raises(ValueError, match=r"env\.eval_options: split='no' must be"):
        try_environment(load("frozen_lake", {"env.eval_options.split": "no"}).env)


def test_an_objective_is_a_name_or_a_name_with_its_settings(tmp_path):
    file = tmp_path / "tis.yaml"
    file.write_text("env: frozen_lake\ntrainer: {objective: tis}\n")
    assert load(str(file)).trainer.objective == Tis()
    assert load(str(file), {"trainer.objective.cap": 3}).trainer.objective == Tis(cap=3)
    ppo = load("frozen_lake", {"trainer.objective": {"name": "ppo", "dual_clip": None}})
    assert ppo.trainer.objective == Ppo(dual_clip=None)
    # The default's settings can be changed without its name.
    decoupled = load("frozen_lake", {"trainer.objective.clip_high": 0.5}).trainer.objective
    assert decoupled == DecoupledPpo(clip_high=0.5)


def test_an_objective_that_corrects_nothing_is_taken_where_nothing_is_stale_or_if_asked_for():
    for name in ("vanilla", "opmd"):
        load("frozen_lake", {"trainer.objective": name, "alpha": 0})
        load("frozen_lake", {"trainer.objective": name, "alpha": 0.5})  # no token older than 0
        allowed = {"name": name, "allow_stale": True}
        load("frozen_lake", {"trainer.objective": allowed, "trainer.mini_batches": 2})
    for name in SETTINGS.keys() - {"vanilla", "opmd", "supervised"}:
        load("frozen_lake", {"trainer.objective": name, "alpha": 4, "trainer.mini_batches": 2})


def test_a_group_of_one_is_taken_where_nothing_in_it_is_compared():
    for name in ("reinforce", "reinforce_pp"):
        load("frozen_lake", {"trainer.advantages": name, "group_size": 1})
        in_group = {"name": name, "baseline": "group"}
        with pytest.raises(ValueError, match=f"group_size=1 with trainer.advantages.name={name}"):
            load("frozen_lake", {"trainer.advantages": in_group, "group_size": 1})


@pytest.mark.parametrize(
    ("changes", "installed", "gpus", "message"),
    [
        ({}, True, [0, 1], "engine.kind=auto can mean embedded workers: use engine.kind=vllm"),
        ({"engine.kind": "sglang"}, False, [], "this machine shows none: use engine.transport"),
        ({"engine.kind": "sglang"}, False, [0], "needs GPUs for servers beside the trainer's"),
        ({"engine.kind": "sglang"}, False, [0, 1], ""),
        ({"engine.kind": "sglang", "engine.urls": "http://a:1"}, False, [0], ""),
        ({"engine.kind": "vllm"}, True, [], "this machine shows none: use engine.transport=disk"),
        ({"engine.urls": "http://a:1"}, False, [0], "needs vLLM, which is not installed here"),
        ({"engine.kind": "vllm", "engine.devices": [1, 2], "trainer.ranks": 2}, True, [0, 1, 2],
         "share GPUs [1], which engine.transport=nccl can't"),
        ({"engine.kind": "vllm", "trainer.ranks": 2}, True, [0, 1], "trainer.ranks=2 take all 2"),
        ({"engine.kind": "vllm", "trainer.ranks": 2}, True, [0, 1, 2], ""),
        ({"engine.kind": "vllm", "engine.devices": [2]}, True, [0, 1, 2], ""),
        ({"engine.urls": "http://a:1"}, True, [0], ""),
        # The workers are explorers'.
        ({"engine.kind": "vllm", "engine.workers": 0, "explorers.expected": 1}, True, [0], ""),
        ({"engine.kind": "vllm", "engine.workers": 0, "explorers.expected": 1}, True, [],
         "this machine shows none: use engine.transport=disk"),
    ],
)  # fmt: skip
def test_weights_go_over_nccl_where_each_side_has_gpus_and_the_other_is_a_server(
    changes, installed, gpus, message, monkeypatch
):
    """`installed`: whether vLLM is."""
    monkeypatch.setattr("flash.system.machine.has_vllm", lambda: installed)
    monkeypatch.setattr("flash.system.machine.has_sglang", lambda: True)
    has = Capacity(cores=64, memory_bytes=10**12, gpus=gpus, open_files=65_536)
    changes = {"engine.transport": "nccl", **changes}
    if not message:
        check_capacity(load("frozen_lake", changes), has)
        return
    with pytest.raises(ValueError, match="engine.transport=nccl") as caught:
        check_capacity(load("frozen_lake", changes), has)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"engine.kind": "embedded"},
            "engine.kind=embedded: only vLLM .*: use engine.kind=v",
        ),
        ({"engine.workers": 0}, "engine.workers=0: there is nobody to share .*: start workers, or"),
        ({"engine.transport": "nccl"}, "engine.transport=nccl, which is between GPUs: use .*=disk"),
        ({"engine.update_mode": "keep_stale_kv"}, "engine.*stale_kv: .*: use engine.*=keep"),
        ({"engine.devices": [1]}, r"engine.devices=\[1\]: .*: leave one of them out"),
        ({"stream": True}, "stream=true: .*: use stream=false"),
        ({"eval.mode": "beside", "engine.workers": 2}, "eval.mode=beside: .*: use eval.mode=pause"),
        ({"explorers.expected": 1}, "explorers.expected=1: .*: leave one of them out"),
        ({"cluster": "ray"}, "cluster.kind=ray: .*: leave one of them out"),
    ],
)
def test_gpus_are_shared_in_turns_where_each_side_can_wait_for_the_other(
    changes, message, monkeypatch
):
    monkeypatch.setattr("flash.system.machine.has_vllm", lambda: True)
    colocated = {"engine.colocated": True, "engine.kind": "vllm"}
    load("frozen_lake", colocated)
    with pytest.raises(ValueError, match=f"engine.colocated=true with {message}"):
        load("frozen_lake", colocated | changes)


def test_servers_that_share_the_trainers_gpus_are_no_more_than_these(monkeypatch):
    monkeypatch.setattr("flash.system.machine.has_vllm", lambda: True)
    changes = {"engine.colocated": True, "engine.kind": "vllm", "engine.workers": 2}
    has = Capacity(cores=64, memory_bytes=10**12, gpus=[0, 1], open_files=65_536)
    check_capacity(load("frozen_lake", changes | {"trainer.ranks": 2}), has)
    with pytest.raises(ValueError, match="engine.workers=2 of .* has 1 .trainer.ranks.: take fewe"):
        check_capacity(load("frozen_lake", changes), has)
    check_capacity(load("frozen_lake", changes), has, trains=False)


def test_what_goes_over_nccl_is_seen_by_others_and_needs_gpus_of_a_cluster(monkeypatch, tmp_path):
    monkeypatch.setattr("flash.system.machine.has_vllm", lambda: True)
    for name in ("certificate", "key"):
        (tmp_path / name).touch()
    nccl = {"engine.transport": "nccl", "engine.kind": "vllm", "explorers.expected": 1}
    tls = {f"explorers.{name}": str(tmp_path / name) for name in ("certificate", "key")}
    with pytest.raises(ValueError, match="NCCL sends weights in the clear: use .*=disk, or leave"):
        load("frozen_lake", nccl | tls)
    ray = nccl | {"cluster": "ray", "cluster.trainer.gpus": 1, "cluster.explorers.gpus": 1}
    load("frozen_lake", ray)
    for one in ("trainer", "explorers"):
        with pytest.raises(ValueError, match=rf"cluster\.{one}\.gpus=0.*it is between GPUs"):
            load("frozen_lake", ray | {f"cluster.{one}.gpus": 0})
