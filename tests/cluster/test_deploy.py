"""What deploy/ has: it parses, and it starts what tests/cluster/test_ray.py starts."""

import os
import shlex
import subprocess

import yaml

from flash import config as configuration
from flash.cli.words import split_words
from tests.cluster.deployed import DEPLOY, entrypoint

# Stand-ins for a cluster's commands, each of which notes how it was called.
STAND_INS = {
    "scontrol": "printf 'n1\\nn2\\n'",
    "hostname": "echo 10.0.0.1",
    "srun": 'while [[ $1 == --* ]]; do shift; done; "$@"',
    "ray": """
        if [[ $1 == start ]]; then exec sleep 600; fi
        until grep -q '^ray start --head' calls; do sleep 0.05; done""",
    "flash": """
        until (($(grep -c '^ray start' calls) == SLURM_JOB_NUM_NODES)); do sleep 0.05; done
        exit ${FLASH_EXIT:-0}""",
}


def submitted(folder, *arguments: str, **env: str) -> tuple[int, list[list[str]]]:
    """Runs the batch script on nothing but stand-ins: its exit code, and what it called."""
    (folder / "bin").mkdir(exist_ok=True)
    calls = folder / "calls"
    for name, does in STAND_INS.items():
        path = folder / "bin" / name
        noted = f'printf "%s\\n" "$(printf "%q " {name} "$@")" >> {calls}'
        path.write_text(f"#!/usr/bin/env bash\n{noted}\n{does}\n")
        path.chmod(0o755)
    variables = {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "RUNS": str(folder / "runs"),
        "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2", **env,
    }  # fmt: skip
    done = subprocess.run(
        ["bash", str(DEPLOY / "slurm.sbatch"), *arguments], env=variables, cwd=folder, check=False,
        timeout=60,
    )  # fmt: skip
    return done.returncode, [shlex.split(line) for line in calls.read_text().splitlines()]


def called(calls: list[list[str]], name: str) -> list[list[str]]:
    return [call[1:] for call in calls if call[0] == name]


def test_the_batch_script_has_a_head_a_worker_elsewhere_and_the_run(tmp_path):
    code, calls = submitted(tmp_path, "run.yaml", "--steps", "7")
    assert code == 0
    starts = [call for call in called(calls, "ray") if call[0] == "start"]
    assert ["start", "--head", "--node-ip-address=10.0.0.1", "--port=6379", "--block"] in starts
    assert ["start", "--address=10.0.0.1:6379", "--block"] in starts
    assert ["--nodes=1", "--ntasks=1", "--exclude=n1", "--overlap"] in [
        call[:4] for call in called(calls, "srun")
    ]
    (run,) = called(calls, "flash")
    assert run[:2] == ["train", "run.yaml"]
    _, fields = split_words(run[2:])
    assert fields == {
        "cluster": "ray", "name": "run", "runs_dir": str(tmp_path / "runs"),
        "cluster.address": "10.0.0.1:6379", "steps": 7,
    }  # fmt: skip


def test_the_batch_script_ends_as_the_run_does_and_a_job_that_is_requeued_resumes(tmp_path):
    (tmp_path / "runs/run").mkdir(parents=True)
    (tmp_path / "runs/run/log.id").touch()
    code, calls = submitted(tmp_path, "conf/run.yaml", FLASH_EXIT="3")
    assert code == 3
    (run,) = called(calls, "flash")
    assert "--resume" in run


def test_the_rayjob_runs_a_command_of_ours_and_has_what_its_comments_say():
    job = yaml.safe_load((DEPLOY / "rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    flash, train, file, *words = shlex.split(entrypoint())
    assert (flash, train) == ("flash", "train")
    _, fields = split_words(words)
    config = configuration.load("frozen_lake", fields)
    assert config.cluster.kind == "ray"
    shared = {file.split("/")[1], str(config.runs_dir).split("/")[1]}
    spec = job["spec"]["rayClusterSpec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        mounted = {mount["mountPath"][1:] for mount in pod["containers"][0]["volumeMounts"]}
        assert shared <= mounted
        assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == {
            volume["name"] for volume in pod["volumes"]
        }
