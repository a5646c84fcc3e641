"""Crops of one decoded image, with PIL's antialiased filters to the bit, in compiled code that holds no lock.

A crop is a box of the image, resized (`cut_all`), or a square part of the resized image (`cut_part`). Both are the
same work: a pixel of the result needs a few rows and columns of the box, whether its neighbours are wanted or not.

The arithmetic is PIL's: the rows are resized first and then the columns, each time rounded to 8 bits, with weights of
22 fractional bits. The order in memory is not: both passes add up weighted rows of a matrix, 32 neighbouring bytes at a
time, so the first pass works on transposed bands of the crop:

    band [R, 3w]     --transpose-->  turned [3w, R]   --weigh-->  narrow [3S, R]  --transpose-->  R rows of between
    between [h, 3S]  --weigh-->      out [3, S, S]

numba cannot be told to keep 32 sums in vector registers (its code for the same loop took 17 times as long), so the two
steps are written in LLVM's language, with vectors that LLVM fits to the CPU at hand. The first use compiles for some
seconds and keeps the result in numba's cache on disk.

Letters: n crops, S side of a crop in pixels, h and w height and width of the pixels that it is made of, R rows of a
band.
"""

from __future__ import annotations

import math
import threading
from functools import cache

import numpy as np
import PIL
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

FILTERS = {"bilinear": 1, "bicubic": 2, "lanczos": 3}
"""Name → half the filter's width in pixels, which also tells the filters apart."""

TALL_FIRST = int(PIL.__version__.split(".")[0]) >= 13
"""PIL 13 and newer resize the columns first where a box shrinks much more in height than in width."""

BITS = 22  # fractional bits of a weight: 8 bits of pixel and 2 of overshoot fill up a 32-bit sum
BLOCK = 16  # rows and columns that are transposed at a time
LANES = 32  # bytes that are weighed at a time
BAND = LANES  # R

_BYTE, _WORD, _INDEX = ir.IntType(8), ir.IntType(32), ir.IntType(64)


def cut_all(
    frame: np.ndarray,
    origin: tuple[int, int],
    boxes: np.ndarray,
    flips: np.ndarray,
    size: int,
    interpolation: str,
    out: np.ndarray,
) -> None:
    """Write an image's crops of one group to `out`: each cut out first, then resized, then flipped.

    Args:
        frame: uint8 [H, W, 3], RGB; the image, or the part of it that holds the boxes.
        origin: top and left of the frame in the image, in pixels.
        boxes: int64 [n, 4], (top, left, height, width) in pixels of the image.
        flips: bool [n], which crops are mirrored left to right.
        size: S, in pixels.
        interpolation: bilinear, bicubic or lanczos.
        out: uint8 [n, 3, S, S], contiguous.

    Raises:
        ValueError: a box has no pixels or leaves the frame, or an array is not as stated.
    """
    count = len(boxes)
    if out.shape != (count, 3, size, size) or out.dtype != np.uint8 or not out.flags.carray:
        raise ValueError(f"out is {out.dtype} {out.shape}; it must be contiguous uint8 {(count, 3, size, size)}")
    _cut_all(frame, origin, boxes, flips, (size, size), (0, 0), size, interpolation, out.reshape(count, -1), True)


def cut_part(
    frame: np.ndarray,
    origin: tuple[int, int],
    shape: tuple[int, int],
    grid: tuple[int, int],
    corner: tuple[int, int],
    size: int,
    interpolation: str,
) -> np.ndarray:
    """A square part of the image as resized to `grid`, uint8 [3, S, S]; nothing else of the resized image is computed.

    Args:
        frame: uint8 [h, w, 3], RGB; the image, or the part of it that `part_window` names.
        origin: top and left of the frame in the image, in pixels.
        shape: height and width of the image, in pixels.
        grid: height and width of the whole resized image, in pixels.
        corner: top and left of the part in it.
        size: S, in pixels.
        interpolation: bilinear, bicubic or lanczos.

    Raises:
        ValueError: the frame lacks pixels of `part_window`, or is not as stated.
    """
    out = np.empty((3, size, size), np.uint8)
    box = np.array([[0, 0, *shape]])
    _cut_all(frame, origin, box, np.zeros(1, bool), grid, corner, size, interpolation, out.reshape(1, -1), True)
    return out


def part_window(
    shape: tuple[int, int], grid: tuple[int, int], corner: tuple[int, int], size: int, interpolation: str
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the pixels of the image that `cut_part` needs."""
    kind = FILTERS[interpolation]
    spans = [_span(*numbers, size, kind) for numbers in zip(shape, grid, corner, strict=True)]
    (top, left), (height, width) = zip(*spans, strict=True)
    return top, left, height, width


def squash(frame: np.ndarray, side: int) -> np.ndarray:
    """The whole image, uint8 [H, W, 3], resized to uint8 [side, side, 3], bilinear and antialiased."""
    box = np.array([[0, 0, *frame.shape[:2]]])
    out = np.empty((1, side * side * 3), np.uint8)
    _cut_all(frame, (0, 0), box, np.zeros(1, bool), (side, side), (0, 0), side, "bilinear", out, False)
    return out.reshape(side, side, 3)


def cut_address() -> int:
    """Address of a C function that cuts crops as `cut_all` and `squash` do, for threads that know nothing of Python:

        void cut(const uint8_t *frame, int64_t stride, int64_t height, int64_t width, int64_t top, int64_t left,
                 const int64_t *boxes, const uint8_t *flips, int64_t count, int64_t size, int64_t kind, int64_t planar,
                 uint8_t *out, int64_t *bad)

    The frame's rows are `stride` bytes apart, top and left are its origin; bad becomes -1, or the number of a box that
    has no pixels or leaves the frame.
    """
    with _compiling:
        return _compile_cut().address


_compiling = threading.Lock()


@cache
def _compile_cut():
    return cfunc(types.void(*[types.int64] * 14), cache=True)(_cut_by_address(TALL_FIRST))


def _cut_all(
    frame: np.ndarray,
    origin: tuple[int, int],
    boxes: np.ndarray,
    flips: np.ndarray,
    grid: tuple[int, int],
    corner: tuple[int, int],
    size: int,
    interpolation: str,
    out: np.ndarray,
    planar: bool,
) -> None:
    """`cut_part` of each box, into rows of `out`, [n, S * S * 3], as planes or as RGB pixels."""
    if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
        raise ValueError(f"the frame is {frame.dtype} {frame.shape}; it must be uint8 [H, W, 3]")
    if frame.strides[1:] != (3, 1) or frame.strides[0] < 0:
        frame = np.ascontiguousarray(frame)
    boxes, flips = np.require(boxes, np.int64, ["C", "W"]), np.require(flips, np.bool_, ["C", "W"])
    if boxes.shape != (len(out), 4) or flips.shape != (len(out),):
        raise ValueError(f"there are {boxes.shape} numbers in boxes and {flips.shape} in flips; {len(out)} crops")
    bad = _cut_boxes(
        frame.ctypes.data, frame.strides[0], frame.shape[:2], (int(origin[0]), int(origin[1])), boxes, flips,
        (int(grid[0]), int(grid[1])), (int(corner[0]), int(corner[1])), int(size), FILTERS[interpolation], TALL_FIRST,
        out, planar,
    )  # fmt: skip
    if bad >= 0:
        raise ValueError(
            f"box {boxes[bad].tolist()} (top, left, height, width) has no pixels or leaves the frame, "
            f"{frame.shape[0]} x {frame.shape[1]} pixels from {tuple(origin)} on"
        )


# ---- vectors


def _vector(builder: ir.IRBuilder, address: ir.Value, lanes: int) -> ir.Value:
    """Pointer to `lanes` bytes."""
    return builder.inttoptr(address, ir.VectorType(_BYTE, lanes).as_pointer())


def _constant(lanes: int, value: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(_WORD, lanes), [value] * lanes)


@intrinsic
def _transpose_block(typingctx, source, stride, target, target_stride):
    """16 x 16 bytes: target[j, i] = source[i, j]; addresses, and bytes from row to row."""

    def generate(context, builder, signature, arguments):
        source, stride, target, target_stride = arguments

        def row(first, step, k):
            return _vector(builder, builder.add(first, builder.mul(step, _INDEX(k))), BLOCK)

        rows = [builder.load(row(source, stride, k), align=1) for k in range(BLOCK)]
        half = BLOCK // 2
        pairs = [index for k in range(BLOCK) for index in (k, k + BLOCK)]
        masks = [ir.Constant(ir.VectorType(_WORD, BLOCK), part) for part in (pairs[:BLOCK], pairs[BLOCK:])]
        for _ in range(4):  # each round interleaves the upper half of the rows with the lower
            rows = [builder.shuffle_vector(rows[k], rows[k + half], mask) for k in range(half) for mask in masks]
        for k in range(BLOCK):
            builder.store(rows[k], row(target, target_stride, k), align=1)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


@intrinsic
def _weigh(typingctx, source, stride, weights, taps, target):
    """32 bytes at `target`: the rounded sum over k < taps of weights[k] times the 32 bytes at source + k * stride."""

    def generate(context, builder, signature, arguments):
        source, stride, weights, taps, target = arguments
        words = ir.VectorType(_WORD, LANES)
        unset = ir.Constant(words, ir.Undefined)
        sums = cgutils.alloca_once_value(builder, _constant(LANES, 1 << (BITS - 1)))
        with cgutils.for_range(builder, taps) as loop:
            place = _vector(builder, builder.add(source, builder.mul(loop.index, stride)), LANES)
            weight = builder.add(weights, builder.mul(loop.index, _INDEX(4)))
            weight = builder.load(builder.inttoptr(weight, _WORD.as_pointer()), align=4)
            weight = builder.insert_element(unset, weight, _WORD(0))
            weight = builder.shuffle_vector(weight, unset, _constant(LANES, 0))
            product = builder.mul(builder.zext(builder.load(place, align=1), words), weight)
            builder.store(builder.add(builder.load(sums), product), sums)
        total = builder.ashr(builder.load(sums), _constant(LANES, BITS))
        for relation, limit in (("<", _constant(LANES, 0)), (">", _constant(LANES, 255))):
            total = builder.select(builder.icmp_signed(relation, total, limit), limit, total)
        builder.store(builder.trunc(total, ir.VectorType(_BYTE, LANES)), _vector(builder, target, LANES), align=1)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), generate


@intrinsic
def _pointer(typingctx, address):
    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), generate


# ---- compiled functions; matrices are given by the address of their first byte and the bytes from row to row


@njit(nogil=True, cache=True)
def _cut_boxes(frame, stride, shape, origin, boxes, flips, grid, corner, size, kind, tall_first, out, planar):
    """Cuts all crops; returns the first box that has no pixels or needs some beside the frame, -1 where there is none.

    Each box is resized to `grid`; its crop are the S x S pixels of that from `corner` on.
    """
    tallest, widest, highest, broadest = 1, 1, 1, 1
    for i in range(len(boxes)):
        top, left, height, width = boxes[i]
        if min(height, width) < 1:
            return i
        first_row, rows = _span(height, grid[0], corner[0], size, kind)
        first_column, columns = _span(width, grid[1], corner[1], size, kind)
        top, left = top - origin[0] + first_row, left - origin[1] + first_column
        if min(top, left) < 0 or rows > shape[0] - top or columns > shape[1] - left:
            return i
        tallest, widest = max(tallest, rows), max(widest, columns)
        highest, broadest = max(highest, height), max(broadest, width)
    turned, narrow = np.empty(3 * widest * BAND, np.uint8), np.empty(3 * size * BAND, np.uint8)
    between = np.empty(3 * size * max(tallest, widest), np.uint8)
    across, down = _table(broadest, grid[1], size, kind), _table(highest, grid[0], size, kind)
    planes, length = (3, size) if planar else (1, 3 * size)
    for i in range(len(boxes)):
        top, left, height, width = boxes[i]
        first_row, rows = _span(height, grid[0], corner[0], size, kind)
        first_column, columns = _span(width, grid[1], corner[1], size, kind)
        _fill(across, width, grid[1], corner[1], kind)
        _fill(down, height, grid[0], corner[0], kind)
        source = frame + (top - origin[0] + first_row) * stride + (left - origin[1] + first_column) * 3
        target, middle = out[i].ctypes.data, between.ctypes.data  # used in every round, so both stay alive
        if tall_first and height - grid[0] > 2 * max(width - grid[1], 0):
            _resize_columns(source, stride, 3 * columns, down, middle, 3 * columns)
            _resize_rows(
                middle, 3 * columns, size, columns, across, flips[i], planes, turned, narrow, target, size * length,
                length,
            )  # fmt: skip
        else:
            _resize_rows(
                source, stride, rows, columns, across, flips[i], planes, turned, narrow, middle, length, 3 * size
            )
            for k in range(planes):
                _resize_columns(middle + k * length, 3 * size, length, down, target + k * size * length, length)
    return -1


def _cut_by_address(tall_first):
    """See `cut_address`. What numba keeps on disk it tells apart by what a closure holds, not by a module's globals:
    PIL's version must be the former."""

    def cut(frame, stride, height, width, top, left, boxes, flips, count, size, kind, planar, out, bad):
        box, flip = carray(_pointer(boxes), (count, 4), np.int64), carray(_pointer(flips), count, np.bool_)
        pixels = carray(_pointer(out), (count, 3 * size * size), np.uint8)
        carray(_pointer(bad), 1, np.int64)[0] = _cut_boxes(
            frame, stride, (height, width), (top, left), box, flip, (size, size), (0, 0), size, kind, tall_first,
            pixels, planar != 0,
        )  # fmt: skip

    return cut


@njit(nogil=True, cache=True)
def _resize_rows(
    source, stride, height, width, table, flip, planes, turned, narrow, target, plane_stride, target_stride
):  # fmt: skip
    """Rows of RGB pixels, resized and perhaps mirrored, as rows of three planes or of RGB pixels (planes: 3 or 1)."""
    begins, counts, weights, _ = table
    size = len(begins)
    channel_step, step = (size, 1) if planes == 3 else (1, 3)
    rows, length = min(BAND, height), 3 * size // planes
    for band in range(0, height, BAND):
        top = min(band, height - rows)  # the last band begins earlier rather than being shorter
        _transpose(source + top * stride, stride, rows, 3 * width, turned.ctypes.data, BAND)
        for x in range(size):
            first = turned.ctypes.data + begins[x] * 3 * BAND
            place = narrow.ctypes.data + (size - 1 - x if flip else x) * step * BAND
            for k in range(3):
                _weigh(first + k * BAND, 3 * BAND, weights[x].ctypes.data, counts[x], place + k * channel_step * BAND)
        for k in range(planes):
            there = target + k * plane_stride + top * target_stride
            _transpose(narrow.ctypes.data + k * length * BAND, BAND, length, rows, there, target_stride)


@njit(nogil=True, cache=True)
def _resize_columns(source, stride, length, table, target, target_stride):
    """Rows of `length` bytes → S rows."""
    begins, counts, weights, _ = table
    for y in range(len(begins)):
        first, place = source + begins[y] * stride, target + y * target_stride
        if length >= LANES:
            for x in range(0, length, LANES):
                at = min(x, length - LANES)  # the last lanes overlap with those before
                _weigh(first + at, stride, weights[y].ctypes.data, counts[y], place + at)
        else:
            rows = carray(_pointer(first), (counts[y] - 1) * stride + length, np.uint8)
            row = carray(_pointer(place), length, np.uint8)
            for x in range(length):
                total = 1 << (BITS - 1)
                for k in range(counts[y]):
                    total += weights[y, k] * rows[k * stride + x]
                row[x] = min(max(total >> BITS, 0), 255)


@njit(nogil=True, cache=True)
def _transpose(source, stride, rows, columns, target, target_stride):
    """target[j, i] = source[i, j]: bytes."""
    if rows < BLOCK or columns < BLOCK:
        small = carray(_pointer(source), (rows - 1) * stride + columns, np.uint8)
        turned = carray(_pointer(target), (columns - 1) * target_stride + rows, np.uint8)
        for i in range(rows):
            for j in range(columns):
                turned[j * target_stride + i] = small[i * stride + j]
        return
    for i in range(0, rows, BLOCK):
        top = min(i, rows - BLOCK)  # the last block overlaps with the one before
        for j in range(0, columns, BLOCK):
            left = min(j, columns - BLOCK)
            _transpose_block(source + top * stride + left, stride, target + left * target_stride + top, target_stride)


@njit(nogil=True, cache=True)
def _table(length, steps, size, kind):
    """Memory for `size` of the weights of up to `length` pixels made into `steps`, for `_fill`."""
    taps = 2 * math.ceil(kind * max(length / steps, 1.0)) + 1
    return (
        np.empty(size, np.int64),
        np.empty(size, np.int64),
        np.empty((size, taps), np.int32),
        np.empty(taps, np.float64),
    )


@njit(nogil=True, cache=True)
def _fill(table, length, steps, first, kind):
    """Where `length` pixels are made into `steps`: which of them make up each new one from the `first` on (counted from
    the first pixel that is needed at all), and their weights in units of 2^-22; PIL's arithmetic."""
    begins, counts, weights, exact = table
    scale = length / steps
    start, _ = _taps(first, length, steps, kind)
    for i in range(len(begins)):
        begin, count = _taps(first + i, length, steps, kind)
        centre = (first + i + 0.5) * scale
        total = 0.0
        for k in range(count):
            exact[k] = _filter((k + begin - centre + 0.5) * (1.0 / max(scale, 1.0)), kind)
            total += exact[k]
        for k in range(count):
            weight = exact[k] / total * (1 << BITS)
            weights[i, k] = int(weight + (0.5 if weight >= 0 else -0.5))
        begins[i], counts[i] = begin - start, count


@njit(nogil=True, cache=True)
def _span(length, steps, first, size, kind):
    """Where `length` pixels are made into `steps`: the first pixel, and how many, that `size` new ones from the `first`
    on are made of."""
    start, _ = _taps(first, length, steps, kind)
    begin, count = _taps(first + size - 1, length, steps, kind)
    return start, begin + count - start


@njit(nogil=True, cache=True)
def _taps(place, length, steps, kind):
    """Where `length` pixels are made into `steps`: the first pixel, and how many, that new pixel `place` is made of."""
    scale = length / steps
    centre, reach = (place + 0.5) * scale, kind * max(scale, 1.0)
    begin = max(int(centre - reach + 0.5), 0)
    return begin, min(int(centre + reach + 0.5), length) - begin


@njit(nogil=True, cache=True)
def _filter(x, kind):
    """The filter at x pixels from its centre: triangle; Keys' cubic with a = -0.5; sinc times sinc of a third."""
    x = abs(x)
    if x >= kind:
        return 0.0
    if kind == 1:
        return 1.0 - x
    if kind == 2:
        return (1.5 * x - 2.5) * x * x + 1.0 if x < 1.0 else (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return _sinc(x) * _sinc(x / 3.0)


@njit(nogil=True, cache=True)
def _sinc(x):
    return math.sin(math.pi * x) / (math.pi * x) if x else 1.0
