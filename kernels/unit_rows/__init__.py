"""Rows of length one: L2 normalisation, as heads have it before their prototypes, and prototypes have it themselves."""

from __future__ import annotations

from torch import Tensor

from fastssl.kernels._check import FLOATS, Shapes, once
from fastssl.kernels._path import use_triton
from fastssl.kernels.unit_rows import reference

NAME = "unit_rows"
WIDEST = 8192  # values that a program of the kernel keeps in registers


def unit_rows(x: Tensor, gain: Tensor | None = None) -> Tensor:
    """Each row over its length (1e-12 at least), times its gain.

    Computed in float32 also under autocast; one launch forward and one backward.

    Args:
        x: [N, D], float32, float16 or bfloat16.
        gain: [N, 1]. None: 1.

    Returns:
        [N, D], float32 (float64 for float64 rows).

    Raises:
        KernelError: a shape or type that does not fit.
    """
    width = _check(x, gain)
    if use_triton(NAME, x) and x.dtype in FLOATS[:3] and width <= WIDEST:
        from fastssl.kernels.unit_rows import kernel

        return kernel.forward(x, gain)[0]
    return reference.unit_rows(x, gain)


@once
def _check(x: Tensor, gain: Tensor | None) -> int:
    """D."""
    shapes = Shapes(NAME)
    width = shapes("x", x, "N D")[1]
    if gain is not None:
        shapes("gain", gain, "N 1")
    return width
