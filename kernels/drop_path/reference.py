"""The table of stochastic depth in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.kernels._philox import philox


def drop_path(
    ids: Tensor, step: int | Tensor, top: int, layers: int, rows: int, seed: int, key: int, together: int, first: int
) -> Tensor:
    """See `fastssl.kernels.drop_path.drop_path`; `top` is the last layer's share in 1 / 2^32."""
    branch = torch.arange(2 * layers, device=ids.device)[:, None]
    row = torch.arange(rows, device=ids.device)
    image = row // together % max(len(ids), 1)
    crop = first + row // (together * max(len(ids), 1)) * together + row % together
    word = philox((ids[image], step, crop, branch), (seed, key))[0]  # [2 x layers, rows]
    dropped = top * (branch // 2) // max(layers - 1, 1)
    kept = 2.0**32 / (2**32 - dropped).float()
    return torch.where(word < dropped, 0.0, kept)
