"""Mixtures of experts whose routers take the experts that workers chose.

    workers' experts [N, R] ──► take ────┐
    hidden states ─► router: logits ─► topk ─► its own weights of the experts that were taken
                                        └────► its own choice ──► chosen, differing

A router's rule ends in one call of topk: before it each expert has a score, after it the scores of
those that were chosen become their weights. Where other indices come out of that call, all else of
the rule is as it was, and gradients flow through the weights, not through the choice (Ma et al.
2025, "Stabilizing MoE Reinforcement Learning by Aligning Training and Inference Routers").

K experts of a token in a layer, of E; R of all layers, one after the other: see `flash.types`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flash.trainer.sequence_parallel import SequenceGroup
from flash.types import UNKNOWN_EXPERT


class Routers:
    """All routers of a model, which from now on tell their choices, and take those of others.

    Where the ranks of a `group` share each pass, each router sees a slice of its N tokens; what it
    is given and tells is of all of them, with those that were padded, and to be told it is a
    collective of the group.

    ValueError if the model has none, or several in a layer, which no worker tells apart.
    """

    def __init__(self, model: Any, *, group: SequenceGroup | None = None) -> None:
        self._group = group
        self._kind = model.config.model_type
        self._layers = int(model.config.get_text_config().num_hidden_layers)
        classes: Any = _router_classes(model)
        self._routers: dict[int, _Router] = {}
        for name, module in model.named_modules() if classes else ():
            if isinstance(module, classes):
                layer = next(int(part) for part in name.split(".") if part.isdecimal())
                if layer in self._routers:
                    raise ValueError(self._refusal("has several routers in a layer"))
                self._routers[layer] = _Router(module)
        if not self._routers:
            raise ValueError(self._refusal("has no routers, because it is no mixture of experts"))

    def _refusal(self, why: str) -> str:
        return (
            f"model_type={self._kind!r} {why}: leave trainer.router_replay out, or give another "
            f"model"
        )

    def take(self, experts_NR: Tensor | None) -> None:
        """What the passes from now on take, also those that recompute activations; UNKNOWN_EXPERT,
        or None for all of it, has the router choose. ValueError for experts of another model."""
        if experts_NR is not None and self._group is not None:
            experts_NR = self._group.own_rows(experts_NR, padding=UNKNOWN_EXPERT)
        experts_NLK = None if experts_NR is None else self._by_layer(experts_NR)
        for layer, router in self._routers.items():
            router.taken_NK = None if experts_NLK is None else experts_NLK[:, layer].long()

    def chosen(self) -> Tensor:
        """What the routers themselves chose in the last pass, int16, [N, R].

        ValueError if a router has chosen nothing.
        """
        return self._joined({layer: each.own() for layer, each in self._routers.items()})

    def others(self) -> Tensor:
        """Beside each expert that was chosen in the last pass the next one, as `chosen`."""
        return self._joined(
            {layer: (each.own() + 1) % each.experts for layer, each in self._routers.items()}
        )

    def all_scored(self) -> bool:
        """Whether each expert that was taken in the last pass had a score."""
        scored = [each.scores_NK.ne(0).all(-1) for each in self._routers.values()]
        return bool(self._of_all(torch.stack(scored, dim=1)).all())

    def _of_all(self, own_NR: Tensor) -> Tensor:
        """Of all tokens what the routers have of theirs."""
        if self._group is None:
            return own_NR
        return self._group.all_rows(own_NR.int()).to(own_NR.dtype)  # no backend sends int16

    def _joined(self, experts: dict[int, Tensor]) -> Tensor:
        tokens, chosen = next(iter(experts.values())).shape
        device = next(iter(experts.values())).device
        joined_NLK = torch.full(
            (tokens, self._layers, chosen), UNKNOWN_EXPERT, dtype=torch.int16, device=device
        )
        for layer, experts_NK in experts.items():
            joined_NLK[:, layer] = experts_NK
        return self._of_all(joined_NLK.flatten(1))

    def differing(self) -> tuple[Tensor, Tensor]:
        """Of each token of the last pass: in which share of the layers whose experts it was given
        the router would have chosen others, and whether it was given any, both [N]."""
        differing, known = [], []
        for router in self._routers.values():
            own_NK, taken_NK = router.own(), router.taken_NK
            if taken_NK is None:
                taken_NK = torch.full_like(own_NK, UNKNOWN_EXPERT)
            known_N = (taken_NK >= 0).all(-1)
            known.append(known_N)
            differing.append(known_N & (own_NK.sort(-1)[0] != taken_NK.sort(-1)[0]).any(-1))
        layers_N2 = torch.stack([torch.stack(each).sum(0) for each in (differing, known)], dim=1)
        differing_N, layers_N = self._of_all(layers_N2).unbind(1)
        return differing_N / layers_N.clamp(min=1), layers_N > 0

    def _by_layer(self, experts_NR: Tensor) -> Tensor:
        """[N, L, K], of the model's L layers."""
        some = next(iter(self._routers.values()))
        told, chosen = experts_NR.shape[1], some.chosen * self._layers
        if told % self._layers or (chosen and told != chosen):
            raise ValueError(
                f"workers chose {told} experts for each token, where the trainer's "
                f"model_type={self._kind!r} chooses {some.chosen} in each of {self._layers} "
                f"layers: have them serve the model that is trained"
            )
        experts_NLK = experts_NR.view(len(experts_NR), self._layers, told // self._layers)
        largest = int(experts_NLK[:, list(self._routers)].max())  # others have whatever they have
        if some.experts and largest >= some.experts:
            raise ValueError(
                f"workers chose the expert {largest}, where the trainer's "
                f"model_type={self._kind!r} has {some.experts} in a layer, counted from 0: have "
                f"them serve the model that is trained"
            )
        return experts_NLK


class _Router:
    """One of them. `taken_NK` are the experts that its passes take, `scores_NK` what they were
    weighed by; `experts` and `chosen` of them are known after its first pass."""

    taken_NK: Tensor | None = None
    scores_NK: Tensor
    experts = chosen = 0

    def __init__(self, module: nn.Module) -> None:
        self._name = type(module).__name__
        self._forward: Callable[..., Any] = module.forward
        self._calls = 0  # of topk in a pass: the last of them is the choice
        self._own_NK: Tensor | None = None
        module.forward = self._pass

    def own(self) -> Tensor:
        """Its own choice in the last pass, [N, K]."""
        if self._own_NK is None:
            raise ValueError(f"{self._name} chooses experts in another way than by topk")
        return self._own_NK

    def _pass(self, *args: Any, **kwargs: Any) -> Any:
        if not self._calls:
            with torch.no_grad(), _Calls() as counted:
                self._forward(*args, **kwargs)
            self._calls = counted.calls
        with _Calls(last=self._calls, replace=self._replace):
            return self._forward(*args, **kwargs)

    def _replace(self, scores_NE: Tensor, choice: Any) -> Any:
        self._own_NK = choice.indices
        self.experts, self.chosen = scores_NE.shape[-1], choice.indices.shape[-1]
        if self.taken_NK is None:
            return choice
        known_N1 = (self.taken_NK >= 0).all(-1, keepdim=True)
        experts_NK = torch.where(known_N1, self.taken_NK, choice.indices)
        scores_NK = scores_NE.gather(-1, experts_NK)
        self.scores_NK = scores_NK.detach().clone()  # some rules change them in place
        return type(choice)((scores_NK, experts_NK))


class _Calls(TorchFunctionMode):
    """In the block calls of topk are counted; of the one with the number `last` comes what
    `replace` makes of its input and its result."""

    def __init__(
        self, *, last: int = 0, replace: Callable[[Tensor, Any], Any] | None = None
    ) -> None:
        super().__init__()
        self.calls = 0
        self._last = last
        self._replace = replace

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in (torch.topk, Tensor.topk):
            self.calls += 1
            if self._replace is not None and self.calls == self._last:
                return self._replace(args[0], result)
        return result


def _router_classes(model: Any) -> tuple[type, ...]:
    """Of the modules whose logits transformers tells as a model's `router_logits`."""
    classes: list[Any] = []
    for module in model.modules():
        told = (getattr(module, "_can_record_outputs", None) or {}).get("router_logits", ())
        for recorder in told if isinstance(told, list | tuple) else [told]:
            classes.append(getattr(recorder, "target_class", recorder))
    return tuple(classes)
