"""Attention over named rows in plain PyTorch: the exact one, and gather followed by PyTorch's fused attention."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.kernels._exact import exact
from fastssl.kernels.masked_attention_gather.gather_reference import within


@exact
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
) -> Tensor:
    """See `fastssl.kernels.masked_attention_gather.indexed_attention`."""
    dtype = q.dtype
    exact = torch.promote_types(dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q = take_rows(q, q_ids, q_count).to(exact)
    k, v = (take_rows(x, kv_ids, kv_count).to(exact) for x in (k, v))
    keys = within(kv_count, k.shape[2], k)[:, None, None, :]
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~keys, torch.finfo(exact).min)
    out = scores.softmax(dim=-1) @ v  # no key at all: equal weights of values that are all zero
    queries = within(q_count, q.shape[2], q)[:, None, :, None]
    return torch.where(queries, out, 0).to(dtype)


def take_rows(x: Tensor, ids: Tensor | None, count: Tensor | None) -> Tensor:
    """The rows named by `ids`, zeros from the count on: [B, H, N, d], [B, K] -> [B, H, K, d]."""
    if ids is None and count is None:
        return x
    valid = within(count, x.shape[2] if ids is None else ids.shape[1], x)
    if ids is not None:
        ids = torch.where(valid, ids.long(), 0)
        x = x.gather(2, ids[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
    return x if count is None else torch.where(valid[:, None, :, None], x, 0)


def gathered_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_ids: Tensor | None = None,
    kv_ids: Tensor | None = None,
    q_count: Tensor | None = None,
    kv_count: Tensor | None = None,
    scale: float | None = None,
    take: Callable[[Tensor, Tensor | None, Tensor | None], Tensor] = take_rows,
) -> Tensor:
    """The same by dense gathered rows and `F.scaled_dot_product_attention`; counts become a boolean mask.

    Args:
        take: gathers rows, as `take_rows` does.
    """
    q = take(q, q_ids, q_count)
    k, v = (take(x, kv_ids, kv_count) for x in (k, v))
    if kv_count is None:
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    else:
        keys = within(kv_count, k.shape[2], k)
        seen = keys | (kv_count == 0)[:, None]  # a row that sees nothing would be NaN
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None, :], scale=scale)
        out = torch.where((kv_count > 0)[:, None, None, None], out, 0)
    if q_count is not None:
        out = torch.where(within(q_count, out.shape[2], out)[:, None, :, None], out, 0)
    return out
