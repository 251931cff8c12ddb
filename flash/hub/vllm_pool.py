"""A pool of vLLM servers."""

from collections.abc import Mapping
from typing import Any, ClassVar

from flash.hub.config import ADAPTER_RANKS
from flash.hub.server_pool import ServerPool

_BLOCK_TOKENS = 32  # the least that attention on a CPU takes


class VllmPool(ServerPool):
    """vLLM API servers; without a GPU those that sleep only pause.

    Args:
        adapter_rank: of the adapters that servers are given; 0: they are given whole weights.
        routed_experts: whether they tell which experts tokens were routed to.
        options: as of every pool of servers.
    """

    _STAGES: ClassVar[Mapping[str, str]] = {
        "Initializing a V1 LLM engine": "vLLM starts its engine",
        "Starting to load model": "vLLM loads the model",
        "Loading model from scratch": "vLLM loads the model",  # the V2 model runner's
        "for vLLM's torch.compile": "vLLM compiles the model, or takes what it compiled before",
        "Capturing CUDA graphs": "vLLM captures CUDA graphs",
    }
    _SERVER = "flash.worker.vllm_server"
    _MODEL, _SEED = "model", "seed"

    def __init__(
        self, model: str, *, adapter_rank: int = 0, routed_experts: bool = False, **options: Any
    ) -> None:
        super().__init__(model, **options)
        self._adapter_rank = adapter_rank
        self._routed_experts = routed_experts

    def _options(self) -> Mapping[str, object]:
        options: dict[str, object] = {
            "dtype": self._dtype,
            "max-model-len": self._max_tokens,
            "max-num-seqs": self._max_running,
            "tensor-parallel-size": self._tensor_parallel,
            # Of the distribution that was sampled from: after the temperature.
            "logprobs-mode": "processed_logprobs",
            # Nothing is sampled but what a request says, whatever the model's files recommend.
            "generation-config": "vllm",
            "worker-extension-cls": "flash.worker.vllm_extension.WeightLoader",
            "middleware": "flash.worker.vllm_extension.RequireKey",
            "enable-scale-out": None,
            "disable-uvicorn-access-log": None,
        }
        if self._devices:
            options["gpu-memory-utilization"] = self._gpu_memory
        else:
            options["num-gpu-blocks-override"] = -(-self._cache_tokens // _BLOCK_TOKENS)
            options["block-size"] = _BLOCK_TOKENS
            options["enforce-eager"] = None
        if self._gives_memory:
            options["enable-sleep-mode"] = None
        if self._adapter_rank:
            options["enable-lora"] = None
            options["max-lora-rank"] = next(r for r in ADAPTER_RANKS if r >= self._adapter_rank)
        if self._routed_experts:
            options["enable-return-routed-experts"] = None
        return options

    def _variables(self) -> Mapping[str, str]:
        variables = {
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_API_KEY": self._api_key,
            "VLLM_NO_USAGE_STATS": "1",
        }
        if self._adapter_rank:
            variables["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
        if not self._devices:
            variables["VLLM_CPU_KVCACHE_SPACE"] = "1"
            variables["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
            # The engine computes itself, as on one GPU. vLLM gives it a process for that on a CPU,
            # to bind its threads: seconds of imports for each server, and nothing is bound here.
            variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        return variables
