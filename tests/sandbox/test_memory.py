"""Where control groups are made that limit a sandbox's memory."""

import subprocess
import sys
from pathlib import Path

import pytest

from flash.sandbox.memory import MemoryGroup, parents


def described(tmp_path, own, **groups):
    """Our groups, and what each of version 2 hands down to those below it."""
    (tmp_path / "own").write_text(own)
    for path, controllers in groups.items():
        folder = tmp_path / "root" / path.replace("_", "/")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cgroup.subtree_control").write_text(controllers)
        (folder / "cgroup.procs").touch()
    found = parents(tmp_path / "root", tmp_path / "own")
    return [str(path.relative_to(tmp_path / "root")) for path, _ in found]


def test_of_version_1_it_is_below_our_own(tmp_path):
    own = "4:memory:/jobs/one\n2:cpu,cpuacct:/\n0::/\n"
    assert described(tmp_path, own) == ["memory/jobs/one"]


@pytest.mark.parametrize(
    ("own", "groups", "found"),
    [
        ("0::/app/run\n", {"app": "cpu memory pids", "app_run": ""}, ["app"]),
        ("0::/app/run\n", {"app": "cpu", "app_run": "memory"}, ["app/run"]),
        ("0::/app/run\n", {"app": "cpu", "app_run": ""}, []),
        ("0::/\n", {"": "memory"}, ["."]),
        ("0::/app/run\n", {}, []),
    ],
)
def test_of_version_2_it_is_where_memory_is_handed_down(tmp_path, own, groups, found):
    assert described(tmp_path, own, **groups) == found


def left_behind():
    """The group of a process that has ended."""
    code = (
        "from flash.sandbox.memory import MemoryGroup as M; print(M.make(1 << 20).members.parent)"
    )
    python = [sys.executable, "-c", code]
    return Path(subprocess.run(python, check=True, capture_output=True, text=True).stdout.strip())


async def test_groups_that_a_killed_process_left_are_removed():
    group = MemoryGroup.make(1 << 20)
    if group is None:
        pytest.skip("no control group can be made here: run as root, or under systemd")
    left = left_behind()
    assert left.is_dir()
    another = MemoryGroup.make(1 << 20)
    assert not left.exists()
    for made in (group, another):
        assert made.members.is_file()
        await made.remove()
        assert not made.members.parent.exists()
