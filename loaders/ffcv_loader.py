"""The compiled CPU engine: each image decoded once, and only where its boxes lie; all crops cut without Python's lock.

Where the C part was built, its threads fill a whole batch per call (batch_pool.py). What these leave, rows that are no
usual JPEGs or RGB pixels, or damaged, and sources that have no places, go image by image through `Loader._fill`.

It reads FFCV's files (and folders) but is not FFCV's loader, which decodes once per crop, cannot be given boxes,
ignores what its decoder reports, and waits for ever when its thread fails. It does not need the ffcv package. The
pixels are the reference engine's, to the bit, and so is the verdict on damaged files.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from fastssl.batch import Batch
from fastssl.loaders import batch_pool, resample, window_decoder
from fastssl.loaders.ahead import Ahead
from fastssl.loaders.batch_pool import BatchPool
from fastssl.loaders.draw import Drawn
from fastssl.loaders.draw_compiled import CompiledDraws
from fastssl.loaders.loader import Crops, Loader, Prepare
from fastssl.loaders.sources import Encoded
from fastssl.loaders.window_decoder import Decoded, Window


class FFCVLoader(Loader):
    """The loader that decodes and crops in compiled code; see `fastssl.loaders.loader.Loader`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._draws = CompiledDraws(self._views, self._seed)

    def _stream(self) -> tuple[Ahead, Prepare]:
        pool = None
        nothing = np.empty(0, np.int64)
        parts_found = not self._part_grid or self._source.part_places(nothing) is not None
        if parts_found and self._source.places(nothing) is not None:
            pool = batch_pool.start(self._workers)
        if pool is None:
            return super()._stream()
        # Threads that mostly wait, one per batch in the pool, and `workers` at a time that fill what it leaves.
        waiting = max(2, self._prefetch)
        threads = max(self._workers, waiting)
        turns = threading.Semaphore(max(1, self._workers))
        return Ahead(threads, self._prefetch, pool.close, waiting), partial(self._prepare_in, pool, turns)

    def _prepare_in(
        self, pool: BatchPool, turns: threading.Semaphore, ids: np.ndarray, epoch: int, schedule_epoch: int
    ) -> tuple[Batch, list[Callable[[], None]]]:
        """A batch that the pool has filled, and the work that fills what it left."""
        batch, drawn, heights, widths = self._begin(ids, epoch)
        places = self._source.places(ids)
        assert places is not None
        groups = []
        for view in self._views:
            mine = drawn[view.name]
            groups.append(Crops(view, mine.box, mine.flip, batch.views[view.name].numpy()))
        crc32 = self._source.to_check(ids)
        if self._part_grid and (found := self._source.part_places(ids)):
            maps = np.empty((len(ids), *found.shape), np.uint8)
            filled = pool.fill(places, heights, widths, groups, (found.table, maps), crc32)
            self._label_parts(batch, drawn, slice(None), maps, np.array([heights, widths]).T)  # also of rows left
        else:
            filled = pool.fill(places, heights, widths, groups, crc32=crc32)
        if crc32 is not None:
            filled &= self._source.sound(ids, crc32)
        todo = np.flatnonzero(~filled).tolist()

        def fill(row: int) -> None:
            with turns:
                self._fill(batch, drawn, row, (int(heights[row]), int(widths[row])), self._cut)

        pieces = self._pieces(batch, todo, fill, schedule_epoch)
        if not pieces:
            self._add_masks(batch, schedule_epoch)
        return batch, pieces

    def _draw_all(self, heights: np.ndarray, widths: np.ndarray, epoch: int, ids: np.ndarray) -> dict[str, Drawn]:
        return self._draws(heights, widths, epoch=epoch, ids=ids)

    def _decode(self, encoded: Encoded, groups: list[Crops]) -> Decoded:
        return window_decoder.decode(encoded, window(groups))

    def _resize(self, image: Decoded, groups: list[Crops]) -> None:
        frames = {0: (image.pixels, (image.top, image.left))}
        for group in groups:
            view = group.view
            if view.squash not in frames:
                frames[view.squash] = resample.squash(image.pixels, view.squash), (0, 0)
            frame, origin = frames[view.squash]
            resample.cut_all(frame, origin, group.box, group.flip, view.size, view.interpolation, group.out)


def window(groups: list[Crops]) -> Window | None:
    """The smallest window that holds all boxes of an image; None where all of it is needed."""
    if any(group.view.squash for group in groups):
        return None
    boxes = np.concatenate([group.box for group in groups]) if len(groups) > 1 else groups[0].box
    top, left = boxes[:, :2].min(axis=0).tolist()
    bottom, right = (boxes[:, :2] + boxes[:, 2:]).max(axis=0).tolist()
    return top, left, bottom - top, right - left
