"""The draws of `draw.py` for a whole batch in one compiled call that holds no lock; `draw_all` is its oracle.

The last bit of exp may differ from numpy's, whose own code differs between processors. It would show where a side is
within 1e-13 of half a pixel.

Importing this module needs numba. The first use compiles for some seconds; numba keeps the result on disk.

Letters: B images, n crops of a group, N crops of all groups, V groups.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import numpy as np
from numba import njit

from fastssl.config import View
from fastssl.loaders.draw import JITTER_ORDERS, Drawn, crop_owners, has_photometric
from fastssl.loaders.philox import HALF, rounds

_UNIT = 2.0**-32

_philox = njit(nogil=True, cache=True)(rounds)


class CompiledDraws:
    """`draw_all` of some groups with a seed.

    Args:
        views: the groups.
        seed: a 32-bit number.

    Raises:
        ConfigError: the groups do not fit together.
    """

    def __init__(self, views: Sequence[View], seed: int) -> None:
        self._views = list(views)
        numbers = {view.name: k for k, view in enumerate(views)}
        owners = crop_owners(views)
        keys = [zlib.crc32(f"view/{view.name}".encode()) for view in views]
        self._whole = np.array(
            [
                (view.count, numbers[owners[view.name].name], view.squash, has_photometric(view), key)
                for view, key in zip(views, keys, strict=True)
            ],
            np.int64,
        )
        self._real = np.array([_real(view) for view in views], np.float64)
        self._seed = np.uint64(seed)
        self._ends = np.cumsum(self._whole[:, 0]).tolist()
        self._photometric = self._whole[:, 3].any()
        self._fields = {
            "jitter": np.empty(0, np.bool_),
            "order": np.empty((0, 4), np.int64),
            "factor": np.empty((0, 4), np.float32),
            "gray": np.empty(0, np.bool_),
            "blur_sigma": np.empty(0, np.float32),
            "solarize": np.empty(0, np.float32),
        }

    def __call__(self, heights: np.ndarray, widths: np.ndarray, *, epoch: int, ids: np.ndarray) -> dict[str, Drawn]:
        """See `draw_all`."""
        images = len(ids)
        rows = images * self._ends[-1]
        box, flip = np.empty((rows, 4), np.int64), np.empty(rows, np.bool_)
        fields = self._fields
        if self._photometric:
            fields = {key: np.empty((rows, *value.shape[1:]), value.dtype) for key, value in fields.items()}
        _draw(
            np.array(ids, np.int64), np.array(heights, np.int64), np.array(widths, np.int64), np.uint64(epoch),
            self._seed, self._whole, self._real, box, flip, *fields.values(),
        )  # fmt: skip
        drawn = {}
        begin = 0
        for view, end, photometric in zip(self._views, self._ends, self._whole[:, 3], strict=True):
            part, shape = slice(begin * images, end * images), (images, view.count)
            mine = None
            if photometric:
                mine = {key: value[part].reshape(*shape, *value.shape[1:]) for key, value in fields.items()}
            drawn[view.name] = Drawn(box[part].reshape(*shape, 4), flip[part].reshape(shape), mine)
            begin = end
        return drawn


def _real(view: View) -> tuple[float, ...]:
    """The numbers of a group, in the order in which `_draw` reads them: ranges as width and lower end."""
    *blend, hue = view.jitter
    ranges = [view.scale, tuple(math.log(r) for r in view.ratio)]
    ranges += [(max(0.0, 1 - s), 1 + s) for s in blend] + [(-hue, hue), view.blur_sigma]
    numbers = [number for low, high in ranges for number in ((high - low) * _UNIT, low)]
    jitter_p = view.jitter_p if any(view.jitter) else 0.0
    return *numbers, *view.ratio, view.flip, jitter_p, view.gray, view.blur, view.solarize, view.solarize_threshold


@njit(nogil=True, cache=True)
def _draw(
    ids, heights, widths, epoch, seed, whole, real, box, flip, jitter, order, factor, gray, blur_sigma, solarize
):  # fmt: skip
    """Writes the draws of all groups, one group after the other: group v of count n has n crops for each image.

    Args:
        ids, heights, widths: int64 [B].
        epoch, seed: uint64.
        whole: int64 [V, 5]: crops, the group whose crops these are, side of the squashed image, whether there are
            photometric operations, CRC-32 of the purpose.
        real: float64 [V, 22], see `_real`.
        box, flip, jitter, order, factor, gray, blur_sigma, solarize: [B * N, ...], the fields of `Drawn`.
    """
    begins = np.zeros(len(whole), np.int64)
    for v in range(1, len(whole)):
        begins[v] = begins[v - 1] + whole[v - 1, 0] * len(ids)
    for v in range(len(whole)):
        count, owner, squash, photometric, key = whole[v]
        if owner == v:
            for b in range(len(ids)):
                height, width = (squash, squash) if squash else (heights[b], widths[b])
                for n in range(count):
                    at = begins[v] + b * count + n
                    flip[at] = _draw_crop(
                        np.uint64(ids[b]), epoch, np.uint64(n), seed, np.uint64(key), height, width, real[v], box[at]
                    )
        if not photometric:
            continue
        jitter_p, gray_p, blur_p = real[v, 17], real[v, 18], real[v, 19]
        solarize_p, threshold = real[v, 20], real[v, 21]
        for b in range(len(ids)):
            for n in range(count):
                at = begins[v] + b * count + n
                sample, crop, code = np.uint64(ids[b]), np.uint64(n), np.uint64(key)
                _, _, _, jitter_word = _philox(sample, epoch, crop, np.uint64(5), seed, code)
                order_word, gray_word, solarize_word, blur_word = _philox(sample, epoch, crop, np.uint64(6), seed, code)
                strength = _philox(sample, epoch, crop, np.uint64(7), seed, code)
                sigma_word, _, _, _ = _philox(sample, epoch, crop, np.uint64(8), seed, code)
                jitter[at] = float(jitter_word) * _UNIT < jitter_p
                order[at] = JITTER_ORDERS[(order_word * np.uint64(24)) >> HALF]
                for k in range(4):
                    factor[at, k] = float(strength[k]) * real[v, 4 + 2 * k] + real[v, 5 + 2 * k]
                gray[at] = float(gray_word) * _UNIT < gray_p
                blurred = float(blur_word) * _UNIT < blur_p
                blur_sigma[at] = float(sigma_word) * real[v, 12] + real[v, 13] if blurred else 0.0
                solarize[at] = threshold if float(solarize_word) * _UNIT < solarize_p else 256.0
    for v in range(len(whole)):
        owner, length = whole[v, 1], whole[v, 0] * len(ids)
        if owner != v:
            box[begins[v] : begins[v] + length] = box[begins[owner] : begins[owner] + length]
            flip[begins[v] : begins[v] + length] = flip[begins[owner] : begins[owner] + length]


@njit(nogil=True, cache=True)
def _draw_crop(sample, epoch, crop, seed, key, height, width, real, box):
    """Writes a crop's box and returns whether it is flipped; `draw._draw_crops`."""
    found = False
    box_h, box_w = 1, 1
    for block in range(5):
        words = _philox(sample, epoch, crop, np.uint64(block), seed, key)
        for first, second in ((words[0], words[1]), (words[2], words[3])):
            area = (float(first) * real[0] + real[1]) * float(height * width)
            ratio = math.exp(float(second) * real[2] + real[3])
            try_h, try_w = np.rint(math.sqrt(area / ratio)), np.rint(math.sqrt(area * ratio))
            if not found and 0 < try_h <= height and 0 < try_w <= width:
                found, box_h, box_w = True, int(try_h), int(try_w)
        if found:
            break
    top_word, left_word, flip_word, _ = _philox(sample, epoch, crop, np.uint64(5), seed, key)
    if found:
        box[0] = (top_word * np.uint64(height - box_h + 1)) >> HALF
        box[1] = (left_word * np.uint64(width - box_w + 1)) >> HALF
    else:
        low, high = real[14], real[15]
        box_h = max(int(np.rint(width / low) if width < height * low else height), 1)
        box_w = max(int(np.rint(height * high) if width > height * high else width), 1)
        box[0], box[1] = (height - box_h) // 2, (width - box_w) // 2
    box[2], box[3] = box_h, box_w
    return float(flip_word) * _UNIT < real[16]
