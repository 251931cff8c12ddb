"""What GPUs and a model's size make of a worker's and a trainer's times: rooflines.

A decode step reads all weights and the context's keys and values once, and multiplies each weight
with each request's token; a prompt's token only multiplies; training multiplies four times as much
as a forward pass (forward, backward twice as much, and the proximal logprobs). How much of a GPU's
peak is reached is assumed below; a real run (`--calibrate`) knows better.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flash.simulate.scenario import Scenario

_BANDWIDTH_REACHED = 0.7
_DECODE_FLOPS_REACHED = 0.4
_PREFILL_FLOPS_REACHED = 0.5
_TRAIN_FLOPS_REACHED = 0.35
_STEP_OVERHEAD_S = 0.002  # scheduler and kernel launches
_BATCH_OVERHEAD_S = 2.0  # packing, optimizer
_TRANSFER_BYTES_PER_S = 20e9  # of new weights, to each worker
_MEMORY_USED = 0.9
_WEIGHTS_SHARE = 0.5  # of a worker's memory at most, unless told otherwise
_BYTES = 2  # bfloat16


@dataclass(frozen=True, slots=True)
class Gpu:
    """Peaks from the data sheet: dense bfloat16 operations."""

    memory: float
    bytes_per_s: float
    flops: float


GPUS = {
    "a100": Gpu(80e9, 2.04e12, 312e12),
    "h100": Gpu(80e9, 3.35e12, 989e12),
    "h20": Gpu(96e9, 4.0e12, 148e12),
    "h200": Gpu(141e9, 4.8e12, 989e12),
    "b200": Gpu(180e9, 7.7e12, 2250e12),
}


@dataclass(frozen=True, slots=True)
class Model:
    """A dense model: its parameters, and the bytes of a token's keys and values."""

    parameters: float
    kv_bytes: float

    @classmethod
    def parse(cls, text: str) -> "Model":
        """Of `8e9` (parameters; keys and values as in models of that size) or of a directory
        with a config.json. ValueError for anything else."""
        path = Path(text).expanduser() / "config.json"
        if path.is_file():
            try:
                return cls.of(json.loads(path.read_text(encoding="utf-8")), str(path))
            except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
                raise ValueError(
                    f"--model {text}: {path} is no model's configuration ({error}): give the "
                    f"number of parameters"
                ) from error
        try:
            parameters = float(text)
        except ValueError:
            raise ValueError(
                f"--model {text}: give the number of parameters (8e9), or a directory that holds "
                f"a config.json"
            ) from None
        if not 1e6 <= parameters < 1e14:
            raise ValueError(f"--model {text}: give all parameters, not billions of them: 8e9")
        # 128 KiB a token with 8 billion parameters, 320 KiB with 70 billion.
        return cls(parameters, 131_072 * (parameters / 8e9) ** 0.45)

    @classmethod
    def of(cls, config: Mapping[str, Any], source: str) -> "Model":
        """Of a config.json in Hugging Face form."""
        try:
            layers, width = config["num_hidden_layers"], config["hidden_size"]
            heads = config["num_attention_heads"]
            inner, vocabulary = config["intermediate_size"], config["vocab_size"]
        except KeyError as error:
            raise ValueError(f"{source} has no {error}: give the number of parameters") from None
        if config.get("num_experts") or config.get("num_local_experts"):
            raise ValueError(f"{source} has experts: give the number of active parameters")
        head = config.get("head_dim") or width // heads
        kv_heads = config.get("num_key_value_heads") or heads
        attention = 2 * width * heads * head + 2 * width * kv_heads * head
        embeddings = vocabulary * width * (1 if config.get("tie_word_embeddings") else 2)
        parameters = layers * (attention + 3 * width * inner) + embeddings
        return cls(parameters, layers * 2 * kv_heads * head * _BYTES)


def on_hardware(scenario: Scenario, model: str, gpu: str, *, keep: Iterable[str]) -> Scenario:
    """The scenario with the times of that model on that GPU, but for the fields in `keep`."""
    size, peaks = Model.parse(model), GPUS[gpu]
    gpus = scenario.workers.gpus
    if "workers.gpus" not in keep:
        gpus = gpus_of_worker(size, peaks)
    times = {f"workers.{name}": value for name, value in worker_times(size, peaks, gpus).items()}
    times |= {f"trainer.{name}": value for name, value in trainer_times(size, peaks).items()}
    return scenario.changed({name: v for name, v in times.items() if name not in keep})


def gpus_of_worker(model: Model, gpu: Gpu) -> int:
    """The fewest that leave half of their memory to keys and values: a power of 2."""
    gpus = 1
    while model.parameters * _BYTES > _WEIGHTS_SHARE * gpus * gpu.memory:
        gpus *= 2
    return gpus


def worker_times(model: Model, gpu: Gpu, gpus: int) -> dict[str, Any]:
    """The fields of a scenario's `workers`. ValueError if the model does not fit."""
    weights = model.parameters * _BYTES
    room = gpus * gpu.memory * _MEMORY_USED - weights
    if room <= 0:
        raise ValueError(
            f"workers.gpus={gpus}: {weights / 1e9:.0f} GB of weights don't fit into "
            f"{gpus * gpu.memory / 1e9:.0f} GB"
        )
    bandwidth = gpus * gpu.bytes_per_s * _BANDWIDTH_REACHED
    flops = 2 * model.parameters / (gpus * gpu.flops)
    return {
        "gpus": gpus,
        "kv_tokens": int(room / model.kv_bytes),
        "step_s": weights / bandwidth + _STEP_OVERHEAD_S,
        "request_s": flops / _DECODE_FLOPS_REACHED,
        "context_s": model.kv_bytes / bandwidth,
        "prefill_s": flops / _PREFILL_FLOPS_REACHED,
        "load_s": weights / _TRANSFER_BYTES_PER_S,
    }


def trainer_times(model: Model, gpu: Gpu) -> dict[str, Any]:
    """The fields of a scenario's `trainer`."""
    return {
        "batch_s": _BATCH_OVERHEAD_S,
        "token_gpu_s": 8 * model.parameters / (gpu.flops * _TRAIN_FLOPS_REACHED),
    }
