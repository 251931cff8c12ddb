"""The weight loader of the tests' vLLM servers: the real one, and a fault for those who ask."""

from pathlib import Path

from flash.worker.checksum import checksum
from flash.worker.vllm_extension import WeightLoader


class FaultyLoader(WeightLoader):
    """Where the directory holds a file `planted`, the packed head keeps its old weights."""

    def load_flash_weights(self, weights_path: str) -> str:
        if not (Path(weights_path) / "planted").exists():
            return super().load_flash_weights(weights_path)
        self.model_runner.reload_weights(weights_path=weights_path)
        return checksum(Path(weights_path))
