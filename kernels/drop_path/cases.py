"""Cases of drop_path."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastssl.kernels._spec import FP32, Case, Maker, Op, nbytes
from fastssl.kernels.drop_path import drop_path, reference


def inputs(
    make: Maker, dtype: torch.dtype, *, B: int, layers: int, rate: float = 0.3, copies: int = 1, together: int = 1,
    clock: bool = False, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    step = make.integers(high=2**31) if clock else 2**31 + 5
    return {
        "ids": make.integers(B, high=2**32), "rate": rate, "layers": layers, "rows": B * copies * together,
        "seed": 7, "step": step, "key": 0xC0FFEE42, "together": together, **options,
    }  # fmt: skip


def by_numbers(
    ids: Tensor, rate: float, layers: int, rows: int, seed: int, step: int | Tensor, key: int, together: int,
    first: int = 0,
) -> Tensor:  # fmt: skip
    """The reference, called as the op is."""
    return reference.drop_path(ids, step, round(rate * 2**32), layers, rows, seed, key, together, first)


def by_torch(ids: Tensor, rate: float, layers: int, rows: int, **rest: Any) -> Tensor:
    """The same shares from PyTorch's own generator."""
    kept = 1 - torch.linspace(0, rate, layers, device=ids.device).repeat_interleave(2)[:, None]
    return torch.rand(2 * layers, rows, device=ids.device).lt(kept) / kept


def min_bytes(inputs: dict[str, Any], outputs: list[Tensor], backward: bool) -> int:
    return nbytes(inputs["ids"], outputs)


PROOF: dict[str, Case] = {
    "one crop": {"B": 9, "layers": 4},
    "crops of an image side by side": {"B": 5, "layers": 3, "together": 3, "first": 2},
    "all images, then all again": {"B": 6, "layers": 2, "copies": 2},
    "both": {"B": 3, "layers": 2, "copies": 2, "together": 4, "first": 1},
    "step on the device": {"B": 7, "layers": 3, "clock": True},
    "one layer": {"B": 8, "layers": 1, "rate": 0.9},
    "all of the last": {"B": 8, "layers": 3, "rate": 1.0},
    "nothing dropped": {"B": 4, "layers": 2, "rate": 0.0},
    "more than a program": {"B": 90, "layers": 12, "rate": 0.5},
    "no images": {"B": 0, "layers": 2},
}

BENCH: dict[str, Case] = {
    "MAE, B=256": {"B": 256, "layers": 12, "rate": 0.1},
    "DINO's small crops, B=64": {"B": 64, "layers": 12, "rate": 0.1, "together": 8, "first": 2, "clock": True},
}

OPS = [Op("drop_path", drop_path, by_numbers, inputs, PROOF, BENCH, min_bytes, dtypes=(FP32,),
          library={"torch.rand": by_torch})]  # fmt: skip
