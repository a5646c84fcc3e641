"""Centred-softmax cross-entropy in Triton: student logits are read once forward and once backward, none are copied.

    q_t = softmax((teacher_t - center) / teacher_temp);  y_v = student_v / student_temp
    loss = sum_v [n_v lse(y_v) - <sum of the q_t paired with v, y_v>] / (B pairs)
    d student_v = (n_v softmax(y_v) - sum of the paired q_t) / (student_temp B pairs), times upstream

Four launches forward: the teacher's rows and columns (partial sums over blocks of K), the rows' combination, the
students' rows (partial over stretches of K), the rest; one backward. No atomics, so every run gives the same bits.

Letters: V student crops, T teacher crops, B images, K prototypes, n_v number of teacher crops paired with crop v.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels._launch import EXACT, cdiv, launch, power_of_2
from fastssl.kernels._op import op

FEW = 1024  # programs that keep the largest cards busy; not measured yet


@triton.jit
def _inverse(inv_temp, warmth, WARMTH: tl.constexpr):
    """1 / the teacher's temperature."""
    if WARMTH:
        inv_temp = (1.0 / tl.load(warmth).to(tl.float64)).to(tl.float32)
    return inv_temp


@triton.jit
def _teacher_forward(
    teacher,  # [T, B, K], strides tt, tb, 1
    center,  # [K] or nothing
    partial,  # float32 [3, K blocks, T B], out: per block of K the maximum m, sum of e = exp(x - m), sum of e x
    column_sums,  # float32 [row groups, K], out
    B,
    K,
    rows,  # T B
    tt,
    tb,
    inv_temp,
    warmth,  # float scalar: the teacher's temperature in the place of inv_temp; or nothing
    WARMTH: tl.constexpr,
    CENTERED: tl.constexpr,
    GROUP: tl.constexpr,  # rows per program
    R: tl.constexpr,  # rows at once
    BLOCK: tl.constexpr,
):
    inv_temp = _inverse(inv_temp, warmth, WARMTH)
    block = tl.program_id(0)
    first = tl.program_id(1) * GROUP
    k = block * BLOCK + tl.arange(0, BLOCK)
    in_k = k < K
    shift = tl.zeros([BLOCK], tl.float32)
    if CENTERED:
        shift = tl.load(center + k, mask=in_k, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    blocks = tl.num_programs(0)
    for start in range(0, GROUP, R):
        row = first + start + tl.arange(0, R)
        in_rows = row < rows
        offset = (row // B).to(tl.int64) * tt + (row % B).to(tl.int64) * tb
        inside = in_rows[:, None] & in_k[None, :]
        value = tl.load(teacher + offset[:, None] + k[None, :], mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(value, 0)
        x = tl.where(inside, (value - shift[None, :]) * inv_temp, -float("inf"))
        m = tl.max(x, 1)
        safe = tl.where(m == -float("inf"), 0.0, m)  # a block of -inf only
        e = tl.exp(x - safe[:, None])
        out = partial + block.to(tl.int64) * rows + row
        step = blocks.to(tl.int64) * rows
        tl.store(out, m, mask=in_rows)
        tl.store(out + step, tl.sum(e, 1), mask=in_rows)
        tl.store(out + 2 * step, tl.sum(tl.where(e > 0, e * x, 0.0), 1), mask=in_rows)
    tl.store(column_sums + tl.program_id(1).to(tl.int64) * K + k, total, mask=in_k)


@triton.jit
def _student_forward(
    student,  # [V, B, K], strides sv, sb, 1
    teacher,  # [T, B, K], strides tt, tb, 1
    center,
    teacher_lse,  # float32 [T, B]
    partial,  # float32 [3, stretches, V B], out: maximum m, sum of exp(y - m), sum of target y
    B,
    K,
    sv,
    sb,
    tt,
    tb,
    stretch,  # values of K per program, a multiple of BLOCK
    student_inv_temp,
    teacher_inv_temp,
    warmth,
    WARMTH: tl.constexpr,
    V: tl.constexpr,
    T: tl.constexpr,
    CENTERED: tl.constexpr,
    MATCHING: tl.constexpr,
    ROWS: tl.constexpr,  # V, rounded up to a power of two
    BLOCK: tl.constexpr,
):
    teacher_inv_temp = _inverse(teacher_inv_temp, warmth, WARMTH)
    b = tl.program_id(0).to(tl.int64)
    v = tl.arange(0, ROWS)
    in_v = v < V
    m = tl.full([ROWS], -float("inf"), tl.float32)
    z = tl.zeros([ROWS], tl.float32)
    dot = tl.zeros([ROWS], tl.float32)
    begin = tl.program_id(1) * stretch
    for start in range(begin, tl.minimum(begin + stretch, K), BLOCK):
        k = start + tl.arange(0, BLOCK)
        inside = in_v[:, None] & (k < K)[None, :]
        at = student + v.to(tl.int64)[:, None] * sv + b * sb + k[None, :]
        y = tl.load(at, mask=inside, other=-float("inf")).to(tl.float32) * student_inv_temp
        target = _target(
            teacher, center, teacher_lse, b, v, k, B, K, tt, tb, teacher_inv_temp,
            V, T, CENTERED, MATCHING, ROWS, BLOCK,
        )  # fmt: skip
        dot += tl.sum(tl.where(inside & (target > 0), target * y, 0.0), 1)
        new = tl.maximum(m, tl.max(y, 1))
        safe = tl.where(new == -float("inf"), 0.0, new)
        z = z * tl.exp(m - safe) + tl.sum(tl.exp(y - safe[:, None]), 1)
        m = new
    out = partial + (tl.program_id(1).to(tl.int64) * V + v) * B + b
    step = tl.num_programs(1).to(tl.int64) * V * B
    tl.store(out, m, mask=in_v)
    tl.store(out + step, z, mask=in_v)
    tl.store(out + 2 * step, dot, mask=in_v)


@triton.jit
def _target(
    teacher, center, teacher_lse, b, v, k, B, K, tt, tb, inv_temp,
    V: tl.constexpr, T: tl.constexpr, CENTERED: tl.constexpr, MATCHING: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Per student crop the sum of the teacher's distributions that it is paired with, [ROWS, BLOCK]; 0 outside."""
    in_k = k < K
    shift = tl.zeros([BLOCK], tl.float32)
    if CENTERED:
        shift = tl.load(center + k, mask=in_k, other=0.0).to(tl.float32)
    if MATCHING:
        inside = (v < V)[:, None] & in_k[None, :]
        at = teacher + v.to(tl.int64)[:, None] * tt + b * tb + k[None, :]
        x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        lse = tl.load(teacher_lse + v * B + b, mask=v < V, other=0.0)
        return tl.where(inside, tl.exp((x - shift[None, :]) * inv_temp - lse[:, None]), 0.0)
    target = tl.zeros([ROWS, BLOCK], tl.float32)
    for t in tl.static_range(T):
        x = tl.load(teacher + t * tt + b * tb + k, mask=in_k, other=-float("inf")).to(tl.float32)
        q = tl.exp((x - shift) * inv_temp - tl.load(teacher_lse + t * B + b))
        target += tl.where((v != t)[:, None], q[None, :], 0.0)
    return target


@triton.jit
def _joined(partial, row, parts, rows, WEIGHTED: tl.constexpr, PARTS: tl.constexpr):
    """Log of the sum of all exponentials per row, and the sum of the third sums, or their mean under the softmax."""
    part = tl.arange(0, PARTS)
    inside = (part < parts)[:, None] & (row < rows)[None, :]
    at = partial + part.to(tl.int64)[:, None] * rows + row[None, :]
    step = parts.to(tl.int64) * rows
    m = tl.load(at, mask=inside, other=-float("inf"))
    top = tl.max(m, 0)
    top = tl.where(top == -float("inf"), 0.0, top)
    weight = tl.exp(m - top[None, :])
    z = tl.sum(weight * tl.load(at + step, mask=inside, other=0.0), 0)
    s = tl.load(at + 2 * step, mask=inside, other=0.0)
    s = tl.sum(weight * s, 0) / z if WEIGHTED else tl.sum(s, 0)
    return top + tl.log(z), s


@triton.jit(do_not_specialize=["parts", "rows"])
def _combine(
    partial,  # float32 [3, parts, rows]: the teacher's maximum, sum of exponentials, third sum
    lse,  # float32 [rows], out
    entropies,  # float32 [rows], out
    parts,
    rows,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    level, mean = _joined(partial, row, parts, rows, True, PARTS)
    tl.store(lse + row, level, mask=row < rows)
    tl.store(entropies + row, level - mean, mask=row < rows)


@triton.jit(do_not_specialize=["parts", "groups", "B", "K"])
def _finish(
    partial,  # float32 [3, parts, V B]: the students' maximum, sum of exponentials, sum of target y
    entropies,  # float32 [T B]
    column_sums,  # float32 [groups, K]
    center,  # [K] or nothing
    lse,  # float32 [V B], out
    loss,  # float32 scalars, out; so the next two
    entropy,
    divergence,
    column_sum,  # float32 [K], out
    kept,  # float32 [K], out: the centre
    parts,
    groups,
    B,
    K,
    V: tl.constexpr,
    T: tl.constexpr,
    CENTERED: tl.constexpr,
    MATCHING: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The first program sums over rows, each of the others over the groups of a block of columns."""
    program = tl.program_id(0)
    if program > 0:
        k = (program - 1) * BLOCK + tl.arange(0, BLOCK)
        columns = tl.zeros([BLOCK], tl.float32)
        for group in range(0, groups):
            columns += tl.load(column_sums + group * K + k, mask=k < K, other=0.0)
        tl.store(column_sum + k, columns, mask=k < K)
        if CENTERED:
            tl.store(kept + k, tl.load(center + k, mask=k < K, other=0.0).to(tl.float32), mask=k < K)
        return
    rows = V * B
    total = tl.zeros([ROWS], tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        level, agreement = _joined(partial, row, parts, rows, False, PARTS)
        tl.store(lse + row, level, mask=row < rows)
        paired = 1.0 if MATCHING else tl.where(row < T * B, T - 1, T).to(tl.float32)
        total += tl.where(row < rows, paired * level - agreement, 0.0)
    spread = tl.zeros([ROWS], tl.float32)
    for start in range(0, T * B, ROWS):
        row = start + tl.arange(0, ROWS)
        spread += tl.load(entropies + row, mask=row < T * B, other=0.0)
    pairs = V if MATCHING else T * (V - 1)
    mean_loss = tl.sum(total, 0) / (pairs * B).to(tl.float32)
    mean_entropy = tl.sum(spread, 0) / (T * B).to(tl.float32)
    tl.store(loss, mean_loss)
    tl.store(entropy, mean_entropy)
    tl.store(divergence, mean_loss - mean_entropy)


@triton.jit
def _student_backward(
    student,
    teacher,
    center,
    student_lse,  # float32 [V, B]
    teacher_lse,  # float32 [T, B]
    upstream,  # float32 scalar
    gradient,  # [V, B, K], contiguous, out
    B,
    K,
    sv,
    sb,
    tt,
    tb,
    student_inv_temp,
    teacher_inv_temp,
    scale,  # 1 / (student_temp B pairs)
    warmth,
    WARMTH: tl.constexpr,
    V: tl.constexpr,
    T: tl.constexpr,
    CENTERED: tl.constexpr,
    MATCHING: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    teacher_inv_temp = _inverse(teacher_inv_temp, warmth, WARMTH)
    b = tl.program_id(1).to(tl.int64)
    v = tl.arange(0, ROWS)
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = (v < V)[:, None] & (k < K)[None, :]
    at = student + v.to(tl.int64)[:, None] * sv + b * sb + k[None, :]
    y = tl.load(at, mask=inside, other=-float("inf")).to(tl.float32) * student_inv_temp
    target = _target(
        teacher, center, teacher_lse, b, v, k, B, K, tt, tb, teacher_inv_temp,
        V, T, CENTERED, MATCHING, ROWS, BLOCK,
    )  # fmt: skip
    lse = tl.load(student_lse + v * B + b, mask=v < V, other=0.0)
    paired = tl.full([ROWS], 1, tl.float32) if MATCHING else tl.where(v < T, T - 1, T).to(tl.float32)
    slope = paired[:, None] * tl.exp(y - lse[:, None]) - target
    slope *= scale * tl.load(upstream)
    out = gradient + (v.to(tl.int64)[:, None] * B + b) * K + k[None, :]
    tl.store(out, slope.to(gradient.dtype.element_ty), mask=inside)


def _rows(x: Tensor) -> Tensor:
    """The logits with neighbouring values of K next to each other in memory."""
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()


def _tile(crops: int, classes: int) -> dict[str, int]:
    """Rows and columns that one program holds at once: about 4096 values (not measured yet)."""
    rows = power_of_2(crops)
    block = min(power_of_2(classes), max(64, 4096 // rows))
    return {"ROWS": rows, "BLOCK": block, "num_warps": max(1, min(8, rows * block // 1024))}


def _parts(partial: Tensor) -> dict[str, int]:
    """All parts of about 2048 / parts rows at once."""
    tile = power_of_2(partial.shape[1])
    return {"ROWS": max(1, 2048 // tile), "PARTS": tile}


@op("fastssl::centering_softmax_loss")
def forward(
    student: Tensor,
    teacher: Tensor,
    center: Tensor | None,
    warmth: Tensor | None,
    student_temp: float,
    teacher_temp: float,
    matching: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, column sums [K], mean entropy, mean divergence; for the backward pass the centre as it is now (the method
    moves its own before that; empty without one), and log-sum-exps of the students [V, B] and the teacher [T, B].
    `warmth`, if there, takes the place of `teacher_temp`."""
    student, teacher = _rows(student), _rows(teacher)
    (crops, images, classes), teachers = student.shape, len(teacher)
    rows = teachers * images

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=student.device)

    # Blocks of 512, and groups of at least 32 rows where that leaves enough programs: not measured yet.
    block = min(power_of_2(classes), 512)
    at_once = max(2, block // 64)
    blocks = cdiv(classes, block)
    group = at_once * cdiv(rows, at_once * max(1, min(cdiv(rows, 32), cdiv(FEW, blocks))))
    partial, column_sums = empty(3, blocks, rows), empty(cdiv(rows, group), classes)
    launch(
        _teacher_forward, (blocks, len(column_sums)), teacher, center, partial, column_sums, images, classes, rows,
        *teacher.stride()[:2], 1 / teacher_temp, warmth, WARMTH=warmth is not None, CENTERED=center is not None,
        GROUP=group, R=at_once, BLOCK=block,
    )  # fmt: skip
    teacher_lse, entropies = empty(teachers, images), empty(rows)
    tile = _parts(partial)
    launch(_combine, (cdiv(rows, tile["ROWS"]),), partial, teacher_lse, entropies, blocks, rows, **tile)

    tile = _tile(crops, classes)
    # At least 4 blocks per program: not measured yet.
    stretches = max(1, min(cdiv(classes, 4 * tile["BLOCK"]), cdiv(FEW, images)))
    stretch = tile["BLOCK"] * cdiv(classes, tile["BLOCK"] * stretches)
    partial = empty(3, cdiv(classes, stretch), crops * images)
    launch(
        _student_forward, (images, partial.shape[1]), student, teacher, center, teacher_lse, partial, images, classes,
        *student.stride()[:2], *teacher.stride()[:2], stretch, 1 / student_temp, 1 / teacher_temp,
        warmth, WARMTH=warmth is not None, V=crops, T=teachers, CENTERED=center is not None, MATCHING=matching,
        **EXACT, **tile,
    )  # fmt: skip
    loss, entropy, divergence, column_sum, student_lse = empty(), empty(), empty(), empty(classes), empty(crops, images)
    kept = empty(0 if center is None else classes)
    launch(
        _finish, (1 + cdiv(classes, 512),), partial, entropies, column_sums, center, student_lse, loss, entropy,
        divergence, column_sum, kept, partial.shape[1], len(column_sums), images, classes,
        V=crops, T=teachers, CENTERED=center is not None, MATCHING=matching, BLOCK=512, **EXACT, **_parts(partial),
    )  # fmt: skip
    return loss, column_sum, entropy, divergence, kept, student_lse, teacher_lse


def _pairs(crops: int, teachers: int, matching: bool) -> int:
    return crops if matching else teachers * (crops - 1)


@forward.register_fake
def _(student, teacher, center, *rest):
    def empty(*shape):
        return student.new_empty(shape, dtype=torch.float32)

    lse = empty(*student.shape[:2]), empty(*teacher.shape[:2])
    kept = empty(0 if center is None else student.shape[2])
    return empty(), empty(student.shape[2]), empty(), empty(), kept, *lse


@op("fastssl::centering_softmax_loss_backward")
def backward(
    upstream: Tensor, student: Tensor, teacher: Tensor, warmth: Tensor | None, center: Tensor, student_lse: Tensor,
    teacher_lse: Tensor, student_temp: float, teacher_temp: float, matching: bool,
) -> Tensor:  # fmt: skip
    """Gradient of the student's logits, contiguous. An empty centre: none."""
    student, teacher = _rows(student), _rows(teacher)
    (crops, images, classes), teachers = student.shape, len(teacher)
    gradient = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    tile = _tile(crops, classes)
    scale = 1 / (student_temp * images * _pairs(crops, teachers, matching)) if images else 0.0
    launch(
        _student_backward, (cdiv(classes, tile["BLOCK"]), images), student, teacher, center, student_lse, teacher_lse,
        upstream, gradient, images, classes, *student.stride()[:2], *teacher.stride()[:2],
        1 / student_temp, 1 / teacher_temp, scale, warmth, WARMTH=warmth is not None,
        V=crops, T=teachers, CENTERED=len(center) > 0, MATCHING=matching, **EXACT, **tile,
    )  # fmt: skip
    return gradient


@backward.register_fake
def _(upstream, student, *rest):
    return torch.empty_like(student, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    student, teacher, _, warmth, *ctx.options = inputs
    ctx.save_for_backward(student, teacher, warmth, *output[4:])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx, upstream, *_):
    return backward(upstream, *ctx.saved_tensors, *ctx.options), *[None] * 6


forward.register_autograd(_differentiate, setup_context=_save)
