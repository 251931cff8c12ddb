"""What a machine can't hold is refused before anything starts; what it can is not."""

import pytest

from flash.config import check_capacity, load, presets
from flash.system.machine import Capacity, capacity, how_to_install

SMALL = Capacity(cores=2, memory_bytes=8 << 30, gpus=(), open_files=1024)
NODE = Capacity(cores=96, memory_bytes=1 << 40, gpus=range(8), open_files=1 << 20)


@pytest.mark.parametrize("preset", sorted(set(presets()) - {"gsm8k", "code"}))
def test_every_preset_fits_a_small_machine(preset):
    check_capacity(load(preset), SMALL)


def test_what_a_small_machine_may_be_asked_for_is_not_refused():
    several = {"engine.workers": 4, "trainer.ranks": 2, "env.hosts": 32, "engine.threads": 2}
    check_capacity(load("alfworld", {**several, "batch_size": 1024, "alpha": 4}), SMALL)


def test_a_node_holds_what_a_small_machine_does_not():
    config = load("frozen_lake", {"engine.workers": 64, "trainer.ranks": 8, "env.hosts": 2000})
    check_capacity(config, NODE)
    with pytest.raises(ValueError, match=r"^engine\.workers=64: this machine \(2 cores, 8\.6 GB"):
        check_capacity(config, SMALL)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine.workers": 17}, "engine.workers=17: this machine (2 cores, 8.6 GB of memory, no "
         "GPUs) is enough for 16: take no more"),
        ({"trainer.ranks": 64}, "trainer.ranks=64: this machine (2 cores"),
        ({"env.hosts": 1_000_000}, "env.hosts=1000000: this machine (2 cores"),
        ({"reward": {"name": "process", "run": "math:sqrt", "concurrency": 5000}},
         "reward.concurrency=5000: this machine (2 cores"),
        ({"engine.threads": 100}, "engine.threads=100: this machine"),
        ({"trainer.threads": 100}, "trainer.threads=100: this machine"),
        ({"engine.devices": [0]}, "engine.devices=[0]: this machine (2 cores, 8.6 GB of memory, "
         "no GPUs) shows no GPU [0]: name others, or leave it out"),
        ({"batch_size": 1 << 20}, "batch_size=1048576 samples of up to agent.max_sequence_tokens="
         "512 need 19.3 GB of memory, more than this machine"),
        ({"alpha": 1e6}, "batch_size=64 with alpha=1e+06, rollout.redundant_groups=0 and"),
        ({"rollout.redundant_groups": 1 << 20}, "rollout.redundant_groups=1048576 and"),
        ({"rollout.redundant_episodes": 1 << 20}, "rollout.redundant_episodes=1048576 need"),
        ({"eval.tasks": 10**9}, "eval.tasks=1000000000 with eval.samples=1 need 1,000.0 GB"),
        ({"policy.hidden_size": 1 << 16}, "policy.layers=2 with policy.hidden_size=65536 need"),
        ({"warm_start.demonstrations": 10**9}, "warm_start.demonstrations=1000000000 need"),
        ({"engine.cache_tokens": 10**9}, "engine.cache_tokens=1000000000 with engine.workers=1"),
        ({"engine.max_running": 10**6}, "engine.max_running=1000000 with engine.workers=1 need"),
        ({"engine.max_running": 5000, "batch_size": 4096},
         "engine.max_running=5000 with batch_size=4096 is 5000 connections at a time, and this "
         "machine allows a process 1024 open files: lower one of them, or allow more (ulimit -Hn)"),
    ],
)  # fmt: skip
def test_a_size_that_a_machine_can_not_hold_is_refused_with_what_it_has(changes, message):
    with pytest.raises(ValueError) as caught:
        check_capacity(load("frozen_lake", changes), SMALL)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ranks_have_a_gpu_each_where_there_are_gpus():
    with pytest.raises(ValueError, match=r"trainer\.ranks=9: each takes a GPU"):
        check_capacity(load("frozen_lake", {"trainer.ranks": 9}), NODE)
    check_capacity(load("frozen_lake", {"trainer.ranks": 16}), NODE, nodes=2)


def test_a_server_has_as_many_gpus_as_the_trainer_leaves(monkeypatch):
    monkeypatch.setattr("flash.system.machine.has_vllm", lambda: True)
    monkeypatch.setattr("flash.system.machine.gpus", lambda: [*NODE.gpus])
    servers = {"engine.kind": "vllm", "engine.tensor_parallel": 4, "policy.heads": 4}
    check_capacity(load("frozen_lake", servers | {"trainer.ranks": 4}), NODE)
    with pytest.raises(ValueError, match=r"parallel=4 exceeds the 3 GPUs that the servers may use"):
        check_capacity(load("frozen_lake", servers | {"trainer.ranks": 5}), NODE)
    there = {"trainer.ranks": 5, "engine.devices": [0, 1, 2, 3]}
    check_capacity(load("frozen_lake", servers | there), NODE)


def test_embedded_workers_are_not_taken_in_the_place_of_servers_of_several_gpus(monkeypatch):
    for vllm, machine in ((True, SMALL), (False, NODE)):
        monkeypatch.setattr("flash.config.capacity.has_vllm", lambda vllm=vllm: vllm)
        with pytest.raises(ValueError, match=r"with engine\.kind=auto, which means embedded work"):
            check_capacity(load("frozen_lake", {"engine.tensor_parallel": 2}), machine)


def test_an_evaluation_starts_no_ranks_and_keeps_no_batch():
    large = load("frozen_lake", {"trainer.ranks": 64, "batch_size": 1 << 20})
    check_capacity(large, SMALL, trains=False)


def test_workers_that_run_already_take_nothing_here():
    urls = [f"http://host{number}:8000" for number in range(64)]
    check_capacity(load("frozen_lake", {"engine.urls": urls, "engine.max_running": 8}), SMALL)


def test_a_containers_memory_is_what_it_may_use(tmp_path):
    limit = tmp_path / "memory.max"
    whole = capacity(limit).memory_bytes
    limit.write_text("1048576\n")
    assert capacity(limit).memory_bytes == 1048576
    limit.write_text("max\n")
    assert capacity(limit).memory_bytes == whole


def test_what_to_install_is_said_for_a_clone_and_for_an_installed_package(tmp_path):
    assert how_to_install("vllm", clone=tmp_path) == "`pip install vllm`"
    assert how_to_install("alfworld", clone=tmp_path) == "`pip install 'flash-rl[alfworld]'`"
    (tmp_path / "Makefile").touch()
    assert how_to_install("vllm", clone=tmp_path) == "`make setup-vllm`"
    assert how_to_install("alfworld", clone=tmp_path) == "`make setup`"
    assert how_to_install("sglang", clone=tmp_path) == "`pip install sglang`"
