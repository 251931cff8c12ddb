"""Who may import whom, read from the sources."""

import ast
import configparser
import graphlib
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import flash

ROOT = Path(__file__).parents[1]
HEAVY = {"torch", "vllm", "sglang", "ray", "transformers"}
INSIDE_FUNCTIONS = {
    "system": {"transformers"},
    "conversation.py": {"transformers"},
    "parts": {"transformers"},
    "door": {"transformers"},
    "fakes": {"torch"},
    "tools": {"transformers", "vllm"},
    "warm_start": {"torch", "transformers"},
}
# What is on it; nothing else imports these before they are asked for.
USE_RAY = {ROOT / "flash" / "cluster" / name for name in ("launch.py", "remote.py")}


def imports(path: Path, *, top_level_only: bool = False):
    """The absolute names that a file imports."""
    tree = ast.parse(path.read_text())
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def packages(path: Path, *, top_level_only: bool = False) -> set[str]:
    return {name.split(".")[0] for name in imports(path, top_level_only=top_level_only)}


def sources(folder: str):
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", sources("flash"), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_engine_imports_no_environment_and_no_agent(path):
    for name in imports(path):
        assert not name.startswith(("envs", "agents", "flash.envs", "flash.agents")), name


@pytest.mark.parametrize("path", sources("flash"), ids=lambda path: str(path.relative_to(ROOT)))
def test_heavy_packages_are_imported_where_they_are_needed_only(path):
    place = path.relative_to(ROOT / "flash").parts[0]
    if place in ("trainer", "worker") or path in USE_RAY:
        return
    assert not packages(path, top_level_only=True) & HEAVY
    assert packages(path) & HEAVY <= INSIDE_FUNCTIONS.get(place, set())


@pytest.mark.parametrize("path", sources("flash"), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_engine_talks_to_vllm_and_sglang_over_http_and_ray_is_known_to_one_file(path):
    # What vLLM's servers are and load, the process that joins them in a NCCL group, and parsers.
    vllms = ("vllm_server.py", "vllm_extension.py", "patch.py", "nccl.py", "vllm_parsers.py")
    of_vllm = {"vllm"} if path.name in vllms else set()
    of_ray = {"ray"} if path in USE_RAY else set()
    assert packages(path) & {"vllm", "sglang", "ray"} <= of_vllm | of_ray


def test_the_one_file_that_knows_ray_is_imported_only_where_it_is_asked_for():
    for path in sources("flash"):
        assert "flash.cluster.launch" not in {*imports(path, top_level_only=True)}, path


@pytest.mark.parametrize(
    "path", sources("envs") + sources("agents"), ids=lambda path: str(path.relative_to(ROOT))
)
def test_environments_and_agents_know_the_seams_only(path):
    allowed = (
        "flash.types", "flash.errors", "flash.rollout.episode",
        "flash.warm_start.small_policy", "flash.conversation", "flash.turn_check",
        "flash.reward.outcome", "flash.answers", "flash.deadline", "flash.tools", "flash.roles",
        "flash.sandbox",
    )  # fmt: skip
    for name in imports(path):
        if name.split(".")[0] == "flash":
            assert any(name == one or name.startswith(f"{one}.") for one in allowed), name
        assert name.split(".")[0] not in ("envs", "agents"), "siblings are imported relatively"


def modules() -> dict[str, Path]:
    """Every module of ours by the name that it has once it is installed."""
    tops = {"flash": "flash", "agents": "flash.agents", "envs": "flash.envs"}
    return {
        ".".join((package, *path.relative_to(ROOT / top).with_suffix("").parts)): path
        for top, package in tops.items()
        for path in sources(top)
    }


def relative_imports(name: str, path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            beside = name.rsplit(".", node.level)[0]
            yield f"{beside}.{node.module}" if node.module else beside


def test_no_module_imports_itself_through_others_not_even_for_types():
    ours = {name.removesuffix(".__init__"): path for name, path in modules().items()}
    graph = {}
    for name, path in ours.items():
        package = f"{name}.__init__" if path.name == "__init__.py" else name
        imported = {*imports(path), *relative_imports(package, path)}
        graph[name] = (imported & ours.keys()) - {name}
    assert sum(map(len, graph.values())) > 500, "it reads them"
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_every_entry_point_loads():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for group in ("console_scripts", "flash.envs", "flash.agents", "flash.styles"):
        for line in setup["options.entry_points"][group].strip().splitlines():
            module, _, attribute = line.split("=")[1].strip().partition(":")
            assert hasattr(importlib.import_module(module), attribute)


def test_importing_the_package_costs_a_child_process_nothing():
    heavy = "{'aiohttp', 'gymnasium', 'numpy', 'pydantic'}"
    code = f"import sys, flash; print(sorted({heavy} & set(sys.modules)))"
    seen = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert seen.stdout.strip() == "[]"


@pytest.mark.parametrize("name", flash.__all__)
def test_every_exported_name_is_there(name):
    assert getattr(flash, name).__name__ == name
    assert name in dir(flash)
    assert importlib.util.find_spec(f"flash.{name}") is None, "a module would take its place"


# What they import from elsewhere is there already, so that a child costs milliseconds.
EACH_FIRST = """
import os
import aiohttp, gymnasium, msgspec, numpy, pydantic, torch
import flash
for name in flash.__all__:
    if not (child := os.fork()):
        getattr(flash, name)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print(name)
"""


@pytest.mark.slow
def test_any_exported_name_can_be_the_first_that_is_asked_for():
    seen = subprocess.run(
        [sys.executable, "-c", EACH_FIRST], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert seen.stdout == "", seen.stderr


def test_a_name_that_is_not_exported_is_an_attribute_error():
    with pytest.raises(AttributeError, match="Flash"):
        _ = flash.Flash
