"""Cases of unit_rows: outputs of heads, and prototypes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.kernels._spec import FP32, Case, Maker, Op, nbytes
from fastssl.kernels.unit_rows import reference, unit_rows


def inputs(
    make: Maker, dtype: torch.dtype, *, N: int, D: int, gain: bool = False, strided: bool = False, scale: float = 1.0
) -> dict[str, Any]:
    x = (
        make.normal(N, 2 * D, dtype=dtype, scale=scale)[:, ::2]
        if strided
        else make.normal(N, D, dtype=dtype, scale=scale)
    )
    return {"x": x, "gain": make.normal(N, 1) if gain else None}


def min_bytes(inputs: dict[str, Any], outputs: list[Tensor], backward: bool) -> int:
    return nbytes(inputs, outputs) + (nbytes(inputs["x"]) if backward else 0)


def weight_norm(x: Tensor, gain: Tensor | None) -> Tensor:
    unit = F.normalize(x.float(), dim=1)
    return unit if gain is None else unit * gain


PROOF: dict[str, Case] = {
    "rows": {"N": 7, "D": 24},
    "gain": {"N": 37, "D": 16, "gain": True},
    "odd": {"N": 3, "D": 1000, "gain": True},
    "strided": {"N": 5, "D": 33, "strided": True},
    "short rows": {"N": 4, "D": 8, "scale": 1e-4},
    "one of one": {"N": 1, "D": 1},
    "nothing": {"N": 0, "D": 8},
}

BENCH: dict[str, Case] = {
    "SCFS's heads, B=64": {"N": 1920, "D": 256},
    "DINO's bottleneck, B=64": {"N": 640, "D": 256},
    "prototypes": {"N": 65536, "D": 256, "gain": True},
    "wide rows": {"N": 512, "D": 8192},
}

OPS = [
    Op(
        "unit_rows", unit_rows, reference.unit_rows, inputs, PROOF, BENCH, min_bytes, gradients=("x", "gain"),
        library={"F.normalize, product": weight_norm},
        tolerance={FP32: (5e-6, 5e-5)},  # a gradient along the row cancels
    ),
]  # fmt: skip
