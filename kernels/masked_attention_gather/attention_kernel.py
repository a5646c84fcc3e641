"""Attention over named rows in Triton: keys, values and queries are read through ids, nothing is gathered in memory.

    s = scale q[q_ids] k[kv_ids]^T,  p = exp(s - lse),  out = p v[kv_ids]      (keys block by block, softmax online)
    dp = upstream v^T,  ds = p (dp - delta),  delta = sum(upstream * out)
    dq = scale ds k,  dk = scale ds^T q,  dv = p^T upstream                     (p is computed anew)

Letters: B samples, H heads, N rows of k and v (Nq of q), Kk named ones (Kq of q), d head width, padded to D.
Scores and lse are kept in units of log 2. Outputs and gradients lie in memory as [B, rows, H, d].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels._launch import cdiv, launch, power_of_2
from fastssl.kernels.masked_attention_gather.gather_kernel import find, length_of

LOG2E = 1.4426950408889634


@triton.jit
def _rows(
    ids,  # int [B, K], strides ib, ik, or nothing
    b,
    place,  # [ROWS] among the ids
    valid,  # place is before the count: only there ids are read
    ib,
    ik,
    IDS: tl.constexpr,
):
    """The rows that the places name, int64."""
    row = place.to(tl.int64)
    if IDS:
        row = tl.load(ids + b * ib + place * ik, mask=valid, other=0).to(tl.int64)
    return row


@triton.jit
def _forward(
    q,  # [B, H, Nq, d], strides qb, qh, qn, 1
    k,  # [B, H, N, d]
    v,
    q_ids,
    kv_ids,
    q_count,  # int [B] or nothing
    kv_count,
    out,  # [B, Kq, H, d]
    lse,  # float32 [B, H, Kq], out; rows beyond the count are left as they are
    scale2,  # of the scores, times log2(e)
    H,
    Kq,
    Kk,
    blocks,  # of queries per head
    qb,
    qh,
    qn,
    kb,
    kh,
    kn,
    vb,
    vh,
    vn,
    qib,
    qik,
    kib,
    kik,
    d: tl.constexpr,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    Q_IDS: tl.constexpr,
    KV_IDS: tl.constexpr,
    Q_COUNT: tl.constexpr,
    KV_COUNT: tl.constexpr,
):
    program = tl.program_id(0)
    head = (program // blocks).to(tl.int64)
    b = head // H
    h = head % H
    i = program % blocks * QUERIES + tl.arange(0, QUERIES)
    lane = tl.arange(0, D)
    inside = (lane < d)[None, :]
    queries = length_of(q_count, b, Kq, Q_COUNT)
    if program % blocks * QUERIES >= queries:
        at = out + ((b * Kq + i[:, None]) * H + h) * d + lane[None, :]
        tl.store(at, tl.zeros([QUERIES, D], out.dtype.element_ty), mask=(i < Kq)[:, None] & inside)
        return
    keys = length_of(kv_count, b, Kk, KV_COUNT)
    asked = i < queries
    row = _rows(q_ids, b, i, asked, qib, qik, Q_IDS)
    query = tl.load(q + b * qb + h * qh + row[:, None] * qn + lane[None, :], mask=asked[:, None] & inside, other=0.0)
    k += b * kb + h * kh
    v += b * vb + h * vh

    top = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    mixed = tl.zeros([QUERIES, D], tl.float32)
    for start in range(0, keys, KEYS):
        j = start + tl.arange(0, KEYS)
        there = j < keys
        key_row = _rows(kv_ids, b, j, there, kib, kik, KV_IDS)
        mask = there[:, None] & inside
        key = tl.load(k + key_row[:, None] * kn + lane[None, :], mask=mask, other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale2
        score = tl.where(there[None, :], score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        p = tl.exp2(score - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        value = tl.load(v + key_row[:, None] * vn + lane[None, :], mask=mask, other=0.0)
        mixed = tl.dot(p.to(value.dtype), value, mixed * shrink[:, None], input_precision="ieee")
        top = higher

    empty = total == 0.0  # no keys
    result = mixed / tl.where(empty, 1.0, total)[:, None]
    result = tl.where(asked[:, None], result, 0.0)
    at = out + ((b * Kq + i[:, None]) * H + h) * d + lane[None, :]
    tl.store(at, result.to(out.dtype.element_ty), mask=(i < Kq)[:, None] & inside)
    tl.store(lse + head * Kq + i, tl.where(empty, 0.0, top + tl.log2(total)), mask=asked)


@triton.jit
def _backward_q(
    upstream,  # [B, H, Kq, d], strides ub, uh, un, 1
    out,
    lse,
    q,
    k,
    v,
    q_ids,
    kv_ids,
    q_count,
    kv_count,
    gradient,  # [B, Nq, H, d], out: rows that are named (all rows without ids)
    delta,  # float32 [B, H, Kq], out; rows beyond the count are left as they are
    scale,  # of the scores
    scale2,  # times log2(e)
    H,
    Nq,
    Kq,
    Kk,
    blocks,
    ub,
    uh,
    un,
    qb,
    qh,
    qn,
    kb,
    kh,
    kn,
    vb,
    vh,
    vn,
    qib,
    qik,
    kib,
    kik,
    d: tl.constexpr,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    Q_IDS: tl.constexpr,
    KV_IDS: tl.constexpr,
    Q_COUNT: tl.constexpr,
    KV_COUNT: tl.constexpr,
):
    program = tl.program_id(0)
    head = (program // blocks).to(tl.int64)
    b = head // H
    h = head % H
    i = program % blocks * QUERIES + tl.arange(0, QUERIES)
    lane = tl.arange(0, D)
    inside = (lane < d)[None, :]
    queries = length_of(q_count, b, Kq, Q_COUNT)
    keys = length_of(kv_count, b, Kk, KV_COUNT)
    asked = i < queries
    row = _rows(q_ids, b, i, asked, qib, qik, Q_IDS)
    written = asked if Q_IDS else i < Kq
    filled = asked[:, None] & inside
    query = tl.load(q + b * qb + h * qh + row[:, None] * qn + lane[None, :], mask=filled, other=0.0)
    slope = tl.load(upstream + b * ub + h * uh + i[:, None].to(tl.int64) * un + lane[None, :], mask=filled, other=0.0)
    result = tl.load(out + ((b * Kq + i[:, None]) * H + h) * d + lane[None, :], mask=filled, other=0.0)
    level = tl.load(lse + head * Kq + i, mask=asked, other=0.0)
    mean = tl.sum(slope.to(tl.float32) * result.to(tl.float32), 1)
    tl.store(delta + head * Kq + i, mean, mask=asked)
    k += b * kb + h * kh
    v += b * vb + h * vh

    total = tl.zeros([QUERIES, D], tl.float32)
    for start in range(0, keys, KEYS):
        j = start + tl.arange(0, KEYS)
        there = j < keys
        key_row = _rows(kv_ids, b, j, there, kib, kik, KV_IDS)
        mask = there[:, None] & inside
        key = tl.load(k + key_row[:, None] * kn + lane[None, :], mask=mask, other=0.0)
        value = tl.load(v + key_row[:, None] * vn + lane[None, :], mask=mask, other=0.0)
        score = tl.dot(query, tl.trans(key), input_precision="ieee") * scale2
        p = tl.where(there[None, :], tl.exp2(score - level[:, None]), 0.0)
        change = p * (tl.dot(slope, tl.trans(value), input_precision="ieee") - mean[:, None])
        total = tl.dot(change.to(key.dtype), key, total, input_precision="ieee")

    total = tl.where(asked[:, None], total * scale, 0.0)
    at = gradient + ((b * Nq + row[:, None]) * H + h) * d + lane[None, :]
    tl.store(at, total.to(gradient.dtype.element_ty), mask=written[:, None] & inside)


@triton.jit
def _backward_kv(
    upstream,
    lse,
    delta,
    q,
    k,
    v,
    q_ids,
    kv_ids,
    q_count,
    kv_count,
    k_gradient,  # [B, N, H, d], out: rows that are named (all rows without ids)
    v_gradient,
    scale,  # of the scores
    scale2,  # times log2(e)
    H,
    N,
    Kq,
    Kk,
    blocks,  # of keys per head
    ub,
    uh,
    un,
    qb,
    qh,
    qn,
    kb,
    kh,
    kn,
    vb,
    vh,
    vn,
    qib,
    qik,
    kib,
    kik,
    d: tl.constexpr,
    D: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    Q_IDS: tl.constexpr,
    KV_IDS: tl.constexpr,
    Q_COUNT: tl.constexpr,
    KV_COUNT: tl.constexpr,
):
    program = tl.program_id(0)
    head = (program // blocks).to(tl.int64)
    b = head // H
    h = head % H
    j = program % blocks * KEYS + tl.arange(0, KEYS)
    lane = tl.arange(0, D)
    inside = (lane < d)[None, :]
    keys = length_of(kv_count, b, Kk, KV_COUNT)
    there = j < keys
    queries = length_of(q_count, b, Kq, Q_COUNT)
    queries = tl.where(program % blocks * KEYS < keys, queries, 0)  # nothing to sum where only zeros are written
    row = _rows(kv_ids, b, j, there, kib, kik, KV_IDS)
    written = there if KV_IDS else j < Kk
    filled = there[:, None] & inside
    key = tl.load(k + b * kb + h * kh + row[:, None] * kn + lane[None, :], mask=filled, other=0.0)
    value = tl.load(v + b * vb + h * vh + row[:, None] * vn + lane[None, :], mask=filled, other=0.0)
    q += b * qb + h * qh
    upstream += b * ub + h * uh
    lse += head * Kq
    delta += head * Kq

    k_total = tl.zeros([KEYS, D], tl.float32)
    v_total = tl.zeros([KEYS, D], tl.float32)
    for start in range(0, queries, QUERIES):
        i = start + tl.arange(0, QUERIES)
        asked = i < queries
        query_row = _rows(q_ids, b, i, asked, qib, qik, Q_IDS)
        mask = asked[:, None] & inside
        query = tl.load(q + query_row[:, None] * qn + lane[None, :], mask=mask, other=0.0)
        slope = tl.load(upstream + i[:, None].to(tl.int64) * un + lane[None, :], mask=mask, other=0.0)
        level = tl.load(lse + i, mask=asked, other=0.0)
        mean = tl.load(delta + i, mask=asked, other=0.0)
        score = tl.dot(key, tl.trans(query), input_precision="ieee") * scale2
        p = tl.exp2(score - level[None, :])
        v_total = tl.dot(p.to(slope.dtype), slope, v_total, input_precision="ieee")
        change = p * (tl.dot(value, tl.trans(slope), input_precision="ieee") - mean[None, :])
        k_total = tl.dot(change.to(query.dtype), query, k_total, input_precision="ieee")

    at = ((b * N + row[:, None]) * H + h) * d + lane[None, :]
    kept = written[:, None] & inside
    k_total = tl.where(there[:, None], k_total * scale, 0.0)
    v_total = tl.where(there[:, None], v_total, 0.0)
    tl.store(k_gradient + at, k_total.to(k_gradient.dtype.element_ty), mask=kept)
    tl.store(v_gradient + at, v_total.to(v_gradient.dtype.element_ty), mask=kept)


@triton.jit
def _zero_unnamed(
    ids,
    count,
    first,  # [B, N, W], out: zeros in the rows that no valid id names
    second,  # another one, or nothing
    N,
    K,
    blocks,  # of rows per sample
    ib,
    ik,
    W: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    COUNT: tl.constexpr,
    SECOND: tl.constexpr,
):
    program = tl.program_id(0)
    b = (program // blocks).to(tl.int64)
    n = program % blocks * ROWS + tl.arange(0, ROWS)
    unnamed = (find(ids, n, b, length_of(count, b, K, COUNT), ib, ik, ROWS, CHUNK) < 0) & (n < N)
    for start in range(0, W, BLOCK):
        lane = start + tl.arange(0, BLOCK)
        at = (b * N + n[:, None]) * W + lane[None, :]
        mask = unnamed[:, None] & (lane < W)[None, :]
        tl.store(first + at, tl.zeros([ROWS, BLOCK], first.dtype.element_ty), mask=mask)
        if SECOND:
            tl.store(second + at, tl.zeros([ROWS, BLOCK], second.dtype.element_ty), mask=mask)


def _zero(ids: Tensor | None, count: Tensor | None, first: Tensor, second: Tensor | None = None) -> None:
    """Zeros the rows of gradients [B, N, H, d] that the ids do not name."""
    if ids is None:
        return
    B, N, H, d = first.shape
    blocks = cdiv(N, 16)  # this and the other sizes: not measured yet
    launch(
        _zero_unnamed, (B * blocks,), ids, count, first, second, N, ids.shape[1], blocks, *ids.stride(),
        W=H * d, ROWS=16, BLOCK=256, CHUNK=64, COUNT=count is not None, SECOND=second is not None, num_warps=4,
    )  # fmt: skip


def _constants(q: Tensor, *optional: Tensor | None) -> tuple[dict[str, int], int, int]:
    """Head width and which of q_ids, kv_ids, q_count, kv_count are there; rows of a program's own, rows of its loop."""
    d = q.shape[3]
    D = max(16, power_of_2(d))
    half = q.element_size() == 2
    # 64 and 32 rows of a program's own: not measured yet. float32 dots run without tensor cores, out of registers.
    own = 64 if half else 32
    if half:  # steps with which no case of cases.py spills (but for KNOWN_SPILLS in _compile.py)
        step = 64 if D <= 32 else 32
    else:
        step = 32 if D == 64 else 16
    given = dict(zip(("Q_IDS", "KV_IDS", "Q_COUNT", "KV_COUNT"), (x is not None for x in optional), strict=True))
    # Three stages: ids are fetched one step before the rows that they name, and those one step before their use.
    return {"d": d, "D": D, **given, "num_warps": 8 if D > 64 else 4, "num_stages": 3 if half else 2}, own, step


def _strides(*values: Tensor, ids: tuple[Tensor | None, ...]) -> tuple[int, ...]:
    """Strides of [B, H, rows, d] tensors without the last, which is 1; then those of the ids."""
    numbers = [stride for value in values for stride in value.stride()[:3]]
    return *numbers, *(stride for x in ids for stride in (x.stride() if x is not None else (0, 0)))


def _dense(x: Tensor) -> Tensor:
    """The tensor with neighbouring values of a row side by side."""
    return x if x.stride(3) == 1 else x.contiguous()


@torch.library.custom_op("fastssl::indexed_attention", mutates_args=())
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_ids: Tensor | None,
    kv_ids: Tensor | None,
    q_count: Tensor | None,
    kv_count: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output [B, H, Kq, d] and lse, float32 [B, H, Kq]. Saved for the backward pass: both and the inputs."""
    q, k, v = _dense(q), _dense(k), _dense(v)
    B, H, Nq, d = q.shape
    Kq = Nq if q_ids is None else q_ids.shape[1]
    Kk = k.shape[2] if kv_ids is None else kv_ids.shape[1]
    constants, own, step = _constants(q, q_ids, kv_ids, q_count, kv_count)
    out = torch.empty(B, Kq, H, d, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, H, Kq, dtype=torch.float32, device=q.device)
    blocks = cdiv(Kq, own)
    launch(
        _forward, (B * H * blocks,), q, k, v, q_ids, kv_ids, q_count, kv_count, out, lse, scale * LOG2E,
        H, Kq, Kk, blocks, *_strides(q, k, v, ids=(q_ids, kv_ids)), QUERIES=own, KEYS=step, **constants,
    )  # fmt: skip
    return out.transpose(1, 2), lse


@forward.register_fake
def _(q, k, v, q_ids, kv_ids, q_count, kv_count, scale):
    B, H, Nq, d = q.shape
    Kq = Nq if q_ids is None else q_ids.shape[1]
    return q.new_empty(B, Kq, H, d).transpose(1, 2), q.new_empty(B, H, Kq, dtype=torch.float32)


@torch.library.custom_op("fastssl::indexed_attention_backward", mutates_args=())
def backward(
    upstream: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_ids: Tensor | None,
    kv_ids: Tensor | None,
    q_count: Tensor | None,
    kv_count: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    upstream, q, k, v = _dense(upstream), _dense(q), _dense(k), _dense(v)
    out = out.transpose(1, 2).contiguous()  # as it was written: no copy
    B, H, Nq, d = q.shape
    N, Kq = k.shape[2], out.shape[1]
    Kk = N if kv_ids is None else kv_ids.shape[1]
    constants, own, step = _constants(q, q_ids, kv_ids, q_count, kv_count)
    strides = _strides(upstream, q, k, v, ids=(q_ids, kv_ids))
    indices = (q_ids, kv_ids, q_count, kv_count)
    q_gradient = torch.empty(B, Nq, H, d, dtype=q.dtype, device=q.device)
    k_gradient, v_gradient = (torch.empty(B, N, H, d, dtype=k.dtype, device=k.device) for _ in range(2))
    delta = torch.empty_like(lse)
    _zero(q_ids, q_count, q_gradient)
    blocks = cdiv(Kq, own)
    launch(
        _backward_q, (B * H * blocks,), upstream, out, lse, q, k, v, *indices, q_gradient, delta,
        scale, scale * LOG2E, H, Nq, Kq, Kk, blocks, *strides, QUERIES=own, KEYS=step, **constants,
    )  # fmt: skip
    _zero(kv_ids, kv_count, k_gradient, v_gradient)
    blocks = cdiv(Kk, own)
    launch(
        _backward_kv, (B * H * blocks,), upstream, lse, delta, q, k, v, *indices, k_gradient, v_gradient,
        scale, scale * LOG2E, H, N, Kq, Kk, blocks, *strides, QUERIES=step, KEYS=own, **constants,
    )  # fmt: skip
    return q_gradient.transpose(1, 2), k_gradient.transpose(1, 2), v_gradient.transpose(1, 2)


@backward.register_fake
def _(upstream, out, lse, q, k, v, *rest):
    return tuple(x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (q, k, v))


def _save(ctx, inputs, output):
    ctx.save_for_backward(*output, *inputs[:7])
    ctx.scale = inputs[7]
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, upstream, _):
    return *backward(upstream, *ctx.saved_tensors, ctx.scale), *[None] * 5


forward.register_autograd(_differentiate, setup_context=_save)
