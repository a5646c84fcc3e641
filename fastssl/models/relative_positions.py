"""A learned bias on attention logits per relative position of two patches (Bao et al. 2022, arXiv 2106.08254), added to
a pretrained ViT; it starts at zero, so the network's output is at first what it was.

Letters: H x W patches, N = H W, h heads.
"""

from __future__ import annotations

from typing import cast

import torch
from timm.layers import Attention
from torch import Tensor, nn

from fastssl.models.vit import ViT

KEY = "relative_position_bias_table"


def relative_index(rows: int, columns: int) -> Tensor:
    """Which row of the bias table belongs to each pair (query, key) of tokens, the class token first.

    A query at (i, j) and a key at (k, l) share the entry (i - k + H - 1)(2W - 1) + (j - l + W - 1). The last three
    entries are for the class token: as query, as key, and with itself.

    Returns:
        int64 [1 + N, 1 + N], 0 to (2H - 1)(2W - 1) + 2.
    """
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    row, column = row.flatten(), column.flatten()
    pairs = (2 * rows - 1) * (2 * columns - 1)
    index = torch.empty(1 + len(row), 1 + len(row), dtype=torch.int64)
    down, right = row[:, None] - row + rows - 1, column[:, None] - column + columns - 1
    index[1:, 1:] = down * (2 * columns - 1) + right
    index[0, :], index[:, 0], index[0, 0] = pairs, pairs + 1, pairs + 2
    return index


def add_relative_positions(vit: ViT, rows: int, columns: int) -> Tensor:
    """Gives every block a zero table [(2H - 1)(2W - 1) + 3, h], under `attn.relative_position_bias_table`.

    Returns:
        `relative_index(rows, columns)`, for `attention_bias`.
    """
    entries = (2 * rows - 1) * (2 * columns - 1) + 3
    for block in vit.blocks:
        attention = cast(Attention, block.attn)
        attention.register_parameter(KEY, nn.Parameter(torch.zeros(entries, attention.num_heads)))
    return relative_index(rows, columns)


def attention_bias(block: nn.Module, index: Tensor) -> Tensor:
    """What the block adds to its attention logits, [1, h, 1 + N, 1 + N]."""
    return getattr(block.attn, KEY)[index].permute(2, 0, 1)[None]
