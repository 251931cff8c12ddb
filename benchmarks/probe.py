"""What the probe sees and what it lets pass: random models of many shapes, sound and with faults.

    python benchmarks/probe.py [--models 30] [--device cpu]

Both sides are forward passes of transformers: the worker's with a cache, token by token, the
trainer's over whole sequences. Figures are in units: the largest logit times 2^-8, half of
bfloat16's step near 1. Where a side computes in bfloat16 the limit is 8 of them
(docs/engines.md, The probe).
"""

import argparse
import copy
import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from flash.hub.probe import Gap, Probe

UNIT = 2**-8
SIZES = (5, 10, 20, 40, 60)  # of the largest logit
OFFSET = -60  # of all logits, as some models have: it changes nothing but what is rounded
WINDOW = 32
LONG = WINDOW + 16
KINDS: dict[str, Any] = {
    "llama": (transformers.LlamaConfig, {}),
    "qwen3": (transformers.Qwen3Config, {}),
    "mistral": (transformers.MistralConfig, {"sliding_window": WINDOW}),
}
SHAPES = [(32, 2), (64, 2), (64, 8), (128, 4), (64, 24)]  # hidden size, layers
VOCABULARIES = (50, 200, 1000)
PRECISIONS = {
    "float32, both": (torch.float32, torch.float32),
    "bfloat16, worker": (torch.bfloat16, torch.float32),
    "bfloat16, trainer": (torch.float32, torch.bfloat16),
    "bfloat16, both": (torch.bfloat16, torch.bfloat16),
}
WITH_FAULTS = ("float32, both", "bfloat16, worker")


@dataclass(frozen=True)
class Fault:
    """`size`: of what a weight is off by, as a share of the weights' spread; or the temperature."""

    kind: str
    size: float

    def __str__(self) -> str:
        if self.kind == "temperature":
            return f"temperature {self.size:g}"
        return f"{self.kind} off by {self.size:.1%}"


FAULTS = [
    *(Fault("head", size) for size in (0.001, 0.01, 0.05, 0.1, 0.2)),
    *(Fault("layer", size) for size in (0.01, 0.05, 0.2, 1.0)),
    *(Fault("temperature", size) for size in (0.9, 0.7)),
]


def make(seed: int, size: float, *, offset: float = 0.0) -> Any:
    kind, settings = list(KINDS.values())[seed % len(KINDS)]
    hidden, layers = SHAPES[seed // len(KINDS) % len(SHAPES)]
    # Wider ones in wide or deep models make attention all or nothing, and rounding then decides.
    spread = 0.3 if hidden < 64 else (0.05, 0.1)[seed // 7 % 2]
    torch.manual_seed(seed)
    config = kind(
        vocab_size=VOCABULARIES[seed // 2 % len(VOCABULARIES)], hidden_size=hidden,
        intermediate_size=4 * hidden, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=hidden // 4, max_position_embeddings=1024,
        tie_word_embeddings=False, initializer_range=spread, **settings,
    )  # fmt: skip
    model_class: Any = transformers.AutoModelForCausalLM
    model = model_class.from_config(config, dtype=torch.float32)
    texts_BS = torch.randint(0, config.vocab_size, (8, LONG))
    with torch.no_grad():
        hidden_BSD = model.model(texts_BS).last_hidden_state
        head_VD = model.lm_head.weight
        head_VD.mul_(size / (hidden_BSD @ head_VD.T).abs().max())
        if offset:
            mean_D = hidden_BSD.mean((0, 1))
            head_VD.add_(offset / (hidden_BSD @ mean_D).mean() * mean_D)
    return model.eval()


def with_fault(model: Any, fault: Fault | None, seed: int) -> Any:
    """As it was before some training steps, in one part."""
    if fault is None or fault.kind == "temperature":
        return model
    part = "lm_head" if fault.kind == "head" else f"layers.{len(model.model.layers) // 2}."
    faulty = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in faulty.named_parameters():
            if part in name and weight.dim() == 2:
                noise = torch.randn(weight.shape, generator=generator)
                weight.add_(noise * weight.std() * fault.size)
    return faulty


def computing_in(model: Any, dtype: torch.dtype, device: str) -> Any:
    """Its weights and activations; what is no weight, as frequencies of positions, stays."""
    model = copy.deepcopy(model)
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    return model.to(device)


@torch.no_grad()
def sampled(model: Any, prompts_PS: Tensor, tokens: int, temperature: float) -> tuple[Any, Any]:
    ids_PT, logprobs_PT, new_PS, cache = [], [], prompts_PS, None
    for _ in range(tokens):
        answer = model(new_PS, past_key_values=cache, use_cache=True)
        cache = answer.past_key_values
        logprobs_PV = (answer.logits[:, -1].float() / temperature).log_softmax(-1)
        new_PS = torch.multinomial(logprobs_PV.exp(), 1)
        ids_PT.append(new_PS)
        logprobs_PT.append(logprobs_PV.gather(1, new_PS))
    return torch.cat(ids_PT, 1), torch.cat(logprobs_PT, 1)


@torch.no_grad()
def scored(model: Any, texts_PS: Tensor) -> tuple[Tensor, float]:
    logits_PSV = model(texts_PS).logits[:, :-1].float()
    logprobs_PS = logits_PSV.log_softmax(-1).gather(-1, texts_PS[:, 1:, None])[..., 0]
    return logprobs_PS, float(logits_PSV.abs().max())


def probed(worker: Any, trainer: Any, fault: Fault | None, seed: int) -> tuple[Gap, float]:
    """The gap, and the largest logit."""
    device = trainer.device
    torch.manual_seed(seed)
    probe = Probe()
    prompts_PS = torch.tensor(probe.prompts, device=device)
    if seed % 2:  # past the window
        vocabulary = trainer.config.vocab_size
        prompts_PS = torch.randint(0, vocabulary, (len(probe.prompts), LONG), device=device)
    temperature = fault.size if fault and fault.kind == "temperature" else 1.0
    ids_PT, worker_PT = sampled(worker, prompts_PS, probe.tokens, temperature)
    trainer_PS, largest = scored(trainer, torch.cat([prompts_PS, ids_PT], 1))
    trainer_PT = trainer_PS[:, prompts_PS.shape[1] - 1 :]
    return Gap.between(worker_PT.flatten().tolist(), trainer_PT.flatten().tolist()), largest


def cases(models: int, device: str) -> Iterator[tuple[str, Fault | None, float, Gap, float]]:
    """Precision, fault, size of the logits, gap, largest logit."""
    for seed, size in itertools.product(range(models), SIZES):
        offsets = (0, OFFSET) if seed % 4 == 0 else (0,)
        for offset in offsets:
            model = make(seed, size, offset=offset)
            faults = FAULTS if seed % 6 == 1 else []
            for fault, name in [
                *((None, name) for name in PRECISIONS),
                *itertools.product(faults, WITH_FAULTS),
            ]:
                of_worker, of_trainer = PRECISIONS[name]
                worker = computing_in(with_fault(model, fault, seed), of_worker, device)
                trainer = computing_in(model, of_trainer, device)
                yield (name, fault, size, *probed(worker, trainer, fault, seed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=30)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    found = defaultdict(list)
    for name, fault, _, gap, largest in cases(options.models, options.device):
        found[fault, name].append((gap, largest))
    print(f"{'':24} {'':18} {'probes':>6}  nine tenths within, in units (of float32: nats)")
    print(f"{'':24} {'':18} {'':>6}  {'least':>9} {'median':>9} {'99%':>9} {'most':>9}  KL, most")
    for (fault, name), gaps in found.items():
        exact = name.startswith("float32")
        off = [gap.logits if exact else gap.logits / largest / UNIT for gap, largest in gaps]
        least, middle, most_99, most = np.quantile(off, [0, 0.5, 0.99, 1])
        kl = max(gap.kl for gap, _ in gaps)
        print(
            f"{fault or 'sound'!s:24} {name:18} {len(gaps):6}  "
            f"{least:9.2g} {middle:9.2g} {most_99:9.2g} {most:9.2g}  {kl:.1g}"
        )


if __name__ == "__main__":
    main()
