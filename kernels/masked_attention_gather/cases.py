"""Cases of gather_tokens and indexed_attention."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from fastssl.kernels._spec import Case, Maker, Op, nbytes
from fastssl.kernels.masked_attention_gather import (
    attention_reference,
    gather_reference,
    gather_tokens,
    indexed_attention,
)

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


def attention_inputs(
    make: Maker,
    dtype: torch.dtype,
    *,
    B: int,
    H: int,
    N: int,
    d: int,
    Nq: int | None = None,
    Kq: int | None = None,
    Kk: int | None = None,
    q_ragged: float | None = None,
    ragged: float | None = None,
    same: bool = False,
    layout: str = "fused",
    scale: float | None = None,
) -> dict[str, Any]:
    """`Kq`, `Kk`: ids are given; `q_ragged`, `ragged`: counts; `same`: the keys' ids and counts serve the queries."""
    if layout == "fused":
        q, k, v = make.normal(B, N, 3, H, d, dtype=dtype).permute(2, 0, 3, 1, 4).unbind()
        if Nq is not None:
            q = make.normal(B, Nq, H, d, dtype=dtype).transpose(1, 2)
    else:  # each its own strides; values of a row of q and k apart
        q, k = (make.normal(B, H, d, n, dtype=dtype).transpose(2, 3) for n in (Nq or N, N))
        v = make.normal(B, N, H, d, dtype=dtype).transpose(1, 2)
    shuffled = layout != "fused"
    kv_ids, kv_count = make_ids(make, B, N, N if Kk is None else Kk, ragged, shuffled)
    q_ids, q_count = make_ids(make, B, q.shape[2], q.shape[2] if Kq is None else Kq, q_ragged, shuffled)
    if same:
        q_ids, q_count, Kq = kv_ids, kv_count, Kk
    return {
        "q": q,
        "k": k,
        "v": v,
        "q_ids": None if Kq is None else q_ids,
        "kv_ids": None if Kk is None else kv_ids,
        "q_count": q_count,
        "kv_count": kv_count,
        "scale": scale,
    }


def attention_counts(inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Queries and keys of every sample, [B] each."""
    B = len(inputs["q"])
    found = []
    for name, x in (("q", inputs["q"]), ("kv", inputs["k"])):
        ids, count = inputs[f"{name}_ids"], inputs[f"{name}_count"]
        size = x.shape[2] if ids is None else ids.shape[1]
        found.append(torch.full((B,), size, device=x.device) if count is None else count)
    return found[0], found[1]


def attention_bytes(inputs: dict[str, Any], outputs: list[Tensor], backward: bool) -> int:
    q = inputs["q"]
    queries, keys = attention_counts(inputs)
    row = q.shape[1] * q.shape[3] * q.element_size()
    taken = int(queries.sum() + 2 * keys.sum()) * row  # of q, k, v
    indices = nbytes([inputs[name] for name in ("q_ids", "kv_ids", "q_count", "kv_count")])
    if not backward:
        return taken + indices + nbytes(outputs)
    answers = 2 * int(queries.sum()) * row  # the output and its gradient
    return taken + answers + indices + nbytes(q, inputs["k"], inputs["v"])


def attention_flops(inputs: dict[str, Any], outputs: list[Tensor], backward: bool) -> int:
    """Two products forward; five backward, since the scores are computed anew rather than stored."""
    queries, keys = attention_counts(inputs)
    _, heads, _, width = inputs["q"].shape
    return (5 if backward else 2) * 2 * int((queries * keys).sum()) * heads * width


def some_rows(x: Tensor, ids: Tensor | None, count: Tensor | None = None) -> Tensor:
    """The rows named by `ids`, any row from the count on: the least work for a contender that masks those anyway."""
    return x if ids is None else attention_reference.take_rows(x, ids.clamp(0, x.shape[2] - 1), None)


def flex(
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
    """Gathered rows, then PyTorch's flex_attention with a block mask made from the counts."""
    from torch.nn.attention.flex_attention import create_block_mask

    q = some_rows(q, q_ids)
    k, v = (some_rows(x, kv_ids) for x in (k, v))
    mask = None
    if q_count is not None or kv_count is not None:

        def inside(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            seen = i >= 0 if q_count is None else i < q_count[b]
            return seen if kv_count is None else seen & (j < kv_count[b])

        mask = create_block_mask(inside, len(q), None, q.shape[2], k.shape[2], device=q.device)
    return _flex(q.is_cuda)(q, k, v, block_mask=mask, scale=scale)


@cache
def _flex(compiled: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if compiled else flex_attention


GATHER_PROOF: dict[str, Case] = {
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
GATHER_BENCH: dict[str, Case] = {
    "MAE B/16, B=256, kept patches": {"B": 256, "N": 196, "K": 49, "D": 768},
    "CAE B/16, B=64, kept patches": {"B": 64, "N": 196, "K": 98, "D": 768},
    "SAAE, V=128, cells to paint": {"B": 128, "N": 196, "K": 196, "D": 256, "ragged": 0.3},
}
ATTENTION_PROOF: dict[str, Case] = {
    "kept tokens": {"B": 2, "H": 2, "N": 20, "d": 32, "Kk": 11, "same": True},
    "regressor": {"B": 2, "H": 3, "N": 14, "d": 16, "Nq": 9},
    "queries named": {"B": 2, "H": 1, "N": 13, "d": 16, "Kq": 6},
    "keys named": {"B": 2, "H": 1, "N": 13, "d": 16, "Kk": 7},
    "one": {"B": 1, "H": 1, "N": 1, "d": 1},
    "many blocks": {"B": 1, "H": 2, "N": 72, "d": 16, "Nq": 70, "Kq": 66, "Kk": 67},
    "many blocks, ragged": {
        "B": 2, "H": 1, "N": 72, "d": 16, "Nq": 70, "Kq": 66, "Kk": 67, "q_ragged": 0.1, "ragged": 0.5,
    },
    "ragged": {"B": 4, "H": 2, "N": 12, "d": 24, "Kk": 9, "ragged": 0.0, "same": True},
    "ragged keys": {"B": 3, "H": 1, "N": 8, "d": 16, "Kk": 6, "ragged": 0.0},
    "ragged rows without ids": {"B": 4, "H": 1, "N": 70, "d": 16, "q_ragged": 0.0, "ragged": 0.0},
    "ragged, strided": {
        "B": 3, "H": 2, "N": 10, "d": 20, "Nq": 7, "Kq": 5, "Kk": 8, "q_ragged": 0.2, "ragged": 0.2, "layout": "apart",
    },
    "sharp": {"B": 1, "H": 1, "N": 37, "d": 64, "scale": 0.25},
    "wide heads": {"B": 1, "H": 1, "N": 9, "d": 128, "Kk": 6, "scale": 0.05},
    "many heads": {"B": 1, "H": 17, "N": 6, "d": 16, "Kq": 3, "Kk": 4},
    "no keys": {"B": 2, "H": 1, "N": 5, "d": 16, "Kk": 0, "Nq": 3},
    "no queries": {"B": 2, "H": 1, "N": 5, "d": 16, "Kq": 0},
    "no samples": {"B": 0, "H": 1, "N": 5, "d": 16, "Kk": 3},
}  # fmt: skip
ATTENTION_BENCH: dict[str, Case] = {
    "CAE B/16, B=64, kept tokens": {"B": 64, "H": 12, "N": 196, "d": 64, "Kk": 98, "same": True},
    "CAE B/16 regressor, B=64": {"B": 64, "H": 12, "N": 196, "d": 64, "Nq": 98},
    "SemMAE B/16, B=256, ragged": {"B": 256, "H": 12, "N": 196, "d": 64, "Kk": 98, "ragged": 0.25, "same": True},
    "SiT S/16, B=128, ragged rows": {"B": 128, "H": 6, "N": 196, "d": 64, "q_ragged": 0.3, "ragged": 0.3},
    "heads of 32, B=64, ragged": {"B": 64, "H": 16, "N": 196, "d": 32, "Kk": 98, "ragged": 0.25, "same": True},
    "heads of 80, B=32, ragged": {"B": 32, "H": 16, "N": 256, "d": 80, "Kk": 128, "ragged": 0.25, "same": True},
    "heads of 128, B=32": {"B": 32, "H": 8, "N": 256, "d": 128, "Kk": 128, "same": True},
}  # fmt: skip


OPS = [
    Op(
        "gather_tokens", gather_tokens, gather_reference.gather_tokens, gather_inputs, GATHER_PROOF, GATHER_BENCH,
        gather_bytes, gradients=("tokens",),
    ),
    Op(
        name="indexed_attention",
        call=partial(indexed_attention, backend="indexed"),
        reference=attention_reference.indexed_attention,
        inputs=attention_inputs,
        proof=ATTENTION_PROOF,
        bench=ATTENTION_BENCH,
        min_bytes=attention_bytes,
        flops=attention_flops,
        gradients=("q", "k", "v"),
        library={
            "gather, SDPA": partial(attention_reference.gathered_sdpa, take=some_rows),
            "gather_tokens, SDPA": partial(indexed_attention, backend="sdpa"),
            "gather, flex_attention": flex,
        },
    ),
]  # fmt: skip
