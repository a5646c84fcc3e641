"""Training views of images with boxes and masks: flipped, resized and cropped together, ahead of their use.

Letters: N objects of an image, H and W its sides in pixels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as transforms

from fastssl.evaluation.tuned.coco import CocoSet, Target
from fastssl.evaluation.tuned.label_maps import resized
from fastssl.loaders import ahead
from fastssl.loaders.philox import below, random_words, uniform


@dataclass(frozen=True)
class Cuts:
    """The two ways in which a training image is resized and cut; sides in pixels.

    Attributes:
        short_sides: one of these becomes the shorter side.
        long_side: the longer side is at most this.
        crop_short_sides: the shorter side before a crop; empty: no image is cropped.
        crop: (smallest, largest) side of a crop; height and width are drawn by themselves.
        flip: probability of a horizontal flip.
    """

    short_sides: Sequence[int]
    long_side: int
    crop_short_sides: Sequence[int]
    crop: tuple[int, int]
    flip: float = 0.5


def cut(image: Tensor, target: Target, cuts: Cuts, *, seed: int, epoch: int, number: int) -> tuple[Tensor, Target]:
    """One training view of an image: flipped or not, then resized, or resized, cropped and resized again.

    Both ways have the same probability. What is drawn is a function of (seed, epoch, number). Objects of which the crop
    leaves less than one pixel of box or no pixel of mask are dropped, maybe all of them.

    Args:
        image: uint8 [3, H, W].
        target: its objects.
        number: the image's id, below 2^32.

    Returns:
        float32 [3, h, w] from 0 to 1, and its objects.

    Source: Carion et al. 2020, arXiv 2005.12872, appendix A.4; the numbers are its users'.
    """
    first, second = (random_words(seed, "detect", number, epoch, 0, block) for block in (0, 1))
    boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=image.shape[-2:])
    parts = [tv_tensors.Image(image), boxes, tv_tensors.Mask(target["masks"])]
    labels = target["labels"]

    def resize(short: int) -> None:
        height, width = parts[0].shape[-2:]
        size = list(resized(height, width, short, cuts.long_side))
        parts[:] = [transforms.resize(part, size, antialias=True) for part in parts]

    if uniform(first[0]) < cuts.flip:
        parts = [transforms.horizontal_flip(part) for part in parts]
    if cuts.crop_short_sides and uniform(first[1]) < 0.5:
        resize(cuts.crop_short_sides[int(below(first[3], len(cuts.crop_short_sides)))])
        sides = parts[0].shape[-2:]
        crop, corner = [], []
        for side, how_long, where in zip(sides, second[:2], second[2:], strict=True):
            low, high = (min(limit, side) for limit in cuts.crop)
            crop.append(low + int(below(how_long, high - low + 1)))
            corner.append(int(below(where, side - crop[-1] + 1)))
        parts = [transforms.crop(part, *corner, *crop) for part in parts]
    resize(cuts.short_sides[int(below(first[2], len(cuts.short_sides)))])
    view, boxes, masks = (part.as_subclass(Tensor) for part in parts)
    kept = (boxes[:, 2:] - boxes[:, :2] >= 1).all(dim=1) & (masks.flatten(1) > 0).any(dim=1)
    return view / 255, {"boxes": boxes[kept], "labels": labels[kept], "masks": masks[kept].contiguous()}


def read_ahead(
    data: CocoSet, rows: Sequence[Sequence[int]], make: Callable[[dict[str, Any]], Any], workers: int
) -> Generator[list[Any], None, None]:
    """`make(image)` of the images at each row's positions, row by row; threads work some rows ahead.

    Args:
        data: whose images are meant.
        rows: positions in `data.images`.
        make: what becomes of one image entry; runs in the threads.
        workers: threads.
    """
    images = (data.images[position] for row in rows for position in row)
    prefetch = max(2, workers) * max(map(len, rows), default=1)
    with contextlib.closing(ahead.read_ahead(images, make, workers, prefetch)) as made:
        for row in rows:
            yield list(islice(made, len(row)))
