"""Which GPU serves whom, on machines that have as many as a test says."""

import asyncio
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from flash.config import load
from flash.evaluate import evaluate, plan
from flash.explorer.explore import Options, _play_for
from flash.explorer.player import Player
from flash.hub.pool import ProcessPool
from flash.parts import devices
from flash.parts.devices import check_cards, check_devices, lay_out
from flash.parts.workers import open_hub
from flash.system import machine
from flash.system.machine import Card, card_of
from flash.train import train
from flash.trainer.checkpoint import write_state
from flash.types import Weights
from flash.warm_start.small_policy import create

BILLION = 10**9
H100 = Card(0, "GPU-1", "NVIDIA H100", 80 * BILLION, (9, 0))
V100 = Card(0, "GPU-2", "Tesla V100", 32 * BILLION, (7, 0))
SERVERS = {"engine.kind": "vllm", "policy.heads": 4, "policy.hidden_size": 128}
COLOCATED = SERVERS | {"engine.colocated": True}


@pytest.fixture(autouse=True)
def has_vllm(monkeypatch):
    for place in ("system.machine", "parts.workers"):
        monkeypatch.setattr(f"flash.{place}.has_vllm", lambda: True)


def run_of(**changes: Any) -> Any:
    return load("frozen_lake", changes)


@pytest.mark.parametrize(
    ("changes", "gpus", "how", "lines"),
    [
        (SERVERS | {"trainer.ranks": 2, "engine.workers": 2, "engine.tensor_parallel": 2},
         [0, 1, 2, 3, 4, 5, 6, 7], {},
         ["GPU 0: trainer rank 0", "GPU 1: trainer rank 1", "GPU 2, 3: worker 0",
          "GPU 4, 5: worker 1", "GPU 6, 7: idle (engine.workers may be more)"]),
        ({"engine.workers": 2}, ["GPU-8932f937"], {},
         ["GPU GPU-8932f937: trainer rank 0, worker 0, worker 1"]),
        (SERVERS | {"engine.devices": [2, 0]}, [0, 1, 2], {},
         ["GPU 0: trainer rank 0", "GPU 1: idle (engine.workers may be more)", "GPU 2: worker 0"]),
        (COLOCATED | {"trainer.ranks": 2, "engine.tensor_parallel": 2}, [4, 5], {},
         ["GPU 4: trainer rank 0, worker 0", "GPU 5: trainer rank 1, worker 0"]),
        ({"trainer.ranks": 2}, [0, 1, 2, 3], {"trains": False},
         ["GPU 2: worker 0", "GPU 3: idle (engine.workers may be more)"]),
        ({"trainer.ranks": 2, "engine.urls": "http://a:1"}, [0], {"nodes": 2},
         ["GPU 0: trainer rank 0"]),
    ],
)  # fmt: skip
def test_each_gpu_is_told_with_whom_it_serves(changes, gpus, how, lines):
    assert lay_out(run_of(**changes), gpus, **how).lines() == lines


@pytest.mark.parametrize(
    "changes",
    [
        SERVERS | {"trainer.ranks": 2, "engine.workers": 2, "engine.tensor_parallel": 2},
        SERVERS | {"engine.workers": 3, "engine.tensor_parallel": 2, "engine.devices": [6, 5]},
        COLOCATED | {"trainer.ranks": 4, "engine.workers": 2, "engine.tensor_parallel": 2},
        {"engine.kind": "embedded", "trainer.ranks": 5, "engine.workers": 4},
    ],
)
async def test_workers_see_the_gpus_that_were_laid_out_for_them(changes, tmp_path, monkeypatch):
    present, config = [*range(7)], run_of(**changes)
    monkeypatch.setattr("flash.parts.workers.gpus", lambda: present)
    seen: list[str] = []

    async def start(pool: Any, *_: Any) -> list[Any]:
        seen.extend(
            pool._environment(number)["CUDA_VISIBLE_DEVICES"]
            for number in range(config.engine.workers)
        )
        return []

    async def weights() -> Weights:
        return Weights(version=0, path=tmp_path)

    monkeypatch.setattr(ProcessPool, "start", start)
    async with open_hub(
        config, model="m", version=0, weights=weights, log_dir=tmp_path, say=print,
        make_room=(lambda: asyncio.sleep(0)) if config.engine.colocated else None,
    ):  # fmt: skip
        pass
    assert seen == [",".join(map(str, own)) for own in lay_out(config, present).workers]


@pytest.mark.parametrize(
    ("changes", "cards", "billions", "why"),
    [
        (SERVERS, [H100, V100], 1,
         "engine.dtype=auto: GPU 1 (Tesla V100, compute capability 7.0) has no bfloat16: use "
         "engine.dtype=float32, or other GPUs (engine.devices)"),
        (SERVERS | {"trainer.ranks": 8, "engine.gpu_memory": 0.9}, [H100] * 9, 37,
         "engine.tensor_parallel=1: the model's 37.00 billion parameters are 74.0 GB on each GPU "
         "of a server, more than engine.gpu_memory=0.9 of the 80.0 GB of GPU 8: raise one of the "
         "two"),
        (SERVERS | {"trainer.ranks": 8, "engine.dtype": "float32"}, [H100] * 9, 11,
         "engine.tensor_parallel=1: the model's 11.00 billion parameters are 44.0 GB on each"),
        (SERVERS | {"engine.workers": 3}, [None, None],  1,
         "engine.workers=3 with engine.gpu_memory=0.5: GPU 1 would have 3 servers with that share "
         "each: start fewer, lower the share, or name more GPUs (engine.devices)"),
        ({"engine.kind": "embedded"}, [H100, H100], 6,
         "trainer.ranks=1: a rank takes 96.0 GB at least for a model of 6.00 billion parameters, "
         "and GPU 0 has 80.0 GB: raise trainer.ranks, train adapters (trainer.lora.rank=16), "
         "or use a smaller model"),
        (SERVERS | {"trainer.ranks": 4, "trainer.shard_size": 2}, [H100] * 5, 11,
         "trainer.shard_size=2: a rank takes 88.0 GB at least"),
        (SERVERS | {"trainer.advantages": "gae"}, [H100, H100], 3, "a rank takes 96.0 GB at least"),
        (SERVERS, [H100], 3,
         "trainer.ranks=1: a rank takes 48.0 GB at least for a model of 3.00 billion parameters, "
         "and GPU 0 has 40.0 GB beside engine.gpu_memory=0.5: raise trainer.ranks, lower "
         "engine.gpu_memory, train adapters"),
        (COLOCATED, [H100], 6, "a rank takes 96.0 GB at least"),
        (COLOCATED | {"trainer.lora.rank": 4, "trainer.dtype": "float32"}, [H100], 16,
         "has 40.0 GB beside engine.gpu_memory=0.5: raise trainer.ranks, lower engine.gpu_memory, "
         "or use a smaller model"),
        (COLOCATED | {"engine.gpu_memory": 0.9}, [H100], 4,
         "a rank takes 16.0 GB at least for a model of 4.00 billion parameters, and GPU 0 has "
         "8.0 GB beside engine.gpu_memory=0.9: raise"),
    ],
)  # fmt: skip
def test_a_gpu_that_is_too_small_or_too_old_is_refused(changes, cards, billions, why):
    with pytest.raises(ValueError) as caught:
        checked(changes, cards, billions)
    assert why in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "cards", "billions"),
    [
        (SERVERS | {"engine.dtype": "float32"}, [V100, V100], 1),
        (SERVERS | {"engine.vllm_args": "--dtype=half"}, [V100, V100], 1),
        ({"engine.kind": "embedded"}, [V100, V100], 1),
        (SERVERS, [V100, H100], 1),  # the trainer makes do
        (SERVERS | {"trainer.ranks": 8, "engine.tensor_parallel": 2, "engine.workers": 1},
         [H100] * 10, 30),
        (SERVERS | {"trainer.ranks": 8, "engine.vllm_args": "--quantization fp8"},
         [H100] * 9, 39),
        (SERVERS | {"trainer.ranks": 8, "engine.vllm_args": "--cpu-offload-gb=40"}, [H100] * 9, 39),
        (SERVERS | {"engine.workers": 2}, [None, None], 10**6),  # nothing is known of these
        (SERVERS | {"trainer.lora.rank": 4}, [H100, H100], 19),
        (COLOCATED, [H100], 4),
        (COLOCATED | {"trainer.lora.rank": 4}, [H100], 16),  # in half once they are loaded
        (SERVERS, [Card(0, "GPU-3", "NVIDIA GB10", None, (12, 1))] * 2, 10**6),
    ],
)  # fmt: skip
def test_what_may_fit_is_taken(changes, cards, billions):
    checked(changes, cards, billions)


def checked(changes: dict[str, Any], cards: list[Card | None], billions: int) -> None:
    config = run_of(**changes)
    check_cards(
        config,
        lay_out(config, [*range(len(cards))]),
        {gpu: card for gpu, card in enumerate(cards) if card is not None},
        parameters=billions * BILLION,
        vllm=True,
    )


@pytest.mark.parametrize(
    ("changes", "gigabytes", "nodes", "why"),
    [
        ({}, 16, 1, None),
        ({}, 15, 1,
         "trainer.ranks=1: a model of 1.00 billion parameters takes 16.0 GB at least to be trained "
         "by the ranks that are on this machine, which has 15.0 GB: use adapters "
         "(trainer.lora.rank=16) or a smaller model"),
        ({"trainer.ranks": 4}, 15, 1, "takes 16.0 GB at least"),
        ({"trainer.ranks": 4}, 8, 2, None),
        ({"trainer.advantages": "gae"}, 31, 1, "takes 32.0 GB at least"),
        ({"trainer.lora.rank": 4}, 4, 1, None),
        ({"trainer.lora.rank": 4}, 3, 1, "which has 3.0 GB: use a smaller model"),
    ],
)  # fmt: skip
async def test_a_machine_without_gpus_has_the_memory_that_its_ranks_keep(
    changes, gigabytes, nodes, why, monkeypatch
):
    async def parameters(_: str) -> int:
        return BILLION

    has = replace(machine.capacity(), memory_bytes=gigabytes * 10**9)
    monkeypatch.setattr(machine, "gpus", list)
    monkeypatch.setattr(machine, "capacity", lambda: has)
    monkeypatch.setattr(devices, "parameters_of", parameters)
    if why is None:
        await check_devices(run_of(**changes), "m", say=print, nodes=nodes)
        return
    with pytest.raises(ValueError) as caught:
        await check_devices(run_of(**changes), "m", say=print, nodes=nodes)
    assert why in str(caught.value)
    await check_devices(run_of(**changes), "m", say=print, trains=False)


@pytest.mark.parametrize(
    ("gpu", "second", "order", "found"),
    [
        (0, H100, None, 0),
        (1, H100, None, 1),
        (1, V100, None, None),  # CUDA would number them by their speed
        (1, V100, "PCI_BUS_ID", 1),
        ("GPU-89", V100, None, 1),
        ("MIG-41b3359c", H100, None, None),
        (2, H100, None, None),
    ],
)
def test_a_gpu_is_known_by_the_name_that_cuda_gives_it(gpu, second, order, found, monkeypatch):
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    if order is not None:
        monkeypatch.setenv("CUDA_DEVICE_ORDER", order)
    of_second = Card(1, "GPU-8932f937", second.name, second.memory_bytes, second.capability)
    card = card_of(gpu, [H100, of_second])
    assert (None if card is None else card.number) == found


@pytest.fixture
def too_small(tmp_path, monkeypatch):
    """The only GPU of this machine."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 0, GPU-1, Tiny, 0, 9.0\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr("flash.system.machine.gpus", lambda: [0])


def small_model(folder: Path) -> str:
    return str(create(folder, [f"w{n}" for n in range(300)], layers=1, hidden_size=32, heads=2))


@pytest.mark.slow
@pytest.mark.usefixtures("too_small")
async def test_a_run_tells_who_has_which_gpu_and_starts_nothing_on_one_that_is_too_small(
    tmp_path, capsys
):
    changes = {"model": small_model(tmp_path / "m"), "runs_dir": str(tmp_path / "runs")}
    with pytest.raises(
        ValueError, match=r"^trainer\.ranks=1: a rank takes .* GPU 0 has 0\.0 GB: raise"
    ):
        await train(run_of(**{"engine.kind": "embedded", **changes}), stop=asyncio.Event())
    assert "GPU 0: trainer rank 0, worker 0" in capsys.readouterr().out
    assert [path.name for path in tmp_path.glob("runs/*/logs/*")] == ["controller.log"]


@pytest.mark.slow
@pytest.mark.usefixtures("too_small")
async def test_an_evaluation_has_no_ranks_and_starts_no_server_on_a_gpu_that_is_too_small(tmp_path):
    checkpoint = tmp_path / "r" / "checkpoints" / "step_000001"
    changes = {"model": small_model(checkpoint / "model"), "runs_dir": str(tmp_path)}
    weights = load_file(checkpoint / "model" / "model.safetensors")
    state = {"weights": {f"model.{name}": tensor for name, tensor in weights.items()}}
    with warnings.catch_warnings(action="ignore"):  # that there are no ranks
        save(state, storage_writer=FileSystemWriter(checkpoint / "policy"), no_dist=True)
    write_state(checkpoint, 1)
    settings = run_of(**SERVERS, **changes).model_dump(mode="json")
    (tmp_path / "r" / "config.yaml").write_text(yaml.safe_dump(settings))
    said: list[str] = []
    with pytest.raises(
        ValueError, match=r"^engine\.tensor_parallel=1: the model's .* of GPU 0: rai"
    ):
        await evaluate(plan(str(checkpoint), {}), said.append)
    assert said == ["GPU 0: worker 0"]


@pytest.mark.slow
@pytest.mark.usefixtures("too_small")
async def test_an_explorer_starts_no_server_on_a_gpu_that_is_too_small(tmp_path):
    model = small_model(tmp_path / "m")
    config = run_of(**SERVERS, model=model, **{"explorers.expected": 1}).model_dump(mode="json")
    welcome: Any = SimpleNamespace(config=config, where="elsewhere", version=0)
    nowhere: Any = None
    said: list[str] = []
    with pytest.raises(ValueError, match=r"^engine\.tensor_parallel=1: the model's .* of GPU 0"):
        await _play_for(
            Options(source="", overrides={}), welcome, model, nowhere, Player(nowhere), tmp_path,
            asyncio.Event(), said.append, None,
        )  # fmt: skip
    assert said == ["GPU 0: worker 0"]
