"""The configuration: what is accepted, and one clear line for each mistake."""

import pytest

from flash.config import fields, load, parse, presets


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
    assert (config.engine.kind, config.engine.max_running) == ("embedded", 12)
    assert parse({"env": "frozen_lake", "engine": "auto"}).engine.kind == "auto"


def test_async_generation_ratio_is_another_name_for_alpha():
    assert parse({"env": "frozen_lake", "async_generation_ratio": 2}).alpha == 2
    assert load("frozen_lake", {"async_generation_ratio": 3}).alpha == 3
    with pytest.raises(ValueError, match="alpha=1 and async_generation_ratio=2 are two names"):
        parse({"env": "frozen_lake", "alpha": 1, "async_generation_ratio": 2})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_sise": 3}, "batch_sise is no field: did you mean batch_size?"),
        ({"trainer": {"lerning_rate": 1}}, "did you mean trainer.learning_rate?"),
        ({"clip_low": 0.1}, "clip_low is no field: did you mean trainer.clip_low?"),
        ({"steps": "many"}, "steps='many': must be a valid integer"),
        ({"batch_size": 10, "group_size": 4}, "batch_size=10 is not divisible by group_size=4"),
        ({"group_size": 1}, "use 2 or more"),
        ({"alpha": -1}, "alpha=-1: must be a number of at least 0"),
        ({"alpha": float("nan")}, "alpha=nan: must be a number of at least 0"),
        ({"alpha": float("inf")}, "alpha=inf: must be a number of at least 0"),
        ({"model": "./not/there"}, "model='./not/there': there is no such directory"),
        ({"env": "alfwurld"}, "env.name='alfwurld' is not registered; there are alfworld,"),
        ({"env": "nowhere:Env"}, "env.name='nowhere:Env' can't be imported"),
        ({"agent": {"style": "chatty"}}, "agent.style='chatty' is not registered; there are chat,"),
        ({"engine": "urls"}, "engine.kind=urls needs engine.urls"),
        ({"engine": "warp"}, "engine.kind='warp': must be 'auto'"),
        ({"engine": {"cache_tokens": 100}}, "engine.cache_tokens=100 can't hold one episode"),
        ({"trainer": {"mini_batches": 99}}, "trainer.mini_batches=99 exceeds batch_size=64"),
    ],
)
def test_a_mistake_is_one_line_with_field_value_and_remedy(settings, message):
    with pytest.raises(ValueError) as caught:
        parse({"env": "frozen_lake", **settings})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_environment_is_asked_for():
    with pytest.raises(ValueError, match="env is missing"):
        parse({})


def test_a_source_that_is_no_preset_and_no_file_lists_the_presets(tmp_path):
    with pytest.raises(ValueError, match=r"neither a preset \(alfworld, frozen_lake, reasoning"):
        load("alfred")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1")
    with pytest.raises(ValueError, match="is not YAML"):
        load(str(broken))
    broken.write_text("- a\n- b")
    with pytest.raises(ValueError, match="must hold a mapping"):
        load(str(broken))


def test_every_field_says_what_it_is():
    for name, info in fields():
        is_section = hasattr(info.annotation, "model_fields")
        assert info.description or is_section, name
