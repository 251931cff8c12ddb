"""Which engine samples, and whether GPUs are used, on machines of all kinds."""

import asyncio
import os

import pytest
from transformers import AutoModelForCausalLM

from flash.config import load
from flash.parts.engine import choose_engine, keep_to_quickest_device
from flash.parts.model import parameters_of
from flash.parts.workers import open_hub
from flash.warm_start.small_policy import create

FEW, MANY = 900_000, 500_000_000


@pytest.mark.parametrize(
    ("changes", "devices", "vllm", "parameters", "kind", "why"),
    [
        ({}, [], False, None, "embedded", "because vLLM is not installed (`make setup-vllm`)"),
        ({}, [], True, None, "embedded", "because vLLM has no GPU here"),
        ({}, [0], False, FEW, "embedded", "because vLLM is not installed (`make setup-vllm`)"),
        ({}, [0], True, FEW, "embedded", "because it samples a policy of 0.9 million parameters s"),
        ({}, [0], True, 99_999_999, "embedded", "because it samples a policy of 100.0 million pa"),
        ({}, [0], True, 100_000_000, "vllm", "because it is installed"),
        ({}, [0], True, MANY, "vllm", "because it is installed"),
        ({}, [0], True, None, "vllm", "because it is installed"),
        # What only vLLM has, or is quick in.
        (
            {"engine.vllm_args": "--enforce-eager"},
            [0],
            True,
            FEW,
            "vllm",
            "because it is installed",
        ),
        ({"engine.tensor_parallel": 2}, [0, 1], True, FEW, "vllm", "because it is installed"),
        ({"engine.dtype": "float32"}, [0], True, FEW, "vllm", "because it is installed"),
        # What is asked for by name.
        ({"engine.kind": "vllm"}, [0], True, FEW, "vllm", "as engine.kind says"),
        ({"engine.kind": "vllm"}, [], True, FEW, "vllm", "as engine.kind says"),
        ({"engine.kind": "embedded"}, [0], True, MANY, "embedded", "as engine.kind says"),
        ({"engine.kind": "sglang"}, [0], False, FEW, "sglang", "as engine.kind says"),
    ],
)
def test_small_policies_have_the_engine_that_is_quick_for_them(
    changes, devices, vllm, parameters, kind, why, monkeypatch
):
    monkeypatch.setattr("flash.system.machine.has_vllm", lambda: True)
    monkeypatch.setattr("flash.system.machine.has_sglang", lambda: True)
    engine = load("frozen_lake", changes).engine
    choice = choose_engine(engine, devices=devices, vllm=vllm, parameters=parameters)
    assert choice.kind == kind
    assert choice.why.startswith(why)


async def test_parameters_are_counted_in_the_models_files(tmp_path):
    model = create(tmp_path / "m", ["a", "b"], layers=1, hidden_size=32, seed=0)
    loaded = AutoModelForCausalLM.from_pretrained(model)
    assert await parameters_of(str(model)) == loaded.num_parameters()


async def test_a_run_beside_a_gpu_says_why_its_small_policy_is_not_on_vllm(tmp_path, monkeypatch):
    model = create(tmp_path / "m", ["a", "b"], layers=1, hidden_size=32, seed=0)
    monkeypatch.setattr("flash.parts.workers.gpus", lambda: [0])
    monkeypatch.setattr("flash.parts.workers.has_vllm", lambda: True)
    monkeypatch.setattr(
        "flash.hub.embedded_pool.EmbeddedPool.start", lambda *_: asyncio.sleep(0, [])
    )
    said = []

    async def no_weights():
        raise AssertionError("its own workers need none")

    async with open_hub(
        load("frozen_lake", {}),
        model=str(model),
        version=0,
        weights=no_weights,
        log_dir=tmp_path,
        say=said.append,
    ):
        pass
    (line,) = said
    assert line.startswith(
        "engine: 1 embedded worker on GPU 0, because it samples a policy of 0.0 "
    )


OLD = "device: the CPU, which is quicker for a small policy than a GPU of compute capability 7.5 "


@pytest.mark.parametrize(
    ("changes", "gpus", "capability", "told"),
    [
        ({}, [0], (7, 5), OLD),
        ({"engine.kind": "embedded"}, [0, 1], (7, 5), OLD),
        ({}, [0], (8, 0), ""),
        ({}, [0], (9, 0), ""),
        ({}, [0], None, ""),  # it does not tell
        ({}, [], (7, 5), ""),
        # Where a GPU is meant.
        ({"model": "org/model"}, [0], (7, 5), ""),
        ({"engine.devices": "0"}, [0], (7, 5), ""),
        ({"engine.kind": "vllm"}, [0], (7, 5), ""),
        ({"engine.kind": "sglang"}, [0], (7, 5), ""),
        ({"engine.urls": "http://127.0.0.1:1"}, [0], (7, 5), ""),
        ({"trainer.ranks": 2}, [0, 1], (7, 5), ""),
        ({"trainer.dtype": "float32", "engine.dtype": "float32"}, [0], (7, 5), ""),
        ({"explorers.expected": 1}, [0], (7, 5), ""),
    ],
)
def test_a_small_policy_leaves_a_gpu_that_is_slower_than_the_cpu(
    changes, gpus, capability, told, monkeypatch
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr("flash.system.machine.has_vllm", lambda: True)
    monkeypatch.setattr("flash.system.machine.has_sglang", lambda: True)
    monkeypatch.setattr("flash.system.machine.gpus", lambda: gpus)
    monkeypatch.setattr("flash.system.machine.compute_capability", lambda: capability)
    said = keep_to_quickest_device(load("frozen_lake", changes))
    assert said.startswith(told)
    assert bool(said) == bool(told)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ("" if told else "0,1")
