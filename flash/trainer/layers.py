"""What is made of a model's decoder layers before they are sharded: compiled ones, ones that keep
no activations.

    layer.forward ─► compiled ─► recomputed in the backward pass ─► a unit of FSDP's

In that order: what is compiled is what is computed twice, and FSDP's own work stays outside.
"""

import functools
import importlib.util
import os
import shutil
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

_BACKEND = "inductor"
# Of one function: with a gradient and without, in the policy, its reference and its critic, for
# each kind of layer. Beyond it torch would go on without compiling.
_MOST_VARIANTS = 64


def recompute_activations(model: Any) -> None:
    """Layers keep no activations for the backward pass; transformers' own way needs `train()`."""
    for layer in _needed_layers(model, field="trainer.gradient_checkpointing"):
        layer.forward = functools.partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False
        )


def keep_activations(model: Any) -> None:
    """Undoes `recompute_activations`."""
    for layer in decoder_layers(model):
        layer.forward = layer.forward.args[0]


def compile_layers(model: Any) -> None:
    """Layers are compiled at their first pass, once for passes of all sizes.

    Attention is called as it is, and what lies on either side of it is fused. ValueError if this
    machine has no compiler for it.
    """
    layers = _needed_layers(model, field="trainer.compile")
    if missing := missing_to_compile(model.device.type):
        raise ValueError(f"trainer.compile=true needs {missing}: install it, or leave it out")
    dynamo: Any = torch._dynamo.config
    # By default numbers in FSDP's modules become variables of the graph, which keeps kernels from
    # being fused (pytorch/pytorch#194795), and what was compiled for one module is run for another
    # of other sizes, up to an AssertionError (#139222).
    dynamo.skip_fsdp_guards = False
    dynamo.recompile_limit = _MOST_VARIANTS
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=True, backend=_BACKEND)


def missing_to_compile(device: str) -> str:
    """What torch.compile needs for that kind of device and is not here; empty if it is."""
    usual: tuple[str, ...]
    if device == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "triton, which torch's builds for CUDA bring along"
        named, usual = os.environ.get("CC"), ("gcc", "clang")
    else:
        named, usual = os.environ.get("CXX"), ("g++",)
    if any(shutil.which(name) for name in ((named,) if named else usual)):
        return ""
    return f"a C{'' if device == 'cuda' else '++'} compiler ({named or ' or '.join(usual)})"


def decoder_layers(model: Any) -> list[Any]:
    """Those that transformers knows as such; none of an unusual model."""
    return [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]


def _needed_layers(model: Any, *, field: str) -> list[Any]:
    layers = decoder_layers(model)
    if not layers:
        raise ValueError(
            f"{field}=true: model_type={model.config.model_type!r} has no layers that can do it: "
            f"leave it out"
        )
    return layers
