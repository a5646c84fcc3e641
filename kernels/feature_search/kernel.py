"""Feature search in Triton: a map is read once for all crops, and a scaled map is never read back.

    maps = dot(q, T) / (|q| |T|);  A y has the moments  mean = mean(a y),  m2 = sum(M (a y - mean)^2 + s y^2)
        with a and s the mean over crops of a position's A, and the sum of its squared deviations from it
    out = relu((A y - mean) / sqrt(var + eps) * weight + bias)
    pooled = mean(relu((z - mean) / sqrt(var + eps) * weight + bias + A T))

Letters: M crops, B images, C channels, P = H W positions; rows of [M B] are crop-major. No op has a gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels._launch import EXACT, cdiv, launch, power_of_2, recording
from fastssl.kernels._op import op

EPS = 1e-12  # least norm, as in F.normalize
# Not measured yet: these two, and the sizes of blocks below.
SPLITS = 256  # most partial moments per channel
PROGRAMS = 1024  # aimed at where positions can be split: about 8 blocks per multiprocessor


@triton.jit
def _unit(
    queries,  # [M, B, C]
    unit,  # [PARTS, M, B, C], out
    rows,  # M B
    C,
    eps,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Queries of length one. In two parts where the type is short: the rounded value, and what rounding took away."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < C
    q = tl.load(queries + row * C + c, mask=inside, other=0.0).to(tl.float32)
    q = q / tl.maximum(tl.sqrt_rn(tl.sum(q * q, 0)), eps)
    high = q.to(unit.dtype.element_ty)
    tl.store(unit + row * C + c, high, mask=inside)
    if PARTS == 2:
        low = (q - high.to(tl.float32)).to(unit.dtype.element_ty)
        tl.store(unit + (row + rows) * C + c, low, mask=inside)


@triton.jit
def _search(
    unit,  # [PARTS, M, B, C]
    feature,  # [B, C, P], strides fb, fc, fp
    maps,  # float32 [M, B, P], out
    M,
    B,
    C,
    P,
    fb,
    fp,
    fc,
    eps,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,  # PARTS x crops of a program
    WIDEN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    CROPS: tl.constexpr = ROWS // PARTS
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    b = tl.program_id(1).to(tl.int64)
    first = tl.program_id(2) * CROPS
    lane = tl.arange(0, ROWS)
    m = first + lane % CROPS
    query = ((lane // CROPS * M + m) * B + b) * C
    accumulator = tl.zeros([BLOCK_P, ROWS], tl.float32)
    squares = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        q = tl.load(unit + query[None, :] + c[:, None], mask=(m < M)[None, :] & (c < C)[:, None], other=0.0)
        at = feature + b * fb + p.to(tl.int64)[:, None] * fp + c.to(tl.int64)[None, :] * fc
        f = tl.load(at, mask=(p < P)[:, None] & (c < C)[None, :], other=0.0)
        wide = f.to(tl.float32)
        squares += wide * wide
        if WIDEN:
            accumulator = tl.dot(wide, q.to(tl.float32), accumulator, input_precision="ieee")
        else:
            accumulator = tl.dot(f, q, accumulator, input_precision="ieee")
    cosine = tl.sum(tl.reshape(accumulator, [BLOCK_P, PARTS, CROPS]), 1)
    cosine = cosine / tl.maximum(tl.sqrt_rn(tl.sum(squares, 1)), eps)[:, None]
    m = first + tl.arange(0, CROPS)
    row = m.to(tl.int64) * B + b
    tl.store(maps + row[None, :] * P + p[:, None], cosine, mask=(m < M)[None, :] & (p < P)[:, None])


@triton.jit
def _moments(
    y,  # [B, C, P], strides yb, yc, yp
    maps,  # [M, B, P]
    partial,  # float32 [3, splits, C], out: count, mean, m2
    M,
    B,
    C,
    P,
    yb,
    yp,
    yc,
    columns,  # blocks of positions per image
    blocks,  # in all images
    each,  # blocks of a program
    CROPS: tl.constexpr,  # overruns M
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    split = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m = tl.arange(0, CROPS)
    count = 0.0
    mean = tl.zeros([BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_C], tl.float32)
    for block in range(split * each, min(split * each + each, blocks)):
        b = (block // columns).to(tl.int64)
        p = block % columns * BLOCK_P + tl.arange(0, BLOCK_P)
        inside = p < P
        at = y + b * yb + p.to(tl.int64)[:, None] * yp + c.to(tl.int64)[None, :] * yc
        v = tl.load(at, mask=inside[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
        row = m.to(tl.int64) * B + b
        real = (m < M)[:, None] & inside[None, :]
        a = tl.load(maps + row[:, None] * P + p[None, :], mask=real, other=0.0).to(tl.float32)
        average = tl.sum(a, 0) / M
        a = tl.where(real, a - average[None, :], 0.0)
        spread = tl.sum(a * a, 0)
        positions = min(P - block % columns * BLOCK_P, BLOCK_P)
        x = average[:, None] * v
        here = tl.sum(x, 0) / positions
        x = tl.where(inside[:, None], x - here[None, :], 0.0)
        m2_here = tl.sum(M * x * x + spread[:, None] * v * v, 0)
        # Merge with the blocks before.
        new = (M * positions).to(tl.float32)
        share = new / (count + new)
        delta = here - mean
        mean += delta * share
        m2 += m2_here + delta * delta * (count * share)
        count += new
    out = partial + split * C + c
    plane = tl.num_programs(0) * C
    tl.store(out, tl.zeros([BLOCK_C], tl.float32) + count, mask=c < C)
    tl.store(out + plane, mean, mask=c < C)
    tl.store(out + 2 * plane, m2, mask=c < C)


@triton.jit
def _merge(
    partial,  # float32 [3, splits, C]: count, mean, m2
    out,  # float32 [3, C], out: mean, m2 and the biased variance
    running_mean,  # [C], moved, or nothing; so the next
    running_var,
    batches,  # int64, counted up, or nothing
    splits,
    C,
    momentum,
    RUNNING: tl.constexpr,
    ROWS: tl.constexpr,  # overruns splits
    BLOCK_C: tl.constexpr,
):
    row = tl.arange(0, ROWS)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (row < splits)[:, None] & (c < C)[None, :]
    at = partial + row[:, None] * C + c[None, :]
    plane = splits * C
    count = tl.load(at, mask=inside, other=0.0)
    means = tl.load(at + plane, mask=inside, other=0.0)
    squares = tl.load(at + 2 * plane, mask=inside, other=0.0)
    values = tl.sum(count, 0)
    centre = tl.sum(count * means, 0) / tl.maximum(values, 1.0)
    delta = means - centre[None, :]
    m2 = tl.sum(squares + count * delta * delta, 0)
    tl.store(out + c, centre, mask=c < C)
    tl.store(out + C + c, m2, mask=c < C)
    tl.store(out + 2 * C + c, m2 / tl.maximum(values, 1.0), mask=c < C)
    if RUNNING:
        old = tl.load(running_mean + c, mask=c < C, other=0.0).to(tl.float32)
        new = old + momentum * (centre - old)
        tl.store(running_mean + c, new.to(running_mean.dtype.element_ty), mask=c < C)
        old = tl.load(running_var + c, mask=c < C, other=0.0).to(tl.float32)
        new = old + momentum * (m2 / tl.maximum(values - 1.0, 1.0) - old)
        tl.store(running_var + c, new.to(running_var.dtype.element_ty), mask=c < C)
        if tl.program_id(0) == 0:
            tl.store(batches, tl.load(batches) + 1)


@triton.jit
def _norm(
    feature,  # [B, C, P], strides fb, fc, fp
    maps,  # [M, B, P]
    weight,  # [C]; so the next three
    bias,
    mean,
    var,
    out,  # [M B, C, P], strides fb, fc, fp
    M,
    B,
    C,
    P,
    fb,
    fp,
    fc,
    eps,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    b = tl.program_id(2).to(tl.int64)
    inside = (p < P)[:, None] & (c < C)[None, :]
    offset = p.to(tl.int64)[:, None] * fp + c.to(tl.int64)[None, :] * fc
    f = tl.load(feature + b * fb + offset, mask=inside, other=0.0).to(tl.float32)
    centre = tl.load(mean + c, mask=c < C, other=0.0).to(tl.float32)
    slope = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
    slope = slope / tl.sqrt_rn(tl.load(var + c, mask=c < C, other=0.0).to(tl.float32) + eps)
    rise = tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
    for m in range(M):
        row = m * B + b
        a = tl.load(maps + row * P + p, mask=p < P, other=0.0).to(tl.float32)
        x = (a[:, None] * f - centre[None, :]) * slope[None, :] + rise[None, :]
        x = tl.where(x < 0, 0.0, x)  # keeps NaN
        tl.store(out + row * fb + offset, x.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _pool(
    z,  # [M B, C, P], strides zb, zc, zp
    weight,  # [C]; so the next three
    bias,
    mean,
    var,
    maps,  # [M, B, P]
    feature,  # [B, C, P], strides fb, fc, fp
    out,  # [splits, M B, C]: mean over the split's positions, of all P
    M,
    B,
    C,
    P,
    zb,
    zp,
    zc,
    fb,
    fp,
    fc,
    eps,
    splits,
    each,  # positions of a split, a multiple of BLOCK_P
    CROPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    b = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2) % splits
    m = tl.program_id(2) // splits * CROPS + tl.arange(0, CROPS)
    row = m.to(tl.int64) * B + b
    slope = tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
    slope = slope / tl.sqrt_rn(tl.load(var + c, mask=c < C, other=0.0).to(tl.float32) + eps)
    rise = tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
    centre = tl.load(mean + c, mask=c < C, other=0.0).to(tl.float32)
    total = tl.zeros([CROPS, BLOCK_P, BLOCK_C], tl.float32)
    for start in range(split * each, min(split * each + each, P), BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        flat = (p < P)[:, None] & (c < C)[None, :]
        full = (m < M)[:, None, None] & flat[None, :, :]
        at = feature + b * fb + p.to(tl.int64)[:, None] * fp + c.to(tl.int64)[None, :] * fc
        f = tl.load(at, mask=flat, other=0.0).to(tl.float32)
        offset = p.to(tl.int64)[:, None] * zp + c.to(tl.int64)[None, :] * zc
        x = tl.load(z + row[:, None, None] * zb + offset[None, :, :], mask=full, other=0.0).to(tl.float32)
        at = maps + row[:, None] * P + p[None, :]
        a = tl.load(at, mask=(m < M)[:, None] & (p < P)[None, :], other=0.0).to(tl.float32)
        x = (x - centre[None, None, :]) * slope[None, None, :] + rise[None, None, :] + a[:, :, None] * f[None, :, :]
        total += tl.where(full, tl.where(x < 0, 0.0, x), 0.0)
    pooled = tl.sum(total, 1) / P
    at = out + (split.to(tl.int64) * M * B + row)[:, None] * C + c[None, :]
    tl.store(at, pooled.to(out.dtype.element_ty), mask=(m < M)[:, None] & (c < C)[None, :])


def _dense(x: Tensor) -> tuple[Tensor, tuple[int, int, int], bool]:
    """A map that is contiguous or channels_last, its strides over images, positions and channels, and which it is."""
    _, channels, height, width = x.shape
    positions = height * width
    if x.is_contiguous():
        return x, (channels * positions, 1, positions), False
    return x.contiguous(memory_format=torch.channels_last), (channels * positions, channels, 1), True


def _like(x: Tensor, maps: Tensor) -> Tensor:
    """An empty [M B, C, H, W] in the memory format that `_dense` gives x."""
    dense = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    shape = (maps.shape[0] * maps.shape[1], *x.shape[1:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=dense)


def _sizes(maps: Tensor, feature: Tensor) -> tuple[int, int, int, int]:
    return *maps.shape[:2], feature.shape[1], feature.shape[2] * feature.shape[3]


@op("fastssl::search_maps")
def search(queries: Tensor, feature: Tensor) -> Tensor:
    """Maps [M, B, H, W], float32."""
    crops, images, channels = queries.shape
    feature, strides, last = _dense(feature)
    maps = feature.new_empty(crops, images, *feature.shape[2:], dtype=torch.float32)
    positions = maps.shape[2] * maps.shape[3]
    parts = 1 if feature.dtype == torch.float32 else 2
    unit = feature.new_empty(parts, *queries.shape)
    block = power_of_2(channels)
    launch(
        _unit, (crops * images,), queries.contiguous(), unit, crops * images, channels, EPS,
        PARTS=parts, BLOCK=block, num_warps=max(1, min(8, block // 256)),
    )  # fmt: skip
    rows = max(16, min(32, parts * power_of_2(crops)))
    block = 64 if positions >= 512 else 32 if positions >= 128 or not last else 16
    widen = feature.dtype == torch.bfloat16 and not (feature.is_cuda or recording())  # the interpreter cannot dot it
    grid = (cdiv(positions, block), images, cdiv(crops, rows // parts))
    cap = {"maxnreg": 128} if block == 64 and feature.dtype != torch.float32 else {}  # else 80, and a spill
    launch(
        _search, grid, unit, feature, maps, crops, images, channels, positions, *strides, EPS,
        PARTS=parts, ROWS=rows, WIDEN=widen, BLOCK_P=block, BLOCK_C=2048 * parts // block,
        num_warps=4, num_stages=4, **cap,
    )  # fmt: skip
    return maps


@search.register_fake
def _(queries, feature):
    return feature.new_empty(*queries.shape[:2], *feature.shape[2:], dtype=torch.float32)


@op("fastssl::scaled_moments")
def moments(
    y: Tensor, maps: Tensor, mean: Tensor | None, var: Tensor | None, batches: Tensor | None, momentum: float
) -> Tensor:
    """Float32 [3, C]: mean, m2 and the biased variance.

    Running statistics (`mean`, `var`, `batches`) move in place, which a traced call must not ask for.
    """
    y, strides, last = _dense(y)
    crops, images, channels, positions = sizes = _sizes(maps, y)
    block_p, block_c = (64, 64) if last else (128, 32)
    columns = cdiv(positions, block_p)
    blocks = columns * images if crops else 0
    each = max(1, cdiv(blocks, SPLITS))
    splits = cdiv(blocks, each)
    partial = y.new_empty(3, splits, channels, dtype=torch.float32)
    launch(
        _moments, (splits, cdiv(channels, block_c)), y, maps.contiguous(), partial, *sizes, *strides,
        columns, blocks, each, CROPS=power_of_2(crops), BLOCK_P=block_p, BLOCK_C=block_c, num_warps=4, **EXACT,
    )  # fmt: skip
    out = y.new_empty(3, channels, dtype=torch.float32)
    launch(
        _merge, (cdiv(channels, 16),), partial, out, mean, var, batches, splits, channels, momentum,
        RUNNING=mean is not None, ROWS=SPLITS, BLOCK_C=16, num_warps=4, **EXACT,
    )  # fmt: skip
    return out


@moments.register_fake
def _(y, *rest):
    return y.new_empty(3, y.shape[1], dtype=torch.float32)


@op("fastssl::scale_norm_relu")
def normalised(
    feature: Tensor, maps: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float
) -> Tensor:
    """A times the feature, normalised and rectified."""
    out = _like(feature, maps)
    feature, strides, last = _dense(feature)
    _, images, channels, positions = sizes = _sizes(maps, feature)
    block_p, block_c = (32, 64) if last else (64, 32)
    vectors = [v.contiguous() for v in (weight, bias, mean, var)]
    launch(
        _norm, (cdiv(positions, block_p), cdiv(channels, block_c), images),
        feature, maps.contiguous(), *vectors, out, *sizes, *strides, eps,
        BLOCK_P=block_p, BLOCK_C=block_c, num_warps=4, **EXACT,
    )  # fmt: skip
    return out


@normalised.register_fake
def _(feature, maps, *rest):
    return _like(feature, maps)


@op("fastssl::residual_pool")
def pool(
    z: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float, maps: Tensor, feature: Tensor
) -> Tensor:
    """[M B, C], dtype of z."""
    z, z_strides, last = _dense(z)
    feature, strides, _ = _dense(feature)
    crops, images, channels, positions = sizes = _sizes(maps, feature)
    block_p, block_c = (8, 64) if last else (64, 8)
    together = min(8, power_of_2(crops))
    programs = cdiv(channels, block_c) * images * cdiv(crops, together)
    splits = max(1, min(PROGRAMS // max(programs, 1), cdiv(positions, 2 * block_p)))
    each = cdiv(cdiv(positions, splits), block_p) * block_p
    splits = max(1, cdiv(positions, each)) if each else 1
    dtype = z.dtype if splits == 1 else torch.float32
    out = z.new_empty((splits, crops * images, channels) if splits > 1 else (crops * images, channels), dtype=dtype)
    grid = (cdiv(channels, block_c), images, cdiv(crops, together) * splits)
    vectors = [v.contiguous() for v in (weight, bias, mean, var)]
    launch(
        _pool, grid, z, *vectors, maps.contiguous(), feature, out, *sizes, *z_strides, *strides, eps, splits, each,
        CROPS=together, BLOCK_P=block_p, BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip
    return out if splits == 1 else out.sum(0).to(z.dtype)


@pool.register_fake
def _(z, *rest):
    return z.new_empty(z.shape[:2])
