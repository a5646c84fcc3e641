"""Batch norm of training with what stands around it, residual sum and ReLU, and with its running statistics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastssl.kernels._check import FLOATS, Shapes, check, once
from fastssl.kernels._path import use_triton
from fastssl.kernels.batch_norm_act import reference

NAME = "batch_norm_act"


@dataclass(frozen=True)
class Running:
    """The running statistics of a norm, which a call moves: by each group in order, as PyTorch does.

    Attributes:
        mean, var: [C]; `var` takes the unbiased variances.
        batches: int64 scalar, groups so far; counted up.
        momentum: weight of the newest group.
    """

    mean: Tensor
    var: Tensor
    batches: Tensor
    momentum: float


def takes(xs: list[Tensor], residuals: list[Tensor] | None, together: bool) -> bool:
    """Whether these groups go to the kernel, and so may go to `batch_norm_act` in the place of PyTorch's functions."""
    x = xs[0]
    if len(xs) > 2 or not use_triton(NAME, x) or x.dtype not in FLOATS[:3] or x.ndim not in (2, 4):
        return False
    for group in [*xs, *(residuals or [])]:
        if group.dtype != x.dtype:
            return False
    return together or min(group.numel() for group in xs) > x.shape[1]  # PyTorch knows what it says to single values


def batch_norm_act(
    xs: list[Tensor],
    residuals: list[Tensor] | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running: Running | None,
    eps: float,
    relu: bool,
    together: bool,
) -> list[Tensor]:
    """Batch norm of one or two groups by the statistics of each group, over images and positions.

        for x, residual in zip(xs, residuals):
            y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias + residual  # var biased; None: left out
            if relu:
                y = max(y, 0)

    Two launches forward and two backward, for both groups together. Statistics and sums are float32; they are the same,
    bit for bit, at every run.

    Args:
        xs: [B, C] or [B, C, H, W] each, float32, float16 or bfloat16; B, H and W are a group's own. Contiguous or
            channels_last; the outputs are as the first group.
        residuals: of the same shapes and type. None: none.
        weight, bias: [C], both or neither.
        running: moved in place.
        eps: added to the variance.
        relu: whether a ReLU ends it.
        together: the statistics are those of the groups of all processes. Each process must take part, forward and
            backward; it may have no image.

    Returns:
        What `xs` become.

    Raises:
        KernelError: a shape or type that does not fit.
    """
    count = len(xs)
    check(count in (1, 2), NAME, "xs", "one or two groups", count)
    check(residuals is None or len(residuals) == count, NAME, "residuals", f"{count}, one per group", residuals)
    x, other = xs[0], xs[1] if count == 2 else None
    residual, other_residual = (*residuals, None)[:2] if residuals is not None else (None, None)
    mean, var, batches = (None, None, None) if running is None else (running.mean, running.var, running.batches)
    _check(x, other, residual, other_residual, weight, bias, mean, var)
    if not use_triton(NAME, x) or x.dtype not in FLOATS[:3]:
        check(not together, NAME, "together", "False without the kernel", together)
        return reference.batch_norm_act(xs, residuals, weight, bias, running, eps, relu)
    from fastssl.kernels.batch_norm_act import kernel

    momentum = 0.0 if running is None else running.momentum
    moved = (None, None, None) if torch.compiler.is_compiling() else (mean, var, batches)
    y, other_y, stats = kernel.forward(
        x, other, residual, other_residual, weight, bias, *moved, momentum, eps, relu, together
    )
    if running is not None and moved[0] is None:
        _move(running, stats)
    return [y] if other is None else [y, other_y]


@torch.no_grad()
def _move(running: Running, stats: Tensor) -> None:
    """Moves running statistics outside the kernel: what is traced must show it."""
    channels = running.mean.shape[0]
    for group in stats.unbind(0):
        mean, var, count = group.split([channels, channels, 1])
        running.mean.lerp_(mean.to(running.mean.dtype), running.momentum)
        running.var.lerp_((var * (count / (count - 1).clamp_min(1))).to(running.var.dtype), running.momentum)
    running.batches.add_(len(stats))


@once
def _check(
    x: Tensor, other: Tensor | None, residual: Tensor | None, other_residual: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, mean: Tensor | None, var: Tensor | None,
) -> None:  # fmt: skip
    shapes = Shapes(NAME)
    kind = (x.dtype,) if x.dtype in FLOATS else FLOATS
    shapes("x", x, "B C" if x.ndim == 2 else "B C H W", kind)
    if residual is not None:
        shapes("residual", residual, "B C" if x.ndim == 2 else "B C H W", kind)
    if other is not None:
        shapes("the second x", other, "N C" if x.ndim == 2 else "N C h w", kind)
    if other_residual is not None:
        shapes("the second residual", other_residual, "N C" if x.ndim == 2 else "N C h w", kind)
    check((weight is None) == (bias is None), NAME, "weight", "given together with bias", "one of them alone")
    if weight is not None and bias is not None:
        shapes("weight", weight, "C")
        shapes("bias", bias, "C", (weight.dtype,))
    if mean is not None and var is not None:
        shapes("running mean", mean, "C")
        shapes("running var", var, "C", (mean.dtype,))
