"""A pool of SGLang servers."""

from collections.abc import Mapping
from typing import Any, ClassVar

from flash.hub.server_pool import ServerPool
from flash.hub.sglang_worker import SglangWorker


class SglangPool(ServerPool):
    """SGLang servers, whose `gpu_memory` is for weights, keys and values.

    Args:
        keeps_stale: whether a publish may keep keys and values: steps do not overlap then.
        routed_experts: whether they tell which experts tokens were routed to.
        options: as of every pool of servers.
    """

    _STAGES: ClassVar[Mapping[str, str]] = {
        "Loading safetensors checkpoint shards": "SGLang loads the model",
        "Multi-thread loading shards": "SGLang loads the model",
        "Capturing batches": "SGLang captures CUDA graphs",
    }
    _SERVER = "flash.worker.sglang_server"
    _MODEL, _SEED = "model-path", "random-seed"

    def __init__(
        self,
        model: str,
        *,
        keeps_stale: bool = False,
        routed_experts: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(model, **options)
        self._keeps_stale = keeps_stale
        self._routed_experts = routed_experts

    def _options(self) -> Mapping[str, object]:
        options: dict[str, object] = {
            "dtype": self._dtype,
            "context-length": self._max_tokens,
            "max-running-requests": self._max_running,
            "tp-size": self._tensor_parallel,
            "mem-fraction-static": self._gpu_memory,
            # It would log its arguments, of which one is the key.
            "log-level": "warning",
        }
        if not self._devices:
            options["device"] = "cpu"
            options["attention-backend"] = "torch_native"
            options["max-total-tokens"] = self._cache_tokens
        options["skip-tokenizer-init"] = None
        options["incremental-streaming-output"] = None
        if self._gives_memory:
            options["enable-memory-saver"] = None
        if self._keeps_stale:
            options["disable-overlap-schedule"] = None
        if self._routed_experts:
            options["enable-return-routed-experts"] = None
        return options

    def _variables(self) -> Mapping[str, str]:
        return {
            "SGLANG_API_KEY": self._api_key,
            # Logprobs are of the distribution that was sampled from: after the temperature.
            "SGLANG_RETURN_ORIGINAL_LOGPROB": "false",
        }

    def _client(self, number: int, url: str) -> SglangWorker:
        return SglangWorker(url, api_key=self._api_key)
