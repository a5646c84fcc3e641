"""Cases of gather_tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastssl.kernels._spec import Case, Maker, Op, nbytes
from fastssl.kernels.masked_attention_gather import gather_reference, gather_tokens

GARBAGE = 1 << 30  # ids behind a row's count


def make_ids(make: Maker, B: int, N: int, K: int, ragged: float | None, shuffled: bool) -> tuple[Tensor, Tensor | None]:
    """Ids [B, K] below N and, if `ragged`, counts from that share of K up to K; the first and last are the extremes."""
    ids = make.choice(B, N, K, dtype=torch.int32 if shuffled else torch.int64)
    ids = ids.flip(1) if shuffled else ids
    if ragged is None:
        return ids, None
    least = int(ragged * K)
    count = make.integers(B, low=least, high=K + 1)
    count[:1], count[-1:] = least, K
    behind = torch.arange(K, device=ids.device) >= count[:, None]
    return ids.masked_fill(behind, GARBAGE), count


def rows(ids: Tensor, count: Tensor | None) -> int:
    """Rows that all samples' ids name."""
    return ids.numel() if count is None else int(count.sum())


def gather_inputs(
    make: Maker,
    dtype: torch.dtype,
    *,
    B: int,
    N: int,
    K: int,
    D: int,
    ragged: float | None = None,
    strided: bool = False,
) -> dict[str, Any]:
    ids, count = make_ids(make, B, N, K, ragged, strided)
    tokens = make.normal(B, 1 + N, D * (2 if strided else 1), dtype=dtype)[:, 1:]
    return {"tokens": tokens[..., ::2] if strided else tokens, "ids": ids, "count": count}


def gather_bytes(inputs: dict[str, Any], outputs: list[Tensor], backward: bool) -> int:
    tokens, ids, count = inputs.values()
    kept = rows(ids, count) * tokens.shape[2] * tokens.element_size()
    return nbytes(ids, count) + kept + nbytes(tokens if backward else outputs)  # upstream is as large as what was kept


PROOF: dict[str, Case] = {
    "mae": {"B": 9, "N": 12, "K": 5, "D": 192},
    "one": {"B": 1, "N": 1, "K": 1, "D": 1},
    "ragged": {"B": 5, "N": 10, "K": 6, "D": 40, "ragged": 0.0},
    "many blocks of ids": {"B": 2, "N": 66, "K": 66, "D": 4, "ragged": 0.98},
    "many blocks of rows": {"B": 9, "N": 9, "K": 9, "D": 260},
    "strided": {"B": 3, "N": 11, "K": 8, "D": 36, "strided": True},
    "strided, ragged": {"B": 3, "N": 11, "K": 8, "D": 36, "strided": True, "ragged": 0.2},
    "none kept": {"B": 2, "N": 6, "K": 0, "D": 16},
    "no samples": {"B": 0, "N": 6, "K": 3, "D": 16},
}
BENCH: dict[str, Case] = {
    "MAE B/16, B=256, kept patches": {"B": 256, "N": 196, "K": 49, "D": 768},
    "CAE B/16, B=64, kept patches": {"B": 64, "N": 196, "K": 98, "D": 768},
    "SAAE, V=128, cells to paint": {"B": 128, "N": 196, "K": 196, "D": 256, "ragged": 0.3},
}

OPS = [
    Op(
        "gather_tokens", gather_tokens, gather_reference.gather_tokens, gather_inputs, PROOF, BENCH,
        gather_bytes, gradients=("tokens",),
    ),
]  # fmt: skip
