"""Batch norm, residual sum and ReLU in Triton: two launches forward, two backward, each for both groups.

    h = (x - mean) r, r = 1 / sqrt(var + eps);  y = relu(h weight + bias + residual)
    g = dy where y > 0;  dx = weight r (g - sum(g) / n - h sum(g h) / n);  dresidual = g
    dweight = sum(g h);  dbias = sum(g), over both groups

The first launch of each pass leaves parts of its sums, one row per program along the values; every program of the
second merges the rows of its channels by itself, in one order. That costs little as long as there are few programs.
Moments are merged as by Chan et al. 1983, so a mean that is large against the spread costs no digits.

Letters: N values per channel, a row each; C channels, P positions of an image. A row of parts is mean, m2 (sum of the
squared deviations) and N; one of the statistics mean, var and N.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels._launch import EXACT, cdiv, launch, power_of_2
from fastssl.kernels._op import op

# Not measured yet.
PROGRAMS = 512  # about 4 per multiprocessor
MOST = 256  # along the values: what each program of a second launch has to merge
LEAST = 4  # blocks of values per program


@triton.jit
def _at(n, c, C, P, LAST: tl.constexpr):
    """Where values lie in a map that is dense: channels innermost, or positions."""
    if LAST:
        return n.to(tl.int64)[:, None] * C + c[None, :]
    return (n // P).to(tl.int64)[:, None] * C * P + (n % P)[:, None] + c[None, :].to(tl.int64) * P


@triton.jit
def _merged(
    parts,  # float32 [.., 2 C + 1]
    first,  # rows: the first, and how many
    count,
    c,
    C,
    LANES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Values per channel, their mean and m2, from the parts of a group."""
    lane = tl.arange(0, LANES)
    values = tl.zeros([LANES], tl.float32)
    mean = tl.zeros([LANES, BLOCK_C], tl.float32)
    m2 = tl.zeros([LANES, BLOCK_C], tl.float32)
    for start in range(0, count, LANES):
        real = start + lane < count
        row = parts + (first + start + lane).to(tl.int64) * (2 * C + 1)
        at = row[:, None] + c[None, :]
        inside = real[:, None] & (c < C)[None, :]
        more = tl.load(row + 2 * C, mask=real, other=0.0)
        delta = tl.load(at, mask=inside, other=0.0) - mean
        total = values + more
        share = more / tl.maximum(total, 1.0)
        mean += delta * share[:, None]
        m2 += tl.load(at + C, mask=inside, other=0.0) + delta * delta * (values * share)[:, None]
        values = total
    total = tl.sum(values, 0)
    centre = tl.sum(values[:, None] * mean, 0) / tl.maximum(total, 1.0)
    mean -= centre[None, :]
    return total, centre, tl.sum(m2 + values[:, None] * mean * mean, 0)


@triton.jit
def _summed(parts, first, count, c, C, LANES: tl.constexpr, BLOCK_C: tl.constexpr):
    """Both sums of a group from its parts, float32 [.., 2 C]."""
    lane = tl.arange(0, LANES)
    a = tl.zeros([LANES, BLOCK_C], tl.float32)
    b = tl.zeros([LANES, BLOCK_C], tl.float32)
    for start in range(0, count, LANES):
        at = parts + (first + start + lane).to(tl.int64)[:, None] * (2 * C) + c[None, :]
        inside = (start + lane < count)[:, None] & (c < C)[None, :]
        a += tl.load(at, mask=inside, other=0.0)
        b += tl.load(at + C, mask=inside, other=0.0)
    return tl.sum(a, 0), tl.sum(b, 0)


@triton.jit
def _moments(
    x,  # [N, C]; so the next
    other,
    parts,  # float32 [programs, 2 C + 1], out
    N,  # of the first group; so P
    other_N,
    P,
    other_P,
    C,
    each,  # values of a program, a multiple of BLOCK_N
    programs,  # of the first group
    LAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    second = program >= programs
    begin = tl.where(second, program - programs, program) * each
    end = tl.minimum(begin + each, tl.where(second, other_N, N))
    positions = tl.where(second, other_P, P)
    if second:
        x = other
    values = tl.zeros([BLOCK_N], tl.float32)
    mean = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    m2 = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        real = n < end
        inside = real[:, None] & (c < C)[None, :]
        v = tl.load(x + _at(n, c, C, positions, LAST), mask=inside, other=0.0).to(tl.float32)
        values += tl.where(real, 1.0, 0.0)
        delta = tl.where(inside, v - mean, 0.0)
        mean += delta * (1.0 / tl.maximum(values, 1.0))[:, None]
        m2 += delta * (v - mean)
    total = tl.sum(values, 0)
    centre = tl.sum(values[:, None] * mean, 0) / tl.maximum(total, 1.0)
    mean -= centre[None, :]
    row = parts + program.to(tl.int64) * (2 * C + 1)
    tl.store(row + c, centre, mask=c < C)
    tl.store(row + C + c, tl.sum(m2 + values[:, None] * mean * mean, 0), mask=c < C)
    tl.store(row + 2 * C + c, total + tl.zeros([BLOCK_C], tl.float32), mask=c < 1)


@triton.jit
def _merge(parts, out, programs, other_programs, C, LANES: tl.constexpr, BLOCK_C: tl.constexpr):
    """The parts of each group as one row: [groups, 2 C + 1]."""
    second = tl.program_id(0) == 1
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tl.where(second, programs, 0)
    count = tl.where(second, other_programs, programs)
    values, mean, m2 = _merged(parts, first, count, c, C, LANES, BLOCK_C)
    row = out + tl.program_id(0) * (2 * C + 1)
    tl.store(row + c, mean, mask=c < C)
    tl.store(row + C + c, m2, mask=c < C)
    tl.store(row + 2 * C + c, values + tl.zeros([BLOCK_C], tl.float32), mask=c < 1)


@triton.jit
def _moved(running_mean, running_var, mean, m2, values, momentum):
    """Running statistics after one more group."""
    var = m2 / tl.maximum(values - 1.0, 1.0)
    return running_mean + momentum * (mean - running_mean), running_var + momentum * (var - running_var)


@triton.jit
def _normalise(
    x,  # [N, C]; so the next five
    other,
    residual,  # or nothing; so the next
    other_residual,
    y,  # out; so the next
    other_y,
    weight,  # [C] or nothing; so the next
    bias,
    parts,  # float32 [.., 2 C + 1]
    stats,  # float32 [groups, 2 C + 1], out
    mean,  # [C], moved, or nothing; so the next
    var,
    batches,  # int64, counted up, or nothing
    N,
    other_N,
    P,
    other_P,
    C,
    each,
    programs,  # of the first group
    rows,  # parts of the first group
    other_rows,
    momentum,
    eps,
    LAST: tl.constexpr,
    WEIGHT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    RUNNING: tl.constexpr,
    PAIR: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    second = program >= programs
    begin = tl.where(second, program - programs, program) * each
    end = tl.minimum(begin + each, tl.where(second, other_N, N))
    positions = tl.where(second, other_P, P)
    first = tl.where(second, rows, 0)
    count = tl.where(second, other_rows, rows)
    values, centre, m2 = _merged(parts, first, count, c, C, LANES, BLOCK_C)
    spread = m2 / tl.maximum(values, 1.0)
    if begin == 0:
        row = stats + tl.where(second, 1, 0) * (2 * C + 1)
        tl.store(row + c, centre, mask=c < C)
        tl.store(row + C + c, spread, mask=c < C)
        tl.store(row + 2 * C + c, values + tl.zeros([BLOCK_C], tl.float32), mask=c < 1)
    if RUNNING and program == 0:
        moved_mean = tl.load(mean + c, mask=c < C, other=0.0).to(tl.float32)
        moved_var = tl.load(var + c, mask=c < C, other=0.0).to(tl.float32)
        moved_mean, moved_var = _moved(moved_mean, moved_var, centre, m2, values, momentum)
        if PAIR:
            more, other_centre, other_m2 = _merged(parts, rows, other_rows, c, C, LANES, BLOCK_C)
            moved_mean, moved_var = _moved(moved_mean, moved_var, other_centre, other_m2, more, momentum)
        tl.store(mean + c, moved_mean.to(mean.dtype.element_ty), mask=c < C)
        tl.store(var + c, moved_var.to(var.dtype.element_ty), mask=c < C)
        if tl.program_id(1) == 0:
            tl.store(batches, tl.load(batches) + (2 if PAIR else 1))
    if second:
        x = other
        y = other_y
        if RESIDUAL:
            residual = other_residual
    slope = 1.0 / tl.sqrt_rn(spread + eps)
    if WEIGHT:
        slope *= tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
        rise = tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = (n < end)[:, None] & (c < C)[None, :]
        at = _at(n, c, C, positions, LAST)
        v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        v = (v - centre[None, :]) * slope[None, :]
        if WEIGHT:
            v += rise[None, :]
        if RESIDUAL:
            v += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        if RELU:
            v = tl.where(v < 0, 0.0, v)  # keeps NaN
        tl.store(y + at, v.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _sums(
    x,  # [N, C]; so the next five
    other,
    y,  # with RELU
    other_y,
    dy,
    other_dy,
    stats,  # float32 [groups, 2 C + 1]
    parts,  # float32 [programs, 2 C], out
    N,
    other_N,
    P,
    other_P,
    C,
    each,
    programs,
    eps,
    LAST: tl.constexpr,
    RELU: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    second = program >= programs
    begin = tl.where(second, program - programs, program) * each
    end = tl.minimum(begin + each, tl.where(second, other_N, N))
    positions = tl.where(second, other_P, P)
    row = stats + tl.where(second, 1, 0) * (2 * C + 1)
    if second:
        x = other
        dy = other_dy
        if RELU:
            y = other_y
    centre = tl.load(row + c, mask=c < C, other=0.0)
    r = 1.0 / tl.sqrt_rn(tl.load(row + C + c, mask=c < C, other=1.0) + eps)
    plain = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    weighted = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = (n < end)[:, None] & (c < C)[None, :]
        at = _at(n, c, C, positions, LAST)
        g = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        if RELU:
            g = tl.where(tl.load(y + at, mask=inside, other=0.0) > 0, g, 0.0)
        plain += g
        weighted += g * (tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - centre[None, :])
    at = parts + program.to(tl.int64) * (2 * C) + c
    tl.store(at, tl.sum(plain, 0), mask=c < C)
    tl.store(at + C, tl.sum(weighted, 0) * r, mask=c < C)


@triton.jit
def _differentiate_values(
    x,  # [N, C]; so the next nine
    other,
    y,  # with RELU
    other_y,
    dy,
    other_dy,
    dx,  # out; so the next
    other_dx,
    d_residual,  # out, with RESIDUAL; so the next
    other_d_residual,
    weight,  # [C] or nothing
    d_weight,  # [C], out, with SUMS; so the next
    d_bias,
    stats,  # float32 [groups, 2 C + 1]
    parts,  # float32 [.., 2 C]
    N,
    other_N,
    P,
    other_P,
    C,
    each,
    programs,
    rows,
    other_rows,
    eps,
    LAST: tl.constexpr,
    WEIGHT: tl.constexpr,
    SUMS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RELU: tl.constexpr,
    PAIR: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    second = program >= programs
    begin = tl.where(second, program - programs, program) * each
    end = tl.minimum(begin + each, tl.where(second, other_N, N))
    positions = tl.where(second, other_P, P)
    row = stats + tl.where(second, 1, 0) * (2 * C + 1)
    first = tl.where(second, rows, 0)
    count = tl.where(second, other_rows, rows)
    plain, weighted = _summed(parts, first, count, c, C, LANES, BLOCK_C)
    if SUMS and program == 0:
        all_plain = plain
        all_weighted = weighted
        if PAIR:
            more_plain, more_weighted = _summed(parts, rows, other_rows, c, C, LANES, BLOCK_C)
            all_plain += more_plain
            all_weighted += more_weighted
        tl.store(d_bias + c, all_plain.to(d_bias.dtype.element_ty), mask=c < C)
        tl.store(d_weight + c, all_weighted.to(d_weight.dtype.element_ty), mask=c < C)
    if second:
        x = other
        dy = other_dy
        dx = other_dx
        if RELU:
            y = other_y
        if RESIDUAL:
            d_residual = other_d_residual
    values = tl.maximum(tl.load(row + 2 * C), 1.0)
    centre = tl.load(row + c, mask=c < C, other=0.0)
    r = 1.0 / tl.sqrt_rn(tl.load(row + C + c, mask=c < C, other=1.0) + eps)
    plain = plain / values
    weighted = weighted / values * r
    slope = r
    if WEIGHT:
        slope *= tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = (n < end)[:, None] & (c < C)[None, :]
        at = _at(n, c, C, positions, LAST)
        g = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        if RELU:
            g = tl.where(tl.load(y + at, mask=inside, other=0.0) > 0, g, 0.0)
        if RESIDUAL:
            tl.store(d_residual + at, g.to(d_residual.dtype.element_ty), mask=inside)
        v = tl.load(x + at, mask=inside, other=0.0).to(tl.float32) - centre[None, :]
        g = (g - plain[None, :] - v * weighted[None, :]) * slope[None, :]
        tl.store(dx + at, g.to(dx.dtype.element_ty), mask=inside)


# -- layout and sizes -------------------------------------------------------------------------------------------------


def _last(x: Tensor) -> bool:
    """Whether channels lie innermost in a map, or shall once it is dense."""
    return x.ndim == 2 or x.is_contiguous(memory_format=torch.channels_last) or not x.is_contiguous()


def _format(x: Tensor, last: bool) -> torch.memory_format:
    return torch.channels_last if last and x.ndim == 4 else torch.contiguous_format


def _dense(x: Tensor, last: bool) -> Tensor:
    return x.contiguous(memory_format=_format(x, last))


def _empty(x: Tensor, last: bool) -> Tensor:
    return torch.empty_like(x, memory_format=_format(x, last))


def _values(x: Tensor) -> tuple[int, int]:
    """Values per channel, and positions of an image."""
    positions = x.shape[2] * x.shape[3] if x.ndim == 4 else 1
    return x.shape[0] * positions, positions


def _both(first: Tensor | None, second: Tensor | None, pair: bool = True) -> tuple[Tensor | None, Tensor | None]:
    """What stands for the second group where there is none is not read."""
    return first, first if second is None or not pair else second


class _Sizes:
    """How the programs share the values of one or two groups.

    Attributes:
        programs: of each group.
        grid: both groups, and blocks of channels.
        numbers: the kernels' arguments from N to `programs`.
        constants: the kernels' constants.
        rows: of parts that a program reads at once.
    """

    def __init__(self, x: Tensor, other: Tensor | None) -> None:
        channels = x.shape[1]
        last = _last(x)
        # Not measured yet.
        block_c = min(64, max(16, power_of_2(channels))) if last else 16
        block_n = 4096 // block_c
        columns = cdiv(channels, block_c)
        values, positions = _values(x)
        more, other_positions = (0, 1) if other is None else _values(other)
        most = max(1, min(MOST, PROGRAMS // max(columns, 1)))
        each = max(LEAST, cdiv(cdiv(values + more, most), block_n)) * block_n
        first = max(1, cdiv(values, each))
        second = 0 if other is None else max(1, cdiv(more, each))
        self.last, self.channels, self.programs = last, channels, (first, second)
        self.grid = (first + second, columns)
        self.numbers = (values, more, positions, other_positions, channels, each, first)
        self.constants: dict[str, Any] = {
            "LAST": last, "BLOCK_N": block_n, "BLOCK_C": block_c, "num_warps": 8, **EXACT
        }  # fmt: skip
        self.merge = {"LANES": 1024 // block_c}


# -- ops --------------------------------------------------------------------------------------------------------------


@op("fastssl::batch_norm_act")
def forward(
    x: Tensor, other: Tensor | None, residual: Tensor | None, other_residual: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, mean: Tensor | None, var: Tensor | None, batches: Tensor | None, momentum: float, eps: float,
    relu: bool, together: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Outputs of both groups (the second empty without one) and float32 [groups, 2 C + 1]: mean, var and count.

    Running statistics (`mean`, `var`, `batches`) move in place, which a traced call must not ask for.
    """
    sizes = _Sizes(x, other)
    last = sizes.last
    x = _dense(x, last)
    other, residual, other_residual = (
        None if v is None else _dense(v, last) for v in (other, residual, other_residual)
    )
    y = _empty(x, last)
    other_y = x.new_empty(0) if other is None else _empty(other, last)
    parts, rows = _parts(x, other, sizes, together)
    stats = x.new_empty(1 if other is None else 2, 2 * sizes.channels + 1, dtype=torch.float32)
    given = *_both(x, other), *_both(residual, other_residual), *_both(y, other_y, other is not None)
    launch(
        _normalise, sizes.grid, *given, weight, bias, parts, stats, mean, var, batches, *sizes.numbers, *rows, momentum,
        eps, WEIGHT=weight is not None, RESIDUAL=residual is not None, RELU=relu,
        RUNNING=mean is not None, PAIR=other is not None, **sizes.merge, **sizes.constants,
    )  # fmt: skip
    return y, other_y, stats


@forward.register_fake
def _(x, other, *rest):
    last = _last(x)
    stats = x.new_empty(1 if other is None else 2, 2 * x.shape[1] + 1, dtype=torch.float32)
    return _empty(x, last), x.new_empty(0) if other is None else _empty(other, last), stats


def _parts(x: Tensor, other: Tensor | None, sizes: _Sizes, together: bool) -> tuple[Tensor, tuple[int, int]]:
    """Parts of the moments, and how many each group has; over all processes one per process."""
    parts = x.new_empty(sizes.grid[0], 2 * sizes.channels + 1, dtype=torch.float32)
    launch(_moments, sizes.grid, *_both(x, other), parts, *sizes.numbers, **sizes.constants)
    if not together or not dist.is_initialized():
        return parts, sizes.programs
    merged = parts.new_empty(1 if other is None else 2, parts.shape[1])
    launch(
        _merge, (len(merged), sizes.grid[1]), parts, merged, *sizes.programs, sizes.channels,
        BLOCK_C=sizes.constants["BLOCK_C"], num_warps=4, **sizes.merge, **EXACT,
    )  # fmt: skip
    every = [torch.empty_like(merged) for _ in range(dist.get_world_size())]
    dist.all_gather(every, merged)
    return torch.stack(every, 1).flatten(0, 1), (len(every), 0 if other is None else len(every))


@op("fastssl::batch_norm_act_backward")
def backward(
    dy: Tensor, other_dy: Tensor | None, x: Tensor, other: Tensor | None, y: Tensor | None, other_y: Tensor | None,
    weight: Tensor | None, stats: Tensor, eps: float, residual: bool, together: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of both groups, both residuals (where asked for), weight and bias; empty where there is none."""
    sizes = _Sizes(x, other)
    last, channels = sizes.last, sizes.channels
    x, dy = _dense(x, last), _dense(dy, last)
    other, other_dy = (None if v is None else _dense(v, last) for v in (other, other_dy))
    parts = x.new_empty(sizes.grid[0], 2 * channels, dtype=torch.float32)
    given = *_both(x, other), *_both(y, other_y), *_both(dy, other_dy)
    launch(_sums, sizes.grid, *given, stats, parts, *sizes.numbers, eps, RELU=y is not None, **sizes.constants)
    rows = sizes.programs
    empty = x.new_empty(0)
    d_weight, d_bias = (empty if weight is None else torch.empty_like(weight) for _ in range(2))
    alone = not together or not dist.is_initialized()
    if not alone:
        groups = torch.stack([part.sum(0) for part in parts.split([n for n in rows if n])])
        if weight is not None:
            d_bias, d_weight = (v.to(weight.dtype) for v in groups.sum(0).chunk(2))
        dist.all_reduce(groups)
        parts, rows = groups, (1, 0 if other is None else 1)
    d_x, d_residual = _empty(x, last), _empty(x, last) if residual else empty
    other_dx = empty if other is None else _empty(other, last)
    other_d_residual = _empty(other, last) if residual and other is not None else empty
    made = *_both(d_x, other_dx, other is not None), *_both(d_residual, other_d_residual, other is not None)
    launch(
        _differentiate_values, sizes.grid, *given, *made, weight, d_weight, d_bias, stats, parts, *sizes.numbers, *rows,
        eps, WEIGHT=weight is not None,
        SUMS=weight is not None and alone, RESIDUAL=residual, RELU=y is not None, PAIR=other is not None,
        **sizes.merge, **sizes.constants,
    )  # fmt: skip
    return d_x, other_dx, d_residual, other_d_residual, d_weight, d_bias


@backward.register_fake
def _(dy, other_dy, x, other, y, other_y, weight, stats, eps, residual, together):
    last, empty = _last(x), x.new_empty(0)
    maps = [empty if v is None else _empty(v, last) for v in (x, other)]
    residuals = [empty if v is None or not residual else _empty(v, last) for v in (x, other)]
    vectors = [empty if weight is None else torch.empty_like(weight) for _ in range(2)]
    return *maps, *residuals, *vectors


def _save(ctx, inputs, output):
    x, other, residual, _, weight, *_, eps, relu, together = inputs
    y, other_y, stats = output
    ctx.options = eps, relu, together
    ctx.residual = residual is not None and ctx.needs_input_grad[2]
    ctx.mark_non_differentiable(stats, *([other_y] if other is None else []))
    last = _last(x)
    dense = (None if v is None else _dense(v, last) for v in (x, other))
    ctx.save_for_backward(*dense, y if relu else None, None if other is None or not relu else other_y, weight, stats)


def _differentiate(ctx, dy, other_dy, _):
    x, other, y, other_y, weight, stats = ctx.saved_tensors
    eps, relu, together = ctx.options
    dy = torch.zeros_like(x) if dy is None else dy
    other_dy = torch.zeros_like(other) if other_dy is None and other is not None else other_dy
    d_x, other_dx, d_residual, other_d_residual, d_weight, d_bias = backward(
        dy, None if other is None else other_dy, x, other, y, other_y, weight, stats, eps, ctx.residual and relu,
        together,
    )  # fmt: skip
    if not ctx.residual:
        d_residual = other_d_residual = None
    elif not relu:  # the residual's gradient is the output's
        d_residual, other_d_residual = dy, other_dy
    pair = other is not None
    vectors = (None, None) if weight is None else (d_weight, d_bias)
    return (
        d_x, other_dx if pair else None, d_residual, other_d_residual if pair else None, *vectors, *[None] * 7
    )  # fmt: skip


forward.register_autograd(_differentiate, setup_context=_save)
