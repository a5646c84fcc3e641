"""Rows of length one in Triton: a program has a few rows, which it reads once and keeps in registers.

    u = x / l, l = max(|x|, 1e-12);  y = gain u;  dx = gain (dy - u (u dy)) / l;  dgain = u dy
    where |x| is less than 1e-12, l is constant: dx = gain dy / l

Letters: N rows, D values of each.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels._launch import EXACT, cdiv, launch, power_of_2
from fastssl.kernels._op import op

EPS = 1e-12  # least length, as in F.normalize


@triton.jit
def _forward(
    x,  # [N, D]
    gain,  # [N] or nothing
    y,  # float32 [N, D], out
    length,  # float32 [N], out: |x|
    N,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,  # overruns D
    ROWS: tl.constexpr,
    GAIN: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, BLOCK)
    real = row < N
    inside = real[:, None] & (lane < D)[None, :]
    at = row.to(tl.int64)[:, None] * D + lane[None, :]
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    size = tl.sqrt_rn(tl.sum(v * v, 1))
    v = v / tl.maximum(size, eps)[:, None]
    if GAIN:
        v *= tl.load(gain + row, mask=real, other=0.0).to(tl.float32)[:, None]
    tl.store(y + at, v, mask=inside)
    tl.store(length + row, size, mask=real)


@triton.jit
def _backward(
    x,  # [N, D]
    gain,  # [N] or nothing
    length,  # float32 [N]
    dy,  # float32 [N, D]
    dx,  # [N, D], out
    d_gain,  # [N], out, or nothing
    N,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    GAIN: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, BLOCK)
    real = row < N
    inside = real[:, None] & (lane < D)[None, :]
    at = row.to(tl.int64)[:, None] * D + lane[None, :]
    size = tl.load(length + row, mask=real, other=1.0)
    v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) / tl.maximum(size, eps)[:, None]
    g = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    along = tl.sum(v * g, 1)
    if GAIN:
        tl.store(d_gain + row, along.to(d_gain.dtype.element_ty), mask=real)
    g -= v * tl.where(size < eps, 0.0, along)[:, None]
    if GAIN:
        g *= tl.load(gain + row, mask=real, other=0.0).to(tl.float32)[:, None]
    tl.store(dx + at, (g / tl.maximum(size, eps)[:, None]).to(dx.dtype.element_ty), mask=inside)


def _sizes(x: Tensor) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and constants; not measured yet."""
    block = power_of_2(x.shape[1])
    rows = max(1, 1024 // block)
    constants = {"D": x.shape[1], "BLOCK": block, "ROWS": rows, "num_warps": max(4, min(16, block // 512)), **EXACT}
    return (cdiv(len(x), rows),), constants


@op("fastssl::unit_rows")
def forward(x: Tensor, gain: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows, float32, and their lengths before."""
    x = x.contiguous()
    gain = None if gain is None else gain.contiguous()
    y, length = torch.empty_like(x, dtype=torch.float32), x.new_empty(len(x), dtype=torch.float32)
    grid, constants = _sizes(x)
    launch(_forward, grid, x, gain, y, length, len(x), EPS, GAIN=gain is not None, **constants)
    return y, length


@forward.register_fake
def _(x, gain):
    return x.new_empty(x.shape, dtype=torch.float32), x.new_empty(x.shape[0], dtype=torch.float32)


@op("fastssl::unit_rows_backward")
def backward(dy: Tensor, x: Tensor, gain: Tensor | None, length: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of rows and gain (empty without)."""
    x, dy = x.contiguous(), dy.contiguous()
    gain = None if gain is None else gain.contiguous()
    dx, d_gain = torch.empty_like(x), x.new_empty(0) if gain is None else torch.empty_like(gain)
    grid, constants = _sizes(x)
    launch(_backward, grid, x, gain, length, dy, dx, d_gain, len(x), EPS, GAIN=gain is not None, **constants)
    return dx, d_gain


@backward.register_fake
def _(dy, x, gain, length):
    return x.new_empty(x.shape), x.new_empty(0) if gain is None else torch.empty_like(gain)


def _save(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, output[1])


def _differentiate(ctx, dy, _):
    dx, d_gain = backward(dy, *ctx.saved_tensors)
    return dx, d_gain if ctx.needs_input_grad[1] else None


forward.register_autograd(_differentiate, setup_context=_save)
