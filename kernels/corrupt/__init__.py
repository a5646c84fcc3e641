"""Damage of image blocks: the drawing of rectangles, and zeros, noise or another image painted there in one pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastssl.kernels._check import FLOATS, INTEGERS, Shapes, check
from fastssl.kernels._path import use_triton
from fastssl.kernels.corrupt import reference

ZERO, NOISE, ALIEN = 0, 1, 2  # kinds of rectangle
MOST_PIXELS = 512 * 512  # that a program of the kernel of draw_blocks keeps in registers


class Corrupted(NamedTuple):
    """Damaged views.

    Attributes:
        views: [B, 3, H, W], dtype and memory format of the clean ones.
        mask: bool [B, H, W], true where a rectangle lies.
    """

    views: Tensor
    mask: Tensor


@torch.no_grad()
def corrupt(
    views: Tensor,
    boxes: Tensor,
    kind: Tensor,
    source: Tensor,
    *,
    ids: Tensor,
    seed: int,
    epoch: int = 0,
    view: int = 0,
) -> Corrupted:
    """The views with their rectangles painted over one another (Atito et al., "SiT: Self-supervised vIsion
    Transformer", 2021; group masked model learning, GMML).

        for b in range(B):
            for (top, left, height, width), k in zip(boxes[b], kind[b]):
                for pixel in the rectangle, cut at the border:
                    out[b, :, pixel] = (0, 0, 0) if k == ZERO
                    out[b, :, pixel] = three normal numbers if k == NOISE
                    out[b, :, pixel] = views[source[b], :, pixel] if k == ALIEN  # clean, whatever happens to that view
                    mask[b, pixel] = True

    Only the last rectangle over a pixel decides, so each pixel is written once, and read only where it shows. Noise is
    a function of (seed, epoch, id, view, pixel): Philox4x32-10 and the Box-Muller transform. No gradient.

    Args:
        views: [B, 3, H, W], clean, normalised (so that 0 is the mean colour).
        boxes: int32 [B, R, 4], top, left, height, width in pixels; height 0: not used.
        kind: int32 [B, R]: 0 zero, 1 noise, 2 alien.
        source: int32 or int64 [B], index in this batch of the image that alien rectangles show; always a valid index.
        ids: int64 [B], sample ids, below 2^32.
        seed, epoch, view: 32-bit numbers.

    Raises:
        KernelError: a shape or type that does not fit.
    """
    name = "corrupt"
    shapes = Shapes(name)
    shapes("views", views, "B 3 H W")
    shapes("boxes", boxes, "B R 4", (torch.int32,))
    shapes("kind", kind, "B R", (torch.int32,))
    shapes("source", source, "B", INTEGERS)
    shapes("ids", ids, "B", (torch.int64,))
    if use_triton(name, views) and views.dtype in FLOATS[:3]:
        from fastssl.kernels.corrupt import kernel

        return Corrupted(*kernel.paint(views, boxes, kind, source, ids, seed, epoch, view))
    return Corrupted(*reference.corrupt(views, boxes, kind, source, ids, seed, epoch, view))


@torch.no_grad()
def draw_blocks(
    ids: Tensor,
    *,
    height: int,
    width: int,
    fraction: float,
    seed: int,
    epoch: int,
    view: int = 0,
    kind: int = ZERO,
    max_side: float = 0.3,
    align: int = 1,
    uniform_rate: bool = True,
    max_blocks: int = 128,
) -> Tensor:
    """Random rectangles per image until their union reaches a budget (GMML of SiT, version of 2022).

        for b in range(B):
            budget = uniform(min(0.5, fraction), fraction) * H * W  # pixels
            while union of the blocks < budget:
                add a block with sides uniform in {align, .., int(max_side * side of the image) - 1}

    The union is counted pixel by pixel, so overlaps do not count twice; the budget holds without the last block only
    from below. An image's blocks are a function of (seed, epoch, id, view, kind), not of the batch.

    Args:
        ids: int64 [B], sample ids, below 2^32.
        height, width: of the image, pixels.
        fraction: m, share of the image to cover, from 0 to less than 1; above 0.5 it is the upper end of a range.
        seed, epoch, view: 32-bit numbers.
        kind: what the blocks will show; each kind has its own draws.
        max_side: bound on a block's sides, as a share of the image's.
        align: starts and sides are multiples of this many pixels (sides rounded, half to even).
        uniform_rate: starts uniform in {-side + align, .., side of the image - align}, the block cut at all four
            borders, so that every pixel is covered equally often. False is upstream: starts uniform in
            {0, .., side of the image - align - 1}, blocks grow down and to the right, and the top and left margins
            are almost never covered (the top-left 16 x 16 of 224 x 224 at a rate of 0.04 instead of 0.5).
        max_blocks: most blocks of an image; one that needs more falls short of its budget. At 224 x 224 and m = 0.5
            an image takes 40 on average (64 at most in the method's card).

    Returns:
        int32 [B, max_blocks, 4]: top, left, height, width; within the image; zeros from an image's last block on.

    Raises:
        KernelError: a shape, type or number that does not fit.
    """
    name = "draw_blocks"
    Shapes(name)("ids", ids, "B", (torch.int64,))
    check(0 <= fraction < 1, name, "fraction", "from 0 to less than 1", fraction)
    check(align >= 1, name, "align", "at least 1", align)
    least = min(int(max_side * height), int(max_side * width), height, width)
    check(align < least, name, "max_side", f"a share that leaves sides above align = {align}", f"{max_side} ({least})")
    check(max_blocks >= 0, name, "max_blocks", "at least 0", max_blocks)
    if use_triton(name, ids) and height * width <= MOST_PIXELS:
        from fastssl.kernels.corrupt import kernel

        low, span = reference.budget(height, width, fraction)
        limits = int(max_side * height), int(max_side * width)
        return kernel.draw(
            ids, height, width, low, span, *limits, align, uniform_rate, max_blocks, seed, epoch, view, kind
        )
    return reference.draw_blocks(
        ids, height, width, fraction, seed, epoch, view, kind, max_side, align, uniform_rate, max_blocks
    )
