"""Photometric augmentation on the CPU, compiled: a dozen times as fast as the operations one by one in PyTorch.

The same operations as `fastssl.kernels.photometric.photometric`. A crop is worked on in tiles that stay in the first
cache, all operations of a tile in a row. Only two things need the whole crop first: the contrast's mean gray and the
blur. Values are gray levels 0-255 in float32, so that a crop which drew nothing meets the solarize threshold exactly.

Importing this module needs numba; the first call compiles (about ten seconds), later processes load what was compiled.

Letters: N crops, H x W pixels, P = H x W.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from fastssl.kernels.photometric.reference import BLUR_RADIUS

_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)
_F = np.float32
_BLACK, _WHITE, _NEVER = _F(0), _F(255), _F(1e30)
_RED, _GREEN, _BLUE = _F(0.2989), _F(0.587), _F(0.114)  # ITU-R BT.601, as PIL and torchvision round them
_TILE, _BLUR_TILE = 1024, 2048  # pixels worked on at once, in whole rows
_NARROW = 3  # a blur whose taps beyond this radius weigh less than _NOTHING each is done without them
_NOTHING = 1e-6

# Products and sums may be fused and the sign of a zero lost. _step: an inner loop, compiled into its callers.
_MATH = {"contract", "nsz"}
_INNER: dict[str, Any] = {"nogil": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
_step = njit(fastmath=_MATH, **_INNER)
_sum = njit(fastmath=_MATH | {"reassoc"}, **_INNER)


@njit(nogil=True, fastmath=_MATH, cache=True)
def photometric_range(
    crops, start, stop, jitter, order, factor, gray, blur_sigma, solarize, gain, offset, scratch, out
):  # fmt: skip
    """The crops from `start` to before `stop`, unchecked: arrays in C order, bool, int64 (order) and float32.

    Runs without Python's lock. Several threads may work on different ranges of the same arrays, each with a scratch of
    its own. Before normalisation the result is within 1e-5 (of a range of 1) of exact arithmetic, except where a value
    lies that close to the solarize threshold.

    Args:
        crops: uint8 [N, 3, H, W]; the drawn parameters as for `photometric`, [N] or [N, 4].
        gain, offset: [3]; gain x level + offset = (level / 255 - mean) / std.
        scratch: [3 (H + 2 BLUR_RADIUS) W] or longer, overwritten.
        out: [N, 3, H, W].
    """
    for i in range(start, stop):
        _crop(
            crops[i], jitter[i], order[i], factor[i], gray[i], blur_sigma[i], solarize[i], gain, offset, scratch, out[i]
        )


@_step
def _crop(crop, jitter, order, factor, gray, blur_sigma, solarize, gain, offset, scratch, out):
    """One crop, [3, H, W]."""
    height, width = crop.shape[1], crop.shape[2]
    pixels = height * width
    levels, result = crop.reshape((3, pixels)), out.reshape((3, pixels))
    threshold = solarize if solarize <= 255 else _NEVER
    weights = _gaussian(blur_sigma)
    blurred = weights[1] > _NOTHING
    if not (jitter or gray or blurred):
        for c in range(3):
            _finish(levels[c], threshold, gain[c], offset[c], result[c])
        return
    # The crop, with room for repeated rows above and below it. Where nothing needs it whole, a tile of it at the front.
    margin = BLUR_RADIUS * width
    planes = scratch[: 3 * (pixels + 2 * margin)].reshape((3, pixels + 2 * margin))
    tile = max(_TILE // width, 1) * width
    kept = False  # whether planes hold the crop, all operations before kind[0] done
    kind, value, count = np.empty(4, np.int64), np.empty((4, 3), np.float32), 0  # operations to do, with parameters
    for position in range(4 if jitter else 0):
        op = order[position]
        amount = factor[op]
        if op == _HUE and amount == 0:
            continue
        value[count] = amount
        if op == _BRIGHTNESS:
            value[count, 1] = 0
        elif op == _CONTRAST:
            if not kept and count == 0:
                total = 0.2989 * _total(levels[0]) + 0.587 * _total(levels[1]) + 0.114 * _total(levels[2])
            else:
                keep = kept or count > 1 or kind[0] != _BRIGHTNESS  # a brightness alone is quickly done again
                total = 0.0
                for start in range(0, pixels, tile):
                    stop = min(start + tile, pixels)
                    at = margin + start if keep else 0
                    _work(levels, start, stop, kept, kind, value, count, planes, at)
                    end = at + stop - start
                    total += _total_luma(planes[0, at:end], planes[1, at:end], planes[2, at:end])
                if keep:
                    kept, count = True, 0
            value[count, 0], value[count, 1] = amount, total / pixels * (1.0 - amount)
        elif op == _HUE:
            for c in range(3):
                value[count, c] = (6.0 * amount + 3.0 - 2.0 * c) % 6.0 - 6.0
        kind[count] = op
        count += 1
    for start in range(0, pixels, tile):
        stop = min(start + tile, pixels)
        at = margin + start if kept or blurred else 0
        end = at + stop - start
        _work(levels, start, stop, kept, kind, value, count, planes, at)
        if gray:
            _to_luma(planes[0, at:end], planes[1, at:end], planes[2, at:end])
        if not blurred:
            for c in range(3):
                _finish(planes[0 if gray else c, at:end], threshold, gain[c], offset[c], result[c, start:stop])
    if blurred:
        _blur(planes, gray, width, weights, threshold, gain, offset, result)


@_step
def _work(levels, start, stop, kept, kind, value, count, planes, at):
    """Do the operations on the pixels start to stop, kept in `planes` from `at` on, or else read to there first."""
    end = at + stop - start
    red, green, blue = planes[0, at:end], planes[1, at:end], planes[2, at:end]
    done = 0
    if not kept:
        gain, offset = _F(1), _F(0)
        if count and kind[0] <= _CONTRAST:
            gain, offset, done = value[0, 0], value[0, 1], 1
        _read(levels[0, start:stop], gain, offset, red)
        _read(levels[1, start:stop], gain, offset, green)
        _read(levels[2, start:stop], gain, offset, blue)
    for i in range(done, count):
        if kind[i] == _SATURATION:
            _saturate(red, green, blue, value[i, 0])
        elif kind[i] == _HUE:
            _rotate(red, green, blue, value[i, 0], value[i, 1], value[i, 2])
        else:
            _scale(red, value[i, 0], value[i, 1])
            _scale(green, value[i, 0], value[i, 1])
            _scale(blue, value[i, 0], value[i, 1])


@_step
def _clip(x, low, high):
    x = x if x > low else low
    return x if x < high else high


@_step
def _read(levels, gain, offset, out):
    """Brightness or contrast from uint8."""
    for i in range(out.size):
        out[i] = _clip(_F(levels[i]) * gain + offset, _BLACK, _WHITE)


@_step
def _scale(x, gain, offset):
    """Brightness or contrast in place."""
    for i in range(x.size):
        x[i] = _clip(x[i] * gain + offset, _BLACK, _WHITE)


@_step
def _saturate(red, green, blue, factor):
    """Move away from the pixel's own gray."""
    for i in range(red.size):
        r, g, b = red[i], green[i], blue[i]
        gray = _RED * r + _GREEN * g + _BLUE * b
        red[i] = _clip(gray + factor * (r - gray), _BLACK, _WHITE)
        green[i] = _clip(gray + factor * (g - gray), _BLACK, _WHITE)
        blue[i] = _clip(gray + factor * (b - gray), _BLACK, _WHITE)


@_step
def _rotate(red, green, blue, turn_red, turn_green, turn_blue):
    """Turn the hue of HSV; saturation and value stay.

    In the HSV model each channel is value - chroma * clip(2 - |k - 2|, 0, 1) with k = (6 hue + n) mod 6 and n = 5, 3, 1
    for red, green, blue. With 6 hue in [-1, 5] and turn = (6 turns + n - 2) mod 6 - 6 that is
    value - chroma * clip(||6 hue + turn| - 3| - 1, 0, 1). Multiplied out with chroma nothing is divided.
    """
    for i in range(red.size):
        r, g, b = red[i], green[i], blue[i]
        high = r if r > g else g
        high = high if high > b else b
        low = r if r < g else g
        low = low if low < b else b
        chroma = high - low
        hue = _F(2) * chroma + (b - r) if high == g else _F(4) * chroma + (r - g)
        hue = g - b if high == r else hue
        three, top = _F(3) * chroma, high + chroma
        red[i] = _clip(top - abs(abs(hue + turn_red * chroma) - three), low, high)
        green[i] = _clip(top - abs(abs(hue + turn_green * chroma) - three), low, high)
        blue[i] = _clip(top - abs(abs(hue + turn_blue * chroma) - three), low, high)


@_step
def _to_luma(red, green, blue):
    for i in range(red.size):
        red[i] = _RED * red[i] + _GREEN * green[i] + _BLUE * blue[i]


@_sum
def _total_luma(red, green, blue):
    total = _F(0)
    for i in range(red.size):
        total += _RED * red[i] + _GREEN * green[i] + _BLUE * blue[i]
    return total


@_step
def _total(levels):
    total = 0
    for i in range(levels.size):
        total += levels[i]
    return total


@_step
def _finish(x, threshold, gain, offset, out):
    """Solarize and normalise."""
    for i in range(out.size):
        v = _F(x[i])
        v = _WHITE - v if v >= threshold else v
        out[i] = v * gain + offset


@_step
def _gaussian(sigma):
    """Weights of the blur from its centre outwards, float32 [BLUR_RADIUS + 1]; the 13 of both sides sum to 1."""
    weights = np.zeros(BLUR_RADIUS + 1, np.float32)
    weights[0] = 1
    if sigma > 0:
        total = 1.0
        for i in range(1, BLUR_RADIUS + 1):
            weights[i] = math.exp(-0.5 * (i / max(sigma, 1e-3)) ** 2)
            total += 2 * weights[i]
        for i in range(BLUR_RADIUS + 1):
            weights[i] /= total
    return weights


@_step
def _blur(planes, gray, width, weights, threshold, gain, offset, result):
    """Blur the crop in `planes` (the first plane alone, if gray), down and then across, and finish it."""
    pixels, margin = result.shape[1], BLUR_RADIUS * width
    tile = max(_BLUR_TILE // width, 1) * width
    part = np.empty(tile, np.float32)
    padded = np.empty(tile // width * (width + 2 * BLUR_RADIUS), np.float32)
    for c in range(1 if gray else 3):
        plane = planes[c]
        for at in range(0, margin, width):
            _copy(plane[margin : margin + width], plane[at : at + width])
            _copy(plane[margin + pixels - width : margin + pixels], plane[margin + pixels + at :][:width])
        for start in range(0, pixels, tile):
            stop = min(start + tile, pixels)
            _blur_down(plane, margin + start, width, weights, part[: stop - start])
            _blur_across(part[: stop - start], width, weights, padded)
            for k in range(3):
                if gray or k == c:
                    _finish(part[: stop - start], threshold, gain[k], offset[k], result[k, start:stop])


@_step
def _blur_down(plane, at, width, w, out):
    """The rows of `plane` from `at` on, blurred down the columns.

    In two loops, because the compiler vectorises one with so many arrays only up to a number of them.
    """
    n = out.size
    a, b, c = at - width, at - 2 * width, at - 3 * width
    d, e, f = at + width, at + 2 * width, at + 3 * width
    _down_near(
        plane[at:][:n], plane[a:][:n], plane[d:][:n], plane[b:][:n], plane[e:][:n], plane[c:][:n], plane[f:][:n],
        w[0], w[1], w[2], w[3], out,
    )  # fmt: skip
    if w[_NARROW + 1] > _NOTHING:
        a, b, c = at - 4 * width, at - 5 * width, at - 6 * width
        d, e, f = at + 4 * width, at + 5 * width, at + 6 * width
        _down_far(
            plane[a:][:n], plane[d:][:n], plane[b:][:n], plane[e:][:n], plane[c:][:n], plane[f:][:n],
            w[4], w[5], w[6], out,
        )  # fmt: skip


@_step
def _down_near(x, up1, down1, up2, down2, up3, down3, w0, w1, w2, w3, out):
    for i in range(out.size):
        out[i] = w0 * x[i] + w1 * (up1[i] + down1[i]) + w2 * (up2[i] + down2[i]) + w3 * (up3[i] + down3[i])


@_step
def _down_far(up4, down4, up5, down5, up6, down6, w4, w5, w6, out):
    for i in range(out.size):
        out[i] += w4 * (up4[i] + down4[i]) + w5 * (up5[i] + down5[i]) + w6 * (up6[i] + down6[i])


@_step
def _blur_across(x, width, w, padded):
    """The rows in `x`, blurred in place; `padded` has room for them with 2 BLUR_RADIUS more columns."""
    stride = width + 2 * BLUR_RADIUS
    rows = x.size // width
    for row in range(rows):
        line, wide = x[row * width :][:width], padded[row * stride :][:stride]
        for i in range(BLUR_RADIUS):
            wide[i], wide[i + BLUR_RADIUS + width] = line[0], line[width - 1]
        _copy(line, wide[BLUR_RADIUS:][:width])
    for row in range(rows):
        line, wide = x[row * width :][:width], padded[row * stride :][:stride]
        if w[_NARROW + 1] > _NOTHING:
            _across_wide(wide, w[0], w[1], w[2], w[3], w[4], w[5], w[6], line)
        else:
            _across_narrow(wide, w[0], w[1], w[2], w[3], line)


@_step
def _across_wide(x, w0, w1, w2, w3, w4, w5, w6, out):
    for i in range(out.size):
        near = w0 * x[i + 6] + w1 * (x[i + 5] + x[i + 7]) + w2 * (x[i + 4] + x[i + 8]) + w3 * (x[i + 3] + x[i + 9])
        out[i] = near + w4 * (x[i + 2] + x[i + 10]) + w5 * (x[i + 1] + x[i + 11]) + w6 * (x[i] + x[i + 12])


@_step
def _across_narrow(x, w0, w1, w2, w3, out):
    for i in range(out.size):
        out[i] = w0 * x[i + 6] + w1 * (x[i + 5] + x[i + 7]) + w2 * (x[i + 4] + x[i + 8]) + w3 * (x[i + 3] + x[i + 9])


@_step
def _copy(x, out):
    for i in range(out.size):
        out[i] = x[i]
