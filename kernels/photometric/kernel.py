"""Photometric augmentation in Triton: each value is computed in registers between one read of uint8 and one write.

    x = crops / 255; x = clip(factor x + (1 - factor) target) or hue turned, four times; x = luma(x) if gray
    x = A_vertical x A_horizontal^T if blurred, A the band matrices of the Gaussian, as tensor-core products
    out = (1 - x where x >= threshold, x elsewhere) / std - mean / std

What a crop drew is the same for a whole program, so every drawn operation is a branch that all threads take alike.
Three launches, and nothing in memory between them but the means:
- `_means` reads the crops that were jittered and sums, per program, the luma after the operations that come before
  contrast (contrast needs the crop's mean). The others end at once.
- `_plain` does the crops without a blur, as runs of neighbouring pixels. It goes from the last crop to the first, so
  that it finds the crops that `_means` read last still in the level-2 cache.
- `_blurred` does the others. A program walks down a strip of COLUMNS, ROWS at a time; the 2 x 6 columns beside it
  are coloured a second time (1.5 times the colours' work), which moves fewer bytes than a copy of the coloured crop in
  memory: that would be 12 (float16) or 24 bytes per pixel besides the 3 read and the 6 or 12 written. The band matrices
  have 48 columns horizontally and 32 vertically; one tap per instruction would need 26 shifted loads per value, and
  shifted loads run at a quarter of the rate of multiply-adds.
  Every factor of a product is split into two float16 numbers, high + low, and the three products that matter are summed
  in float32: an error of 2^-22. For a bfloat16 result, whose own rounding is ten times coarser, high alone is used.

Letters: N crops, H rows, W columns, P = H W pixels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels._launch import cdiv, launch, power_of_2
from fastssl.kernels._op import op
from fastssl.kernels.photometric.reference import BLUR_RADIUS

# Not measured against other sizes yet: the tiles and RUN.
ROWS, COLUMNS = 16, 32  # of the blurred tiles
HALO = 16  # columns beside a strip, 2 BLUR_RADIUS of them used
RUN = 4096  # pixels per program of `_means` and `_plain`


@triton.jit
def _load(crops, at, P, inside):
    """The three channels of pixels at offsets `at`, float32 in [0, 1]."""
    red = tl.load(crops + at, mask=inside, other=0).to(tl.float32) * (1 / 255)
    green = tl.load(crops + at + P, mask=inside, other=0).to(tl.float32) * (1 / 255)
    blue = tl.load(crops + at + 2 * P, mask=inside, other=0).to(tl.float32) * (1 / 255)
    return red, green, blue


@triton.jit
def _luma(red, green, blue):
    return 0.2989 * red + 0.587 * green + 0.114 * blue


@triton.jit
def _clip(x):
    return tl.minimum(tl.maximum(x, 0.0), 1.0)


@triton.jit
def _blend(red, green, blue, amount, target):
    """clip(target + amount (x - target)) of each channel."""
    rest = (1 - amount) * target
    return _clip(amount * red + rest), _clip(amount * green + rest), _clip(amount * blue + rest)


@triton.jit
def _rotate_hue(red, green, blue, turns):
    """Turn the hue of HSV, saturation and value stay.

    With the hue h in sixths of a turn, red = low + chroma clip(|h - 3| - 1, 0, 1), and likewise for the others.
    """
    value = tl.maximum(tl.maximum(red, green), blue)
    low = tl.minimum(tl.minimum(red, green), blue)
    chroma = value - low
    shift = 6 * turns
    shift -= 6 * tl.floor((shift - 1) * (1 / 6))  # in [1, 7), so that h is in [0, 12)
    is_red, is_green = value == red, value == green
    other = tl.where(is_red, green - blue, tl.where(is_green, blue - red, red - green))
    start = tl.where(is_red, shift, tl.where(is_green, shift + 2, shift + 4))
    h = other / tl.maximum(chroma, 1e-30) + start
    h = tl.where(h >= 6, h - 6, h)
    red = low + chroma * _clip(tl.abs(h - 3) - 1)
    green = low + chroma * _clip(2 - tl.abs(h - 2))
    blue = low + chroma * _clip(2 - tl.abs(h - 4))
    return red, green, blue


@triton.jit
def _jittered(red, green, blue, order, factor, mean, count):
    """The first `count` jitter operations of one crop; `order` and `factor` point at its four."""
    for position in range(count):
        op = tl.load(order + position)
        amount = tl.load(factor + op).to(tl.float32)
        if op == 3:  # hue
            if amount != 0:
                red, green, blue = _rotate_hue(red, green, blue, amount)
        elif op == 2:  # saturation
            red, green, blue = _blend(red, green, blue, amount, _luma(red, green, blue))
        else:  # brightness: away from black; contrast: from the mean
            red, green, blue = _blend(red, green, blue, amount, tl.where(op == 1, mean, 0.0))
    return red, green, blue


@triton.jit
def _colored(red, green, blue, order, factor, gray, mean, count):
    """Jitter and gray."""
    red, green, blue = _jittered(red, green, blue, order, factor, mean, count)
    if gray:
        luma = _luma(red, green, blue)
        red, green, blue = luma, luma, luma
    return red, green, blue


@triton.jit
def _threshold(solarize, n):
    """The crop's threshold in [0, 1]; infinite if it is above."""
    levels = tl.load(solarize + n).to(tl.float32)
    return tl.where(levels <= 255, levels * (1 / 255), float("inf"))  # rounded as the pixels are: a tie stays one


@triton.jit
def _finished(x, threshold, scale, shift):
    """Solarize and normalise."""
    return tl.where(x >= threshold, 1 - x, x) * scale + shift


@triton.jit
def _mean(sums, n, P, parts, jittered, PARTS: tl.constexpr):
    """The mean that contrast needs, from the sums of `_means`; 0 for a crop without jitter."""
    part = tl.arange(0, PARTS)
    return tl.sum(tl.load(sums + n * parts + part, mask=part < tl.where(jittered, parts, 0), other=0.0), 0) / P


@triton.jit
def _means(
    crops,  # uint8 [N, 3, P]
    jitter,  # bool [N]
    order,  # int [N, 4]
    factor,  # [N, 4]
    sums,  # float32 [N, parts], out: luma after the operations before contrast; untouched for crops without jitter
    P,
    parts,  # programs per crop
    steps,  # blocks per program
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    n = (program // parts).to(tl.int64)
    part = program % parts
    if tl.load(jitter + n) == 0:
        return
    position = tl.arange(0, 4)
    before = tl.sum(tl.where(tl.load(order + n * 4 + position) == 1, position, 0), 0)
    total = tl.zeros([BLOCK], tl.float32)
    for step in range(steps):
        pixel = (part * steps + step) * BLOCK + tl.arange(0, BLOCK)
        inside = pixel < P
        red, green, blue = _load(crops, n * 3 * P + pixel, P, inside)
        red, green, blue = _jittered(red, green, blue, order + n * 4, factor + n * 4, 0.0, before)
        total += tl.where(inside, _luma(red, green, blue), 0.0)
    tl.store(sums + n * parts + part, tl.sum(total, 0))


@triton.jit
def _plain(
    crops,
    jitter,
    order,
    factor,
    gray,  # bool [N]
    blur_sigma,  # [N]
    solarize,  # [N]
    sums,
    out,  # [N, 3, P], out
    N,
    P,
    parts,
    steps,
    scale0,
    scale1,
    scale2,
    shift0,
    shift1,
    shift2,
    DRAWN: tl.constexpr,  # whether there are drawn parameters
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    n = (N - 1 - program // parts).to(tl.int64)
    part = program % parts
    threshold = float("inf")
    if DRAWN:
        if tl.load(blur_sigma + n) > 0:
            return
        jittered = tl.load(jitter + n)
        count = tl.where(jittered, 4, 0)
        mean = _mean(sums, n, P, parts, jittered, PARTS)
        threshold = _threshold(solarize, n)
        is_gray = tl.load(gray + n)
    for step in range(steps):
        pixel = (part * steps + step) * BLOCK + tl.arange(0, BLOCK)
        inside = pixel < P
        at = n * 3 * P + pixel
        red, green, blue = _load(crops, at, P, inside)
        if DRAWN:
            red, green, blue = _colored(red, green, blue, order + n * 4, factor + n * 4, is_gray, mean, count)
        to = out.dtype.element_ty
        tl.store(out + at, _finished(red, threshold, scale0, shift0).to(to), mask=inside)
        tl.store(out + at + P, _finished(green, threshold, scale1, shift1).to(to), mask=inside)
        tl.store(out + at + 2 * P, _finished(blue, threshold, scale2, shift2).to(to), mask=inside)


@triton.jit
def _split(x, EXACT: tl.constexpr):
    """x as high + low in float16; low only where EXACT."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16) if EXACT else high


@triton.jit
def _product(a, a_low, b, b_low, total, EXACT: tl.constexpr):
    """total + a b."""
    total = tl.dot(a, b, total)
    if EXACT:
        total = tl.dot(a, b_low, total)
        total = tl.dot(a_low, b, total)
    return total


@triton.jit
def _band(distance, inv_sigma, norm, RADIUS: tl.constexpr):
    """The weights of pixels `distance` away."""
    d = distance.to(tl.float32) * inv_sigma
    return tl.where(tl.abs(distance) <= RADIUS, tl.exp(-0.5 * d * d) * norm, 0.0)


@triton.jit
def _rows_blurred(x, beside, main, main_low, halo, halo_low, EXACT: tl.constexpr):
    """Horizontal blur of a tile x with the columns beside it, split for the vertical one."""
    x, x_low = _split(x, EXACT)
    beside, beside_low = _split(beside, EXACT)
    total = tl.zeros(x.shape, tl.float32)
    total = _product(x, x_low, main, main_low, total, EXACT)
    total = _product(beside, beside_low, halo, halo_low, total, EXACT)
    return _split(total, EXACT)


@triton.jit
def _blurred(
    crops,
    jitter,
    order,
    factor,
    gray,
    blur_sigma,
    solarize,
    sums,
    out,
    N,
    H,
    W,
    parts,
    strips,  # of COLUMNS per crop
    scale0,
    scale1,
    scale2,
    shift0,
    shift1,
    shift2,
    RADIUS: tl.constexpr,
    EVEN: tl.constexpr,  # whether the strips fit into the rows
    EXACT: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HALO: tl.constexpr,
):
    program = tl.program_id(0)
    n = (N - 1 - program // strips).to(tl.int64)
    sigma = tl.load(blur_sigma + n).to(tl.float32)
    if (sigma > 0) == 0:
        return
    P = H * W
    jittered = tl.load(jitter + n)
    count = tl.where(jittered, 4, 0)
    mean = _mean(sums, n, P, parts, jittered, PARTS)
    threshold = _threshold(solarize, n)
    is_gray = tl.load(gray + n)

    inv_sigma = 1 / tl.maximum(sigma, 1e-3)
    taps = tl.arange(0, 16) - RADIUS
    norm = 1 / tl.sum(_band(taps, inv_sigma, 1.0, RADIUS), 0)
    line, i, j = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, HALO)
    # The halo's columns, counted from the strip's first; the last of them are not used.
    beside = tl.where(j < RADIUS, j - RADIUS, tl.where(j < 2 * RADIUS, COLUMNS + j - RADIUS, 4 * COLUMNS))
    main, main_low = _split(_band(i[:, None] - i[None, :], inv_sigma, norm, RADIUS), EXACT)
    halo, halo_low = _split(_band(beside[:, None] - i[None, :], inv_sigma, norm, RADIUS), EXACT)
    # The tiles of input are shifted up by RADIUS rows: an output tile needs this one of input and the next.
    distance = line[None, :] - RADIUS - line[:, None]
    upper, upper_low = _split(_band(distance, inv_sigma, norm, RADIUS), EXACT)
    lower, lower_low = _split(_band(distance + ROWS, inv_sigma, norm, RADIUS), EXACT)

    column = program % strips * COLUMNS + i
    beside = tl.minimum(tl.maximum(program % strips * COLUMNS + beside, 0), W - 1)  # the edge columns are repeated
    base = crops + n * 3 * P
    red_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    green_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    blue_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    for top in range(0, H + ROWS, ROWS):
        row = tl.minimum(tl.maximum(top - RADIUS + line, 0), H - 1)[:, None] * W  # the edge rows are repeated
        source = column if EVEN else tl.minimum(column, W - 1)
        red, green, blue = _load(base, row + source[None, :], P, True)
        red, green, blue = _colored(red, green, blue, order + n * 4, factor + n * 4, is_gray, mean, count)
        red2, green2, blue2 = _load(base, row + beside[None, :], P, True)
        red2, green2, blue2 = _colored(red2, green2, blue2, order + n * 4, factor + n * 4, is_gray, mean, count)
        red, red_low = _rows_blurred(red, red2, main, main_low, halo, halo_low, EXACT)
        green, green_low = _rows_blurred(green, green2, main, main_low, halo, halo_low, EXACT)
        blue, blue_low = _rows_blurred(blue, blue2, main, main_low, halo, halo_low, EXACT)

        red_sum = _product(lower, lower_low, red, red_low, red_sum, EXACT)
        green_sum = _product(lower, lower_low, green, green_low, green_sum, EXACT)
        blue_sum = _product(lower, lower_low, blue, blue_low, blue_sum, EXACT)
        row = top - ROWS + line
        inside = ((row >= 0) & (row < H))[:, None]
        if not EVEN:
            inside &= (column < W)[None, :]
        at = out + n * 3 * P + (row[:, None] * W + column[None, :])
        to = out.dtype.element_ty
        tl.store(at, _finished(red_sum, threshold, scale0, shift0).to(to), mask=inside)
        tl.store(at + P, _finished(green_sum, threshold, scale1, shift1).to(to), mask=inside)
        tl.store(at + 2 * P, _finished(blue_sum, threshold, scale2, shift2).to(to), mask=inside)

        zero = tl.zeros([ROWS, COLUMNS], tl.float32)
        red_sum = _product(upper, upper_low, red, red_low, zero, EXACT)
        green_sum = _product(upper, upper_low, green, green_low, zero, EXACT)
        blue_sum = _product(upper, upper_low, blue, blue_low, zero, EXACT)


@op("fastssl::photometric")
def forward(
    crops: Tensor, jitter: Tensor | None, order: Tensor | None, factor: Tensor | None, gray: Tensor | None,
    blur_sigma: Tensor | None, solarize: Tensor | None, mean: list[float], std: list[float], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The views [N, 3, H, W]."""
    crops = crops.contiguous()
    drawn = [x if x is None else x.contiguous() for x in (jitter, order, factor, gray, blur_sigma, solarize)]
    number, _, height, width = crops.shape
    out = torch.empty(crops.shape, dtype=dtype, device=crops.device)
    if not crops.numel():
        return out
    pixels = height * width
    normal = (*(1 / s for s in std), *(-m / s for m, s in zip(mean, std, strict=True)))
    # Per thread 4 float32 or 8 16-bit values: what one store instruction takes.
    threads = 256 if dtype == torch.float32 else 128
    block = min(power_of_2(pixels), 1024)
    parts = cdiv(pixels, RUN)
    steps = cdiv(pixels, parts * block)
    tile = {"BLOCK": block, "num_warps": max(1, min(threads, block) // 32)}
    sums = None
    if factor is not None:
        sums = torch.empty(number, parts, dtype=torch.float32, device=crops.device)
        launch(_means, (number * parts,), crops, *drawn[:3], sums, pixels, parts, steps, **tile)
    launch(
        _plain, (number * parts,), crops, *drawn, sums, out, number, pixels, parts, steps, *normal,
        DRAWN=factor is not None, PARTS=power_of_2(parts), **tile,
    )  # fmt: skip
    if blur_sigma is not None:
        strips = cdiv(width, COLUMNS)
        launch(
            _blurred, (number * strips,), crops, *drawn, sums, out, number, height, width, parts, strips, *normal,
            RADIUS=BLUR_RADIUS, EVEN=width % COLUMNS == 0, EXACT=dtype != torch.bfloat16, PARTS=power_of_2(parts),
            ROWS=ROWS, COLUMNS=COLUMNS, HALO=HALO, num_warps=4, maxnreg=96 if dtype == torch.bfloat16 else 128,
        )  # fmt: skip
    return out


@forward.register_fake
def _(crops, jitter, order, factor, gray, blur_sigma, solarize, mean, std, dtype):
    return crops.new_empty(crops.shape, dtype=dtype)
