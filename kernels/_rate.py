"""How fast this device multiplies matrices: what utilisation is measured against."""

from __future__ import annotations

import time

import torch


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measured floating-point operations per second of a large matrix product on this device."""
    side = (8192 if dtype != torch.float32 else 4096) if device.type == "cuda" else 512
    own = torch.Generator(device).manual_seed(0)  # nothing is drawn from the generator of the training
    a = torch.randn(side, side, device=device, dtype=torch.float32, generator=own).to(dtype)
    out = torch.empty_like(a)

    def seconds(count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count):
            torch.mm(a, a, out=out)
        out[0, 0].item()  # waits for the device
        return time.perf_counter() - begin

    seconds(1)
    return 3 * 2 * side**3 / seconds(3)
