"""transformers' continuous batching as an engine whose weights change under running requests.

    submit ──► manager (its own thread) ──► result ──► future
                      │
    pause ── freezes it between two steps ── load_weights, set_version ── resume

Every token carries the version in force when it was sampled. The engine is frozen while weights
change, so what a request has sampled by then is all that the old weights have sampled of it.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
from transformers.conversion_mapping import get_model_conversion_mapping

from flash.errors import InferenceFailure
from flash.positions import positions_of
from flash.system.quiet import no_progress_bars
from flash.trainer.self_test import own_attention, plain_logits
from flash.types import Experts
from flash.worker import attention
from flash.worker.experts import RoutedExperts

PauseMode = Literal["keep", "abort", "wait"]

# Small pages fit short conversations, and make short prefixes shareable.
_PAGE_SIZE = 16
_MIN_BATCH_TOKENS = 2048

# Per-request temperatures exist only if the engine is made with one that is neither None nor 1.
_TEMPERATURE_AT_START = 0.5
# The engine always samples. So sharp a distribution is the greedy choice, but for exact ties.
_GREEDY_TEMPERATURE = 1e-4

_STOP_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """One response to sample."""

    request_id: str
    token_ids: Sequence[int]
    max_tokens: int
    temperature: float = 1.0
    stop_token_ids: Sequence[int] = ()
    experts_from: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineResult:
    """What was sampled; `spans` are (version, start, end), end excluded, without gaps.

    `experts` are those of the tokens from the request's `experts_from` on, as in
    `flash.types.Completion`; None if the engine does not tell them.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: Literal["stop", "length", "abort"]
    spans: list[tuple[int, int, int]]
    experts: Experts | None = None


class EngineDied(InferenceFailure):
    """The engine's thread has ended; no request can be answered any more."""


@dataclass(slots=True, eq=False)
class _Running:
    request: EngineRequest
    result: asyncio.Future[EngineResult]
    spans: list[tuple[int, int, int]] = field(default_factory=list)

    def close_span(self, version: int, end: int) -> None:
        """The tokens since the last span, up to `end`, were sampled by `version`."""
        start = self.spans[-1][2] if self.spans else 0
        if end > start:
            if self.spans and self.spans[-1][0] == version:
                start = self.spans.pop()[1]
            self.spans.append((version, start, end))


class EmbeddedEngine:
    """One model, sampling many requests at once, in a thread of its own.

    The logprobs are those of the distribution that was sampled from, temperature included; a
    trainer must divide its logits by the same temperature to compare.

    Args:
        model: a directory or a hub name.
        cache_tokens: room for keys and values, in tokens; a request must fit in alone.
        max_running: requests in one step.
        routed_experts: whether it tells which experts tokens were routed to.

    Use it from one event loop only.
    """

    def __init__(
        self,
        model: str,
        *,
        device: str,
        dtype: str,
        cache_tokens: int,
        max_running: int,
        routed_experts: bool = False,
        version: int = 0,
        seed: int = 0,
    ) -> None:
        torch.manual_seed(seed)
        self.version = version
        self.max_request_tokens = cache_tokens
        self._model = _load(model, dtype).to(device)
        # What is in its files and what it computes with differ: experts are apart and together.
        self._converted = bool(get_model_conversion_mapping(self._model, add_legacy=False))
        self._positions = positions_of(self._model.config.to_dict())
        try:
            self._manager = self._model.init_continuous_batching(
                GenerationConfig(  # type: ignore[no-untyped-call]
                    do_sample=True,
                    temperature=_TEMPERATURE_AT_START,
                    top_k=0,
                    eos_token_id=-1,
                    max_new_tokens=1,
                ),
                ContinuousBatchingConfig(
                    page_size=_PAGE_SIZE,
                    num_blocks=-(-cache_tokens // _PAGE_SIZE),
                    max_batch_tokens=max(_MIN_BATCH_TOKENS, 2 * max_running),
                    max_requests_per_batch=max_running,
                    return_logprobs=True,
                    per_request_processors=True,
                    # A step must be over before the next begins, or a token's version is a guess.
                    use_async_batching=False,
                    auto_switch_to_flash=False,
                ),
            )
            # After the manager is made, which knows its own kinds only.
            attention.use(
                self._model, self._manager, longest=self.longest, graphs=not routed_experts
            )
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the boundary to transformers, which raises all kinds
            raise ValueError(cannot_serve(self.config.model_type, error)) from error
        self._experts = RoutedExperts(self._model, self._manager) if routed_experts else None
        self._running: dict[str, _Running] = {}
        self._gate = asyncio.Event()  # open unless a pause waits for the running ones to end
        self._gate.set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._freeze = contextlib.ExitStack()
        # The manager counts pauses per thread, so that one thread makes and ends them all.
        self._pauser = ThreadPoolExecutor(1, thread_name_prefix="pause")
        self._manager.start()

    @property
    def config(self) -> Any:
        """The model's."""
        return self._model.config

    @property
    def dtype(self) -> torch.dtype:
        """That the model computes in."""
        dtype: torch.dtype = self._model.dtype
        return dtype

    @property
    def longest(self) -> int:
        """The most tokens of a prompt and its response."""
        return min(self.max_request_tokens, self._positions or self.max_request_tokens)

    @property
    def running(self) -> int:
        """Requests submitted and not yet answered."""
        return len(self._running)

    @property
    def alive(self) -> bool:
        return bool(self._manager.is_running())

    async def generate(self, request: EngineRequest) -> EngineResult:
        """Samples one response; a cancelled caller frees the request's place.

        Raises ValueError for a request that can't be, EngineDied if the engine's thread has ended.
        """
        while not self._gate.is_set():
            await self._gate.wait()
        self._check(request)
        running = _Running(request, asyncio.get_running_loop().create_future())
        self._running[request.request_id] = running
        self._idle.clear()
        if self._experts is not None:
            self._experts.begin(request.request_id)
        try:
            self._manager.register_result_handler(request.request_id, self._on_output)
            added = self._manager.add_request(
                list(request.token_ids),
                request_id=request.request_id,
                max_new_tokens=request.max_tokens,
                eos_token_id=list(request.stop_token_ids) or -1,
                temperature=max(request.temperature, _GREEDY_TEMPERATURE),
            )
            if added is None:
                raise EngineDied(f"the engine has ended: {self._cause()}")
            return await running.result
        except asyncio.CancelledError:
            self._forget(request.request_id)
            raise
        finally:
            del self._running[request.request_id]
            if self._experts is not None:
                self._experts.end(request.request_id)
            if not self._running:
                self._idle.set()

    def abort(self, request_id: str) -> bool:
        """Answer a running request with what it has so far; False if there is no such request."""
        running = self._running.get(request_id)
        if running is None or running.result.done():
            return False
        token_ids, logprobs = self._sampled_so_far(request_id)
        self._forget(request_id)
        self._answer(running, token_ids, logprobs, "abort")
        return True

    @torch.no_grad()
    def plain_logits(self, token_ids: Sequence[int], count: int) -> torch.Tensor:
        """What the model itself would choose the last tokens from, without any cache, [count, V].

        Call it while paused.
        """
        with own_attention(self._model):
            return plain_logits(self._model, token_ids, count)

    def failure(self) -> Exception | None:
        """What has ended the engine, if anything has; waits until it is over. Call it once a
        request has raised EngineDied."""
        self._manager.join(time.perf_counter(), timeout=_STOP_S)
        cause: Exception | None = self._manager.background_thread_status.fatal_error
        return cause

    # ── changing weights ─────────────────────────────────────────────────────────────────────

    async def pause(self, mode: PauseMode) -> None:
        """Freeze between two steps: with the requests inside (`keep`), after answering each with
        what it has (`abort`), or after all have ended (`wait`, in which new ones queue)."""
        if mode == "wait":
            self._gate.clear()
            await self._idle.wait()
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._pauser, self._freeze.enter_context, self._manager.pause())
        if mode == "abort":
            for request_id in list(self._running):
                self.abort(request_id)

    async def resume(self) -> None:
        """Go on where `pause` stopped; does nothing if it did not."""
        await asyncio.get_running_loop().run_in_executor(self._pauser, self._freeze.close)
        self._gate.set()

    def load_weights(self, directory: Path) -> None:
        """Replace the weights in place, while paused. Raises ValueError if they don't fit."""
        tensors: dict[str, torch.Tensor] = {}
        for file in sorted(directory.glob("*.safetensors")):
            try:
                tensors |= load_file(file)
            except SafetensorError as error:
                raise ValueError(f"{file} can't be read: {error}") from error
        if not tensors:
            raise ValueError(f"no safetensors in {directory}")
        if self._converted:
            tensors = _load(str(directory), self.dtype).state_dict()
        own = self._model.state_dict(keep_vars=True)
        tied = {name for name in own if _is_tied(name, own, tensors)}
        if missing := own.keys() - tensors.keys() - tied:
            raise ValueError(f"{directory} lacks weights of this model: {sorted(missing)[:3]} …")
        for name, tensor in tensors.items():
            if name not in own or own[name].shape != tensor.shape:
                raise ValueError(f"{directory} has {name} {list(tensor.shape)}, not the model")
        with torch.no_grad():
            for name, tensor in tensors.items():
                own[name].copy_(tensor)
        if self._model.device.type == "cuda":
            torch.cuda.synchronize()  # the engine's steps are in another stream
        self._start_over()

    def set_version(self, version: int) -> None:
        """Tokens sampled from now on carry this version. Call it while paused."""
        for request_id, running in self._running.items():
            token_ids, _ = self._sampled_so_far(request_id)
            running.close_span(self.version, len(token_ids))
        self.version = version

    def close(self) -> None:
        """End the engine's thread; running requests fail."""
        self._freeze.close()
        self._manager.stop(block=True, timeout=_STOP_S, hard_stop=True)
        self._pauser.shutdown()

    # ── between the manager's thread and the event loop ──────────────────────────────────────

    def _on_output(self, output: Any) -> None:
        """Called by the manager in the event loop, once a request has ended."""
        running = self._running.get(output.request_id)
        if running is None or running.result.done() or not output.is_finished():
            return
        if output.error is not None:
            running.result.set_exception(EngineDied(f"the engine failed: {output.error}"))
            return
        stopped = output.generated_tokens[-1:] and (
            output.generated_tokens[-1] in running.request.stop_token_ids
        )
        reason: Literal["stop", "length"] = "stop" if stopped else "length"
        self._answer(running, output.generated_tokens, output.logprobs, reason)

    def _answer(
        self,
        running: _Running,
        token_ids: list[int],
        logprobs: list[float],
        reason: Literal["stop", "length", "abort"],
    ) -> None:
        running.close_span(self.version, len(token_ids))
        request, experts = running.request, None
        if self._experts is not None:
            end = len(request.token_ids) + len(token_ids) - 1
            experts = self._experts.of(request.request_id, request.experts_from, end)
        running.result.set_result(
            EngineResult(
                token_ids=token_ids,
                logprobs=logprobs,
                finish_reason=reason,
                spans=running.spans,
                experts=experts,
            )
        )

    def _sampled_so_far(self, request_id: str) -> tuple[list[int], list[float]]:
        processor = self._manager.batch_processor
        state = None
        if processor is not None:
            scheduler = processor.scheduler
            state = scheduler.active_requests.get(request_id)
            state = state or scheduler.waiting_requests.get(request_id)
        if state is None:
            return [], []
        output = state.to_generation_output()
        # The manager's thread may be between the two appends of a token.
        known = min(len(output.generated_tokens), len(output.logprobs))
        return output.generated_tokens[:known], output.logprobs[:known]

    def _forget(self, request_id: str) -> None:
        router = self._manager.output_router
        with router._lock:
            router.result_handlers.pop(request_id, None)
        self._manager.cancel_request(request_id)

    def _start_over(self) -> None:
        """Keys and values of old weights serve nobody: what runs is computed anew, with what it has
        sampled as part of its prompt. So every token is sampled by one version alone."""
        processor = self._manager.batch_processor
        if processor is None:
            return
        scheduler, cache = processor.scheduler, processor.cache
        for request_id, state in list(scheduler.active_requests.items()):
            cache.free_blocks(request_id, no_cache=True)
            again = state.create_equivalent_initial_request()
            scheduler.finish_request(request_id)
            scheduler.add_waiting_request(again)
        cache.evict_cached_blocks()

    def _check(self, request: EngineRequest) -> None:
        if request.request_id in self._running:
            raise ValueError(f"request_id {request.request_id!r} is already running")
        if not request.token_ids:
            raise ValueError("token_ids is empty: a prompt needs at least one token")
        vocabulary = self._model.config.get_text_config().vocab_size
        if min(request.token_ids) < 0 or max(request.token_ids) >= vocabulary:
            raise ValueError(f"token_ids must lie in 0 … {vocabulary - 1}, the model's vocabulary")
        if not 0 <= request.experts_from <= len(request.token_ids):
            raise ValueError(
                f"routed_experts_prompt_start={request.experts_from} must lie within the "
                f"{len(request.token_ids)} tokens of the prompt"
            )
        if request.max_tokens < 1:
            raise ValueError(f"max_tokens={request.max_tokens} must be at least 1")
        if not 0 <= request.temperature < math.inf:
            raise ValueError(f"temperature={request.temperature} must be a number of at least 0")
        if (total := len(request.token_ids) + request.max_tokens) > self.max_request_tokens:
            raise ValueError(
                f"prompt and max_tokens are {total} tokens, more than the cache's "
                f"{self.max_request_tokens}: shorten them, or start the worker with more"
            )
        if self._positions is not None and total > self._positions:
            raise ValueError(
                f"prompt and max_tokens are {total} tokens, more than the model's "
                f"{self._positions} positions: shorten them"
            )

    def _cause(self) -> str:
        return str(self._manager.background_thread_status.fatal_error or "it was closed")


def cannot_serve(kind: str, why: object) -> str:
    """What is told of a type that an embedded worker computes wrong, or not at all."""
    return (
        f"model_type={kind!r} can't be served by an embedded worker: have vLLM do it "
        f"(engine.kind=vllm), or give a model of another type, as docs/models.md lists them ({why})"
    )


def _is_tied(name: str, own: dict[str, Any], given: dict[str, torch.Tensor]) -> bool:
    """Whether a weight that is not given is the same tensor as one that is."""
    return name not in given and any(own[other] is own[name] for other in given if other in own)


def _load(model: str, dtype: str | torch.dtype) -> Any:
    """The model. ValueError if there is none to be had, or its files lack weights."""
    model_class: Any = AutoModelForCausalLM  # its types are not published
    try:
        with no_progress_bars():
            loaded, found = model_class.from_pretrained(
                model, dtype=dtype, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        why = " ".join(str(error).split())
        raise ValueError(
            f"model {model!r} can't be loaded: check its name and the connection to the hub, or "
            f"give a directory ({why})"
        ) from error
    if lacking := sorted(found["missing_keys"]):  # transformers has drawn them at random
        raise ValueError(
            f"model {model!r}: its files lack {len(lacking)} weights, {lacking[0]} first: give the "
            f"weights and the config.json of one model"
        )
    return loaded
