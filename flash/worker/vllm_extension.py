"""What our vLLM servers have that vLLM has not; each server imports it by name.

`--worker-extension-cls flash.worker.vllm_extension.WeightLoader` adds the method that
`/collective_rpc` calls for new weights; `--middleware flash.worker.vllm_extension.RequireKey`
guards the routes that vLLM's own API key leaves open.
"""

import hmac
import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from flash.system.listener import page_refusal
from flash.worker.checksum import checksum

ADAPTERS = "adapters"  # the name of all versions of them
_ADAPTERS_ID = 1  # which a server gives to the first that it is told of

Scope = MutableMapping[str, Any]
Asgi = Callable[[Scope, Any, Any], Awaitable[None]]


class WeightLoader:
    """Mixed into vLLM's worker class, one in each tensor-parallel rank."""

    model_runner: Any
    device: Any

    def load_flash_weights(self, weights_path: str) -> str:
        """Replace the weights in place by the safetensors in a directory; their checksum."""
        loaded = checksum(Path(weights_path))
        self.model_runner.reload_weights(weights_path=weights_path)
        self._pack_head()
        return loaded

    def load_flash_adapters(self, weights_path: str) -> str:
        """Replace the adapters in place by those in a directory; their checksum."""
        from vllm.lora.request import LoRARequest  # noqa: PLC0415  (in vLLM only)

        loaded = checksum(Path(weights_path))
        self.model_runner.add_lora(
            LoRARequest(ADAPTERS, _ADAPTERS_ID, weights_path, load_inplace=True)
        )
        return loaded

    def load_shared_flash_weights(self, directory: str) -> None:
        """Replace the weights by those that a rank of the trainer's has in this device's memory."""
        # Here, because whoever guards routes needs no torch.
        from flash.worker.shared import shared_weights  # noqa: PLC0415

        with shared_weights(Path(directory), self.device) as tensors:
            self.model_runner.reload_weights(weights_iterator=tensors)
            tensors.clear()
        self._pack_head()

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
