"""The weight loader of a server that keeps its weights as one on a GPU does.

On a CPU vLLM packs them, for oneDNN, where nothing can be changed in place.
"""

from vllm import _custom_ops

from flash.worker.vllm_extension import WeightLoader

_custom_ops._supports_onednn = False


class UnpackedLoader(WeightLoader):
    """In another file, which vLLM's workers import before they load a model."""
