"""A worker with a real policy in this process, whose time is counted in tokens.

Every `token_s` of the loop's time it samples one token of each running request, in one forward
pass: a continuous-batching engine under whatever clock the loop has, so that a run under virtual
time is the same each time, however busy the machine.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from flash.hub.worker import OnTokens, WorkerFailure
from flash.types import Completion, SamplingParams, UpdateMode, Weights


@dataclass(eq=False)
class _Request:
    token_ids: list[int]
    sampling: SamplingParams
    answer: asyncio.Future[Completion]
    prompt: int
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)


class PolicyWorker:
    """The Worker protocol, for one small model on a CPU. Weights change between two tokens."""

    name = "policy"
    constrains = False

    def __init__(self, model: Path, *, seed: int, token_s: float) -> None:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="sdpa"
        )
        self._model = loaded.eval()
        self._rng = torch.Generator().manual_seed(seed)
        self._token_s = token_s
        self._running: dict[str, _Request] = {}
        self._tick: asyncio.TimerHandle | None = None
        self._paused = False
        self.version = 0

    async def generate(
        self,
        request_id: str,
        token_ids: Sequence[int],
        sampling: SamplingParams,
        on_tokens: OnTokens | None = None,
    ) -> Completion:
        answer: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        request = _Request(list(token_ids), sampling, answer, len(token_ids))
        self._running[request_id] = request
        self._wind()
        try:
            return await answer
        finally:
            self._running.pop(request_id, None)

    async def abort(self, request_id: str) -> None:
        self._running.pop(request_id, None)

    async def pause(self, mode: UpdateMode) -> None:
        if mode != "keep":
            raise WorkerFailure(f"{self.name} knows update_mode=keep only, not {mode}")
        self._paused = True

    async def load_weights(self, weights: Weights) -> None:
        tensors: dict[str, torch.Tensor] = {}
        for file in sorted(weights.path.glob("*.safetensors")):
            tensors |= load_file(file)
        self._model.load_state_dict(tensors, strict=False)
        self._model.tie_weights()

    async def recompute(self) -> None:
        pass  # it keeps no keys and values

    async def set_version(self, version: int) -> None:
        self.version = version

    async def resume(self) -> None:
        self._paused = False
        self._wind()

    async def sleep(self, mode: UpdateMode) -> None:
        raise AssertionError("the study's worker shares no GPU with its trainer")

    async def wake_weights(self) -> None:
        raise AssertionError("the study's worker does not sleep")

    async def wake_rest(self) -> None:
        raise AssertionError("the study's worker does not sleep")

    async def check_health(self) -> None:
        pass

    async def close(self) -> None:
        if self._tick is not None:
            self._tick.cancel()

    def _wind(self) -> None:
        """The next tick, on the clock's grid, so that requests share forward passes."""
        if self._tick is None and self._running and not self._paused:
            loop = asyncio.get_running_loop()
            ticks = int(loop.time() / self._token_s + 1e-6) + 1
            self._tick = loop.call_at(ticks * self._token_s, self._sample)

    @torch.no_grad()
    def _sample(self) -> None:
        self._tick = None
        if self._paused:
            return
        requests = list(self._running.values())
        if requests:
            self._one_token_each(requests)
        for request_id, request in list(self._running.items()):
            if request.answer.done():
                del self._running[request_id]
        self._wind()

    def _one_token_each(self, requests: list[_Request]) -> None:
        lengths = [len(request.token_ids) for request in requests]
        # Padded at the end, where a causal model does not look.
        ids_BN = torch.zeros(len(requests), max(lengths), dtype=torch.int64)
        for row, request in enumerate(requests):
            ids_BN[row, : lengths[row]] = torch.tensor(request.token_ids)
        hidden_BND = self._model.base_model(input_ids=ids_BN, use_cache=False).last_hidden_state
        last_BD = hidden_BND[torch.arange(len(requests)), torch.tensor(lengths) - 1]
        logits_BV = self._model.get_output_embeddings()(last_BD)
        temperatures_B = torch.tensor([r.sampling.temperature for r in requests])
        logprobs_BV = (logits_BV / temperatures_B[:, None]).log_softmax(-1)
        chosen_B = torch.multinomial(logprobs_BV.exp(), 1, generator=self._rng)[:, 0]
        told = logprobs_BV[torch.arange(len(requests)), chosen_B].tolist()
        for request, token, logprob in zip(requests, chosen_B.tolist(), told, strict=True):
            request.token_ids.append(token)
            request.logprobs.append(logprob)
            request.versions.append(self.version)
            stopped = token in request.sampling.stop_token_ids
            if not stopped and len(request.logprobs) < request.sampling.max_tokens:
                continue
            if request.answer.done():
                continue
            request.answer.set_result(
                Completion(
                    token_ids=request.token_ids[request.prompt :],
                    logprobs=request.logprobs,
                    versions=request.versions,
                    temperature=request.sampling.temperature,
                    finish_reason="stop" if stopped else "length",
                    worker=self.name,
                )
            )
