"""Taking out and putting back the kept tokens, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_tokens(
    tokens: Tensor, ids: Tensor, positions: Tensor | None = None, *, count: Tensor | None = None
) -> Tensor:
    """See `fastssl.kernels.masked_attention_gather.gather_tokens`."""
    dtype = result_type(tokens, positions)
    exact = torch.promote_types(dtype, torch.float32)
    valid = within(count, ids.shape[1], ids)[:, :, None]
    ids = torch.where(valid[:, :, 0], ids.long(), 0)
    out = tokens.to(exact).gather(1, ids[:, :, None].expand(-1, -1, tokens.shape[2]))
    if positions is not None:
        out = out + torch.nn.functional.embedding(ids, positions.to(exact))
    return torch.where(valid, out, 0).to(dtype)


def scatter_tokens(
    x: Tensor,
    ids: Tensor,
    mask_token: Tensor,
    num_patches: int,
    positions: Tensor | None = None,
    *,
    count: Tensor | None = None,
) -> Tensor:
    """See `fastssl.kernels.masked_attention_gather.scatter_tokens`."""
    dtype = result_type(x, mask_token, positions)
    exact = torch.promote_types(dtype, torch.float32)
    ids = torch.where(within(count, ids.shape[1], ids), ids.long(), num_patches)  # rows that do not count: one too far
    out = mask_token.to(exact).expand(len(x), num_patches + 1, -1)
    out = out.scatter(1, ids[:, :, None].expand_as(x), x.to(exact))[:, :num_patches]
    if positions is not None:
        out = out + positions.to(exact)
    return out.to(dtype)


def result_type(*tensors: Tensor | None) -> torch.dtype:
    """The type that a sum of the tensors has."""
    dtype, *others = (tensor.dtype for tensor in tensors if tensor is not None)
    for other in others:
        dtype = torch.promote_types(dtype, other)
    return dtype


def within(count: Tensor | None, size: int, like: Tensor) -> Tensor:
    """Which of `size` places lie before each row's count: bool [B, size]."""
    places = torch.arange(size, device=like.device)
    if count is None:
        return torch.ones_like(places, dtype=torch.bool).expand(len(like), -1)
    return places < count[:, None]
