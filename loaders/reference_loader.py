"""The reference engine: PIL in threads; one decoding per image, all crops from it. The oracle of the other engines, and
of the central views that evaluation reads (`evaluation_view`).

A crop is cut out first and resized then (as torchvision's RandomResizedCrop does), so no pixel outside its box has a
part in it; then it is flipped.

Letters: B images in the batch, n crops of the group, S side in pixels.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from fastssl.config import View
from fastssl.loaders.loader import Crops, Loader
from fastssl.loaders.sources import Encoded, decode

FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


class ReferenceLoader(Loader):
    """The loader that decodes and crops with PIL; see `fastssl.loaders.loader.Loader`."""

    def _decode(self, encoded: Encoded, groups: list[Crops]) -> Image.Image:
        return Image.fromarray(decode(encoded))

    def _resize(self, image: Image.Image, groups: list[Crops]) -> None:
        frames = {0: image}
        for group in groups:
            squash = group.view.squash
            if squash not in frames:
                frames[squash] = image.resize((squash, squash), Image.Resampling.BILINEAR)
            cut(frames[squash], group.view, group.box, group.flip, group.out)


def cut(frame: Image.Image, view: View, box: np.ndarray, flip: np.ndarray, out: np.ndarray) -> None:
    """Write an image's crops of one group to `out`, uint8 [n, 3, S, S].

    Args:
        frame: the decoded (or squashed) image, RGB.
        box: int64 [n, 4], (top, left, height, width) in pixels of the frame.
        flip: bool [n].
    """
    side = (view.size, view.size)
    for crop, ((top, left, height, width), mirrored) in enumerate(zip(box.tolist(), flip.tolist(), strict=True)):
        region = frame.crop((left, top, left + width, top + height))
        pixels = np.asarray(region.resize(side, FILTERS[view.interpolation]))
        out[crop] = (pixels[:, ::-1] if mirrored else pixels).transpose(2, 0, 1)


def evaluation_view(image: Image.Image, size: int, resize: int) -> np.ndarray:
    """uint8 [size, size, 3]: the shorter side resized to `resize` pixels, then the centre."""
    short = min(image.size)
    width, height = (resize if side == short else int(resize * side / short) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))
