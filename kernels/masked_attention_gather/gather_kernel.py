"""Taking out and putting back the kept tokens in Triton: each row of each output is written exactly once.

    gather:  out[b, k] = tokens[b, ids[b, k]] + positions[ids[b, k]]
    scatter: out[b, n] = (x[b, inverse[b, n]] or mask_token where inverse[b, n] = -1) + positions[n]
    d tokens[b, n] = upstream[b, inverse[b, n]] or 0; d positions[n], d mask_token = sums of rows, in a fixed order

Letters: B samples, N patches, K kept ones, D width; S parts into which the sums over B are split.
`inverse` [B, N] holds for every patch its place among the sample's valid ids, -1 if it is not there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels._launch import cdiv, launch, power_of_2
from fastssl.kernels.masked_attention_gather.gather_reference import result_type

TILE = 2048  # values that a program moves at once
PROGRAMS = 2048  # programs wanted where a sum over the batch can be split: enough to fill a large GPU


@triton.jit
def find(
    ids,  # int [B, K], strides ib, ik
    n,  # [ROWS] patches looked for
    b,
    length,  # valid ids of this sample
    ib,
    ik,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The place of each patch among the sample's valid ids, -1 if it is not there: int32 [ROWS]."""
    at = tl.full([ROWS], -1, tl.int32)
    for start in range(0, length, CHUNK):
        place = start + tl.arange(0, CHUNK)
        patch = tl.load(ids + b * ib + place * ik, mask=place < length, other=-1)
        hit = patch[None, :] == n[:, None]
        at = tl.maximum(at, tl.max(tl.where(hit, place[None, :], -1), 1))
    return at


@triton.jit
def length_of(count, b, size, COUNT: tl.constexpr):
    """How many of the `size` rows of sample b are valid."""
    length = size
    if COUNT:
        length = tl.minimum(tl.load(count + b).to(tl.int32), size)
    return length


@triton.jit
def _invert(
    ids,
    count,  # int [B] or nothing
    inverse,  # int32 [B, N], out
    N,
    K,
    blocks,  # programs per sample
    ib,
    ik,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    COUNT: tl.constexpr,
):
    program = tl.program_id(0)
    b = (program // blocks).to(tl.int64)
    n = program % blocks * ROWS + tl.arange(0, ROWS)
    at = find(ids, n, b, length_of(count, b, K, COUNT), ib, ik, ROWS, CHUNK)
    tl.store(inverse + b * N + n, at, mask=n < N)


@triton.jit
def _gather(
    tokens,  # [B, N, D], strides tb, tn, td
    ids,
    positions,  # [N, D], strides pn, pd, or nothing
    count,
    out,  # [B, K, D]
    K,
    blocks,  # of rows per sample
    tb,
    tn,
    td,
    ib,
    ik,
    pn,
    pd,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    POSITIONS: tl.constexpr,
    COUNT: tl.constexpr,
):
    parts: tl.constexpr = (D + BLOCK - 1) // BLOCK  # of a row
    program = tl.program_id(0)
    lane = program % parts * BLOCK + tl.arange(0, BLOCK)
    block = program // parts
    b = (block // blocks).to(tl.int64)
    k = block % blocks * ROWS + tl.arange(0, ROWS)
    kept = k < length_of(count, b, K, COUNT)
    patch = tl.load(ids + b * ib + k * ik, mask=kept, other=0).to(tl.int64)
    mask = kept[:, None] & (lane < D)[None, :]
    x = tl.load(tokens + b * tb + patch[:, None] * tn + lane[None, :] * td, mask=mask, other=0.0).to(tl.float32)
    if POSITIONS:
        x += tl.load(positions + patch[:, None] * pn + lane[None, :] * pd, mask=mask, other=0.0).to(tl.float32)
    at = out + (b * K + k[:, None]) * D + lane[None, :]
    tl.store(at, x.to(out.dtype.element_ty), mask=(k < K)[:, None] & (lane < D)[None, :])


@triton.jit
def _gather_backward(
    upstream,  # [B, K, D], strides ub, uk, ud
    inverse,
    gradient,  # [B, N, D], out
    sums,  # float32 [S, N, D], out: over samples; or nothing
    B,
    N,
    samples,  # of each part
    ub,
    uk,
    ud,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SUM: tl.constexpr,
):
    parts: tl.constexpr = (D + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    lane = program % parts * BLOCK + tl.arange(0, BLOCK)
    n = (program // parts).to(tl.int64)
    split = tl.program_id(1)
    inside = (lane < D)[None, :]
    end = tl.minimum((split + 1) * samples, B)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(split * samples, end, ROWS):
        sample = start + tl.arange(0, ROWS)
        b = sample.to(tl.int64)
        k = tl.load(inverse + b * N + n, mask=sample < end, other=-1).to(tl.int64)
        at = upstream + b[:, None] * ub + k[:, None] * uk + lane[None, :] * ud
        x = tl.load(at, mask=(k >= 0)[:, None] & inside, other=0.0).to(tl.float32)
        at = gradient + (b[:, None] * N + n) * D + lane[None, :]
        tl.store(at, x.to(gradient.dtype.element_ty), mask=(sample < end)[:, None] & inside)
        if SUM:
            total += x
    if SUM:
        tl.store(sums + (split * N + n) * D + lane, tl.sum(total, 0), mask=lane < D)


@triton.jit
def _scatter(
    x,  # [B, K, D], strides xb, xk, xd
    inverse,
    mask_token,  # [D]
    positions,
    out,  # [B, N, D]
    N,
    blocks,
    xb,
    xk,
    xd,
    pn,
    pd,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    parts: tl.constexpr = (D + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    lane = program % parts * BLOCK + tl.arange(0, BLOCK)
    block = program // parts
    b = (block // blocks).to(tl.int64)
    n = (block % blocks * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    k = tl.load(inverse + b * N + n, mask=n < N, other=-1).to(tl.int64)
    kept = (k >= 0)[:, None]
    inside = (lane < D)[None, :]
    y = tl.load(x + b * xb + k[:, None] * xk + lane[None, :] * xd, mask=kept & inside, other=0.0).to(tl.float32)
    y = tl.where(kept, y, tl.load(mask_token + lane, mask=lane < D, other=0.0).to(tl.float32)[None, :])
    mask = (n < N)[:, None] & inside
    if POSITIONS:
        y += tl.load(positions + n[:, None] * pn + lane[None, :] * pd, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + (b * N + n[:, None]) * D + lane[None, :], y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _scatter_backward(
    upstream,  # [B, N, D], strides ub, un, ud
    inverse,
    gradient,  # [B, K, D], out: the kept rows
    masked_sums,  # float32 [S, N, D], out: over samples that lack the patch
    sums,  # float32 [S, N, D], out: over all samples; or nothing
    B,
    N,
    K,
    samples,
    ub,
    un,
    ud,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SUM: tl.constexpr,
):
    parts: tl.constexpr = (D + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    lane = program % parts * BLOCK + tl.arange(0, BLOCK)
    n = (program // parts).to(tl.int64)
    split = tl.program_id(1)
    inside = (lane < D)[None, :]
    end = tl.minimum((split + 1) * samples, B)
    masked = tl.zeros([ROWS, BLOCK], tl.float32)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(split * samples, end, ROWS):
        sample = start + tl.arange(0, ROWS)
        b = sample.to(tl.int64)
        k = tl.load(inverse + b * N + n, mask=sample < end, other=-1).to(tl.int64)
        kept = (k >= 0)[:, None]
        at = upstream + b[:, None] * ub + n * un + lane[None, :] * ud
        x = tl.load(at, mask=(sample < end)[:, None] & inside, other=0.0).to(tl.float32)
        at = gradient + (b[:, None] * K + k[:, None]) * D + lane[None, :]
        tl.store(at, x.to(gradient.dtype.element_ty), mask=kept & inside)
        masked += tl.where(kept, 0.0, x)
        if SUM:
            total += x
    at = (split * N + n) * D + lane
    tl.store(masked_sums + at, tl.sum(masked, 0), mask=lane < D)
    if SUM:
        tl.store(sums + at, tl.sum(total, 0), mask=lane < D)


def _invert_ids(ids: Tensor, count: Tensor | None, num_patches: int) -> Tensor:
    B, K = ids.shape
    inverse = torch.empty(B, num_patches, dtype=torch.int32, device=ids.device)
    blocks = cdiv(num_patches, 64)
    launch(
        _invert, (B * blocks,), ids, count, inverse, num_patches, K, blocks, *ids.stride(),
        ROWS=64, CHUNK=64, COUNT=count is not None, num_warps=4,
    )  # fmt: skip
    return inverse


def _blocks(width: int) -> dict[str, int]:
    """Sizes of a tile: at most 256 values of a row, and as many rows as fill it."""
    block = min(256, power_of_2(width))
    return {"D": width, "ROWS": TILE // block, "BLOCK": block, "num_warps": 4}


def _parts(constants: dict[str, int]) -> int:
    return cdiv(constants["D"], constants["BLOCK"])


def _split(B: int, programs: int, rows: int, *, whole: bool) -> tuple[int, int]:
    """(parts into which the batch is split, samples of each) where a part has `programs` programs.

    Args:
        whole: sums are taken, so parts cost memory: no more than fill the GPU. Otherwise one tile each.
    """
    most = max(1, cdiv(B, rows))
    splits = min(most, max(1, PROGRAMS // max(programs, 1))) if whole else most
    samples = cdiv(cdiv(B, splits), rows) * rows
    return max(1, cdiv(B, max(samples, 1))), samples


def _strides(positions: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if positions is None else positions.stride()


@torch.library.custom_op("fastssl::gather_tokens", mutates_args=())
def gather(tokens: Tensor, ids: Tensor, positions: Tensor | None, count: Tensor | None) -> Tensor:
    """The kept tokens with their positions. Saved for the backward pass: ids and count."""
    B, K = ids.shape
    constants = _blocks(tokens.shape[2])
    out = torch.empty(B, K, tokens.shape[2], dtype=result_type(tokens, positions), device=tokens.device)
    blocks = cdiv(K, constants["ROWS"])
    launch(
        _gather, (B * blocks * _parts(constants),), tokens, ids, positions, count, out, K, blocks,
        *tokens.stride(), *ids.stride(), *_strides(positions),
        POSITIONS=positions is not None, COUNT=count is not None, **constants,
    )  # fmt: skip
    return out


@gather.register_fake
def _(tokens, ids, positions, count):
    return tokens.new_empty(*ids.shape, tokens.shape[2], dtype=result_type(tokens, positions))


@torch.library.custom_op("fastssl::gather_tokens_backward", mutates_args=())
def gather_backward(
    upstream: Tensor,
    ids: Tensor,
    count: Tensor | None,
    num_patches: int,
    dtype: torch.dtype,
    positions_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of the tokens and of the positions; the latter is empty without `positions_dtype`."""
    B, _, width = upstream.shape
    whole = positions_dtype is not None
    constants = _blocks(width)
    programs = num_patches * _parts(constants)
    splits, samples = _split(B, programs, constants["ROWS"], whole=whole)
    inverse = _invert_ids(ids, count, num_patches)
    gradient = torch.empty(B, num_patches, width, dtype=dtype, device=upstream.device)
    sums = torch.empty(splits, num_patches, width, dtype=torch.float32, device=upstream.device) if whole else None
    launch(
        _gather_backward, (programs, splits), upstream, inverse, gradient, sums, B, num_patches, samples,
        *upstream.stride(), SUM=whole, **constants,
    )  # fmt: skip
    return gradient, sums.sum(0).to(positions_dtype) if whole else upstream.new_empty(0)


@gather_backward.register_fake
def _(upstream, ids, count, num_patches, dtype, positions_dtype):
    B, _, width = upstream.shape
    whole = positions_dtype is not None
    positions = upstream.new_empty(num_patches, width, dtype=positions_dtype) if whole else upstream.new_empty(0)
    return upstream.new_empty(B, num_patches, width, dtype=dtype), positions


def _save_gather(ctx, inputs, output):
    tokens, ids, positions, count = inputs
    ctx.save_for_backward(ids, count)
    ctx.num_patches, ctx.dtype = tokens.shape[1], tokens.dtype
    ctx.positions_dtype = None if positions is None else positions.dtype


def _differentiate_gather(ctx, upstream):
    learned = ctx.needs_input_grad[2]
    tokens, positions = gather_backward(
        upstream, *ctx.saved_tensors, ctx.num_patches, ctx.dtype, ctx.positions_dtype if learned else None
    )
    return tokens, None, positions if learned else None, None


gather.register_autograd(_differentiate_gather, setup_context=_save_gather)


@torch.library.custom_op("fastssl::scatter_tokens", mutates_args=())
def scatter(
    x: Tensor, ids: Tensor, mask_token: Tensor, num_patches: int, positions: Tensor | None, count: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Tokens in their places, and the inverse table, int32 [B, N], which the backward pass reads again."""
    B, _, width = x.shape
    constants = _blocks(width)
    inverse = _invert_ids(ids, count, num_patches)
    out = torch.empty(B, num_patches, width, dtype=result_type(x, mask_token, positions), device=x.device)
    blocks = cdiv(num_patches, constants["ROWS"])
    launch(
        _scatter, (B * blocks * _parts(constants),), x, inverse, mask_token.contiguous(), positions, out,
        num_patches, blocks, *x.stride(), *_strides(positions), POSITIONS=positions is not None, **constants,
    )  # fmt: skip
    return out, inverse


@scatter.register_fake
def _(x, ids, mask_token, num_patches, positions, count):
    out = x.new_empty(x.shape[0], num_patches, x.shape[2], dtype=result_type(x, mask_token, positions))
    return out, ids.new_empty(x.shape[0], num_patches, dtype=torch.int32)


@torch.library.custom_op("fastssl::scatter_tokens_backward", mutates_args=())
def scatter_backward(
    upstream: Tensor,
    inverse: Tensor,
    kept: int,
    ragged: bool,
    dtype: torch.dtype,
    mask_dtype: torch.dtype,
    positions_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of the mask token and of the positions; the last is empty without `positions_dtype`.

    With counts, no patch has the rows of x beyond them, so x's gradient is zeroed beforehand.
    """
    B, num_patches, width = upstream.shape
    whole = positions_dtype is not None
    constants = _blocks(width)
    programs = num_patches * _parts(constants)
    splits, samples = _split(B, programs, constants["ROWS"], whole=True)
    gradient = (torch.zeros if ragged else torch.empty)(B, kept, width, dtype=dtype, device=upstream.device)
    sums = torch.empty(1 + whole, splits, num_patches, width, dtype=torch.float32, device=upstream.device)
    launch(
        _scatter_backward, (programs, splits), upstream, inverse, gradient, sums[0], sums[1] if whole else None,
        B, num_patches, kept, samples, *upstream.stride(), SUM=whole, **constants,
    )  # fmt: skip
    positions = sums[1].sum(0).to(positions_dtype) if whole else upstream.new_empty(0)
    return gradient, sums[0].sum((0, 1)).to(mask_dtype), positions


@scatter_backward.register_fake
def _(upstream, inverse, kept, ragged, dtype, mask_dtype, positions_dtype):
    B, num_patches, width = upstream.shape
    whole = positions_dtype is not None
    positions = upstream.new_empty(num_patches, width, dtype=positions_dtype) if whole else upstream.new_empty(0)
    return upstream.new_empty(B, kept, width, dtype=dtype), upstream.new_empty(width, dtype=mask_dtype), positions


def _save_scatter(ctx, inputs, output):
    x, _, mask_token, _, positions, count = inputs
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.options = (x.shape[1], count is not None, x.dtype, mask_token.dtype)
    ctx.positions_dtype = None if positions is None else positions.dtype


def _differentiate_scatter(ctx, upstream, _):
    learned = ctx.needs_input_grad[4]
    x, mask_token, positions = scatter_backward(
        upstream, *ctx.saved_tensors, *ctx.options, ctx.positions_dtype if learned else None
    )
    return x, None, mask_token, None, positions if learned else None, None


scatter.register_autograd(_differentiate_scatter, setup_context=_save_scatter)
