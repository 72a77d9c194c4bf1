"""What a GPU tells of itself while it computes."""

from __future__ import annotations

import time

import pytest
import torch

from launcher.train.system import Machine

pytestmark = pytest.mark.gpu


def test_gpus_tell_their_use_memory_power_and_energy() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    pytest.importorskip("pynvml", reason="needs nvidia-ml-py")
    machine = Machine()
    first = machine.look()["gpus"][0]
    square = torch.randn(8192, 8192, device="cuda")
    ends = time.monotonic() + 3
    while time.monotonic() < ends:
        square = square @ square / 100
        torch.cuda.synchronize()
    last = machine.look()["gpus"][0]
    machine.close()
    assert last["percent"] > 80
    assert last["memory_bytes"] - first["memory_bytes"] > 200 << 20
    assert last["power_w"] > first["power_w"]
    assert last["energy_j"] > 100
