"""Residual sum and layer norm in Triton: one program per row, which is read once and kept in registers.

    s = x + keep gain (branch + shift);  r = 1 / sqrt(var(s) + eps);  h = (s - mean(s)) r;  y = h weight + bias
    g = dy weight;  dx = ds + r (g - mean(g) - h mean(g h));  dbranch = keep gain dx
    dweight = sum of dy h;  dbias = sum of dy;  dgain = sum of keep (branch + shift) dx;  dshift = sum of dbranch,
    over all rows

The backward pass has programs of many rows each; each writes its part of the four sums, a second launch adds the parts
up, in one order. Saved are the sum, mean and r of each row, and the branch where there is a gain.

Letters: B images, N tokens, D channels; a row is one token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels._launch import EXACT, cdiv, launch, power_of_2
from fastssl.kernels._op import op

# Not measured yet.
PROGRAMS = 1024  # of the backward pass at most: 8 per multiprocessor
ROWS = 8  # at least so many per program, so that its part of the sums costs little


@triton.jit
def _forward(
    x,  # [B, N, D]
    branch,  # [B, N, D] or nothing
    shift,  # [D] or nothing
    gain,  # [D] or nothing
    keep,  # [B] or nothing
    weight,  # [D] or nothing: the sum alone; so the next
    bias,
    total,  # [B, N, D], out: s; nothing without a branch
    normed,  # [B, N, D], out
    stats,  # float32 [2, B N], out: mean and r
    rows,  # B N
    N,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,  # overruns the channels
    BRANCH: tl.constexpr,
    SHIFT: tl.constexpr,
    GAIN: tl.constexpr,
    KEEP: tl.constexpr,
    NORM: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    inside = lane < D
    at = row * D + lane
    s = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if BRANCH:
        more = tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
        if SHIFT:
            more += tl.load(shift + lane, mask=inside, other=0.0).to(tl.float32)
        if GAIN:
            more *= tl.load(gain + lane, mask=inside, other=0.0).to(tl.float32)
        if KEEP:
            more *= tl.load(keep + row // N).to(tl.float32)
        stored = (s + more).to(total.dtype.element_ty)
        tl.store(total + at, stored, mask=inside)
        s = stored.to(tl.float32)
    if NORM:
        mean = tl.sum(s, 0) / D
        centred = tl.where(inside, s - mean, 0.0)
        r = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 0) / D + eps)
        w = tl.load(weight + lane, mask=inside, other=0.0).to(tl.float32)
        y = centred * r * w + tl.load(bias + lane, mask=inside, other=0.0).to(tl.float32)
        tl.store(normed + at, y.to(normed.dtype.element_ty), mask=inside)
        tl.store(stats + row, mean)
        tl.store(stats + rows + row, r)


@triton.jit
def _backward(
    total,  # [B, N, D]: s
    branch,  # [B, N, D], where there is a gain
    shift,  # [D] or nothing
    gain,  # [D] or nothing
    keep,  # [B] or nothing
    weight,  # [D] or nothing
    stats,  # float32 [2, B N]
    d_total,  # [B, N, D] or nothing
    d_normed,  # [B, N, D] or nothing
    d_x,  # [B, N, D], out
    d_branch,  # [B, N, D], out, or nothing
    partial,  # float32 [programs, sums, D], out: parts of dweight, dbias (NORM), dgain (GAIN), dshift (SHIFT)
    rows,  # B N
    N,
    each,  # rows of a program
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    TOTAL: tl.constexpr,
    NORMED: tl.constexpr,
    BRANCH: tl.constexpr,
    SHIFT: tl.constexpr,
    GAIN: tl.constexpr,
    KEEP: tl.constexpr,
):
    first = tl.program_id(0) * each
    lane = tl.arange(0, BLOCK)
    inside = lane < D
    if NORMED:
        w = tl.load(weight + lane, mask=inside, other=0.0).to(tl.float32)
    d_weight = tl.zeros([BLOCK], tl.float32)
    d_bias = tl.zeros([BLOCK], tl.float32)
    d_gain = tl.zeros([BLOCK], tl.float32)
    d_shift = tl.zeros([BLOCK], tl.float32)
    if GAIN:
        gains = tl.load(gain + lane, mask=inside, other=0.0).to(tl.float32)
    for n in range(first, min(first + each, rows)):
        row = tl.cast(n, tl.int64)
        at = row * D + lane
        d = tl.zeros([BLOCK], tl.float32)
        if NORMED:
            dy = tl.load(d_normed + at, mask=inside, other=0.0).to(tl.float32)
            s = tl.load(total + at, mask=inside, other=0.0).to(tl.float32)
            r = tl.load(stats + rows + row)
            h = tl.where(inside, (s - tl.load(stats + row)) * r, 0.0)
            d_weight += dy * h
            d_bias += dy
            g = dy * w
            d = (g - tl.sum(g, 0) / D - h * (tl.sum(g * h, 0) / D)) * r
        if TOTAL:
            d += tl.load(d_total + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_x + at, d.to(d_x.dtype.element_ty), mask=inside)
        if KEEP:
            d *= tl.load(keep + n // N).to(tl.float32)  # n, not row: 32 bits take fewer registers
        if SHIFT:
            d_shift += d
        if GAIN:
            d_gain += d * tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
            d *= gains
        if BRANCH:
            tl.store(d_branch + at, d.to(d_branch.dtype.element_ty), mask=inside)
    if SHIFT and GAIN:
        d_gain += d_shift * tl.load(shift + lane, mask=inside, other=0.0).to(tl.float32)
        d_shift *= gains
    norms: tl.constexpr = 2 if NORM else 0
    others: tl.constexpr = norms + 1 if GAIN else norms
    sums: tl.constexpr = others + 1 if SHIFT else others
    out = partial + tl.program_id(0).to(tl.int64) * sums * D + lane
    if NORM:
        tl.store(out, d_weight, mask=inside)
        tl.store(out + D, d_bias, mask=inside)
    if GAIN:
        tl.store(out + norms * D, d_gain, mask=inside)
    if SHIFT:
        tl.store(out + others * D, d_shift, mask=inside)


@triton.jit
def _add_up(
    partial,  # float32 [programs, sums, D]
    first,  # [D], out; so the next three, as many as there are sums
    second,
    third,
    fourth,
    programs,
    D,
    SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    which = tl.program_id(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, programs, ROWS):
        program = start + tl.arange(0, ROWS)
        at = partial + (program * SUMS + which)[:, None].to(tl.int64) * D + column[None, :]
        total += tl.load(at, mask=(program < programs)[:, None] & (column < D)[None, :], other=0.0)
    found = tl.sum(total, 0)
    if which == 0:
        tl.store(first + column, found.to(first.dtype.element_ty), mask=column < D)
    if SUMS > 1 and which == 1:
        tl.store(second + column, found.to(second.dtype.element_ty), mask=column < D)
    if SUMS > 2 and which == 2:
        tl.store(third + column, found.to(third.dtype.element_ty), mask=column < D)
    if SUMS > 3 and which == 3:
        tl.store(fourth + column, found.to(fourth.dtype.element_ty), mask=column < D)


def _sizes(x: Tensor) -> tuple[int, dict[str, int]]:
    """Rows, and the constants of a program."""
    channels = x.shape[2]
    block = power_of_2(channels)
    constants = {"D": channels, "BLOCK": block, "num_warps": max(1, min(8, block // 256))}  # not measured yet
    return x.shape[0] * x.shape[1], constants


@op("fastssl::residual_norm")
def forward(
    x: Tensor, branch: Tensor | None, gain: Tensor | None, keep: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, eps: float, out_dtype: torch.dtype, shift: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Sum (empty without a branch), norm and float32 [2, B N], mean and r of each row (both empty without a weight)."""
    rows, constants = _sizes(x)
    x = x.contiguous()
    vectors = (shift, gain, keep, weight, bias)
    shift, gain, keep, weight, bias = (None if v is None else v.contiguous() for v in vectors)
    total = x.new_empty(0)
    normed, stats = x.new_empty(0), x.new_empty(0)
    if weight is not None:
        normed = torch.empty_like(x, dtype=out_dtype)
        stats = x.new_empty(2, rows, dtype=torch.float32)
    if branch is not None:
        total, branch = torch.empty_like(x), branch.contiguous()
    launch(
        _forward, (rows,), x, branch, shift, gain, keep, weight, bias, total, normed, stats, rows, x.shape[1], eps,
        BRANCH=branch is not None, SHIFT=shift is not None, GAIN=gain is not None, KEEP=keep is not None,
        NORM=weight is not None, **constants, **EXACT,
    )  # fmt: skip
    return total, normed, stats


@forward.register_fake
def _(x, branch, gain, keep, weight, bias, eps, out_dtype, shift):
    total = x.new_empty(0 if branch is None else x.shape)
    if weight is None:
        return total, x.new_empty(0), x.new_empty(0)
    return total, x.new_empty(x.shape, dtype=out_dtype), x.new_empty(2, x.shape[0] * x.shape[1], dtype=torch.float32)


@op("fastssl::residual_norm_backward")
def backward(
    d_total: Tensor | None, d_normed: Tensor | None, total: Tensor, branch: Tensor | None, shift: Tensor | None,
    gain: Tensor | None, keep: Tensor | None, weight: Tensor | None, stats: Tensor, branch_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, branch (empty without a `branch_dtype`), weight, bias (empty without), gain, shift (likewise)."""
    rows, constants = _sizes(total)
    if weight is None:  # no sums along a row, so more threads cost nothing: with half the channels each, none spills
        constants["num_warps"] = max(1, min(16, constants["BLOCK"] // 128))
    total = total.contiguous()
    shift, gain, keep, weight = (None if v is None else v.contiguous() for v in (shift, gain, keep, weight))
    each = max(ROWS, cdiv(rows, PROGRAMS))
    programs = cdiv(rows, each)
    d_x = torch.empty_like(total)
    d_branch = total.new_empty(0) if branch_dtype is None else torch.empty_like(total, dtype=branch_dtype)
    vectors = (weight, weight, gain, shift)
    d_weight, d_bias, d_gain, d_shift = sums = [_like(v, total) for v in vectors]
    results = [d for d, v in zip(sums, vectors, strict=True) if v is not None]
    partial = total.new_empty(programs, len(results), total.shape[2], dtype=torch.float32)
    given = (None if d is None else d.contiguous() for d in (d_total, d_normed))
    launch(
        _backward, (programs,), total, None if branch is None else branch.contiguous(), shift, gain, keep, weight,
        stats, *given, d_x, d_branch, partial, rows, total.shape[1], each,
        NORM=weight is not None, TOTAL=d_total is not None, NORMED=d_normed is not None,
        BRANCH=branch_dtype is not None, SHIFT=shift is not None, GAIN=gain is not None, KEEP=keep is not None,
        **constants, **EXACT,
    )  # fmt: skip
    block = 16
    launch(
        _add_up, (cdiv(total.shape[2], block), len(results)), partial, *(results + [None] * 4)[:4],
        programs, total.shape[2], SUMS=len(results), ROWS=128, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return d_x, d_branch, d_weight, d_bias, d_gain, d_shift


@backward.register_fake
def _(d_total, d_normed, total, branch, shift, gain, keep, weight, stats, branch_dtype):
    d_branch = total.new_empty(0) if branch_dtype is None else total.new_empty(total.shape, dtype=branch_dtype)
    return total.new_empty(total.shape), d_branch, *(_like(v, total) for v in (weight, weight, gain, shift))


def _like(vector: Tensor | None, total: Tensor) -> Tensor:
    return total.new_empty(0) if vector is None else torch.empty_like(vector)


def _save(ctx, inputs, output):
    x, branch, gain, keep, weight, _, _, _, shift = inputs
    total, normed, stats = output
    ctx.branch_dtype = None
    if branch is not None:
        x = total
        if ctx.needs_input_grad[1]:
            ctx.branch_dtype = branch.dtype
    # Neither gain nor keep: the gradients of x and branch are one and the same.
    ctx.shared = gain is None and keep is None and ctx.branch_dtype == x.dtype
    unused = [*([total] if branch is None else []), *([normed] if weight is None else [])]
    ctx.mark_non_differentiable(stats, *unused)
    ctx.save_for_backward(x, None if gain is None else branch, shift, gain, keep, weight, stats)


def _differentiate(ctx, d_total, d_normed, _):
    branch_dtype = None if ctx.shared else ctx.branch_dtype
    d_x, d_branch, d_weight, d_bias, d_gain, d_shift = backward(d_total, d_normed, *ctx.saved_tensors, branch_dtype)
    _, _, shift, gain, _, weight, _ = ctx.saved_tensors
    d_branch = d_x if ctx.shared else None if branch_dtype is None else d_branch
    norm = (None, None) if weight is None else (d_weight, d_bias)
    vectors = (None if gain is None else d_gain, None, *norm, None, None, None if shift is None else d_shift)
    return d_x, d_branch, *vectors


forward.register_autograd(_differentiate, setup_context=_save)
