"""The table of stochastic depth in Triton: one lane per branch and row, one word each."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels._launch import cdiv, launch
from fastssl.kernels._op import op
from fastssl.kernels._philox import LOW

BLOCK = 256


@triton.jit(do_not_specialize=["step", "key", "top", "first"])
def _draw(
    ids,  # int64 [B]
    clock,  # int64 scalar or nothing: the step
    table,  # float32 [2 layers, rows], out
    step,
    key,
    top,
    first,
    images,  # B
    rows,
    together,
    steps,  # layers - 1, at least 1
    count,  # 2 layers rows
    CLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = lane < count
    branch = lane // rows
    row = lane % rows
    image = row // together % images
    crop = first + row // (together * images) * together + row % together
    identity = tl.load(ids + image, mask=inside, other=0).to(tl.int32)
    if CLOCK:
        now = tl.load(clock).to(tl.int32)
    else:
        now = step
    word, _, _, _ = tl.philox(key, identity, identity * 0 + now, crop, branch)
    dropped = tl.cast(top, tl.int64) * (branch // 2) // steps
    kept = tl.div_rn(4294967296.0, (4294967296 - dropped).to(tl.float32))
    tl.store(table + lane, tl.where((word.to(tl.int64) & 0xFFFFFFFF) < dropped, 0.0, kept), mask=inside)


@op("fastssl::drop_path")
def draw(
    ids: Tensor, clock: Tensor | None, step: int, top: int, layers: int, rows: int, seed: int, key: int,
    together: int, first: int,
) -> Tensor:  # fmt: skip
    """float32 [2 x layers, rows]."""
    table = ids.new_empty(2 * layers, rows, dtype=torch.float32)
    launch(
        _draw, (cdiv(table.numel(), BLOCK),), ids.contiguous(), clock, table, _signed(step, 32),
        _signed((seed & LOW) + ((key & LOW) << 32), 64), top, first, len(ids), rows, together, max(layers - 1, 1),
        table.numel(), CLOCK=clock is not None, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return table


@draw.register_fake
def _(ids, clock, step, top, layers, rows, *rest):
    return ids.new_empty(2 * layers, rows, dtype=torch.float32)


def _signed(number: int, bits: int) -> int:
    """The lower bits as a signed number."""
    half = 1 << bits - 1
    return (number + half) % (2 * half) - half
