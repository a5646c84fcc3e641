"""Cases of patch_contrast."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.kernels._spec import BF16, Case, Maker, Op, nbytes
from fastssl.kernels.patch_contrast import patch_contrast, reference


def inputs(
    make: Maker,
    dtype: torch.dtype,
    *,
    N: int,
    P: int,
    C: int,
    valid: float = 0.33,
    likeness: float = 0.0,
    strided: bool = False,
    **options: Any,
) -> dict[str, Any]:
    a = make.normal(N, P + 1, C * (2 if strided else 1), dtype=dtype)
    b = likeness * a + make.normal(*a.shape, dtype=dtype)
    mask = make.boolean(N, P, p=valid)
    return {
        "a": a[:, 1:, ::2] if strided else a[:, 1:],  # without CLS
        "b": b.transpose(0, 1).contiguous().transpose(0, 1)[:, 1:, ::2] if strided else b[:, 1:],
        "valid": make.boolean(P, N, p=valid).t() if strided else mask,
        **options,
    }


def min_bytes(inputs: dict[str, Any], outputs: list[Tensor], backward: bool) -> int:
    codes = nbytes(inputs["a"], inputs["b"])
    return (2 * codes if backward else codes) + nbytes(inputs["valid"])


def flops(inputs: dict[str, Any], outputs: list[Tensor], backward: bool) -> int:
    """Of all patches, valid or not; the backward pass: the similarities again, and two products."""
    images, patches, width = inputs["a"].shape
    return (6 if backward else 2) * images * patches**2 * width


def by_library(a: Tensor, b: Tensor, valid: Tensor, temperature: float = 0.2) -> Tensor:
    """Normalisation and torch.bmm in the inputs' type, F.cross_entropy with ignored rows."""
    a, b = F.normalize(a, dim=2), F.normalize(b, dim=2)
    logits = torch.bmm(a, b.transpose(1, 2)) / temperature
    target = torch.where(valid, torch.arange(a.shape[1], device=a.device), -1)
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-1, reduction="sum")


PROOF: dict[str, Case] = {
    "saae, small": {"N": 2, "P": 25, "C": 32},
    "more than one block": {"N": 2, "P": 35, "C": 16, "likeness": 1.0},
    "width padded": {"N": 1, "P": 20, "C": 24, "temperature": 0.07},
    "two patches, two values": {"N": 1, "P": 2, "C": 2, "valid": 1.0},
    "all valid": {"N": 1, "P": 33, "C": 16, "valid": 2.0},
    "none valid": {"N": 2, "P": 17, "C": 16, "valid": 0.0},
    "few valid": {"N": 2, "P": 68, "C": 16, "valid": 0.02},
    "wide": {"N": 1, "P": 5, "C": 300, "valid": 1.0},
    "strided": {"N": 2, "P": 18, "C": 16, "strided": True},
    "no images": {"N": 0, "P": 5, "C": 16},
}

BENCH: dict[str, Case] = {
    "SAAE N=120 P=196 C=256": {"N": 120, "P": 196, "C": 256, "likeness": 0.3},
    "SAAE N=240 P=196 C=256": {"N": 240, "P": 196, "C": 256, "likeness": 0.3},
}

OPS = [
    Op(
        "patch_contrast", patch_contrast, reference.patch_contrast, inputs, PROOF, BENCH, min_bytes, flops, ("a", "b"),
        library={"F.normalize, torch.bmm, F.cross_entropy": by_library},
        tolerance={BF16: (1.2e-2, 3e-2)},  # two roundings; the interpreter's are towards zero
    )
]  # fmt: skip
