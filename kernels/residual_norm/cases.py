"""Cases of residual_norm and residual_add."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.kernels._spec import FP16, FP32, Case, Maker, Op, nbytes
from fastssl.kernels.residual_norm import reference, residual_add, residual_norm


def inputs(
    make: Maker,
    dtype: torch.dtype,
    *,
    B: int,
    N: int,
    D: int,
    stream: torch.dtype | None = FP32,
    branch: bool = True,
    gain: bool = False,
    keep: bool = False,
    parameters: torch.dtype | None = FP32,
    out: torch.dtype | None = None,
    strided: bool = False,
    shift: torch.dtype | bool = False,
    mean: float = 0.0,
) -> dict[str, Any]:
    """A branch, a norm and a shift of the case's type (or of another one), as are stream and parameters where they are
    None; `mean`: of the stream."""

    def rows(dtype: torch.dtype) -> Tensor:
        return make.normal(B, N + 3, D, dtype=dtype)[:, 2:-1] if strided else make.normal(B, N, D, dtype=dtype)

    parameters = parameters or dtype
    factor = make.boolean(B, p=0.7).float() / 0.7 if keep else None
    return {
        "x": rows(stream or dtype) + mean,
        "branch": rows(dtype) if branch else None,
        "gain": make.normal(D, dtype=parameters) if gain else None,
        "keep": factor,
        "weight": make.normal(D, dtype=parameters),
        "bias": make.normal(D, dtype=parameters),
        "eps": 1e-6,
        "out_dtype": out or dtype,
        "shift": make.normal(D, dtype=dtype if shift is True else shift) if shift else None,
    }


def min_bytes(inputs: dict[str, Any], outputs: list[Tensor], backward: bool) -> int:
    x, branch, gain = (inputs[name] for name in ("x", "branch", "gain"))
    if not backward:
        return nbytes(x, branch, outputs[1]) + (nbytes(outputs[0]) if branch is not None else 0)
    read = nbytes(outputs) + nbytes(x) + (nbytes(branch) if gain is not None else 0)
    return read + nbytes(x) + (nbytes(branch) if branch is not None else 0)


def step_by_step(
    x: Tensor, branch: Tensor | None, gain: Tensor | None, keep: Tensor | None, weight: Tensor, bias: Tensor,
    eps: float, out_dtype: torch.dtype, shift: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """PyTorch's own layer norm after the sum, as timm's blocks have it."""
    if branch is not None:
        x = x + reference.scaled(branch, gain, keep, shift)
    return x, F.layer_norm(x.to(weight.dtype), x.shape[-1:], weight, bias, eps).to(out_dtype)


def inputs_of_sum(make: Maker, dtype: torch.dtype, **case: Any) -> dict[str, Any]:
    given = inputs(make, dtype, **case)
    return {name: given[name] for name in ("x", "branch", "gain", "keep", "shift")}


def min_bytes_of_sum(inputs: dict[str, Any], outputs: list[Tensor], backward: bool) -> int:
    x, branch, gain = (inputs[name] for name in ("x", "branch", "gain"))
    if not backward:
        return nbytes(x, branch, outputs)
    return 2 * nbytes(x) + nbytes(branch) * (2 if gain is not None else 1)


PROOF: dict[str, Case] = {
    "sum": {"B": 3, "N": 5, "D": 48},
    "everything": {"B": 4, "N": 3, "D": 40, "gain": True, "keep": True},
    "gain": {"B": 2, "N": 9, "D": 64, "gain": True},
    "keep": {"B": 5, "N": 4, "D": 33, "keep": True},
    "no branch": {"B": 2, "N": 7, "D": 24, "branch": False},
    "stream of the branch's type": {"B": 2, "N": 6, "D": 32, "stream": None, "gain": True, "keep": True},
    "parameters of a short type": {"B": 2, "N": 6, "D": 32, "stream": None, "gain": True, "parameters": None},
    "float32 out": {"B": 2, "N": 5, "D": 56, "gain": True, "keep": True, "out": FP32},
    "strided": {"B": 3, "N": 4, "D": 16, "strided": True, "gain": True},
    "far from zero": {"B": 2, "N": 4, "D": 48, "mean": 50.0},
    "many rows": {"B": 3, "N": 11, "D": 12, "gain": True, "keep": True},
    "shift": {"B": 3, "N": 5, "D": 40, "shift": True},
    "shift and gain": {"B": 2, "N": 9, "D": 24, "shift": True, "gain": True},
    "shift and keep": {"B": 5, "N": 3, "D": 33, "shift": True, "keep": True},
    "shift and everything": {"B": 4, "N": 11, "D": 40, "shift": True, "gain": True, "keep": True},
    "float32 shift": {"B": 3, "N": 6, "D": 32, "shift": FP32, "gain": True, "keep": True},
    "a wide row": {"B": 1, "N": 2, "D": 2048, "gain": True},
    "one row of two": {"B": 1, "N": 1, "D": 2, "gain": True, "keep": True},
    "nothing": {"B": 0, "N": 3, "D": 8, "gain": True, "keep": True},
}

BENCH: dict[str, Case] = {
    "MAE B/16 encoder, B=256": {"B": 256, "N": 50, "D": 768, "shift": True},
    "MAE decoder, B=256": {"B": 256, "N": 197, "D": 512, "shift": True},
    "DINO S/16, B=64 x 2": {"B": 128, "N": 197, "D": 384, "shift": True, "keep": True},
    "CAE B/16, B=128": {"B": 128, "N": 99, "D": 768, "shift": True, "gain": True, "keep": True},
    "L/16 without drops, B=64": {"B": 64, "N": 197, "D": 1024, "shift": True, "gain": True},
    "first norm, B=256": {"B": 256, "N": 50, "D": 768, "branch": False},
    "CAE's last norm, B=128": {"B": 128, "N": 98, "D": 768, "shift": True, "gain": True, "keep": True, "out": FP32},
    "vit_tiny in one type, B=128": {"B": 128, "N": 197, "D": 192, "shift": True, "stream": None, "keep": True},
    "huge, B=16": {"B": 16, "N": 257, "D": 1280, "shift": True, "gain": True, "keep": True},
    "widest, B=16": {"B": 16, "N": 257, "D": 2048, "shift": True, "gain": True, "keep": True},
}

OPS = [
    Op(
        "residual_norm", residual_norm, reference.residual_norm, inputs, PROOF, BENCH, min_bytes,
        gradients=("x", "branch", "gain", "weight", "bias", "shift"), library={"sum, F.layer_norm": step_by_step},
        # Sums over D values that nearly cancel; a sum is rounded once more before its norm is taken.
        tolerance={FP32: (5e-6, 5e-5), FP16: (2e-3, 6e-3)},
    ),
    Op(
        "residual_add", residual_add, reference.residual_add, inputs_of_sum,
        {name: case for name, case in PROOF.items() if case.get("branch", True)},
        {name: case for name, case in BENCH.items() if name.startswith(("MAE d", "DINO", "CAE", "vit"))},
        min_bytes_of_sum, gradients=("x", "branch", "gain", "shift"), tolerance={FP16: (2e-3, 6e-3)},
    ),
]  # fmt: skip
