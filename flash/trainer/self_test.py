"""Whether the trainer's forward over packed sequences is the model's own, and the texts to see it.

    texts ─┬─► packed, our attention  ──┐
           └─► one by one, the model's ─┴─► the same logprobs, and each layer's attention was ours

A model can compute attention by itself, or have windows, biases and positions that packing would
lose; what it then learns from is not what was sampled.
"""

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from flash.trainer.attention import recorded
from flash.trainer.scorer import TokenScorer

# What configurations call the number of tokens that a layer looks back on.
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")
_OTHER_SETTINGS = ("alibi", "rope_parameters", "is_decoder", "use_bidirectional_attention")
# A window beyond it is longer than what is trained here, and a text of that length costs too much.
WIDEST_WINDOW = 8192
_LENGTHS = (64, 5, 33)  # several sequences; more than a few dozen tokens in one
_PAST_WINDOW = 16
_COMPARED = 16  # tokens at the end of each text, where windows and positions show
LIMIT = 1e-3  # in float32
_NO_MEMORY = "DefaultCPUAllocator: can't allocate memory"  # torch has no class for it on a CPU


def texts(config: Any, *, at_most: int | None = None) -> list[list[int]]:
    """Token ids to compare logprobs on; the first is longer than any window, if that may be.

    Args:
        config: of the model.
        at_most: so many tokens has the longest.
    """
    text = config.get_text_config()
    windows = (getattr(text, name, None) for name in WINDOWS)
    known = [w for w in windows if isinstance(w, int) and w <= WIDEST_WINDOW]
    longest = max([_LENGTHS[0], *(window + _PAST_WINDOW for window in known)])
    limits = [at_most, getattr(text, "max_position_embeddings", None)]
    longest = min([longest, *(limit for limit in limits if limit and limit > 0)])
    lengths = [longest, *(length for length in _LENGTHS[1:] if length <= longest)]
    vocabulary = int(text.vocab_size)
    # Neighbours differ, and no text repeats another.
    return [
        [(7919 * (place + 1) + 104_729 * number) % vocabulary for place in range(length)]
        for number, length in enumerate(lengths)
    ]


@torch.no_grad()
def check_layers(scorer: TokenScorer) -> list[Tensor]:
    """ValueError that names why the model can't be given packed sequences; else their logprobs.

    The model may be on torch's meta device, without weights. There RuntimeError means that what is
    computed depends on them.
    """
    model: Any = scorer.model
    kind = model.config.model_type
    with recorded() as attended:
        try:
            packed = _packed_logprobs(scorer, _compared(model.config), model.device)
        except RuntimeError:
            raise
        except Exception as error:  # the boundary to the model's class
            raise ValueError(
                f"model_type={kind!r} can't compute packed sequences: give a model of another "
                f"type ({str(error) or type(error).__name__})"
            ) from error
    layers = int(model.config.get_text_config().num_hidden_layers)
    if len(attended) != layers:
        raise ValueError(
            f"{len(attended)} of the {layers} layers of model_type={kind!r} leave attention to the "
            f"trainer; the others would mix packed sequences: give a model of another type"
        )
    return packed


def check_packed(scorer: TokenScorer) -> None:
    """ValueError that names what differs between the packed forward and the model's own.

    The model is whole here, in float32, and evaluates.
    """
    for tokens, gap in packed_gaps(scorer):
        if not gap <= LIMIT:  # nan is none either
            raise ValueError(differs(scorer.model.config, tokens, gap))


@torch.no_grad()
def packed_gaps(scorer: TokenScorer) -> list[tuple[int, float]]:
    """How many tokens each of the texts has, and by how many nats packing changes their logprobs.

    ValueError that names why the model can't compute them.
    """
    model: Any = scorer.model
    compared = _compared(model.config)
    try:
        packed = check_layers(scorer)
        with own_attention(model):
            plain = [
                last_logprobs(plain_logits(model, text, _count(text)), text) for text in compared
            ]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # the boundary to the model's class
        if _NO_MEMORY in str(error):
            raise
        raise ValueError(
            f"model_type={model.config.model_type!r} can't compute a forward pass: correct its "
            f"config.json ({error})"
        ) from error
    return [
        (len(text), float((packed_T - plain_T).abs().max()))
        for text, packed_T, plain_T in zip(compared, packed, plain, strict=True)
    ]


def differs(config: Any, tokens: int, gap: float, *, seen_in: str = "") -> str:
    """What is told of a configuration with which packing changes logprobs; `seen_in` says in which
    model, if it is another than the one that is to be trained."""
    return (
        f"model_type={config.model_type!r} computes other logprobs in packed sequences than alone, "
        f"by {gap:.2g} nats at the end of {tokens} tokens{seen_in} (config.json has "
        f"{told(config)}): it would not learn from what was sampled; give a model of another type, "
        f"or without these settings"
    )


@torch.no_grad()
def check_replay(scorer: TokenScorer) -> None:
    """ValueError that names why the model's routers can't take the experts that workers chose.

    The model is whole here, in float32, and evaluates. What its routers chose must make the
    logprobs that they make, and each other choice must have a weight.
    """
    model: Any = scorer.model
    assert scorer.routers is not None
    refused = f"trainer.router_replay=true: model_type={model.config.model_type!r}"

    def logprobs(experts_NR: Tensor | None) -> Tensor:
        compared = _compared(model.config)
        return torch.cat(_packed_logprobs(scorer, compared, model.device, experts_NR))

    own = logprobs(None)
    try:
        chosen, others = scorer.routers.chosen(), scorer.routers.others()
    except ValueError as error:
        raise ValueError(f"{refused}: {error}: leave it out, or give another model") from error
    gap = float((logprobs(chosen) - own).abs().max())
    if not gap <= LIMIT:
        raise ValueError(
            f"{refused} computes other logprobs with the experts that its own routers chose, by "
            f"{gap:.2g} nats: leave it out, or give another model"
        )
    if torch.equal(logprobs(others), own) or not scorer.routers.all_scored():
        raise ValueError(
            f"{refused} gives no weight to experts that its routers did not choose: leave it out, "
            f"or give another model"
        )


def _compared(config: Any) -> list[list[int]]:
    return [text for text in texts(config) if len(text) > 1]


def _count(text: list[int]) -> int:
    """How many of its tokens are compared: the first has no logprob."""
    return min(_COMPARED, len(text) - 1)


def _packed_logprobs(
    scorer: TokenScorer,
    compared: list[list[int]],
    device: Any,
    experts_NR: Tensor | None = None,
) -> list[Tensor]:
    """Of the last tokens of each text, all computed at once."""
    lengths = [len(text) for text in compared]
    counts = [_count(text) for text in compared]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    scored = [
        torch.arange(end - count, end, device=device)
        for end, count in zip(ends, counts, strict=True)
    ]
    token_ids_N = torch.tensor([token for text in compared for token in text], device=device)
    logprobs_T = scorer(token_ids_N, lengths, torch.cat(scored), experts_NR=experts_NR)
    return list(logprobs_T.split(counts))


@contextlib.contextmanager
def own_attention(model: Any) -> Iterator[None]:
    """In the block the model computes attention as anybody's does."""
    ours = model.config.get_text_config()._attn_implementation  # a part that sees may keep its own
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    try:
        yield
    finally:
        model.set_attn_implementation(ours)


def plain_logits(model: Any, text: Sequence[int], count: int) -> Tensor:
    """What the last tokens of a text were chosen from, [count, V], in float32, by a forward pass as
    anybody would make it."""
    token_ids_1S = torch.tensor([text], device=model.device)
    kept = {}  # all logits of a long text may not fit in memory
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        kept["logits_to_keep"] = count + 1
    logits_SV = model(input_ids=token_ids_1S, use_cache=False, **kept).logits[0]
    logits_TV: Tensor = logits_SV[-count - 1 : -1].float()
    return logits_TV


def last_logprobs(logits_TV: Tensor, text: Sequence[int]) -> Tensor:
    """Of the last tokens of a text, by what they were chosen from, [T]."""
    last_T = torch.tensor(text[-len(logits_TV) :], device=logits_TV.device)
    return logits_TV.log_softmax(-1).gather(-1, last_T[:, None])[:, 0]


def told(config: Any) -> str:
    """What of a configuration attention may depend on."""
    text = config.get_text_config()
    told = {name: getattr(text, name, None) for name in (*WINDOWS, *_OTHER_SETTINGS)}
    return ", ".join(f"{name}={value}" for name, value in told.items() if value) or "no windows"
