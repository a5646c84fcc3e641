"""Whole batches filled by threads that never hold Python's lock: `_pool.c`, which reads, decodes and cuts."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence

import numpy as np

from fastssl.loaders import resample, window_decoder
from fastssl.loaders.decode import FILE_AT, JPEG, Places
from fastssl.loaders.loader import Crops

_address, _number, _int = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_DECODED = 0


def available() -> bool:
    """Whether the C part was built, here and for this version, and works."""
    return bool(window_decoder.works() and _start)


def start(threads: int) -> BatchPool | None:
    """A pool of so many threads; None where the C part is not `available`, or there are no threads."""
    if not available():
        return None
    handle = _start(max(1, threads), resample.cut_address())
    return BatchPool(handle) if handle else None


class BatchPool:
    """Threads that fill batches, in the order in which these come. Use `start` to make one.

    After a fork the child's copy does nothing: it has no threads.
    """

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._end = weakref.finalize(self, _free, handle)  # at the interpreter's exit before this object goes

    def fill(
        self,
        places: Places,
        heights: np.ndarray,
        widths: np.ndarray,
        groups: Sequence[Crops],
        parts: tuple[np.ndarray, np.ndarray] | None = None,
        crc32: np.ndarray | None = None,
    ) -> np.ndarray:
        """Fills the crops of a batch, and waits for that; may be called from many threads.

        Args:
            places: where the images lie.
            heights, widths: int64 [B], of the images as their crops were drawn, in pixels.
            groups: as for one image, with one more dimension: box int64 [B, n, 4], flip bool [B, n], out uint8
                [B, n, 3, S, S]; all contiguous.
            parts: int64 [B, 2], where the images' part maps lie (`Source.part_places`), and uint8 [B, N, h, w],
                contiguous, to be filled with them.
            crc32: int64 [B]; where it is not negative, it becomes the checksum of the image's bytes, or -1 of raw
                pixels and files by name.

        Returns:
            bool [B], which rows were filled. The others are no usual images, or damaged; for Python to see to.

        Raises:
            RuntimeError: `close` was called meanwhile.
            ValueError: an array is not as stated.
        """
        count, part_bytes, part_address = len(heights), 0, 0
        rows = np.empty((count, 9), np.int64)
        rows[:, 8] = -1 if crc32 is None else np.where(np.isin(places.table[:, 0], (JPEG, FILE_AT)), crc32, -1)
        rows[:, :4], rows[:, 4], rows[:, 5] = places.table, heights, widths
        if parts is not None:
            rows[:, 6:8], maps = parts
            if maps.dtype != np.uint8 or len(maps) != count or not maps.flags.c_contiguous:
                raise ValueError(f"parts: {maps.dtype} {maps.shape}, not contiguous uint8 [{count}, ...]")
            part_bytes, part_address = maps[0].nbytes, _at(maps)
        table = np.array([_describe(group, count) for group in groups], np.int64)
        status = np.empty(count, np.uint8)
        done = self._end.alive and _run(
            self._handle, count, _at(rows), len(groups), _at(table), part_bytes, part_address, _at(status)
        )
        if not done:
            raise RuntimeError("the pool was closed")
        if crc32 is not None:
            crc32[:] = rows[:, 8]
        return status == _DECODED

    def close(self) -> None:
        """End the threads, each after the image that it is at; `fill` is of no use then."""
        if self._end.alive:
            _stop(self._handle)


def _describe(group: Crops, rows: int) -> tuple[int, ...]:
    view, n = group.view, group.view.count
    for array, kind, shape in (
        (group.box, np.int64, (rows, n, 4)),
        (group.flip, np.bool_, (rows, n)),
        (group.out, np.uint8, (rows, n, 3, view.size, view.size)),
    ):
        if array.dtype != kind or array.shape != shape or not array.flags.c_contiguous:
            raise ValueError(f"views.{view.name}: {array.dtype} {array.shape}, not contiguous {kind.__name__} {shape}")
    numbers = n, view.size, resample.FILTERS[view.interpolation], view.squash
    return _at(group.box), _at(group.flip), _at(group.out), *numbers


def _at(array: np.ndarray) -> int:
    """The address of an array's first byte."""
    return array.__array_interface__["data"][0]


def _typed(name: str, result: type | None, *arguments: type):
    function = window_decoder.load(name)
    if function:
        function.restype, function.argtypes = result, arguments
    return function


_start = _typed("fastssl_pool_start_4", _address, _int, _address)
_run = _typed("fastssl_pool_run", _int, _address, _number, _address, _number, _address, _number, _address, _address)
_stop = _typed("fastssl_pool_stop", None, _address)
_free = _typed("fastssl_pool_free", None, _address)
