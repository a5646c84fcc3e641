"""Taking out the kept tokens in Triton: each row of each output is written exactly once.

    out[b, k] = tokens[b, ids[b, k]]
    d tokens[b, n] = upstream[b, k] where ids[b, k] = n, or 0 if there is no such k

Letters: B samples, N patches, K kept ones, D width. Backward, a program looks for its patches among all ids of their
sample: a few hundred bytes for some thousands that it writes.
"""

from __future__ import annotations

from functools import cache

import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels._launch import cdiv, launch, power_of_2
from fastssl.kernels._op import op

TILE = 2048  # values that a program moves at once; not measured yet


@triton.jit
def _find(
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
def _length_of(count, b, size, COUNT: tl.constexpr):
    """How many of the `size` rows of sample b are valid."""
    length = size
    if COUNT:
        length = tl.minimum(tl.load(count + b).to(tl.int32), size)
    return length


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
    kept = k < _length_of(count, b, K, COUNT)
    patch = tl.load(ids + b * ib + k * ik, mask=kept, other=0).to(tl.int64)
    mask = kept[:, None] & (lane < D)[None, :]
    x = tl.load(tokens + b * tb + patch[:, None] * tn + lane[None, :] * td, mask=mask, other=0.0)
    at = out + (b * K + k[:, None]) * D + lane[None, :]
    tl.store(at, x, mask=(k < K)[:, None] & (lane < D)[None, :])


@triton.jit
def _gather_backward(
    upstream,  # [B, K, D], strides ub, uk, ud
    ids,
    count,
    gradient,  # [B, N, D], out
    N,
    K,
    blocks,  # of patches per sample
    ub,
    uk,
    ud,
    ib,
    ik,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNT: tl.constexpr,
):
    program = tl.program_id(0)
    b = (program // blocks).to(tl.int64)
    n = program % blocks * ROWS + tl.arange(0, ROWS)
    k = _find(ids, n, b, _length_of(count, b, K, COUNT), ib, ik, ROWS, 64).to(tl.int64)
    for start in range(0, D, BLOCK):
        lane = start + tl.arange(0, BLOCK)
        inside = (lane < D)[None, :]
        at = upstream + b * ub + k[:, None] * uk + lane[None, :] * ud
        x = tl.load(at, mask=(k >= 0)[:, None] & inside, other=0.0)
        tl.store(gradient + (b * N + n[:, None]) * D + lane[None, :], x, mask=(n < N)[:, None] & inside)


@cache
def _blocks(width: int) -> dict[str, int]:
    """Sizes of a tile: at most 256 values of a row, and at most 64 rows that fill it. Not measured yet."""
    block = min(256, power_of_2(width))
    return {"D": width, "ROWS": min(64, TILE // block), "BLOCK": block, "num_warps": 4}


@op("fastssl::gather_tokens")
def gather(tokens: Tensor, ids: Tensor, count: Tensor | None) -> Tensor:
    """The kept tokens [B, K, D]. Saved for the backward pass: ids and count."""
    B, K = ids.shape
    width = tokens.shape[2]
    constants = _blocks(width)
    out = tokens.new_empty(B, K, width)
    blocks = cdiv(K, constants["ROWS"])
    launch(
        _gather, (B * blocks * cdiv(width, constants["BLOCK"]),), tokens, ids, count, out, K, blocks,
        *tokens.stride(), *ids.stride(), COUNT=count is not None, **constants,
    )  # fmt: skip
    return out


@gather.register_fake
def _(tokens, ids, count):
    return tokens.new_empty(*ids.shape, tokens.shape[2])


@op("fastssl::gather_tokens_backward")
def gather_backward(upstream: Tensor, ids: Tensor, count: Tensor | None, num_patches: int) -> Tensor:
    """Gradient of the tokens [B, N, D]; zero in rows that were not taken."""
    B, K, width = upstream.shape
    constants = _blocks(width)
    gradient = upstream.new_empty(B, num_patches, width)
    blocks = cdiv(num_patches, constants["ROWS"])
    launch(
        _gather_backward, (B * blocks,), upstream, ids, count, gradient, num_patches, K, blocks,
        *upstream.stride(), *ids.stride(), COUNT=count is not None, **constants,
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
