"""Which GPUs there are, from what the system shows."""

import pytest

from flash.system.machine import compute_capability, gpus


@pytest.mark.parametrize(
    ("nodes", "visible", "found"),
    [
        (["nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"], None, [0, 1]),
        ([], None, []),
        ([], "0", []),
        (["nvidia0", "nvidia1"], "", []),
        (["nvidia0", "nvidia1"], "-1", []),
        (["nvidia0", "nvidia1", "nvidia2"], "2, 0,7,1", [2, 0]),  # CUDA stops there
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


@pytest.mark.parametrize(
    ("told", "capability"),
    [
        ("echo 0, GPU-1, NVIDIA H100, 81559, 9.0", (9, 0)),
        ("echo 0, GPU-1, A10, 23028, 8.6; echo 1, GPU-2, T4, 15360, 7.5", (7, 5)),
        ("echo '0, GPU-1, GB10, [N/A], 12.1'", (12, 1)),
        ("echo '0, GPU-1, K80, 11441, [N/A]'", None),
        ("echo NVIDIA-SMI has failed >&2; exit 9", None),
        ("true", None),
        (None, None),
    ],
)
def test_the_oldest_gpu_is_known_by_its_driver(told, capability, tmp_path, monkeypatch):
    if told is not None:
        driver_that_says(told, tmp_path, monkeypatch)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compute_capability() == capability


def driver_that_says(told, folder, monkeypatch):
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{told}\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
