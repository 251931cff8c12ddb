"""Who may import whom, read from the sources."""

import ast
import configparser
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "vllm", "ray", "transformers"}


def imports(path: Path, *, top_level_only: bool = False):
    """The absolute names that a file imports."""
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def sources(folder: str):
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", sources("flash"), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_engine_imports_no_environment_and_no_agent(path):
    for name in imports(path):
        assert not name.startswith(("envs", "agents", "flash.envs", "flash.agents")), name


@pytest.mark.parametrize("path", sources("flash"), ids=lambda path: str(path.relative_to(ROOT)))
def test_heavy_packages_are_imported_where_they_are_needed_only(path):
    place = path.relative_to(ROOT / "flash").parts[0]
    if place in ("trainer", "worker"):
        return
    heavy = {name.split(".")[0] for name in imports(path, top_level_only=True)} & HEAVY
    assert not heavy
    if path.name not in ("small_policy.py", "assembly.py", "warm_start.py"):
        assert not {name.split(".")[0] for name in imports(path)} & HEAVY


@pytest.mark.parametrize(
    "path", sources("envs") + sources("agents"), ids=lambda path: str(path.relative_to(ROOT))
)
def test_environments_and_agents_know_the_seams_only(path):
    allowed = ("flash.types", "flash.errors", "flash.rollout.episode", "flash.small_policy")
    for name in imports(path):
        if name.split(".")[0] == "flash":
            assert name.startswith(allowed), name
        assert name.split(".")[0] not in ("envs", "agents"), "siblings are imported relatively"


def test_every_entry_point_loads():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for group in ("console_scripts", "flash.envs", "flash.agents", "flash.styles"):
        for line in setup["options.entry_points"][group].strip().splitlines():
            module, _, attribute = line.split("=")[1].strip().partition(":")
            assert hasattr(importlib.import_module(module), attribute)
