"""Which GPUs there are, from what the system shows."""

import pytest

from flash.system.machine import gpus


@pytest.mark.parametrize(
    ("nodes", "visible", "found"),
    [
        (["nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"], None, [0, 1]),
        ([], None, []),
        ([], "0", []),
        (["nvidia0", "nvidia1"], "", []),
        (["nvidia0", "nvidia1"], "-1", []),
        (["nvidia0", "nvidia1", "nvidia2"], "2, 0,7", [2, 0]),
        # A container's devices keep their host's numbers, and CUDA counts from 0.
        (["nvidia3", "nvidia5"], None, [0, 1]),
        (["nvidia3"], "0", [0]),
        (["nvidia0"], "GPU-8932f937,MIG-41b3359c", ["GPU-8932f937", "MIG-41b3359c"]),
    ],
)
def test_gpus_are_named_as_cuda_names_them(nodes, visible, found, tmp_path, monkeypatch):
    for node in nodes:
        (tmp_path / node).touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpus(tmp_path) == found
