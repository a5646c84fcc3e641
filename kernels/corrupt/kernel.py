"""Damage of image blocks in Triton: one program per tile of an image, which reads what shows and writes once.

    rows[y], columns[x] = bit set of the rectangles over that row, that column;  over(y, x) = rows[y] & columns[x]
    of the kinds' parts of that set the greatest number has the highest bit: the last rectangle's kind
    blocks: add the rectangle's bits to a bitmap of the image, count the new ones, until the count reaches the budget

Letters: B images, H x W pixels, R rectangles per image. No op has a gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels._launch import cdiv, launch, power_of_2
from fastssl.kernels._philox import LOW
from fastssl.kernels.corrupt.reference import BLOCKS_KEY, NOISE_KEY


@triton.jit
def _normals(first, second):
    """Two normal numbers from two words. The words of an angle say its quadrant, so that short series are exact."""
    radius = tl.sqrt_rn(-2.0 * tl.log(((first >> 8).to(tl.int32) + 1).to(tl.float32) * (2.0**-24)))
    turn = second.to(tl.int32, bitcast=True) >> 8  # [-2^23, 2^23): half turns of 2^23
    quadrant = (turn + (1 << 21)) >> 22
    t = (turn - quadrant * (1 << 22)).to(tl.float32) * (3.141592653589793 * 2.0**-23)  # [-pi / 4, pi / 4)
    tt = t * t
    sine = t * (1.0 + tt * (-1.0 / 6 + tt * (1.0 / 120 + tt * (-1.0 / 5040 + tt * (1.0 / 362880)))))
    cosine = 1.0 + tt * (-0.5 + tt * (1.0 / 24 + tt * (-1.0 / 720 + tt * (1.0 / 40320))))
    along = tl.where((quadrant & 1) != 0, sine, cosine)
    across = tl.where((quadrant & 1) != 0, cosine, sine)
    along = tl.where(((quadrant + 1) & 2) != 0, -along, along)
    across = tl.where((quadrant & 2) != 0, -across, across)
    return radius * along, radius * across


@triton.jit(do_not_specialize=["key", "epoch", "view"])
def _paint(
    views,  # [B, 3, H, W], strides vb, vc, vh, vw
    boxes,  # int32 [B, R, 4]
    kinds,  # int32 [B, R]
    source,  # int [B]
    ids,  # int64 [B]
    out,  # [B, 3, H, W], strides ob, oc, oh, ow
    mask,  # uint8 [B, H, W], out
    R,
    H,
    W,
    tiles,  # per row of tiles
    vb,
    vc,
    vh,
    vw,
    ob,
    oc,
    oh,
    ow,
    key,
    epoch,
    view,
    GROUP: tl.constexpr,  # pixels of one memory access
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    GROUPS: tl.constexpr = BLOCK_W // GROUP
    tile = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    y = tile // tiles * BLOCK_H + tl.arange(0, BLOCK_H)
    x = tile % tiles * BLOCK_W + tl.arange(0, BLOCK_W)
    lane = tl.arange(0, 32)
    bit = tl.full([32], 1, tl.uint32) << lane.to(tl.uint32)
    none = tl.zeros([32], tl.uint32)
    shown = tl.zeros([BLOCK_H, GROUPS, GROUP], tl.int32)  # 1 + kind
    for start in range(0, R, 32):
        r = start + lane
        real = r < R
        box = boxes + (b * R + r) * 4
        top = tl.load(box, mask=real, other=0)
        left = tl.load(box + 1, mask=real, other=0)
        bottom = top + tl.load(box + 2, mask=real, other=0)
        right = left + tl.load(box + 3, mask=real, other=0)
        kind = tl.load(kinds + b * R + r, mask=real, other=0)
        hit = (y[:, None] >= top[None, :]) & (y[:, None] < bottom[None, :])
        rows = tl.sum(tl.where(hit, bit[None, :], none[None, :]), 1)
        hit = (x[:, None] >= left[None, :]) & (x[:, None] < right[None, :])
        columns = tl.reshape(tl.sum(tl.where(hit, bit[None, :], none[None, :]), 1), [GROUPS, GROUP])
        over = rows[:, None, None] & columns[None, :, :]
        zero = over & tl.sum(tl.where(kind == 0, bit, none), 0)
        noise = over & tl.sum(tl.where(kind == 1, bit, none), 0)
        alien = over & tl.sum(tl.where(kind == 2, bit, none), 0)
        last = tl.where((noise > zero) & (noise > alien), 2, tl.where(alien > zero, 3, 1))
        shown = tl.where(over != 0, last, shown)
    # From here pixels stand in groups that are read or not read as one.
    x = tile % tiles * BLOCK_W + tl.arange(0, GROUPS)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = (y < H)[:, None, None] & (x < W)[None, :, :]
    noise0 = tl.zeros([BLOCK_H, GROUPS, GROUP], tl.float32)
    noise1 = noise0
    noise2 = noise0
    if tl.max(tl.where(shown == 2, 1, 0)) > 0:
        pixel = y[:, None, None] * W + x[None, :, :]
        identity = tl.load(ids + b).to(tl.int32)
        zeros = pixel * 0
        w0, w1, w2, w3 = tl.philox(key, pixel, zeros + view, zeros + epoch, zeros + identity)
        noise0, noise1 = _normals(w0, w1)
        noise2, _ = _normals(w2, w3)
    clean = inside & (tl.max(tl.where(shown == 0, 1, 0), 2, keep_dims=True) > 0)
    alien = inside & (tl.max(tl.where(shown == 3, 1, 0), 2, keep_dims=True) > 0)
    other = tl.load(source + b).to(tl.int64)
    rows = y.to(tl.int64)[:, None, None]
    columns = x.to(tl.int64)[None, :, :]
    at = views + b * vb + rows * vh + columns * vw
    there = views + other * vb + rows * vh + columns * vw
    to = out + b * ob + rows * oh + columns * ow
    for channel in tl.static_range(3):
        own = tl.load(at + channel * vc, mask=clean, other=0.0)
        foreign = tl.load(there + channel * vc, mask=alien, other=0.0)
        noise = noise0 if channel == 0 else (noise1 if channel == 1 else noise2)
        value = tl.where(shown == 0, own, tl.where(shown == 3, foreign, 0.0))
        value = tl.where(shown == 2, noise.to(own.dtype), value)
        tl.store(to + channel * oc, value, mask=inside)
    tl.store(mask + b * H * W + rows * W + columns, tl.where(shown > 0, 1, 0).to(tl.uint8), mask=inside)


@triton.jit
def _round(length, ALIGN: tl.constexpr):
    """length / ALIGN, rounded, half to even."""
    cells = length // ALIGN
    rest = 2 * (length % ALIGN)
    return cells + tl.where((rest > ALIGN) | ((rest == ALIGN) & (cells % 2 == 1)), 1, 0)


@triton.jit
def _extent(start, length, side, limit, ALIGN: tl.constexpr, UNIFORM: tl.constexpr):
    """First and end of a block along one side of the image, from two words."""
    length = ALIGN + tl.umulhi(length, limit - ALIGN).to(tl.int32)
    if UNIFORM:
        cells = _round(length, ALIGN)
        all = (side + ALIGN - 1) // ALIGN + cells - 1
        first = (tl.umulhi(start, all.to(tl.uint32)).to(tl.int32) - cells + 1) * ALIGN
        end = first + cells * ALIGN
    else:
        first = tl.umulhi(start, side - ALIGN).to(tl.int32) // ALIGN * ALIGN
        end = first + _round(tl.minimum(length, side - first), ALIGN) * ALIGN
    return tl.maximum(first, 0), tl.minimum(end, side)


@triton.jit
def _bits(words):
    """How many bits are set in each 32-bit word."""
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    words = words + (words >> 8)
    return ((words + (words >> 16)) & 63).to(tl.int32)


@triton.jit(do_not_specialize=["low", "span", "key", "epoch", "view"])
def _draw(
    ids,  # int64 [B]
    boxes,  # int32 [B, most, 4], zeros; out
    most,
    low,  # least budget, pixels
    span,  # how much more it may be
    height,
    width,
    tallest,  # a block's height is less
    widest,
    key,
    epoch,
    view,
    ALIGN: tl.constexpr,
    UNIFORM: tl.constexpr,
    ROWS: tl.constexpr,  # overruns the image's rows
    WORDS: tl.constexpr,  # of 32 columns, overrun the image's columns
):
    b = tl.program_id(0).to(tl.int64)
    identity = tl.load(ids + b).to(tl.int32)
    row = tl.arange(0, ROWS)
    column = tl.arange(0, WORDS) * 32
    covered = tl.zeros([ROWS, WORDS], tl.uint32)
    zero = identity * 0
    w0, w1, w2, w3 = tl.philox(key, identity, zero + epoch, zero + view, zero)
    need = low + tl.umulhi(w0, (zero + span + 1).to(tl.uint32)).to(tl.int32)
    total = zero
    n = zero
    while (total < need) & (n < most):
        w0, w1, w2, w3 = tl.philox(key, identity, zero + epoch, zero + view, n + 1)
        top, bottom = _extent(w0, w1, height, tallest, ALIGN, UNIFORM)
        left, right = _extent(w2, w3, width, widest, ALIGN, UNIFORM)
        # Bits from left to right of each word: those below right, less those below left.
        first = tl.minimum(tl.maximum(left - column, 0), 32).to(tl.int64)
        end = tl.minimum(tl.maximum(right - column, 0), 32).to(tl.int64)
        one = tl.full([WORDS], 1, tl.int64)
        bits = ((one << end) - (one << first)).to(tl.uint32)
        hit = (row >= top) & (row < bottom)
        grown = covered | tl.where(hit[:, None], bits[None, :], 0)
        total += tl.sum(_bits(grown ^ covered))
        covered = grown
        box = boxes + (b * most + n) * 4
        tl.store(box, top)
        tl.store(box + 1, left)
        tl.store(box + 2, bottom - top)
        tl.store(box + 3, right - left)
        n += 1


def _signed(number: int) -> int:
    """The 32-bit number whose bits these are."""
    number &= LOW
    return number - (1 << 32) if number > LOW >> 1 else number


@torch.library.custom_op("fastssl::corrupt", mutates_args=())
def paint(
    views: Tensor, boxes: Tensor, kind: Tensor, source: Tensor, ids: Tensor, seed: int, epoch: int, view: int
) -> tuple[Tensor, Tensor]:
    """Damaged views and mask."""
    images, _, height, width = views.shape
    out = torch.empty_like(views)
    mask = torch.empty(images, height, width, dtype=torch.bool, device=views.device)
    group = 16 // views.element_size()
    block_h, block_w = 32, 64  # not measured yet
    tiles = cdiv(width, block_w)
    launch(
        _paint, (cdiv(height, block_h) * tiles, images),
        views, boxes.contiguous(), kind.contiguous(), source.contiguous(), ids.contiguous(), out,
        mask.view(torch.uint8), boxes.shape[1], height, width, tiles, *views.stride(), *out.stride(),
        (seed & LOW) + (NOISE_KEY << 32), _signed(epoch), _signed(view),
        GROUP=group, BLOCK_H=block_h, BLOCK_W=block_w, num_warps=8,
    )  # fmt: skip
    return out, mask


@paint.register_fake
def _(views, *rest):
    return torch.empty_like(views), views.new_empty(views[:, 0].shape, dtype=torch.bool)


@torch.library.custom_op("fastssl::draw_blocks", mutates_args=())
def draw(
    ids: Tensor, height: int, width: int, low: int, span: int, tallest: int, widest: int, align: int,
    uniform_rate: bool, max_blocks: int, seed: int, epoch: int, view: int, kind: int,
) -> Tensor:  # fmt: skip
    """int32 [B, max_blocks, 4]."""
    boxes = torch.zeros(len(ids), max_blocks, 4, dtype=torch.int32, device=ids.device)
    rows, words = power_of_2(height), power_of_2(cdiv(width, 32))
    launch(
        _draw, (len(ids) if max_blocks else 0,), ids.contiguous(), boxes, max_blocks,
        low, span, height, width, tallest, widest,
        (seed & LOW) + (BLOCKS_KEY + kind << 32), _signed(epoch), _signed(view),
        ALIGN=align, UNIFORM=uniform_rate, ROWS=rows, WORDS=words, num_warps=max(1, min(8, rows * words // 256)),
    )  # fmt: skip
    return boxes


@draw.register_fake
def _(ids, height, width, low, span, tallest, widest, align, uniform_rate, max_blocks, *rest):
    return ids.new_empty(len(ids), max_blocks, 4, dtype=torch.int32)
