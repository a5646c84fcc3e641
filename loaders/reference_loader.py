"""The reference engine: PIL in threads; one decoding per image, all crops from it. The oracle of the other engines.

A crop is cut out first and resized then (as torchvision's RandomResizedCrop does), so no pixel outside its box has a
part in it; then it is flipped. The photometric part is left to `fastssl.augment`.

Letters: B images in the batch, n crops of the group, S side in pixels, g side of the part grid.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal

import numpy as np
import torch
from PIL import Image

from fastssl.batch import Batch, Photometric
from fastssl.config import View
from fastssl.loaders.ahead import Ahead
from fastssl.loaders.draw import Drawn, check_views, draw_all
from fastssl.loaders.index import batch_ids, batches_per_epoch, order, replacement
from fastssl.loaders.sources import DecodeError, Source, decode

log = logging.getLogger(__name__)

FILTERS = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


class BadSampleError(RuntimeError):
    """A sample cannot be read, or too many cannot; the message names index, source and reason of each."""


class ReferenceLoader:
    """Batches of uint8 crops, the same for a given seed whatever the threads, prefetch, batch size or ranks.

    Usable as a context manager; `close` also ends epochs that are being read.

    Args:
        source: where the encoded images come from.
        views: the view groups.
        batch_size: images per batch and rank.
        seed: seed of order and draws, 0 to 2^32 - 1.
        rank, world: which slice of every global batch to deliver.
        workers: decoding threads; 0 counts as 1.
        prefetch: batches in work beyond the one that is asked for.
        on_bad: an unreadable sample is replaced by another one, chosen by (seed, epoch, id) (skip), or ends the epoch
            with a BadSampleError (raise).
        max_bad: with skip, more different bad samples than this end the epoch with a BadSampleError.
        pin_memory: deliver batches in page-locked memory, for asynchronous copies to a CUDA device.
        part_grid: side of the part-label grid per group; None delivers no part labels.

    Attributes:
        batches_per_epoch: whole batches per epoch; images left over are not used in that epoch.

    Raises:
        ConfigError: the view groups do not fit together.
        ValueError: fewer images than one batch of all ranks, no such rank or seed, or an undeliverable part grid.
    """

    def __init__(
        self,
        source: Source,
        views: Sequence[View],
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        prefetch: int = 4,
        on_bad: Literal["skip", "raise"] = "skip",
        max_bad: int = 100,
        pin_memory: bool = False,
        part_grid: dict[str, int] | None = None,
    ) -> None:
        check_views(views)
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed is {seed}; it must be from 0 to 2^32 - 1")
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} does not exist; there are {world}")
        if part_grid and not source.has_parts:
            raise ValueError("part_grid is set, but the data has no part maps")
        if unknown := set(part_grid or ()) - {view.name for view in views}:
            raise ValueError(f"part_grid names {sorted(unknown)}, which are not view groups")
        self.batches_per_epoch = batches_per_epoch(len(source), batch_size, world)
        self._source = source
        self._views = list(views)
        self._batch_size, self._seed, self._rank, self._world = batch_size, seed, rank, world
        self._workers, self._prefetch = workers, prefetch
        self._on_bad, self._max_bad = on_bad, max_bad
        self._pin_memory = pin_memory
        self._part_grid = part_grid or {}
        self._bad: dict[int, tuple[int, str, str]] = {}
        self._lock = threading.Lock()
        self._streams: set[Ahead] = set()

    @property
    def bad(self) -> list[tuple[int, str, str]]:
        """The samples that could not be read so far: (id, source name, reason), by id."""
        with self._lock:
            return sorted(self._bad.values())

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, from position `start` on (to resume inside an epoch).

        Raises:
            ValueError: `start` lies behind the epoch's end.
            BadSampleError: see `on_bad`, `max_bad`; raised while iterating.
        """
        if not 0 <= start <= self.batches_per_epoch:
            raise ValueError(f"batch {start} of the epoch does not exist; there are {self.batches_per_epoch}")
        return self._epoch(epoch, start)

    def _epoch(self, epoch: int, start: int) -> Iterator[Batch]:
        stream = Ahead(self._workers, self._prefetch)
        self._streams.add(stream)
        ids = order(len(self._source), self._seed, epoch)

        def prepare(position: int) -> tuple[Batch, list[Callable[[], None]]]:
            mine = batch_ids(ids, position, self._batch_size, self._rank, self._world)
            return self._prepare(mine, epoch)

        try:
            for batch in stream.run(prepare, range(start, self.batches_per_epoch)):
                yield batch.map(torch.Tensor.pin_memory) if self._pin_memory else batch
        finally:
            stream.close()
            self._streams.discard(stream)

    def _prepare(self, ids: np.ndarray, epoch: int) -> tuple[Batch, list[Callable[[], None]]]:
        """A batch with everything but its pixels and part labels, and the work that fills those in, row by row."""
        heights, widths = (np.maximum(sides, 1) for sides in self._source.sizes(ids))  # 0: no readable header
        drawn, batch = self._draw(ids, heights, widths, epoch)
        for view in self._views:
            shape = (len(ids), view.count, 3, view.size, view.size)
            batch.views[view.name] = torch.empty(shape, dtype=torch.uint8, pin_memory=self._pin_memory)
        for name, grid in self._part_grid.items():
            batch.parts[name] = torch.empty((*batch.box[name].shape[:2], grid, grid), dtype=torch.int64)
        sizes = zip(heights.tolist(), widths.tolist(), strict=True)
        return batch, [partial(self._fill, batch, drawn, row, size) for row, size in enumerate(sizes)]

    def _draw(
        self, ids: np.ndarray, heights: np.ndarray, widths: np.ndarray, epoch: int
    ) -> tuple[dict[str, Drawn], Batch]:
        """What is drawn for samples of known size: as arrays for cutting, and as a batch without pixels."""
        drawn = draw_all(self._views, heights, widths, seed=self._seed, epoch=epoch, ids=ids)
        batch = Batch(id=torch.tensor(ids), label=torch.tensor(self._source.labels[ids]), epoch=epoch)
        sides = np.stack([heights, widths, heights, widths], axis=-1)[:, None]
        for view in self._views:
            mine = drawn[view.name]
            batch.box[view.name] = torch.tensor(mine.box / (view.squash or sides), dtype=torch.float32)
            batch.flip[view.name] = torch.tensor(mine.flip)
            if mine.photometric:
                fields = {key: torch.from_numpy(value) for key, value in mine.photometric.items()}
                batch.photometric[view.name] = Photometric(**fields)
        return drawn, batch

    def _fill(self, batch: Batch, drawn: dict[str, Drawn], row: int, size: tuple[int, int]) -> None:
        """Decode the image of one row once and cut all its crops; another image where it cannot be read."""
        wanted, epoch, drawn_row = int(batch.id[row]), batch.epoch, row
        sample, image = self._read(wanted, epoch)
        if sample != wanted or (image.height, image.width) != size:
            drawn, substitute = self._draw(np.array([sample]), np.array([image.height]), np.array([image.width]), epoch)
            _put(substitute, batch, row)
            drawn_row = 0
        maps = self._source.parts(sample) if self._part_grid else None
        frames = {0: image}
        for view in self._views:
            if view.squash not in frames:
                frames[view.squash] = image.resize((view.squash, view.squash), Image.Resampling.BILINEAR)
            frame = frames[view.squash]
            box, flip = drawn[view.name].box[drawn_row], drawn[view.name].flip[drawn_row]
            cut(frame, view, box, flip, batch.views[view.name][row].numpy())
            if view.name in self._part_grid:
                labels = part_labels(maps, box, flip, (frame.height, frame.width), self._part_grid[view.name])
                batch.parts[view.name][row] = torch.from_numpy(labels)

    def _read(self, wanted: int, epoch: int) -> tuple[int, Image.Image]:
        """The sample that was read and its image: the wanted one, or the first replacement that can be read."""
        sample, attempt = wanted, 0
        while True:
            try:
                return sample, read_image(self._source, sample)
            except DecodeError as error:
                self._note_bad(sample, str(error))
            sample = replacement(wanted, attempt, len(self._source), self._seed, epoch)
            attempt += 1

    def _note_bad(self, sample: int, reason: str) -> None:
        name = self._source.name(sample)
        if self._on_bad == "raise":
            raise BadSampleError(f"sample {sample} ({name}) {reason}")
        with self._lock:
            new = sample not in self._bad
            self._bad[sample] = (sample, name, reason)
            count = len(self._bad)
        if new:
            log.warning("sample %d (%s) %s; another one replaces it", sample, name, reason)
        if count > self._max_bad or count == len(self._source):
            lines = [f"  sample {i} ({name}) {reason}" for i, name, reason in self.bad]
            raise BadSampleError(
                f"{count} samples cannot be read; data.max_bad allows {self._max_bad}. "
                "Repair the data (fastssl verify lists what is bad):\n" + "\n".join(lines)
            )

    def close(self) -> None:
        """End all epochs that are being read and free their threads."""
        for stream in list(self._streams):
            stream.close()

    def __enter__(self) -> ReferenceLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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


def part_labels(maps: np.ndarray, box: np.ndarray, flip: np.ndarray, frame: tuple[int, int], grid: int) -> np.ndarray:
    """Part label of every patch of an image's crops, int64 [n, g, g]: the strongest map at the patch's centre.

    The maps cover the whole image. They are sampled bilinearly, beyond their outermost cell centres with the value
    there; of equally strong maps the first wins (SemMAE, arXiv 2206.10207; maps rather than labels can be cropped).

    Args:
        maps: uint8 [N, h, w], one map per part on a common scale.
        box: int64 [n, 4], (top, left, height, width) in pixels of the frame.
        flip: bool [n].
        frame: height and width of the decoded (or squashed) image in pixels.
        grid: g, patches along a side of the crop.
    """
    centre = (np.arange(grid) + 0.5) / grid
    across = np.where(flip[:, None], 1 - centre, centre)
    top, left, height, width = box[:, :, None].transpose(1, 0, 2)
    y = maps.shape[1] * (top + centre * height) / frame[0] - 0.5  # [n, g]
    x = maps.shape[2] * (left + across * width) / frame[1] - 0.5
    rows, columns = _taps(y, maps.shape[1]), _taps(x, maps.shape[2])  # [n, g, h], [n, g, w]
    return np.einsum("ngh,phw,nkw->npgk", rows, maps.astype(np.float64), columns, optimize=True).argmax(axis=1)


def _taps(position: np.ndarray, cells: int) -> np.ndarray:
    """Weights [..., cells] of linear interpolation at `position`, in cells from the first cell's centre, clamped."""
    return np.maximum(1 - np.abs(position.clip(0, cells - 1)[..., None] - np.arange(cells)), 0)


def _put(one: Batch, batch: Batch, row: int) -> None:
    """Copy a batch of one sample, without pixels, into a row of another batch."""
    batch.id[row], batch.label[row] = one.id[0], one.label[0]
    for name in one.box:
        batch.box[name][row], batch.flip[name][row] = one.box[name][0], one.flip[name][0]
    for name, fields in one.photometric.items():
        for key, value in vars(fields).items():
            getattr(batch.photometric[name], key)[row] = value[0]


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
