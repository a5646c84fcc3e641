"""Un-crop in Triton: each canvas cell gathers the four codes that it lies between; backward, each code gathers the
canvas cells that read it.

    canvas[i, j] = sum over a, b of y[i, a] x[j, b] codes[a, b] inside the box, mask_code outside
    y[i, a] = max(0, 1 - |(i - top + 1/2) rows / height - 1/2 - a|), x likewise; a mirrored map has columns - 1 - b
    d codes[a, b] = sum over i, j of y[i, a] x[j, b] d canvas[i, j];  d mask_code = sum of d canvas outside the boxes

A box is no larger than the map, so along an axis a canvas cell reads at most two codes and a code is read by at most
two canvas cells: both directions are four loads per value, of which neighbours share all but about one through the
cache. Cells outside the box load nothing, weights of 0 neither. The mask code's gradient is summed per program, then
over the programs: no atomics, so every run gives the same bits.

Letters: V views, S = rows x columns cells of the map and of the canvas, C channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels._launch import cdiv, launch, power_of_2
from fastssl.kernels._op import op


@triton.jit
def _between(place, n, size: tl.constexpr):
    """Cell `place` of n lies between map cells (first, first + 1), at `weight` from the first.

    All in whole numbers up to the last division: no rounding moves a cell, and n = size gives weights of exactly 0.
    """
    x = tl.minimum(tl.maximum((2 * place + 1) * size - n, 0), 2 * n * (size - 1))
    inverse = 1 / (2 * n).to(tl.float32)
    first = ((x.to(tl.float32) + 0.5) * inverse).to(tl.int32)  # floor(x / 2n); the half keeps it off whole numbers
    return first, (x - first * 2 * n).to(tl.float32) * inverse


@triton.jit
def _readers(cell, start, n, size: tl.constexpr):
    """Map cell `cell` is read by cells (first, first + 1) of the n from `start` on; first, and their weights."""
    first = (n * (2 * cell - 1) + size) // (2 * size)
    inverse = 1 / (2 * n).to(tl.float32)
    far = ((2 * first + 1) * size - n - 2 * n * cell).to(tl.float32) * inverse
    weight, further = 1 - tl.abs(far), 1 - tl.abs(far + 2 * size * inverse)
    end = tl.minimum(n, size - start)
    weight = tl.where((weight > 0) & (first < end) & (start + first >= 0), weight, 0.0)
    further = tl.where((further > 0) & (first + 1 < end) & (start + first + 1 >= 0), further, 0.0)
    return start + first, weight, further


@triton.jit
def _place(box, v, cell, columns: tl.constexpr):
    """The box of view v, and where canvas cell `cell` lies in it."""
    top = tl.load(box + v * 4).to(tl.int32)
    left = tl.load(box + v * 4 + 1).to(tl.int32)
    height = tl.load(box + v * 4 + 2).to(tl.int32)
    width = tl.load(box + v * 4 + 3).to(tl.int32)
    row, column = cell // columns - top, cell % columns - left
    seen = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return top, left, height, width, row, column, seen


@triton.jit
def _gather(source, cell, channel, weight, some, in_c):
    """Weighted rows of `source`, float32; rows of weight 0 are not loaded."""
    inside = (some & (weight != 0))[:, None] & in_c[None, :]
    value = tl.load(source + cell[:, None] + channel, mask=inside, other=0.0).to(tl.float32)
    return value * weight[:, None]


@triton.jit
def _forward(
    codes,  # [V, S, C], strides cv, cs, 1
    mask_code,  # [C]
    box,  # int [V, 4]
    flip,  # bool [V]
    canvas,  # [V, S, C], out
    C,
    cv,
    cs,
    rows: tl.constexpr,
    columns: tl.constexpr,
    CHANNEL: tl.constexpr,  # a flip reverses channels instead of columns
    CELLS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks: tl.constexpr = (rows * columns + CELLS - 1) // CELLS
    v = (tl.program_id(0) // blocks).to(tl.int64)
    cell = tl.program_id(0) % blocks * CELLS + tl.arange(0, CELLS)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_s, in_c = cell < rows * columns, c < C
    _, _, height, width, row, column, seen = _place(box, v, cell, columns)
    up, down = _between(row, height, rows)
    near, right = _between(column, width, columns)
    seen = seen & in_s
    flipped = tl.load(flip + v)
    step, channel = 1, c[None, :]
    if CHANNEL:
        channel = tl.where(flipped, C - 1 - c, c)[None, :]
    else:
        near = tl.where(flipped, columns - 1 - near, near)
        step = tl.where(flipped, -1, 1)
    at = codes + v * cv
    first, second = up * columns + near, (up + 1) * columns + near
    value = _gather(at, first.to(tl.int64) * cs, channel, (1 - down) * (1 - right), seen, in_c)
    value += _gather(at, (first + step).to(tl.int64) * cs, channel, (1 - down) * right, seen, in_c)
    value += _gather(at, second.to(tl.int64) * cs, channel, down * (1 - right), seen, in_c)
    value += _gather(at, (second + step).to(tl.int64) * cs, channel, down * right, seen, in_c)
    mask = tl.load(mask_code + c, mask=in_c, other=0.0).to(tl.float32)
    value = tl.where(seen[:, None], value, mask[None, :])
    out = canvas + (v * rows * columns + cell)[:, None] * C + c[None, :]
    tl.store(out, value.to(canvas.dtype.element_ty), mask=in_s[:, None] & in_c[None, :])


@triton.jit
def _backward(
    upstream,  # [V, S, C], strides uv, us, 1
    box,
    flip,
    gradient,  # [V, S, C], out: of the codes
    partial,  # float32 [V blocks, C], out: sums of upstream over the unseen cells of a block
    C,
    uv,
    us,
    rows: tl.constexpr,
    columns: tl.constexpr,
    CHANNEL: tl.constexpr,
    CELLS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks: tl.constexpr = (rows * columns + CELLS - 1) // CELLS
    v = (tl.program_id(0) // blocks).to(tl.int64)
    cell = tl.program_id(0) % blocks * CELLS + tl.arange(0, CELLS)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_s, in_c = cell < rows * columns, c < C
    top, left, height, width, _, _, seen = _place(box, v, cell, columns)
    at = upstream + v * uv
    unseen = (in_s & (seen == 0))[:, None] & in_c[None, :]
    value = tl.load(at + cell.to(tl.int64)[:, None] * us + c[None, :], mask=unseen, other=0.0).to(tl.float32)
    tl.store(partial + tl.program_id(0).to(tl.int64) * C + c, tl.sum(value, 0), mask=in_c)

    flipped = tl.load(flip + v)
    column, channel = cell % columns, c[None, :]
    if CHANNEL:
        channel = tl.where(flipped, C - 1 - c, c)[None, :]
    else:
        column = tl.where(flipped, columns - 1 - column, column)
    row, y0, y1 = _readers(cell // columns, top, height, rows)
    column, x0, x1 = _readers(column, left, width, columns)
    first = row * columns + column
    value = _gather(at, first.to(tl.int64) * us, channel, y0 * x0, in_s, in_c)
    value += _gather(at, (first + 1).to(tl.int64) * us, channel, y0 * x1, in_s, in_c)
    value += _gather(at, (first + columns).to(tl.int64) * us, channel, y1 * x0, in_s, in_c)
    value += _gather(at, (first + columns + 1).to(tl.int64) * us, channel, y1 * x1, in_s, in_c)
    out = gradient + (v * rows * columns + cell)[:, None] * C + c[None, :]
    tl.store(out, value.to(gradient.dtype.element_ty), mask=in_s[:, None] & in_c[None, :])


def _rows(x: Tensor) -> Tensor:
    """The codes with neighbouring channels next to each other in memory."""
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def _tiling(x: Tensor, rows: int, columns: int, channel: bool) -> tuple[tuple[int, int], dict[str, int]]:
    """Programs and constants. Where channels are reversed, every value has an address of its own: fewer per thread."""
    views, _, channels = x.shape
    # 64 channels and 4096 values of a program: not measured yet.
    block = min(power_of_2(channels), 64)
    tile = min(power_of_2(rows * columns), (2048 if channel else 4096) // block)
    grid = (views * cdiv(rows * columns, tile), cdiv(channels, block))
    per_thread = 8 if channel else 64 // x.element_size()
    warps = max(1, min(8, tile * block // (32 * per_thread)))
    constants = {"rows": rows, "columns": columns, "CHANNEL": channel, "CELLS": tile, "BLOCK": block}
    options = {"num_warps": warps, "maxnreg": 96} if channel else {"num_warps": warps}  # no fewer, to spill some
    return grid, constants | options


@op("fastssl::uncrop")
def forward(
    codes: Tensor, mask_code: Tensor, box: Tensor, flip: Tensor, rows: int, columns: int, channel: bool
) -> Tensor:
    """The canvas. Saved for the backward pass: box and flip only."""
    codes, mask_code, box, flip = _rows(codes), mask_code.contiguous(), box.contiguous(), flip.contiguous()
    views, number, channels = codes.shape
    canvas = torch.empty(views, number, channels, dtype=codes.dtype, device=codes.device)
    grid, constants = _tiling(codes, rows, columns, channel)
    launch(_forward, grid, codes, mask_code, box, flip, canvas, channels, *codes.stride()[:2], **constants)
    return canvas


@forward.register_fake
def _(codes, mask_code, box, flip, rows, columns, channel):
    return torch.empty_like(codes, memory_format=torch.contiguous_format)


@op("fastssl::uncrop_backward")
def backward(
    upstream: Tensor, box: Tensor, flip: Tensor, rows: int, columns: int, channel: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the codes and, float32, of the mask code."""
    upstream, box, flip = _rows(upstream), box.contiguous(), flip.contiguous()
    channels = upstream.shape[2]
    gradient = torch.empty(upstream.shape, dtype=upstream.dtype, device=upstream.device)
    grid, constants = _tiling(upstream, rows, columns, channel)
    partial = torch.empty(grid[0], channels, dtype=torch.float32, device=upstream.device)
    launch(_backward, grid, upstream, box, flip, gradient, partial, channels, *upstream.stride()[:2], **constants)
    return gradient, partial.sum(0)


@backward.register_fake
def _(upstream, box, flip, rows, columns, channel):
    gradient = torch.empty_like(upstream, memory_format=torch.contiguous_format)
    return gradient, upstream.new_empty(upstream.shape[2], dtype=torch.float32)


def _save(ctx, inputs, output):
    _, mask_code, box, flip, *ctx.options = inputs
    ctx.dtype = mask_code.dtype
    ctx.save_for_backward(box, flip)


def _differentiate(ctx, upstream):
    codes, mask_code = backward(upstream, *ctx.saved_tensors, *ctx.options)
    return codes, mask_code.to(ctx.dtype), *[None] * 5


forward.register_autograd(_differentiate, setup_context=_save)
