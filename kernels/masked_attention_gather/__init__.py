"""Kept tokens of masked models: taken out, and attention that reads them where they lie."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastssl.kernels._check import FLOATS, INTEGERS, Shapes, check
from fastssl.kernels._path import use_triton
from fastssl.kernels.masked_attention_gather import attention_reference, gather_reference

GATHER, ATTENTION = "gather_tokens", "indexed_attention"
BACKENDS = ("auto", "indexed", "sdpa")
WIDEST_HEAD = 128


def gather_tokens(tokens: Tensor, ids: Tensor, *, count: Tensor | None = None) -> Tensor:
    """The kept tokens (He et al. 2022, section 3: the encoder's input).

        for b in range(B):
            for k in range(K):  # or count[b]; zeros from there on
                out[b, k] = tokens[b, ids[b, k]]

    Args:
        tokens: [B, N, D], float32, float16 or bfloat16.
        ids: int32 or int64 [B, K], the patches kept, in any order; those of one row differ.
        count: int32 or int64 [B]; only the first count[b] ids count, what stands behind them is never used. None: all.

    Returns:
        [B, K, D], the tokens' type. A gradient flows to the tokens.

    Raises:
        KernelError: a shape or type that does not fit.
    """
    shapes = Shapes(GATHER)
    shapes("tokens", tokens, "B N D")
    shapes("ids", ids, "B K", INTEGERS)
    if count is not None:
        shapes("count", count, "B", INTEGERS)
    if use_triton(GATHER, tokens) and tokens.dtype in FLOATS[:3]:
        from fastssl.kernels.masked_attention_gather import gather_kernel

        return gather_kernel.gather(tokens, ids, count)
    return gather_reference.gather_tokens(tokens, ids, count=count)


def indexed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_ids: Tensor | None = None,
    kv_ids: Tensor | None = None,
    q_count: Tensor | None = None,
    kv_count: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention of named queries over named keys: self-attention among kept tokens, or masked queries over
    visible keys (the regressor of Chen et al. 2022, CAE, section 3.2).

        for b in range(B):
            keys, values = k[b, :, kv_ids[b]], v[b, :, kv_ids[b]]  # the first kv_count[b]
            for i in range(Kq):  # or q_count[b]; zeros from there on
                out[b, :, i] = softmax(scale * q[b, :, q_ids[b, i]] @ keys.T) @ values  # 0 if there is no key

    Args:
        q: [B, H, Nq, d], float32, float16 or bfloat16; d at most 128, best a power of two. Any strides: a view of a
            fused projection [B, N, 3, H, d] is read as it lies.
        k, v: [B, H, N, d], of the same type.
        q_ids: int32 or int64 [B, Kq], rows of q; those of one sample differ. None: all rows, in order.
        kv_ids: int32 or int64 [B, Kk], rows of k and v; those of one sample differ. None: all rows.
        q_count: int [B]; only the first q_count[b] ids (or rows) count, the others are never read. None: all.
        kv_count: int [B]; likewise for keys and values.
        scale: of the scores. None: d ** -0.5.
        backend: "indexed" (one kernel that reads rows through the ids and skips what is beyond the counts), "sdpa"
            (rows gathered, then PyTorch's scaled_dot_product_attention; counts become a mask), or "auto"
            (`_default_backend`). FASTSSL_KERNELS decides between kernel and reference for "indexed".

    Returns:
        [B, H, Kq, d] ([B, H, Nq, d] without q_ids). Gradients: q, k, v; zero in rows that take no part.

    Raises:
        KernelError: a shape, type or backend that does not fit.
    """
    shapes = Shapes(ATTENTION)
    width = shapes("q", q, "B H Nq d")[3]
    for name, x in (("k", k), ("v", v)):
        shapes(name, x, "B H N d")
        check(x.dtype == q.dtype, ATTENTION, name, f"of q's type, {q.dtype}", x.dtype)
    check(1 <= width <= WIDEST_HEAD, ATTENTION, "q", f"[B, H, Nq, d] with d from 1 to {WIDEST_HEAD}", list(q.shape))
    for name, ids, shape in (("q_ids", q_ids, "B Kq"), ("kv_ids", kv_ids, "B Kk")):
        if ids is not None:
            shapes(name, ids, shape, INTEGERS)
    for name, count in (("q_count", q_count), ("kv_count", kv_count)):
        if count is not None:
            shapes(name, count, "B", INTEGERS)
    check(backend in BACKENDS, ATTENTION, "backend", " or ".join(map(repr, BACKENDS)), repr(backend))
    if backend == "auto":
        backend = _default_backend(ragged=q_count is not None or kv_count is not None)
    named: dict[str, Any] = {"q_ids": q_ids, "kv_ids": kv_ids, "q_count": q_count, "kv_count": kv_count, "scale": scale}
    if backend == "sdpa":
        return attention_reference.gathered_sdpa(q, k, v, **named, take=_take_rows)
    if use_triton(ATTENTION, q, k, v) and q.dtype in FLOATS[:3]:
        from fastssl.kernels.masked_attention_gather import attention_kernel

        scale = width**-0.5 if scale is None else scale
        return attention_kernel.forward(q, k, v, q_ids, kv_ids, q_count, kv_count, scale)[0]
    return attention_reference.indexed_attention(q, k, v, **named)


def _default_backend(*, ragged: bool) -> str:
    """The backend that "auto" stands for. The one place to change when the bench says otherwise.

    Equal lengths: gathering costs one more pass over a few small tensors, and PyTorch's attention kernels are tuned for
    each architecture. Counts: with a mask those kernels compute every padded row and lose their fastest variant.
    """
    return "indexed" if ragged else "sdpa"


def _take_rows(x: Tensor, ids: Tensor | None, count: Tensor | None) -> Tensor:
    """`attention_reference.take_rows` by `gather_tokens`: [B, H, N, d], [B, K] -> [B, H, K, d]."""
    if ids is None:
        return attention_reference.take_rows(x, ids, count)
    rows = gather_tokens(x.transpose(1, 2).flatten(2), ids, count=count)
    return rows.unflatten(2, (x.shape[1], x.shape[3])).transpose(1, 2)
