"""Cases of uncrop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastssl.kernels._spec import FP32, Case, Maker, Op, nbytes
from fastssl.kernels.uncrop import reference, uncrop


def inputs(
    make: Maker,
    dtype: torch.dtype,
    *,
    V: int,
    C: int,
    grid: int | tuple[int, int],
    least: int = 1,
    mask_dtype: torch.dtype | None = None,
    strided: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Random boxes with sides of `least` cells or more."""
    rows, columns = reference.sides(grid)
    places = []
    for side in (rows, columns):
        u = make.uniform(2, V)
        n = (least + (u[0] * (side - least + 1)).long()).clamp(1, side)
        places.append(((u[1] * (side - n + 1)).long().clamp_min(0), n))
    (top, height), (left, width) = places
    box = torch.stack([top, left, height, width], 1)
    codes = make.normal(V, rows * columns + 1, C, dtype=dtype)[:, 1:]  # the codes behind a class token
    return {
        "codes": codes if strided else codes.contiguous(),
        "mask_code": make.normal(C, dtype=mask_dtype or dtype),
        "box": box.to(torch.int32) if strided else box,
        "flip": make.boolean(V),
        "grid": grid,
        **options,
    }


def min_bytes(inputs: dict[str, Any], outputs: list[Tensor], backward: bool) -> int:
    return nbytes(inputs["codes"], inputs["box"]) * 2


def einsum(
    codes: Tensor, mask_code: Tensor, box: Tensor, flip: Tensor, grid: int | tuple[int, int], flip_axis: str = "width"
) -> Tensor:
    """vertical codes horizontal^T + outside mask_code, in the codes' type; a mirror is in the horizontal matrices."""
    rows, columns = reference.sides(grid)
    top, left, height, width = box.unbind(1)
    vertical = reference.matrices(top, height, rows, torch.float32).to(codes.dtype)
    horizontal = reference.matrices(left, width, columns, torch.float32).to(codes.dtype)
    if flip_axis == "width":
        horizontal = torch.where(flip[:, None, None], horizontal.flip(2), horizontal)
    else:
        codes = torch.where(flip[:, None, None], codes.flip(2), codes)
    canvas = torch.einsum("vrs,vyx,vsxc->vryc", vertical, horizontal, codes.unflatten(1, (rows, columns)))
    outside = ~reference.seen(box, rows, columns)[..., None]
    return (canvas + outside * mask_code.to(codes.dtype)).flatten(1, 2)


PROOF: dict[str, Case] = {
    "saae": {"V": 3, "C": 48, "grid": 14},
    "several blocks": {"V": 2, "C": 130, "grid": (9, 8)},
    "one cell": {"V": 3, "C": 7, "grid": 1},
    "one row": {"V": 4, "C": 5, "grid": (1, 13)},
    "small boxes": {"V": 6, "C": 16, "grid": 6, "mask_dtype": FP32},
    "channels reversed": {"V": 4, "C": 33, "grid": (5, 3), "flip_axis": "channel"},
    "strided": {"V": 3, "C": 24, "grid": (7, 4), "strided": True},
    "whole frames": {"V": 4, "C": 8, "grid": 8, "least": 8},
    "no views": {"V": 0, "C": 8, "grid": 3},
}

BENCH: dict[str, Case] = {
    "SAAE B=120, two views": {"V": 240, "C": 256, "grid": 14, "least": 4, "strided": True},
    "SAAE, patch 8": {"V": 64, "C": 256, "grid": 28, "least": 8, "strided": True},
    "SAAE, authors' flip": {"V": 240, "C": 256, "grid": 14, "least": 4, "strided": True, "flip_axis": "channel"},
}

OPS = [
    Op(
        "uncrop", uncrop, reference.uncrop, inputs, PROOF, BENCH, min_bytes, gradients=("codes", "mask_code"),
        library={"einsum of separable matrices": einsum},
    )
]  # fmt: skip
