"""Central views: every image once, in order, with nothing drawn. All evaluation reads through here.

The shorter side is resized to so many pixels (bicubic by default, antialiased), then the centre is cropped:
torchvision's Resize and CenterCrop on a PIL image, to the bit. Only those pixels are decoded and resized that the
centre is made of.

Letters: B images in the batch, n crops of the group, S side in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from fastssl.batch import Batch
from fastssl.config import View
from fastssl.loaders import resample, window_decoder
from fastssl.loaders.ahead import Ahead
from fastssl.loaders.loader import BadSampleError, part_labels
from fastssl.loaders.masks import Mask, add_masks
from fastssl.loaders.sources import DecodeError, Encoded, Source
from fastssl.loaders.window_decoder import Decoded, Window


def evaluation_batches(
    source: Source,
    *,
    size: int,
    resize: int,
    batch_size: int,
    workers: int = 0,
    prefetch: int = 4,
    ids: Sequence[int] | np.ndarray | None = None,
    interpolation: str = "bicubic",
) -> Generator[Batch, None, None]:
    """Every image in its central view, in order, the last incomplete batch included.

    Args:
        source: where the encoded images come from.
        size: S, the side of the crop, in pixels.
        resize: shorter side before cropping, in pixels; at least `size`.
        batch_size: images per batch.
        workers: decoding threads; 0 counts as 1.
        prefetch: batches in work beyond the one that is asked for.
        ids: sample ids to read, in this order; None reads all.
        interpolation: of the resize: bilinear, bicubic or lanczos.

    Yields:
        Batches with ids, labels and the group "eval", uint8 [B, 1, 3, S, S].

    Raises:
        ValueError: `resize` is smaller than `size`.
        BadSampleError: a sample cannot be read; raised while iterating. Leaving it out would falsify the evaluation.
    """
    if resize < size:
        raise ValueError(f"resize is {resize} pixels, smaller than the crop of {size}")
    view = View(name="eval", size=size)
    how: dict[str, Any] = {"workers": workers, "prefetch": prefetch, "ids": ids, "interpolation": interpolation}
    return central_batches(source, [view], {"eval": resize}, batch_size=batch_size, **how)


def central_batches(
    source: Source,
    views: Sequence[View],
    resize: Mapping[str, int],
    *,
    batch_size: int,
    workers: int = 0,
    prefetch: int = 4,
    ids: Sequence[int] | np.ndarray | None = None,
    part_grid: Mapping[str, int] | None = None,
    masks: Sequence[Mask] = (),
    seed: int = 0,
    schedule_epoch: int = 0,
    interpolation: str = "bicubic",
) -> Generator[Batch, None, None]:
    """All view groups of every image, in order: each crop shows the central view, not flipped.

    A group that is cut from a squashed image shows all of that: resized to a square (bilinear), then to the group's
    size by its own filter.

    Args:
        views: the groups; what they say about draws is ignored.
        resize: shorter side before cropping by group, in pixels, at least the group's size; not read for squashed ones.
        part_grid: side of the part-label grid by group; None delivers no part labels.
        masks: what to hide of the groups; drawn as in epoch 0.
        seed, schedule_epoch: of the masks; the epoch at which their schedules stand.
        source, batch_size, workers, prefetch, ids, interpolation: as for `evaluation_batches`.

    Yields:
        Batches with ids, labels, uint8 views [B, n, 3, S, S], boxes, flips (none is), part labels and masks.

    Raises:
        ValueError: part labels are asked for, but the data has no part maps.
        BadSampleError: a sample cannot be read; raised while iterating.
    """
    order = np.arange(len(source)) if ids is None else np.asarray(ids, dtype=np.int64)
    grids = part_grid or {}
    if grids and not source.has_parts:
        raise ValueError("part_grid is set, but the data has no part maps")

    def prepare(position: int) -> tuple[Batch, list[Callable[[], None]]]:
        mine = order[position * batch_size : (position + 1) * batch_size]
        batch = Batch(id=torch.tensor(mine), label=torch.tensor(source.labels[mine]))
        for view in views:
            shape = (len(mine), view.count)
            batch.views[view.name] = torch.empty(*shape, 3, view.size, view.size, dtype=torch.uint8)
            batch.box[view.name] = torch.empty(*shape, 4)
            batch.flip[view.name] = torch.zeros(shape, dtype=torch.bool)
            if grid := grids.get(view.name):
                batch.parts[view.name] = torch.empty(*shape, grid, grid, dtype=torch.int64)
        left = list(range(len(mine)))  # each row takes one off when it is done
        return batch, [partial(fill, batch, row, left) for row in range(len(mine))]

    def fill(batch: Batch, row: int, left: list[int]) -> None:
        sample = int(batch.id[row])
        try:
            encoded = source.read(sample)
            image = window_decoder.decode(encoded, _window(encoded, views, resize, interpolation))
            maps = source.parts(sample) if grids else None
        except DecodeError as error:
            raise BadSampleError(f"sample {sample} ({source.name(sample)}) {error}", sample) from error
        shape = (encoded.height, encoded.width)
        for view in views:
            box = np.array([0.0, 0.0, 1.0, 1.0]) if view.squash else central_box(*shape, view.size, resize[view.name])
            batch.views[view.name].numpy()[row] = _cut(
                image, shape, view, resize, interpolation
            )  # torch would wake its own threads
            batch.box[view.name].numpy()[row] = box
            if grid := grids.get(view.name):
                assert maps is not None
                labels = part_labels(maps[None], box[None, None], np.zeros((1, 1), bool), np.ones((1, 2)), grid)
                batch.parts[view.name].numpy()[row] = labels[0]
        if left.pop() == 0:  # the last one: part labels are final
            add_masks(batch, masks, seed=seed, schedule_epoch=schedule_epoch)

    def batches() -> Generator[Batch, None, None]:
        with source.coming(order):
            yield from Ahead(workers, prefetch).run(prepare, range(-(-len(order) // batch_size)))

    return batches()


def central_box(height: int, width: int, size: int, resize: int) -> np.ndarray:
    """Top, left, height, width of the central view as fractions of an image of these sides, float64 [4]."""
    extent = min(height, width) * size / resize / np.array([height, width])
    return np.concatenate([(1 - extent) / 2, extent])


def _window(encoded: Encoded, views: Sequence[View], resize: Mapping[str, int], interpolation: str) -> Window | None:
    """The smallest window of an image that all groups are made of; None where that is all of it."""
    shape = (encoded.height, encoded.width)
    if any(view.squash for view in views) or min(shape) < 1:
        return None
    parts = [_central(*shape, view.size, resize[view.name]) for view in views]
    windows = [
        resample.part_window(shape, *part, view.size, interpolation) for part, view in zip(parts, views, strict=True)
    ]
    top, left = (min(window[axis] for window in windows) for axis in (0, 1))
    bottom, right = (max(window[axis] + window[axis + 2] for window in windows) for axis in (0, 1))
    return top, left, bottom - top, right - left


def _cut(
    image: Decoded, shape: tuple[int, int], view: View, resize: Mapping[str, int], interpolation: str
) -> np.ndarray:
    """What a group shows of a decoded image of `shape` (height, width): uint8 [3, S, S]."""
    side = view.size
    if view.squash:
        square = resample.squash(image.pixels, view.squash)
        return resample.cut_part(square, (0, 0), square.shape[:2], (side, side), (0, 0), side, view.interpolation)
    grid, corner = _central(*shape, side, resize[view.name])
    return resample.cut_part(image.pixels, (image.top, image.left), shape, grid, corner, side, interpolation)


def _central(height: int, width: int, size: int, resize: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Height and width of the resized image, and top and left of its centre; in pixels."""
    short = min(height, width)
    rows, columns = (resize if side == short else int(resize * side / short) for side in (height, width))
    return (rows, columns), (round((rows - size) / 2), round((columns - size) / 2))
