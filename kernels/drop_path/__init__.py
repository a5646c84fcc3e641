"""Stochastic depth: which branches of which samples are dropped, for a whole pass of a network in one table."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.kernels._check import INTEGERS, Shapes, check, once
from fastssl.kernels._path import use_triton
from fastssl.kernels.drop_path import reference

NAME = "drop_path"


@torch.no_grad()
def drop_path(
    ids: Tensor,
    *,
    rate: float,
    layers: int,
    rows: int,
    seed: int,
    step: int | Tensor,
    key: int,
    together: int = 1,
    first: int = 0,
) -> Tensor:
    """What each branch of a network is multiplied with, per sample (Huang et al. 2016, arXiv 1603.09382).

        for layer in range(layers):
            share = rate * layer / (layers - 1)  # dropped; 0 for a single layer
            for branch in (2 * layer, 2 * layer + 1):
                for row in range(rows):
                    dropped = word(ids[image], step, crop, branch) < share
                    table[branch, row] = 0 if dropped else 1 / (1 - share)

    The words are Philox4x32-10's with the key (seed, key): they depend on nothing else, neither on the batch that a
    sample stands in nor on ranks.

    Args:
        ids: int64 [B], sample ids, below 2^32.
        rate: share that is dropped in the last layer.
        layers: of two branches each.
        rows: of the batch that passes the network, a multiple of B x together: all images once, or several times, one
            crop of each after the other.
        seed, key: 32-bit numbers; the key says what the draw is for.
        step: a 32-bit number, or an int64 scalar on the device.
        together: crops of one image that stand side by side in the batch.
        first: number of the first crop.

    Returns:
        float32 [2 x layers, rows].

    Raises:
        KernelError: a shape or type that does not fit.
    """
    clock = step if isinstance(step, Tensor) else None
    _check(ids, clock, rate, layers, rows, together)
    top = round(rate * 2**32)
    if use_triton(NAME, ids):
        from fastssl.kernels.drop_path import kernel

        number = 0 if isinstance(step, Tensor) else step
        return kernel.draw(ids, clock, number, top, layers, rows, seed, key, together, first)
    return reference.drop_path(ids, step, top, layers, rows, seed, key, together, first)


@once
def _check(ids: Tensor, clock: Tensor | None, rate: float, layers: int, rows: int, together: int) -> None:
    shapes = Shapes(NAME)
    (images,) = shapes("ids", ids, "B", (torch.int64,))
    if clock is not None:
        shapes("step", clock, "", INTEGERS[1:])
    check(0 <= rate <= 1, NAME, "rate", "from 0 to 1", rate)
    check(layers > 0, NAME, "layers", "at least 1", layers)
    fits = together > 0 and (rows % (images * together) == 0 if images else rows == 0)
    check(fits, NAME, "rows", f"a multiple of {images} images x {together} crops", rows)
