"""The tables of the systems: what they map to is there, what they do not map says why."""

from fnmatch import fnmatchcase

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flash.config import fields, parse
from flash.convert.conversion import OUTCOMES, SYSTEMS, convert, recognised
from flash.convert.rules import Becomes, Depends
from flash.convert.source import Source

FIELDS = {name for name, _ in fields()}
KEYS = {name: sorted({key.replace("*", "x") for key in SYSTEMS[name].rules}) for name in SYSTEMS}
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 3000),
    st.floats(),
    st.sampled_from(
        ["grpo", "gae", "vllm", "none", "token-mean", "bf16", "list(range(0,4))", "gspo", "$X", "a"]
    ),
    st.lists(st.sampled_from(["FrozenLake", "Other", 4]), max_size=3),
    st.just({}),
)


@pytest.mark.parametrize("name", SYSTEMS)
def test_what_a_key_becomes_is_a_field_and_what_it_does_not_become_has_a_reason(name):
    for pattern, rule in SYSTEMS[name].rules.items():
        if isinstance(rule, Becomes):
            assert set(rule.fields) <= FIELDS, pattern
            assert rule.unit, pattern
        elif isinstance(rule, Depends):
            assert all((rule.neutral, rule.why, rule.otherwise)), pattern
        else:
            assert rule.why, pattern


@pytest.mark.parametrize("name", ["roll", "trinity", "verl"])  # whose own come before verl's
def test_no_rule_stands_behind_one_that_takes_all_of_its_keys(name):
    patterns = list(SYSTEMS[name].rules)
    for place, pattern in enumerate(patterns):
        key = pattern.replace("*", "x")
        first = next(one for one in patterns if fnmatchcase(key, one))
        assert patterns.index(first) == place, f"{pattern} is behind {first}"


def test_what_is_set_without_a_key_is_a_field_and_has_a_reason():
    for system in SYSTEMS.values():
        for default in system.defaults:
            assert default.field in FIELDS
            assert default.why


def test_a_system_is_told_by_any_key_that_only_it_has():
    for system in SYSTEMS.values():
        for sign in system.signs:
            assert recognised(Source({sign.replace("*", "x"): 1})) is system


@pytest.mark.parametrize("name", SYSTEMS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_whatever_keys_hold_each_is_told_once_and_the_result_loads(name, data):
    keys = st.sampled_from([*KEYS[name], "of.nobody"])
    leaves = data.draw(st.dictionaries(keys, VALUES, max_size=40))
    converted = convert(Source(leaves), SYSTEMS[name], name="run")
    parse(converted.nested())
    assert [row.key for row in converted.rows] == list(leaves)
    for row in converted.rows:
        assert row.outcome in OUTCOMES
        assert row.note
        assert bool(row.fields) == (row.outcome == "mapped")
        assert (row.outcome == "unknown") == (row.key == "of.nobody")
    assert sum(converted.counts().values()) == len(leaves)
