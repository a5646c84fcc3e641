"""Taking out the kept tokens, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def gather_tokens(tokens: Tensor, ids: Tensor, *, count: Tensor | None = None) -> Tensor:
    """See `fastssl.kernels.masked_attention_gather.gather_tokens`."""
    valid = within(count, ids.shape[1], ids)
    ids = torch.where(valid, ids.long(), 0)
    out = tokens.gather(1, ids[:, :, None].expand(-1, -1, tokens.shape[2]))
    return torch.where(valid[:, :, None], out, 0)


def within(count: Tensor | None, size: int, like: Tensor) -> Tensor:
    """Which of `size` places lie before each row's count: bool [B, size]."""
    places = torch.arange(size, device=like.device)
    if count is None:
        return torch.ones_like(places, dtype=torch.bool).expand(len(like), -1)
    return places < count[:, None]
