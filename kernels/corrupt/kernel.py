"""Damage of image blocks in Triton: one program per tile of an image, which reads what shows and writes once.

    rows[y], columns[x] = bit set of the rectangles over that row, that column;  over(y, x) = rows[y] & columns[x]
    of the kinds' parts of that set the greatest number has the highest bit: the last rectangle's kind
    blocks: add the rectangle's bits to a bitmap of the image, count the new ones, until the count reaches the budget
    a blurred pixel: the sum over its neighbours, mirrored into the block, of two weights and the neighbour

Letters: N = views x B images, view after view, H x W pixels, R rectangles per image. No op has a gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels._launch import cdiv, launch, power_of_2
from fastssl.kernels._philox import LOW
from fastssl.kernels.corrupt import reference


def _signed(number: int) -> int:
    """The 32-bit number whose bits these are."""
    number &= LOW
    return number - (1 << 32) if number > LOW >> 1 else number


NOISE, BLOCKS, DAMAGE, GRAY, BLUR, KERNEL, NOISE_BLOCKS, ALIEN_BLOCKS, ROTATION = (
    tl.constexpr(_signed(key) << 32)  # upper halves of keys
    for key in (
        reference.NOISE_KEY, reference.BLOCKS_KEY, reference.DAMAGE_KEY, reference.GRAY_KEY, reference.BLUR_KEY,
        reference.KERNEL_KEY, reference.NOISE_BLOCKS_KEY, reference.ALIEN_BLOCKS_KEY, reference.ROTATION_KEY,
    )
)  # fmt: skip


@triton.jit
def _number(value):
    """An argument that is a number or points to one, as int32."""
    if value.dtype.is_ptr():
        value = tl.load(value)
    return value.to(tl.int32)


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


@triton.jit
def _in(y, x, top, left, tall, wide):
    """Whether pixels lie in a block."""
    return (y >= top) & (y < top + tall) & (x >= left) & (x < left + wide)


@triton.jit
def _mirrored(y, top, tall, TAPS: tl.constexpr):
    """Coordinates of a block's pixels and up to TAPS beyond it, reflected at its borders."""
    period = tl.maximum(2 * tall - 2, 1)
    offset = (y - top + TAPS * period) % period
    return top + tl.minimum(offset, period - offset)


@triton.jit
def _colours(at, vc, mask, gray):
    """Three channels, float32; their mean where `gray`."""
    red = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    green = tl.load(at + vc, mask=mask, other=0.0).to(tl.float32)
    blue = tl.load(at + 2 * vc, mask=mask, other=0.0).to(tl.float32)
    mean = (red + green + blue) / 3.0
    return tl.where(gray, mean, red), tl.where(gray, mean, green), tl.where(gray, mean, blue)


@triton.jit
def _soften(view, y, x, read, shown, soft, weights, vc, vh, vw, TAPS: tl.constexpr):
    """The channels of an image with a gray block and then a blurred one, right where `shown`, and where these lie."""
    top, left, tall, wide = tl.load(soft), tl.load(soft + 1), tl.load(soft + 2), tl.load(soft + 3)
    from_y, from_x, rows, columns = tl.load(soft + 4), tl.load(soft + 5), tl.load(soft + 6), tl.load(soft + 7)
    gray = _in(y, x, top, left, tall, wide)
    blur = _in(y, x, from_y, from_x, rows, columns)
    red, green, blue = _colours(view + y.to(tl.int64) * vh + x.to(tl.int64) * vw, vc, read, gray)
    need = blur & shown
    if tl.max(tl.where(need, 1, 0)) > 0:
        tap = tl.arange(0, TAPS)
        reach = tl.max(tl.where(tl.load(weights + tap) > 0, tap, 0))
        zero = tl.zeros(need.shape, tl.float32)
        red2, green2, blue2 = zero, zero, zero
        for i in range(-reach, reach + 1):
            there_y = _mirrored(y + i, from_y, rows, TAPS)
            outer = tl.load(weights + tl.abs(i)).to(tl.float32)
            for j in range(-reach, reach + 1):
                there_x = _mirrored(x + j, from_x, columns, TAPS)
                weight = outer * tl.load(weights + tl.abs(j)).to(tl.float32)
                at = view + there_y.to(tl.int64) * vh + there_x.to(tl.int64) * vw
                there = _in(there_y, there_x, top, left, tall, wide)
                red1, green1, blue1 = _colours(at, vc, need, there)
                red2 += weight * red1
                green2 += weight * green1
                blue2 += weight * blue1
        red, green, blue = tl.where(blur, red2, red), tl.where(blur, green2, green), tl.where(blur, blue2, blue)
    return red, green, blue, gray | blur


@triton.jit(do_not_specialize=["images", "seed", "epoch", "view"])
def _paint(
    views,  # [N, 3, H, W], strides vb, vc, vh, vw
    boxes,  # int32 [N, R, 4]
    kinds,  # int32 [N, R]
    source,  # int [N]
    ids,  # int64 [B]
    soft,  # int32 [N, 2, 4]: gray and blurred block
    weights,  # float [N, taps]: of the blur
    out,  # [N, 3, H, W], strides ob, oc, oh, ow
    mask,  # uint8 [N, H, W], out
    images,  # B
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
    seed,
    epoch,
    view,
    TAPS: tl.constexpr,  # 0: nothing is gray or blurred
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
        identity = tl.load(ids + b % images).to(tl.int32)
        number = view + (b // images).to(tl.int32)
        zeros = pixel * 0
        key = (seed.to(tl.int64) & 0xFFFFFFFF) + NOISE
        w0, w1, w2, w3 = tl.philox(key, pixel, zeros + number, zeros + _number(epoch), zeros + identity)
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
    hit = shown > 0
    if TAPS:
        own0, own1, own2, softer = _soften(
            views + b * vb, y[:, None, None], x[None, :, :], clean, shown == 0, soft + b * 8, weights + b * TAPS,
            vc, vh, vw, TAPS,
        )  # fmt: skip
        hit = hit | softer
    for channel in tl.static_range(3):
        foreign = tl.load(there + channel * vc, mask=alien, other=0.0)
        if TAPS:
            own = (own0 if channel == 0 else (own1 if channel == 1 else own2)).to(foreign.dtype)
        else:
            own = tl.load(at + channel * vc, mask=clean, other=0.0)
        noise = noise0 if channel == 0 else (noise1 if channel == 1 else noise2)
        value = tl.where(shown == 0, own, tl.where(shown == 3, foreign, 0.0))
        value = tl.where(shown == 2, noise.to(own.dtype), value)
        tl.store(to + channel * oc, value, mask=inside)
    tl.store(mask + b * H * W + rows * W + columns, tl.where(hit, 1, 0).to(tl.uint8), mask=inside)


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


@triton.jit
def _words(key, identity, epoch, view, n):
    """Four words for each number of n."""
    zero = n * 0
    return tl.philox(key, zero + identity, zero + epoch, zero + view, n)


@triton.jit
def _source(word, b, images, view, GROUP: tl.constexpr):
    """The row of the image that alien blocks show."""
    if GROUP == 0:
        other = tl.umulhi(word, images.to(tl.uint32)).to(tl.int32)
    else:
        begin = b // GROUP * GROUP
        size = tl.minimum(images - begin, GROUP)
        other = begin + (b - begin + 1 + tl.umulhi(word, (size - 1).to(tl.uint32)).to(tl.int32)) % size
    return view * images + other


@triton.jit
def _store_box(box, top, left, tall, wide, mask):
    tl.store(box, top, mask=mask)
    tl.store(box + 1, left, mask=mask)
    tl.store(box + 2, tall, mask=mask)
    tl.store(box + 3, wide, mask=mask)


@triton.jit(
    do_not_specialize=[
        "images", "R", "alien", "noise", "low0", "span0", "most0", "low2", "span2", "most2", "seed", "epoch",
    ]
)  # fmt: skip
def _draw(
    ids,  # int64 [B]
    boxes,  # int32 [N, R, 4], out
    kinds,  # int32 [N, R], out
    source,  # int64 [N], out
    images,  # B
    R,
    height,
    width,
    tallest,  # a block's height is less
    widest,
    alien,  # 2^32 times the probability that an image is mixed with another
    noise,  # 2^32 times the probability that blank blocks show noise
    low0,  # blank images: least budget, pixels
    span0,  # how much more it may be
    most0,  # blocks
    low2,  # mixed images, likewise
    span2,
    most2,
    seed,
    epoch,
    SOURCE: tl.constexpr,  # images of a group
    ALIGN: tl.constexpr,
    UNIFORM: tl.constexpr,
    ROWS: tl.constexpr,  # overruns the image's rows
    WORDS: tl.constexpr,  # of 32 columns, overrun the image's columns
    LANES: tl.constexpr,  # overruns R
):
    n = tl.program_id(0)
    view = n // images
    b = n % images
    identity = tl.load(ids + b).to(tl.int32)
    key = seed.to(tl.int64) & 0xFFFFFFFF
    epoch = _number(epoch)
    path, fill, other, _ = _words(key + DAMAGE, identity, epoch, view, identity * 0)
    mixed = path.to(tl.int64) < alien
    tl.store(source + n, _source(other, b, images, view, SOURCE).to(tl.int64))
    low = tl.where(mixed, low2, low0)
    span = tl.where(mixed, span2, span0)
    most = tl.where(mixed, most2, most0)
    key += BLOCKS + tl.where(mixed, 2, 0).to(tl.int64) * 4294967296

    row = tl.arange(0, ROWS)
    column = tl.arange(0, WORDS) * 32
    covered = tl.zeros([ROWS, WORDS], tl.uint32)
    w0, w1, w2, w3 = _words(key, identity, epoch, view, identity * 0)
    need = low + tl.umulhi(w0, (span + 1).to(tl.uint32)).to(tl.int32)
    total = identity * 0
    r = identity * 0
    boxes += n.to(tl.int64) * R * 4
    while (total < need) & (r < most):
        w0, w1, w2, w3 = _words(key, identity, epoch, view, r + 1)
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
        _store_box(boxes + r * 4, top, left, bottom - top, right - left, True)
        r += 1
    lane = tl.arange(0, LANES)
    none = lane * 0
    _store_box(boxes + lane * 4, none, none, none, none, (lane >= r) & (lane < R))
    kind = tl.where(mixed, 2, tl.where(fill.to(tl.int64) < noise, 1, 0))
    tl.store(kinds + n.to(tl.int64) * R + lane, none + kind, mask=lane < R)


@triton.jit
def _first_box(key, identity, epoch, view, r, side, least, limit):
    """Top, left, height, width of block r of SiT's first version."""
    w0, w1, w2, w3 = _words(key, identity, epoch, view, r)
    room = (side - least).to(tl.uint32)
    more = tl.maximum(limit - least, 1).to(tl.uint32)
    top = tl.umulhi(w0, room).to(tl.int32)
    left = tl.umulhi(w1, room).to(tl.int32)
    tall = least + tl.umulhi(w2, more).to(tl.int32)
    wide = least + tl.umulhi(w3, more).to(tl.int32)
    return top, left, tl.minimum(tall, side - top), tl.minimum(wide, side - left)


@triton.jit
def _spend(boxes, most, key, identity, epoch, view, used, side, least, limit, COUNT: tl.constexpr, LANES: tl.constexpr):
    """The first of COUNT blocks, until their areas add up to the pixels `most` (float64); zeros behind."""
    r = tl.arange(0, LANES)
    top, left, tall, wide = _first_box(key, identity, epoch, view, r, side, least, limit)
    area = tall * wide
    used = used & ((tl.cumsum(area, 0) - area).to(tl.float64) < most)
    top, left = tl.where(used, top, 0), tl.where(used, left, 0)
    tall, wide = tl.where(used, tall, 0), tl.where(used, wide, 0)
    _store_box(boxes + r * 4, top, left, tall, wide, r < COUNT)


@triton.jit(do_not_specialize=["images", "side", "least", "limit", "seed", "epoch"])
def _draw_first(
    ids,  # int64 [B]
    boxes,  # int32 [N, 2 COUNT, 4], out
    kinds,  # int32 [N, 2 COUNT], out
    source,  # int64 [N], out
    soft,  # int32 [N, 2, 4], out
    weights,  # float64 [N, TAPS], out
    turns,  # int64 [N], out
    images,  # B
    side,
    least,  # side of a block
    limit,  # the side of a noise or alien block is less
    seed,
    epoch,
    SCALE: tl.constexpr,  # pixels of a budget per unit of its word
    SOURCE: tl.constexpr,  # images of a group
    COUNT: tl.constexpr,
    LANES: tl.constexpr,  # overruns 2 COUNT
    TAPS: tl.constexpr,
):
    n = tl.program_id(0)
    view = n // images
    b = n % images
    identity = tl.load(ids + b).to(tl.int32)
    zero = identity * 0
    key = seed.to(tl.int64) & 0xFFFFFFFF
    epoch = _number(epoch)
    other, noise, alien, _ = _words(key + DAMAGE, identity, epoch, view, zero)
    row = _source(other, b, images, view, SOURCE)
    tl.store(source + n, row.to(tl.int64))
    at = boxes + n.to(tl.int64) * COUNT * 8
    most = noise.to(tl.float64) * SCALE
    _spend(at, most, key + NOISE_BLOCKS, identity, epoch, view, True, side, least, limit, COUNT, LANES)
    most = alien.to(tl.float64) * SCALE
    at += COUNT * 4
    _spend(at, most, key + ALIEN_BLOCKS, identity, epoch, view, row != n, side, least, limit, COUNT, LANES)
    lane = tl.arange(0, LANES)
    tl.store(kinds + n * COUNT * 2 + lane, tl.where(lane < COUNT, 1, 2), mask=lane < 2 * COUNT)
    top, left, tall, wide = _first_box(key + GRAY, identity, epoch, view, zero, side, least, side)
    _store_box(soft + n * 8, top, left, tall, wide, True)
    top, left, tall, wide = _first_box(key + BLUR, identity, epoch, view, zero, side, least, side)
    _store_box(soft + n * 8 + 4, top, left, tall, wide, True)
    size, spread, _, _ = _words(key + KERNEL, identity, epoch, view, zero)
    half = (3 + tl.umulhi(size, (zero + 13).to(tl.uint32)).to(tl.int32)) // 2
    tap = tl.arange(0, TAPS)
    ratio = tap.to(tl.float64) / (0.1 + 5 * spread.to(tl.float64) * (2.0**-32))
    weight = tl.where(tap <= half, tl.exp(-0.5 * ratio * ratio), 0.0)
    tl.store(weights + n * TAPS + tap, weight / (2 * tl.sum(weight, 0) - 1))
    turn, _, _, _ = _words(key + ROTATION, identity, epoch, view, zero)
    tl.store(turns + n, (turn >> 30).to(tl.int64))


def number(value: int | Tensor) -> tuple[int, Tensor | None]:
    """A number or a tensor of it, as two arguments of an op."""
    return (0, value) if isinstance(value, Tensor) else (value, None)


@torch.library.custom_op("fastssl::corrupt", mutates_args=())
def paint(
    views: Tensor, boxes: Tensor, kind: Tensor, source: Tensor, ids: Tensor, seed: int, epoch: int,
    epoch_there: Tensor | None, view: int, soft: Tensor | None, weights: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Damaged views and mask."""
    rows, _, height, width = views.shape
    out = torch.empty_like(views)
    mask = torch.empty(rows, height, width, dtype=torch.bool, device=views.device)
    group = 16 // views.element_size()
    block_h, block_w = 32, 64  # not measured yet
    tiles = cdiv(width, block_w)
    if soft is None or weights is None:
        soft, weights, taps = boxes, views, 0
    else:
        soft, weights, taps = soft.contiguous(), weights.contiguous(), weights.shape[1]
    launch(
        _paint, (cdiv(height, block_h) * tiles, rows),
        views, boxes.contiguous(), kind.contiguous(), source.contiguous(), ids.contiguous(), soft, weights, out,
        mask.view(torch.uint8), len(ids), boxes.shape[1], height, width, tiles, *views.stride(), *out.stride(),
        _signed(seed), _signed(epoch) if epoch_there is None else epoch_there, _signed(view),
        TAPS=taps, GROUP=group, BLOCK_H=block_h, BLOCK_W=block_w, num_warps=8,
    )  # fmt: skip
    return out, mask


@paint.register_fake
def _(views, *rest):
    return torch.empty_like(views), views.new_empty(views[:, 0].shape, dtype=torch.bool)


@torch.library.custom_op("fastssl::draw_blocks", mutates_args=())
def draw(
    ids: Tensor, views: int, height: int, width: int, tallest: int, widest: int, budgets: list[int],
    max_blocks: list[int], alien: int, noise: int, group: int, align: int, uniform_rate: bool, seed: int, epoch: int,
    epoch_there: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Boxes, kinds and source rows."""
    boxes, kinds, source = _blocks(ids, views, max(max_blocks))
    rows, words = power_of_2(height), power_of_2(cdiv(width, 32))
    launch(
        _draw, (len(source),), ids.contiguous(), boxes, kinds, source, len(ids), max(max_blocks),
        height, width, tallest, widest, alien, noise, *budgets[:2], max_blocks[0], *budgets[2:], max_blocks[1],
        _signed(seed), _signed(epoch) if epoch_there is None else epoch_there, SOURCE=group, ALIGN=align,
        UNIFORM=uniform_rate, ROWS=rows, WORDS=words, LANES=power_of_2(max(max_blocks)),
        num_warps=max(1, min(8, rows * words // 256)),
    )  # fmt: skip
    return boxes, kinds, source


def _blocks(ids: Tensor, views: int, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for boxes, kinds and source rows."""
    rows = views * len(ids)
    return (
        ids.new_empty(rows, most, 4, dtype=torch.int32),
        ids.new_empty(rows, most, dtype=torch.int32),
        ids.new_empty(rows),
    )


@draw.register_fake
def _(ids, views, height, width, tallest, widest, budgets, max_blocks, *rest):
    return _blocks(ids, views, max(max_blocks))


@torch.library.custom_op("fastssl::draw_first", mutates_args=())
def draw_first(
    ids: Tensor, views: int, side: int, share: float, group: int, seed: int, epoch: int, epoch_there: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Boxes, kinds, source rows, gray and blurred blocks, weights, quarter turns."""
    out = _first(ids, views)
    least, limit = reference.first_sides(side)
    launch(
        _draw_first, (len(out[0]),), ids.contiguous(), *out, len(ids), side, least, limit, _signed(seed),
        _signed(epoch) if epoch_there is None else epoch_there, SCALE=reference.first_scale(side, share), SOURCE=group,
        COUNT=reference.CANDIDATES, LANES=power_of_2(2 * reference.CANDIDATES), TAPS=reference.TAPS, num_warps=4,
    )  # fmt: skip
    return out


def _first(ids: Tensor, views: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Room for what `draw_first` returns."""
    rows = views * len(ids)
    return (
        *_blocks(ids, views, 2 * reference.CANDIDATES),
        ids.new_empty(rows, 2, 4, dtype=torch.int32),
        ids.new_empty(rows, reference.TAPS, dtype=torch.float64),
        ids.new_empty(rows),
    )


@draw_first.register_fake
def _(ids, views, *rest):
    return _first(ids, views)
