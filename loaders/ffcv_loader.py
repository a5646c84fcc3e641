"""The compiled CPU engine: each image decoded once, and only where its boxes lie; all crops cut without Python's lock.

Where the C part was built, its threads fill a whole batch per call (batch_pool.py). What these leave, rows that are no
usual JPEGs or RGB pixels, or damaged, and sources that have no places, go image by image through `Loader._fill`.

It reads FFCV's files (and folders) but is not FFCV's loader, which decodes once per crop, cannot be given boxes,
ignores what its decoder reports, and waits for ever when its thread fails. It does not need the ffcv package. The
pixels are the reference engine's, to the bit; only files with missing or corrupt pixels differ: here they are bad
samples, while PIL fills some of them with gray.
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
from fastssl.loaders.sources import DecodeError, Encoded
from fastssl.loaders.window_decoder import Decoded, Window


class FFCVLoader(Loader):
    """The loader that decodes and crops in compiled code; see `fastssl.loaders.loader.Loader`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._draws = CompiledDraws(self._views, self._seed)

    def _stream(self) -> tuple[Ahead, Prepare]:
        pool = None
        if self._source.places(np.empty(0, np.int64)) is not None:
            pool = batch_pool.start(self._workers)
        if pool is None:
            return super()._stream()
        # Threads that mostly wait, one per batch in work. Of these, `workers` at a time fill what the pool leaves.
        threads = max(self._workers, self._prefetch + 1)
        turns = threading.Semaphore(max(1, self._workers))
        return Ahead(threads, self._prefetch, pool.close), partial(self._prepare_in, pool, turns)

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
        filled = pool.fill(places, heights, widths, groups)

        def fill(row: int) -> None:
            size = int(heights[row]), int(widths[row])
            with turns:
                if not filled[row] or not self._label(batch, drawn, row, size):
                    self._fill(batch, drawn, row, size, self._cut)

        todo = range(len(ids)) if self._part_grid else np.flatnonzero(~filled).tolist()
        pieces = self._pieces(batch, todo, fill, schedule_epoch)
        if not pieces:
            self._add_masks(batch, schedule_epoch)
        return batch, pieces

    def _label(self, batch: Batch, drawn: dict[str, Drawn], row: int, size: tuple[int, int]) -> bool:
        """Part labels of a row whose crops are filled; whether its part maps could be read."""
        try:
            maps = self._source.parts(int(batch.id[row]))
        except DecodeError:
            return False
        assert maps is not None
        self._label_parts(batch, drawn, row, row, maps, size)
        return True

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
