"""Taking out the kept tokens in Triton: each row of each output is written exactly once.

    out[b, k] = tokens[b, ids[b, k]]
    d tokens[b, n] = upstream[b, inverse[b, n]], or 0 where inverse[b, n] = -1

Letters: B samples, N patches, K kept ones, D width.
`inverse` [B, N] holds for every patch its place among the sample's valid ids, -1 if it is not there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels._launch import cdiv, launch, power_of_2

TILE = 2048  # values that a program moves at once; not measured yet


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
    count,
    out,  # [B, K, D]
    K,
    blocks,  # of rows per sample
    tb,
    tn,
    td,
    ib,
    ik,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
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
    x = tl.load(tokens + b * tb + patch[:, None] * tn + lane[None, :] * td, mask=mask, other=0.0)
    at = out + (b * K + k[:, None]) * D + lane[None, :]
    tl.store(at, x, mask=(k < K)[:, None] & (lane < D)[None, :])


@triton.jit
def _gather_backward(
    upstream,  # [B, K, D], strides ub, uk, ud
    inverse,
    gradient,  # [B, N, D], out
    B,
    N,
    ub,
    uk,
    ud,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    parts: tl.constexpr = (D + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    lane = program % parts * BLOCK + tl.arange(0, BLOCK)
    n = (program // parts).to(tl.int64)
    b = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = (lane < D)[None, :]
    k = tl.load(inverse + b * N + n, mask=b < B, other=-1).to(tl.int64)
    at = upstream + b[:, None] * ub + k[:, None] * uk + lane[None, :] * ud
    x = tl.load(at, mask=(k >= 0)[:, None] & inside, other=0.0)
    at = gradient + (b[:, None] * N + n) * D + lane[None, :]
    tl.store(at, x, mask=(b < B)[:, None] & inside)


def _invert_ids(ids: Tensor, count: Tensor | None, num_patches: int) -> Tensor:
    B, K = ids.shape
    inverse = torch.empty(B, num_patches, dtype=torch.int32, device=ids.device)
    blocks = cdiv(num_patches, 64)  # 64 patches against 64 ids at a time: not measured yet
    launch(
        _invert, (B * blocks,), ids, count, inverse, num_patches, K, blocks, *ids.stride(),
        ROWS=64, CHUNK=64, COUNT=count is not None, num_warps=4,
    )  # fmt: skip
    return inverse


def _blocks(width: int) -> dict[str, int]:
    """Sizes of a tile: at most 256 values of a row, and as many rows as fill it. Not measured yet."""
    block = min(256, power_of_2(width))
    return {"D": width, "ROWS": TILE // block, "BLOCK": block, "num_warps": 4}


@torch.library.custom_op("fastssl::gather_tokens", mutates_args=())
def gather(tokens: Tensor, ids: Tensor, count: Tensor | None) -> Tensor:
    """The kept tokens [B, K, D]. Saved for the backward pass: ids and count."""
    B, K = ids.shape
    width = tokens.shape[2]
    constants = _blocks(width)
    out = torch.empty(B, K, width, dtype=tokens.dtype, device=tokens.device)
    blocks = cdiv(K, constants["ROWS"])
    launch(
        _gather, (B * blocks * cdiv(width, constants["BLOCK"]),), tokens, ids, count, out, K, blocks,
        *tokens.stride(), *ids.stride(), COUNT=count is not None, **constants,
    )  # fmt: skip
    return out


@gather.register_fake
def _(tokens, ids, count):
    return tokens.new_empty(*ids.shape, tokens.shape[2])


@torch.library.custom_op("fastssl::gather_tokens_backward", mutates_args=())
def gather_backward(upstream: Tensor, ids: Tensor, count: Tensor | None, num_patches: int) -> Tensor:
    """Gradient of the tokens [B, N, D]; zero in rows that were not taken."""
    B, _, width = upstream.shape
    constants = _blocks(width)
    inverse = _invert_ids(ids, count, num_patches)
    gradient = torch.empty(B, num_patches, width, dtype=upstream.dtype, device=upstream.device)
    launch(
        _gather_backward, (num_patches * cdiv(width, constants["BLOCK"]), cdiv(B, constants["ROWS"])),
        upstream, inverse, gradient, B, num_patches, *upstream.stride(), **constants,
    )  # fmt: skip
    return gradient


@gather_backward.register_fake
def _(upstream, ids, count, num_patches):
    return upstream.new_empty(upstream.shape[0], num_patches, upstream.shape[2])


def _save(ctx, inputs, output):
    tokens, ids, count = inputs
    ctx.save_for_backward(ids, count)
    ctx.num_patches = tokens.shape[1]


def _differentiate(ctx, upstream):
    return gather_backward(upstream, *ctx.saved_tensors, ctx.num_patches), None, None


gather.register_autograd(_differentiate, setup_context=_save)
