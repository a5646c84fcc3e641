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
        views: [N, 3, H, W], dtype and memory format of the clean ones.
        mask: bool [N, H, W], true where a rectangle lies (gray and blurred ones included).
    """

    views: Tensor
    mask: Tensor


class Blocks(NamedTuple):
    """What `corrupt` paints, for N = views x B images, view after view.

    Attributes:
        boxes: int32 [N, R, 4], top, left, height, width; within the image; zeros: not used.
        kind: int32 [N, R].
        source: int64 [N], the row whose image alien blocks show, of the same view.
    """

    boxes: Tensor
    kind: Tensor
    source: Tensor


class FirstBlocks(NamedTuple):
    """What SiT's first version draws: `Blocks` (noise blocks, then alien ones), and

    Attributes:
        soft: int32 [N, 2, 4], the gray and the blurred block.
        weights: float64 [N, 8], of the blur: of pixels 0, 1, .. away.
        turns: int64 [N], quarter turns, 0 .. 3.
    """

    boxes: Tensor
    kind: Tensor
    source: Tensor
    soft: Tensor
    weights: Tensor
    turns: Tensor


@torch.no_grad()
def corrupt(
    views: Tensor,
    boxes: Tensor,
    kind: Tensor,
    source: Tensor,
    *,
    ids: Tensor,
    seed: int,
    epoch: int | Tensor = 0,
    view: int = 0,
    soft: Tensor | None = None,
    weights: Tensor | None = None,
) -> Corrupted:
    """The views with their rectangles painted over one another (Atito et al., "SiT: Self-supervised vIsion
    Transformer", 2021; group masked model learning, GMML).

        for n in range(N):
            beneath = views[n]
            if soft is given:
                each pixel in soft[n, 0] = the mean of its three channels
                each pixel in soft[n, 1] = its neighbours', weighted by weights[n, down] weights[n, across], where what
                    lies outside this rectangle is its mirror image (the pixels at its border do not count twice)
            for (top, left, height, width), k in zip(boxes[n], kind[n]):
                for pixel in the rectangle, cut at the border:
                    out[n, :, pixel] = (0, 0, 0) if k == ZERO
                    out[n, :, pixel] = three normal numbers if k == NOISE
                    out[n, :, pixel] = views[source[n], :, pixel] if k == ALIEN  # clean, whatever happens to that view
                    mask[n, pixel] = True

    Only the last rectangle over a pixel decides, so each pixel is written once, and read only where it shows. Noise is
    a function of (seed, epoch, id, view, pixel): Philox4x32-10 and the Box-Muller transform. No gradient.

    Args:
        views: [N, 3, H, W], clean, normalised (so that 0 is the mean colour); N is a multiple of B: row n is of sample
            n mod B and shows its view number `view` + n div B.
        boxes: int32 [N, R, 4], top, left, height, width in pixels; height 0: not used.
        kind: int32 [N, R]: 0 zero, 1 noise, 2 alien.
        source: int32 or int64 [N], row of `views` that alien rectangles show; always a valid index.
        ids: int64 [B], sample ids, below 2^32.
        seed, epoch, view: 32-bit numbers; the epoch may be an int64 tensor [] on the views' device.
        soft: int32 [N, 2, 4], a gray and a blurred rectangle within the view; they count as damaged (mask).
        weights: float64 [N, 8], of the blur; with `soft` only.

    Raises:
        KernelError: a shape or type that does not fit.
    """
    name = "corrupt"
    shapes = Shapes(name)
    shapes("views", views, "N 3 H W")
    shapes("boxes", boxes, "N R 4", (torch.int32,))
    shapes("kind", kind, "N R", (torch.int32,))
    shapes("source", source, "N", INTEGERS)
    (count,) = shapes("ids", ids, "B", (torch.int64,))
    check(len(views) % max(count, 1) == 0, name, "views", f"a multiple of the {count} ids in number", len(views))
    check((soft is None) == (weights is None), name, "weights", "given if and only if soft is", type(weights).__name__)
    if soft is not None and weights is not None:
        shapes("soft", soft, "N 2 4", (torch.int32,))
        shapes("weights", weights, f"N {reference.TAPS}", (torch.float64,))
    if use_triton(name, views) and views.dtype in FLOATS[:3]:
        from fastssl.kernels.corrupt import kernel

        return Corrupted(
            *kernel.paint(views, boxes, kind, source, ids, seed, *kernel.number(epoch), view, soft, weights)
        )
    return Corrupted(*reference.corrupt(views, boxes, kind, source, ids, seed, epoch, view, soft, weights))


@torch.no_grad()
def draw_blocks(
    ids: Tensor,
    *,
    views: int,
    height: int,
    width: int,
    drop: float,
    replace: float,
    seed: int,
    epoch: int | Tensor,
    alien: float = 0.5,
    noise: float = 0.0,
    group: int = 8,
    max_side: float = 0.3,
    align: int = 1,
    uniform_rate: bool = True,
    max_blocks: tuple[int, int] = (128, 128),
) -> Blocks:
    """Random rectangles per view of each image until their union reaches a budget (GMML of SiT, version of 2022).

        for v in range(views):
            for b in range(B):
                kind = ALIEN with probability alien, else NOISE with probability noise, else ZERO
                source = another image of b's group in this view
                fraction = replace if kind == ALIEN else drop
                budget = uniform(min(0.5, fraction), fraction) * H * W  # pixels
                while union of the blocks < budget:
                    add a block with sides uniform in {align, .., int(max_side * side of the image) - 1}

    The union is counted pixel by pixel, so overlaps do not count twice; the budget holds without the last block only
    from below. A view's blocks and kind are a function of (seed, epoch, id, view), not of the batch; its source is
    one of (seed, epoch, id, view) and of the place in the batch.

    Args:
        ids: int64 [B], sample ids, below 2^32.
        views: per image.
        height, width: of the image, pixels.
        drop, replace: share of a view to blank, or to cover with another image, from 0 to less than 1; above 0.5 it is
            the upper end of a range.
        seed, epoch: 32-bit numbers; the epoch may be an int64 tensor [] on the device of the ids.
        alien, noise: probabilities.
        group: consecutive images whose rows may be each other's source; 0: all, itself included.
        max_side: bound on a block's sides, as a share of the image's.
        align: starts and sides are multiples of this many pixels (sides rounded, half to even).
        uniform_rate: starts uniform in {-side + align, .., side of the image - align}, the block cut at all four
            borders, so that every pixel is covered equally often. False is upstream: starts uniform in
            {0, .., side of the image - align - 1}, blocks grow down and to the right, and the top and left margins
            are almost never covered (the top-left 16 x 16 of 224 x 224 at a rate of 0.04 instead of 0.5).
        max_blocks: most blocks of a blanked and of a mixed view; one that needs more falls short of its budget. At
            224 x 224 a share of 0.5 takes 40 on average (64 at most in the method's card). R is the greater one.

    Raises:
        KernelError: a shape, type or number that does not fit.
    """
    name = "draw_blocks"
    Shapes(name)("ids", ids, "B", (torch.int64,))
    for key, share in (("drop", drop), ("replace", replace)):
        check(0 <= share < 1, name, key, "from 0 to less than 1", share)
    check(align >= 1, name, "align", "at least 1", align)
    least = min(int(max_side * height), int(max_side * width), height, width)
    check(align < least, name, "max_side", f"a share that leaves sides above align = {align}", f"{max_side} ({least})")
    check(min(max_blocks) >= 0, name, "max_blocks", "at least 0", max_blocks)
    if use_triton(name, ids) and height * width <= MOST_PIXELS:
        from fastssl.kernels.corrupt import kernel

        budgets = [*reference.budget(height, width, drop), *reference.budget(height, width, replace)]
        return Blocks(
            *kernel.draw(
                ids, views, height, width, int(max_side * height), int(max_side * width), budgets, list(max_blocks),
                int(alien * 2**32), int(noise * 2**32), group, align, uniform_rate, seed, *kernel.number(epoch),
            )
        )  # fmt: skip
    return Blocks(
        *reference.draw_blocks(
            ids, views, height, width, drop, replace, seed, epoch, alien, noise, group, max_side, align, uniform_rate,
            max_blocks,
        )
    )  # fmt: skip


@torch.no_grad()
def draw_first(
    ids: Tensor, *, views: int, side: int, share: float, seed: int, epoch: int | Tensor, group: int = 8
) -> FirstBlocks:
    """What the first version of SiT (2021) draws per view of each image: a gray block, a blurred one and its blur,
    noise blocks, alien blocks, and a rotation.

        for the gray and the blurred block: sides uniform in {11, .., 223} of 224 pixels
        for noise and then alien blocks: sides uniform in {11, .., 55} of 224 pixels
            budget = uniform(0, share) * side * side  # pixels
            while sum of the blocks' areas < budget (and there are fewer than 48): add a block
        top and left uniform in {0, .., 212} of 224 pixels; what lies outside is cut off
        blur: Gaussian, 2 (u div 2) + 1 pixels with u uniform in {3, .., 15}, standard deviation in [0.1, 5.1) pixels

    A function of (seed, epoch, id, view); the source also of the place in the batch, and there are no alien blocks
    where an image is its own source. Other sides than 224 have blocks in proportion, but the same blur.

    Args:
        ids: int64 [B], sample ids, below 2^32.
        views: per image.
        side: of the image, pixels.
        share: greatest budget, from 0 to less than 1.
        seed, epoch: 32-bit numbers; the epoch may be an int64 tensor [] on the device of the ids.
        group: consecutive images whose rows may be each other's source; 0: all, itself included.

    Raises:
        KernelError: a shape, type or number that does not fit.
    """
    name = "draw_first"
    Shapes(name)("ids", ids, "B", (torch.int64,))
    check(0 <= share < 1, name, "share", "from 0 to less than 1", share)
    if use_triton(name, ids):
        from fastssl.kernels.corrupt import kernel

        return FirstBlocks(*kernel.draw_first(ids, views, side, share, group, seed, *kernel.number(epoch)))
    return FirstBlocks(*reference.draw_first(ids, views, side, share, seed, epoch, group))
