"""The reference engine: PIL in threads; one decoding per image, all crops from it. The oracle of the other engines.

A crop is cut out first and resized then (as torchvision's RandomResizedCrop does), so no pixel outside its box has a
part in it; then it is flipped.

Letters: B images in the batch, n crops of the group, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image

from fastssl.batch import Batch
from fastssl.config import View
from fastssl.loaders.ahead import Ahead
from fastssl.loaders.loader import BadSampleError, Crops, Loader
from fastssl.loaders.sources import DecodeError, Encoded, Source, decode

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


def read_image(source: Source, sample: int) -> Image.Image:
    """The decoded image of a sample, RGB. Raises DecodeError if it cannot be read."""
    return Image.fromarray(decode(source.read(sample)))


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


def evaluation_batches(
    source: Source,
    *,
    size: int,
    resize: int,
    batch_size: int,
    workers: int = 0,
    prefetch: int = 4,
    ids: Sequence[int] | np.ndarray | None = None,
) -> Iterator[Batch]:
    """Every image in its deterministic evaluation view, in order, the last incomplete batch included.

    The shorter side is resized to `resize` pixels (bicubic, antialiased), then the centre is cropped: torchvision's
    Resize and CenterCrop on a PIL image.

    Args:
        source: where the encoded images come from.
        size: side of the crop, in pixels.
        resize: shorter side before cropping, in pixels; at least `size`.
        batch_size: images per batch.
        workers: decoding threads; 0 counts as 1.
        prefetch: batches in work beyond the one that is asked for.
        ids: sample ids to read, in this order; None reads all.

    Yields:
        Batches with ids, labels and the group "eval", uint8 [B, 1, 3, size, size].

    Raises:
        ValueError: `resize` is smaller than `size`.
        BadSampleError: a sample cannot be read; raised while iterating. Leaving it out would falsify the evaluation.
    """
    if resize < size:
        raise ValueError(f"resize is {resize} pixels, smaller than the crop of {size}")
    ids = np.arange(len(source)) if ids is None else np.asarray(ids, dtype=np.int64)

    def prepare(position: int) -> tuple[Batch, list[Callable[[], None]]]:
        mine = ids[position * batch_size : (position + 1) * batch_size]
        pixels = torch.empty((len(mine), 1, 3, size, size), dtype=torch.uint8)
        batch = Batch(id=torch.tensor(mine), label=torch.tensor(source.labels[mine]), views={"eval": pixels})
        return batch, [partial(fill, int(sample), pixels[row, 0].numpy()) for row, sample in enumerate(mine)]

    def fill(sample: int, out: np.ndarray) -> None:
        try:
            image = read_image(source, sample)
        except DecodeError as error:
            raise BadSampleError(f"sample {sample} ({source.name(sample)}) {error}") from error
        out[:] = evaluation_view(image, size, resize).transpose(2, 0, 1)

    return Ahead(workers, prefetch).run(prepare, range(-(-len(ids) // batch_size)))


def evaluation_view(image: Image.Image, size: int, resize: int) -> np.ndarray:
    """uint8 [size, size, 3]: the shorter side resized to `resize` pixels, then the centre."""
    short = min(image.size)
    width, height = (resize if side == short else int(resize * side / short) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))
