"""What our vLLM servers have that vLLM has not; each server imports it by name.

`--worker-extension-cls flash.worker.vllm_extension.WeightLoader` adds the method that
`/collective_rpc` calls for new weights; `--middleware flash.worker.vllm_extension.RequireKey`
guards the routes that vLLM's own API key leaves open.
"""

import functools
import hmac
import json
import logging
import os
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import msgspec

from flash.system.listener import page_refusal
from flash.worker.checksum import checksum
from flash.worker.delta import Had, TensorInfo, delta_of

ADAPTERS = "adapters"  # the name of all versions of them
_ADAPTERS_ID = 1  # which a server gives to the first that it is told of

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")
Scope = MutableMapping[str, Any]
Asgi = Callable[[Scope, Any, Any], Awaitable[None]]


def told(method: Callable[P, R]) -> Callable[P, R | dict[str, str]]:
    """What it raises is its answer. When a rank raises, vLLM leaves the answers of those after it
    unread, and takes them for what it asks next (0.32)."""

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R | dict[str, str]:
        try:
            return method(*args, **kwargs)
        except Exception as error:
            logger.exception("%s failed", method.__name__)
            return {"error": repr(error)}

    return call


class WeightLoader:
    """Mixed into vLLM's worker class, one in each tensor-parallel rank.

    Torch is imported where it is used: whoever guards routes needs none.
    """

    model_runner: Any
    weight_transfer_engine: Any
    device: Any

    flash_weights = ""  # the directory whose weights it has
    flash_tensors: Sequence[TensorInfo] = ()  # of the export that a delta is to lead to

    @told
    def load_flash_weights(self, weights_path: str) -> str:
        """Replace the weights in place by the safetensors in a directory; their checksum."""
        loaded = checksum(Path(weights_path))
        self.flash_weights = ""  # until they are loaded
        self.model_runner.reload_weights(weights_path=weights_path)
        self._pack_head()
        self.flash_weights = weights_path
        return loaded

    @told
    def load_flash_adapters(self, weights_path: str) -> str:
        """Replace the adapters in place by those in a directory; their checksum."""
        from vllm.lora.request import LoRARequest  # noqa: PLC0415  (in vLLM only)

        loaded = checksum(Path(weights_path))
        self.model_runner.add_lora(
            LoRARequest(ADAPTERS, _ADAPTERS_ID, weights_path, load_inplace=True)
        )
        return loaded

    @told
    def load_flash_delta(self, directory: str) -> list[Had] | None:
        """Change the weights to those in a directory by its delta; what this rank has of each
        tensor then. None if its weights are not those that the delta changes."""
        delta = delta_of(Path(directory))
        if delta is None or delta.before != self.flash_weights:
            return None
        self._begin(delta.tensors)
        from flash.worker.patch import apply_delta, read  # noqa: PLC0415

        for chunk in read(Path(directory), self.device):
            apply_delta(self.model_runner.get_model(), self.flash_tensors, chunk)
        had = self._finish()
        self.flash_weights = directory
        return had

    @told
    def begin_flash_delta(self, tensors: Sequence[Any]) -> None:
        """Weights are changed from now on, to those of an export of these tensors.

        ValueError, and nothing is changed, if that would not do.
        """
        self._begin(msgspec.convert(tensors, list[TensorInfo]))

    @told
    def receive_flash_delta(self, chunk: dict[str, Any]) -> None:
        """A chunk of the delta, from the sender of this server's group."""
        from flash.worker.patch import apply_delta, received  # noqa: PLC0415

        group = self.weight_transfer_engine.model_update_group
        parts = received(group, chunk["names"], chunk["shapes"], self.device)
        apply_delta(self.model_runner.get_model(), self.flash_tensors, parts)

    @told
    def finish_flash_delta(self) -> list[Had]:
        """What this rank has of each tensor."""
        return self._finish()

    @told
    def load_shared_flash_weights(self, directory: str) -> None:
        """Replace the weights by those that a rank of the trainer's has in this device's memory."""
        from flash.worker.shared import shared_weights  # noqa: PLC0415

        self.flash_weights = ""
        with shared_weights(Path(directory), self.device) as tensors:
            self.model_runner.reload_weights(weights_iterator=tensors)
            tensors.clear()
        self._pack_head()

    def _begin(self, tensors: Sequence[TensorInfo]) -> None:
        config = self.model_runner.model_config
        if config.quantization is not None or config.use_mla:
            raise ValueError("quantized weights and MLA's are made of those that a delta changes")
        self.flash_tensors = tensors
        self.flash_weights = ""

    def _finish(self) -> list[Had]:
        from flash.worker.patch import read_back  # noqa: PLC0415

        self._pack_head()
        return read_back(self.model_runner.get_model(), self.flash_tensors, self.device)

    def _pack_head(self) -> None:
        model = self.model_runner.get_model()
        head: Any = getattr(model, "lm_head", None)
        if hasattr(head, "cpu_linear") and model.config.tie_word_embeddings:
            # On a CPU the head computes with a packed copy, which a reload leaves as it was when
            # the weight is the embedding's (vLLM 0.32).
            from vllm.model_executor.layers.utils import (  # noqa: PLC0415  (in vLLM only)
                dispatch_cpu_unquantized_gemm,
            )

            dispatch_cpu_unquantized_gemm(head, remove_weight=False)


class RequireKey:
    """ASGI middleware: every route but /health asks for `$VLLM_API_KEY` as bearer token.

    vLLM asks for it under /v1 and /inference only, while its development routes run code. No route
    is for web pages.
    """

    def __init__(self, app: Asgi) -> None:
        self._app = app
        self._wanted = b"Bearer " + os.environ["VLLM_API_KEY"].encode()

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            headers = {
                k.decode("latin-1").title(): v.decode("latin-1") for k, v in scope["headers"]
            }
            local, _ = scope.get("server") or ("", 0)
            given = headers.get("Authorization", "").encode("latin-1")
            if why := page_refusal(headers, local_address=local):
                await _refuse(send, 403, why)
                return
            if scope["path"] != "/health" and not hmac.compare_digest(given, self._wanted):
                await _refuse(send, 401, "the API key is missing or wrong")
                return
        await self._app(scope, receive, send)


async def _refuse(send: Any, status: int, why: str) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    body = json.dumps({"error": {"message": why}}).encode()
    await send({"type": "http.response.body", "body": body})
