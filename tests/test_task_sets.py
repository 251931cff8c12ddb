"""Task sets in a configuration: what a set says is its own, and what it does not is the run's."""

import pytest
import yaml

from flash.config import check_capacity, load
from flash.config.resumed import differences, groups_begin_anew
from flash.config.task_sets import groups_of_sets
from flash.config.task_source import changed_source, source_of
from flash.system.machine import Capacity

SETS = {
    "task_sets.small.weight": 3,
    "task_sets.large.env.name": "frozen_lake",
    "task_sets.large.env.options.size": 5,
    "task_sets.large.group_size": 4,
    "task_sets.large.filters": "equal_rewards",
    "task_sets.large.reward": "judge",
    "task_sets.large.agent.max_turns": 9,
}


def lakes(**changes):
    return load("frozen_lake", {**SETS, **changes})


def test_a_set_is_a_run_of_its_own_with_its_part_of_the_batch():
    sets = lakes().sets
    small, large = sets["small"], sets["large"]
    assert list(sets) == ["small", "large"]
    assert (small.batch_size, small.group_size) == (48, 8)
    assert (large.batch_size, large.group_size) == (16, 4)
    assert (small.env.options["size"], large.env.options["size"]) == (4, 5)
    assert (small.agent.max_turns, large.agent.max_turns) == (None, 9)
    assert (small.reward.name, large.reward.name) == ("env", "judge")
    assert (small.rollout.filters, large.rollout.filters) == ((), ("equal_rewards",))


def test_what_a_set_does_not_say_is_the_runs_whatever_that_is():
    sets = lakes(**{"agent.temperature": 0.7, "rollout.filters": "equal_rewards"}).sets
    assert {of_set.agent.temperature for of_set in sets.values()} == {0.7}
    assert sets["small"].rollout.filters == ("equal_rewards",)
    own = lakes(**{"rollout.filters": "equal_rewards", "task_sets.large.filters": []}).sets
    assert own["large"].rollout.filters == ()
    assert own["small"].rollout.filters == ("equal_rewards",)


def test_a_run_without_sets_is_one_set_without_a_name():
    config = load("frozen_lake")
    assert config.sets == {"": config}


def test_a_configuration_is_kept_as_it_was_given(tmp_path):
    config = lakes(**{"task_sets.small.agent.max_turns": None})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    kept = yaml.safe_load(path.read_text())["task_sets"]
    assert kept["small"] == {"weight": 3.0, "agent": {"max_turns": None}}
    assert kept["large"]["agent"] == {"max_turns": 9}
    again = load(str(path))
    assert again == config
    assert list(again.sets) == ["small", "large"], "in the same order"
    assert load(str(path), {"agent.temperature": 0.5}).sets["large"].agent.temperature == 0.5


@pytest.mark.parametrize(
    ("batch_size", "weights", "sizes", "groups"),
    [
        (64, [1, 1], [8, 8], [4, 4]),
        (64, [3, 1], [8, 4], [6, 4]),
        (30, [0.1, 0.2], [5, 4], [2, 5]),
        (7, [2, 5], [2, 5], [1, 1]),
        (24, [1, 1, 2], [2, 3, 6], [3, 2, 2]),
    ],
)
def test_weights_are_shares_of_the_samples_in_whole_groups(batch_size, weights, sizes, groups):
    names = "abc"
    of_weights = dict(zip(names, weights, strict=False))
    found = groups_of_sets(batch_size, of_weights, dict(zip(names, sizes, strict=False)))
    assert list(found.values()) == groups
    assert sum(n * size for n, size in zip(groups, sizes, strict=True)) == batch_size


@pytest.mark.parametrize(
    ("batch_size", "weights", "fits"),
    [
        (64, [2, 1], r"a\.weight=2 of 3 is 5\.333 groups of 8 .* a batch_size of 48 or 72"),
        (8, [1, 1], r"a\.weight=1 of 2 is 0\.5 groups of 8 .* a batch_size of 16, or"),
        (64, [99, 1], r"a\.weight=99 of 100 is 7\.92 groups of 8 .* a batch_size of 800, or"),
    ],
)
def test_what_makes_no_whole_groups_is_refused_with_what_would(batch_size, weights, fits):
    with pytest.raises(ValueError, match=fits):
        groups_of_sets(batch_size, dict(zip("ab", weights, strict=True)), {"a": 8, "b": 8})


def changed(now, before=()):
    was = load("frozen_lake", {**SETS, **dict(before)}).model_dump(mode="json")
    return differences(yaml.safe_load(yaml.safe_dump(was)), lakes(**now))


@pytest.mark.parametrize(
    ("now", "told", "anew"),
    [
        ({}, [], []),
        ({"task_sets.small.weight": 1}, ["task_sets.small.weight 3.0 → 1.0 told"], []),
        (
            {"task_sets.large.agent.max_turns": 5},
            ["task_sets.large.agent.max_turns 9 → 5 told"],
            [],
        ),
        (
            {"task_sets.large.agent.step_timeout_s": 5},
            ["task_sets.large.agent.step_timeout_s null → 5.0 free"],
            [],
        ),
        ({"task_sets.large.filters": []}, ["task_sets.large.filters"], []),
        (
            {"task_sets.large.group_size": 2},
            ["task_sets.large.group_size 4 → 2 told"],
            ["large"],
        ),
        (
            {"task_sets.large.env.options.size": 6},
            ["task_sets.large.env.options.size 5 → 6 fixed"],
            ["large"],
        ),
        ({"task_sets.new.weight": 4}, ["task_sets.new null → {'weight': 4.0} fixed"], ["new"]),
        ({"reward": "judge"}, ["reward"], ["small", "large", "new"]),
    ],
)
def test_a_resume_tells_of_a_sets_fields_as_of_the_runs(now, told, anew):
    found = changed(now)
    assert len(found) == len(told)
    for one, line in zip(found, told, strict=True):
        assert f"{one} {one.kind}".startswith(line)
    names = ("small", "large", "new")
    assert [name for name in names if groups_begin_anew(found, task_set=name)] == anew


def test_what_explorers_bring_is_not_played_here_and_has_its_part_of_the_batch():
    config = load(
        "frozen_lake",
        {
            "task_sets.own.weight": 3, "task_sets.web.brought": True, "env.hosts": 60,
            "model": "org/model", "explorers.expected": 1, "engine.workers": 0,
        },
    )  # fmt: skip
    assert [(name, of_set.batch_size) for name, of_set in config.sets.items()] == [
        ("own", 48),
        ("web", 16),
    ]
    assert [*config.own_sets] == ["own"]
    assert config.brought == {"web"}
    assert "web" not in source_of(config)
    check_capacity(config, Capacity(cores=1, memory_bytes=10**11, open_files=10**5, gpus=()))
    before = config.model_dump(mode="json") | {"task_sets": {"own": {"weight": 3.0}, "web": {}}}
    found = differences(before, config)
    assert [one.field for one in found] == ["task_sets.web.brought"]
    assert groups_begin_anew(found, task_set="web")
    assert not groups_begin_anew(found, task_set="own")


def test_each_sets_tasks_have_a_source():
    one = source_of(lakes())
    weighed = source_of(lakes(**{"task_sets.small.weight": 1}))
    assert not any(changed_source(one, weighed, task_set=name) for name in ("small", "large"))
    other = source_of(lakes(**{"task_sets.large.env.options.size": 6}))
    said = "task_sets.large.env.options.size 5 → 6"
    assert changed_source(one, other, task_set="large") == said
    assert not changed_source(one, other, task_set="small")


def test_the_hosts_of_all_sets_are_counted():
    hosts = {"env.hosts": 60, "task_sets.large.env.hosts": 60}
    machine = Capacity(cores=1, memory_bytes=10**11, open_files=10**5, gpus=())
    check_capacity(lakes(**{"env.hosts": 60}), machine)
    with pytest.raises(ValueError, match=r"env\.hosts=120: .* is enough for 100"):
        check_capacity(lakes(**hosts), machine)
