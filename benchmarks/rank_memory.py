"""What memory a rank needs to train a model, by the model's sizes: before anything is loaded.

    weights    4 bytes a parameter of its share, or as layers compute if they are frozen
    gradients  4 bytes of what is trained, Adam's moments 8
    gathered   the root's own weights (embedding, head) and a layer with the next, as layers compute
    backward   besides: their gradients, as layers compute, and in float32 on their way to the ranks

Its share is one part of as many as hold the model once among them. Activations come on top.
"""

from dataclasses import dataclass
from typing import Any

from flash.trainer.memory import (
    FLOAT32_BYTES,
    GATHERED_LAYERS,
    HALF_BYTES,
    MOMENTS_BYTES,
    SENT_LAYERS,
)
from flash.trainer.sharding import divided_layers


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """Numbers of a model, none in bytes."""

    parameters: int
    trained: int
    root: int  # parameters outside of layers
    layer: int  # parameters of the largest
    tensor: int  # of the largest


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """Bytes of a rank."""

    load: float  # the model is read, and compared with itself in a forward pass, in float32
    weights: float
    gradients: float
    moments: float
    gathered: float  # in a forward pass
    backward: float  # besides, at most
    tensor: float  # the largest, whole

    @property
    def kept(self) -> float:
        """From step to step, and in it."""
        return self.weights + self.gradients + self.moments

    @property
    def step(self) -> float:
        """Without activations."""
        return self.kept + self.gathered + self.backward

    @property
    def checkpoint(self) -> float:
        """At most: what it holds, and a copy of it to write, which a GPU's rank has on the host."""
        return 2 * (self.weights + self.moments)

    def exported(self, file_bytes: float) -> float:
        """Besides what it holds, files of so many bytes, of tensors that are gathered."""
        return self.weights + self.moments + file_bytes + 2 * self.tensor


def size_of(model: Any) -> ModelSize:
    """Of a model that may be on torch's meta device."""
    layers = [
        sum(parameter.numel() for parameter in layer.parameters())
        for layer in divided_layers(model, model)
    ]
    counts = [parameter.numel() for parameter in model.parameters()]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return ModelSize(
        parameters=sum(counts),
        trained=trained,
        root=sum(counts) - sum(layers),
        layer=max(layers, default=0),
        tensor=max(counts),
    )


def rank_memory(size: ModelSize, *, shards: int, half: bool) -> RankMemory:
    """Of each rank, where so many hold the model once among them; `half`: layers compute in
    bfloat16."""
    computed = HALF_BYTES if half else FLOAT32_BYTES
    frozen = size.parameters - size.trained
    gathered = size.root + GATHERED_LAYERS * size.layer
    return RankMemory(
        load=FLOAT32_BYTES * (size.parameters / shards + gathered),
        weights=(FLOAT32_BYTES * size.trained + computed * frozen) / shards,
        gradients=FLOAT32_BYTES * size.trained / shards,
        moments=MOMENTS_BYTES * size.trained / shards,
        gathered=computed * gathered,
        backward=max(
            computed * size.root + (computed + SENT_LAYERS * FLOAT32_BYTES) * size.layer,
            (computed + FLOAT32_BYTES) * size.root,
        ),
        tensor=computed * size.tensor,
    )
