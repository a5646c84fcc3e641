"""What stands between two branches of a transformer: the residual sum and the layer norm of it, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.kernels._check import FLOATS, Shapes, check, once
from fastssl.kernels._path import use_triton
from fastssl.kernels.residual_norm import reference

NAME = "residual_norm"
WIDEST = 8192  # channels that a program of the kernel keeps in registers


def residual_norm(
    x: Tensor,
    branch: Tensor | None,
    gain: Tensor | None,
    keep: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    out_dtype: torch.dtype,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The stream with a branch added to it, and the layer norm of that sum (pre-norm transformers).

        s = x + keep[b] * gain * (branch + shift)  # what is None is left out
        normed = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias  # over the channels, var biased

    Computed in float32 also under autocast; the sum has x's type, and what is normed is the sum as it is stored.

    Args:
        x: [B, N, D], float32, float16 or bfloat16: the residual stream.
        branch: [B, N, D], float of any type. None: nothing is added, and the sum is x itself.
        gain: [D], layer scale.
        keep: [B], stochastic depth: 0 where the branch is dropped, else one over the share that is kept. No gradient.
        weight, bias: [D], of the norm, of one type.
        eps: added to the variance.
        out_dtype: of the norm: what the next matrix product takes.
        shift: [D], float of any type: the bias of the linear layer that made the branch without it. Its gradient is
            found with those of gain, weight and bias; in the layer it would cost a launch of its own.

    Returns:
        The sum, and its norm, [B, N, D] both.

    Raises:
        KernelError: a shape or type that does not fit.
    """
    channels = _check(x, branch, gain, keep, weight, bias, out_dtype, shift)
    if use_triton(NAME, x) and x.dtype in FLOATS[:3] and channels <= WIDEST:
        from fastssl.kernels.residual_norm import kernel

        total, normed, _ = kernel.forward(x, branch, gain, keep, weight, bias, eps, out_dtype, shift)
        return x if branch is None else total, normed
    return reference.residual_norm(x, branch, gain, keep, weight, bias, eps, out_dtype, shift)


def residual_add(
    x: Tensor, branch: Tensor, gain: Tensor | None, keep: Tensor | None, shift: Tensor | None = None
) -> Tensor:
    """`residual_norm`'s sum alone, [B, N, D].

    Raises:
        KernelError: a shape or type that does not fit.
    """
    channels = _check(x, branch, gain, keep, None, None, x.dtype, shift)
    if use_triton(NAME, x) and x.dtype in FLOATS[:3] and channels <= WIDEST:
        from fastssl.kernels.residual_norm import kernel

        return kernel.forward(x, branch, gain, keep, None, None, 0.0, x.dtype, shift)[0]
    return reference.residual_add(x, branch, gain, keep, shift)


@once
def _check(
    x: Tensor, branch: Tensor | None, gain: Tensor | None, keep: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, out_dtype: torch.dtype, shift: Tensor | None,
) -> int:  # fmt: skip
    """The number of channels."""
    shapes = Shapes(NAME)
    channels = shapes("x", x, "B N D")[2]
    alone = gain is None and keep is None and shift is None
    check(branch is not None or alone, NAME, "gain, keep and shift", "None where branch is None", "given")
    if branch is not None:
        shapes("branch", branch, "B N D")
    if gain is not None:
        shapes("gain", gain, "D")
    if shift is not None:
        shapes("shift", shift, "D")
    if keep is not None:
        shapes("keep", keep, "B")
    if weight is not None and bias is not None:
        shapes("weight", weight, "D")
        shapes("bias", bias, "D", (weight.dtype,))
    check(out_dtype in FLOATS, NAME, "out_dtype", "a floating-point type", out_dtype)
    return channels
