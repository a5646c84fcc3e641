"""Cases of batch_norm_act: layers of a ResNet-50 and of heads, alone and as SCFS's two groups of crops."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.kernels._spec import FP16, FP32, Case, Maker, Op, nbytes
from fastssl.kernels.batch_norm_act import Running, batch_norm_act, reference

Group = tuple[int, ...]  # images, height and width; images alone for [B, C]


def inputs(
    make: Maker,
    dtype: torch.dtype,
    *,
    C: int,
    groups: list[Group],
    layout: str = "last",
    residual: bool = False,
    relu: bool = True,
    affine: bool = True,
    running: bool = True,
    parameters: torch.dtype | None = FP32,
    shift: float = 0.0,
) -> dict[str, Any]:
    """Groups of the case's type, as are weight and bias with `parameters` None; layout "last" (channels innermost),
    "first" (contiguous), "sliced" (neither); `shift`: the mean."""

    def maps() -> list[Tensor]:
        return [_map(make, dtype, group[0], C, group[1:], layout) for group in groups]

    given: dict[str, Any] = {
        "xs": [x + shift for x in maps()] if shift else maps(),
        "residuals": maps() if residual else None,
        "weight": make.normal(C, dtype=parameters or dtype) if affine else None,
        "bias": make.normal(C, dtype=parameters or dtype) if affine else None,
    }
    names = ("mean", "var", "batches")
    start = (make.normal(C), make.uniform(C, low=0.5, high=2.0), make.integers(1, high=9)[0])
    given |= dict(zip(names, start if running else (None,) * 3, strict=True))
    return given | {"momentum": 0.1, "eps": 1e-5, "relu": relu}


def _map(make: Maker, dtype: torch.dtype, images: int, channels: int, side: Group, layout: str) -> Tensor:
    if layout == "sliced":
        return make.normal(images, channels, *side[:-1], 2 * side[-1], dtype=dtype)[..., ::2]
    if layout == "last":
        return make.normal(images, *side, channels, dtype=dtype).movedim(-1, 1)
    return make.normal(images, channels, *side, dtype=dtype)


def called(
    f: Any, xs: list[Tensor], residuals: list[Tensor] | None, weight: Tensor | None, bias: Tensor | None,
    mean: Tensor | None, var: Tensor | None, batches: Tensor | None, momentum: float, eps: float, relu: bool,
) -> list[Tensor]:  # fmt: skip
    """`f` with the running statistics as one value; they are in the outputs too."""
    if mean is None or var is None or batches is None:
        return f(xs, residuals, weight, bias, None, eps, relu, False)
    mean, var, batches = mean.clone(), var.clone(), batches.clone()
    out = f(xs, residuals, weight, bias, Running(mean, var, batches, momentum), eps, relu, False)
    return [*out, mean, var, batches]


def ours(**given: Any) -> list[Tensor]:
    return called(batch_norm_act, **given)


def expected(**given: Any) -> list[Tensor]:
    return called(reference.batch_norm_act, **given)


def step_by_step(
    xs: list[Tensor], residuals: list[Tensor] | None, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None,
    var: Tensor | None, batches: Tensor | None, momentum: float, eps: float, relu: bool,
) -> list[Tensor]:  # fmt: skip
    """PyTorch's (cuDNN's) batch norm, then sum and ReLU, in place."""
    out = []
    for i, x in enumerate(xs):
        y = F.batch_norm(x, mean, var, weight, bias, True, momentum, eps)
        out.append(reference.ended(y, None if residuals is None else residuals[i], relu))
    return out


def min_bytes(inputs: dict[str, Any], outputs: list[Tensor], backward: bool) -> int:
    """Statistics and sums need a pass of their own, so what they are of is read twice."""
    xs, residuals, relu = (inputs[name] for name in ("xs", "residuals", "relu"))
    if not backward:
        return 3 * nbytes(xs) + nbytes(residuals)
    return (5 + (2 if relu else 0)) * nbytes(xs) + (nbytes(residuals) if relu else 0)


PROOF: dict[str, Case] = {
    "ReLU": {"C": 24, "groups": [(3, 5, 4)]},
    "block's end": {"C": 40, "groups": [(2, 7, 3)], "residual": True},
    "norm alone": {"C": 33, "groups": [(2, 3, 3)], "relu": False},
    "sum alone": {"C": 16, "groups": [(2, 3, 5)], "residual": True, "relu": False},
    "two groups": {"C": 20, "groups": [(2, 6, 5), (5, 3, 2)], "residual": True},
    "two groups, contiguous": {"C": 70, "groups": [(3, 4, 4), (2, 5, 7)], "residual": True, "layout": "first"},
    "contiguous": {"C": 7, "groups": [(3, 9, 2)], "layout": "first"},
    "strided": {"C": 6, "groups": [(3, 4, 3), (2, 2, 1)], "layout": "sliced", "residual": True},
    "vectors": {"C": 50, "groups": [(37,)]},
    "two groups of vectors": {"C": 130, "groups": [(9,), (300,)], "relu": False},
    "neither gain nor bias": {"C": 12, "groups": [(11,)], "affine": False, "relu": False},
    "no running statistics": {"C": 12, "groups": [(2, 3, 3)], "running": False},
    "parameters of the type": {"C": 8, "groups": [(2, 3, 3)], "parameters": None},
    "one channel": {"C": 1, "groups": [(2, 3, 3)], "residual": True},
    "far from zero": {"C": 8, "groups": [(4, 6, 6)], "shift": 50.0, "relu": False},
    "several programs": {"C": 3, "groups": [(9, 19, 17), (5, 13, 13)], "residual": True},
    "several programs, contiguous": {"C": 3, "groups": [(9, 19, 17)], "layout": "first"},
}

BENCH: dict[str, Case] = {
    "stem, B=32": {"C": 64, "groups": [(64, 112, 112), (256, 48, 48)]},
    "stage 1, B=32": {"C": 64, "groups": [(64, 56, 56), (256, 24, 24)]},
    "stage 1's end, B=32": {"C": 256, "groups": [(64, 56, 56), (256, 24, 24)], "residual": True},
    "stage 1's downsampling, B=32": {"C": 256, "groups": [(64, 56, 56), (256, 24, 24)], "relu": False},
    "stage 3's end, B=32": {"C": 1024, "groups": [(64, 14, 14), (256, 6, 6)], "residual": True},
    "stage 4's end, B=32": {"C": 2048, "groups": [(64, 7, 7), (256, 3, 3)], "residual": True},
    "teacher, stage 2's end, B=32": {"C": 512, "groups": [(64, 28, 28)], "residual": True},
    "teacher, stage 2, contiguous": {"C": 512, "groups": [(32, 28, 28)], "layout": "first", "residual": True},
    "teacher, stage 2, contiguous norm": {"C": 512, "groups": [(32, 28, 28)], "layout": "first"},
    "stage head": {"C": 2048, "groups": [(64,), (256,)]},
    "stage head, traced": {"C": 2048, "groups": [(64,), (256,)], "running": False},
    "SAAE's projector": {"C": 4096, "groups": [(12608,)]},
    "SAAE's code": {"C": 256, "groups": [(12608,)], "affine": False, "relu": False},
    "SiT's head in one type": {"C": 4096, "groups": [(64,)], "relu": False, "parameters": None},
}

OPS = [
    Op(
        "batch_norm_act", ours, expected, inputs, PROOF, BENCH, min_bytes,
        gradients=("xs", "residuals", "weight", "bias"), library={"F.batch_norm, sum, ReLU": step_by_step},
        # Sums over all values of a channel that nearly cancel.
        tolerance={FP32: (1e-5, 1e-4), FP16: (2e-3, 6e-3)},
    ),
]  # fmt: skip
