"""docs/coming-from.md says of keys what their rules say."""

import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from flash.config import fields
from flash.convert.conversion import SYSTEMS
from flash.convert.rules import Becomes

PAGE = (Path(__file__).parents[2] / "docs/coming-from.md").read_text(encoding="utf-8")


def rows(title: str) -> list[tuple[list[str], list[str]]]:
    """The keys and fields of each row in the table of a system's section."""
    section = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    lines = re.findall(r"^\| (`.+?) \| (.+?) \|", section, re.MULTILINE)
    return [(re.findall("`(.+?)`", keys), re.findall("`(.+?)`", here)) for keys, here in lines]


@pytest.mark.parametrize("system", SYSTEMS.values(), ids=SYSTEMS)
def test_each_system_has_a_table_whose_keys_become_the_fields_beside_them(system):
    assert len(rows(system.title)) >= 5
    for keys, here in rows(system.title):
        found = [rule_of(system, key) for key in keys]
        told = {name for rule in found if isinstance(rule, Becomes) for name in rule.fields}
        assert set(here) <= told, keys
        assert bool(here) == bool(told), keys


def test_every_name_on_the_page_is_a_field_or_a_key_of_a_system():
    ours = {name for name, _ in fields()}
    sections = "|".join({name.split(".")[0] for name in ours if "." in name})
    named = re.findall(rf"`((?:{sections})\.[a-z_.]+)", PAGE)
    assert len(named) > 50
    patterns = [pattern for system in SYSTEMS.values() for pattern in system.rules]
    for name in named:
        is_theirs = any(fnmatchcase(name, pattern) for pattern in patterns)
        assert name in ours or is_theirs or name.startswith("env.options."), name


def rule_of(system, key):
    pattern = next((pattern for pattern in system.rules if fnmatchcase(key, pattern)), None)
    assert pattern, f"{key} is no key of {system.title}"
    return system.rules[pattern]
