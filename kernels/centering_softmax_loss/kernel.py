"""Centred-softmax cross-entropy in Triton: student logits are read once forward and once backward, none are copied.

    q_t = softmax((teacher_t - center) / teacher_temp);  y_v = student_v / student_temp
    loss = sum_v [n_v lse(y_v) - <sum of the q_t paired with v, y_v>] / (B pairs)
    d student_v = (n_v softmax(y_v) - sum of the paired q_t) / (student_temp B pairs), times upstream

Four launches forward: the teacher's rows and columns (partial sums over blocks of K), their combination, the students'
rows (partial over stretches of K), their combination; one backward. No atomics, so every run gives the same bits.

Letters: V student crops, T teacher crops, B images, K prototypes, n_v number of teacher crops paired with crop v.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels._launch import EXACT, cdiv, launch, power_of_2

FEW = 1024  # programs that keep the largest cards busy; not measured yet


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
    CENTERED: tl.constexpr,
    GROUP: tl.constexpr,  # rows per program
    R: tl.constexpr,  # rows at once
    BLOCK: tl.constexpr,
):
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
    V: tl.constexpr,
    T: tl.constexpr,
    CENTERED: tl.constexpr,
    MATCHING: tl.constexpr,
    ROWS: tl.constexpr,  # V, rounded up to a power of two
    BLOCK: tl.constexpr,
):
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


@triton.jit(do_not_specialize=["parts", "rows"])
def _combine(
    partial,  # float32 [3, parts, rows]: maximum, sum of exponentials, third sum
    lse,  # float32 [rows], out: log of the sum of all exponentials
    third,  # float32 [rows], out: sum of the third sums, or their mean under the softmax
    parts,
    rows,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
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
    tl.store(lse + row, top + tl.log(z), mask=row < rows)
    tl.store(third + row, s, mask=row < rows)


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
    V: tl.constexpr,
    T: tl.constexpr,
    CENTERED: tl.constexpr,
    MATCHING: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
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


def _combined(partial: Tensor, weighted: bool) -> tuple[Tensor, Tensor]:
    _, parts, rows = partial.shape
    lse, third = torch.empty(2, rows, dtype=torch.float32, device=partial.device).unbind()
    tile = power_of_2(parts)
    block = max(1, 2048 // tile)
    launch(_combine, (cdiv(rows, block),), partial, lse, third, parts, rows, WEIGHTED=weighted, ROWS=block, PARTS=tile)
    return lse, third


@torch.library.custom_op("fastssl::centering_softmax_loss", mutates_args=())
def forward(
    student: Tensor, teacher: Tensor, center: Tensor | None, student_temp: float, teacher_temp: float, matching: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, column sums [K], mean entropy; saved for the backward pass: log-sum-exp of the students [V, B] and of the
    teacher [T, B]."""
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
        *teacher.stride()[:2], 1 / teacher_temp, CENTERED=center is not None, GROUP=group, R=at_once, BLOCK=block,
    )  # fmt: skip
    teacher_lse, mean_logit = _combined(partial, weighted=True)

    tile = _tile(crops, classes)
    # At least 4 blocks per program: not measured yet.
    stretches = max(1, min(cdiv(classes, 4 * tile["BLOCK"]), cdiv(FEW, images)))
    stretch = tile["BLOCK"] * cdiv(classes, tile["BLOCK"] * stretches)
    partial = empty(3, cdiv(classes, stretch), crops * images)
    launch(
        _student_forward, (images, partial.shape[1]), student, teacher, center, teacher_lse, partial, images, classes,
        *student.stride()[:2], *teacher.stride()[:2], stretch, 1 / student_temp, 1 / teacher_temp,
        V=crops, T=teachers, CENTERED=center is not None, MATCHING=matching, **EXACT, **tile,
    )  # fmt: skip
    student_lse, agreement = _combined(partial, weighted=False)

    number = _pairs(crops, teachers, matching) * images
    student_lse = student_lse.view(crops, images)
    if matching:
        paired = student_lse.sum()
    else:
        paired = teachers * student_lse.sum() - student_lse[:teachers].sum()
    loss = (paired - agreement.sum()) / number
    entropy = (teacher_lse - mean_logit).mean()
    return loss, column_sums.sum(0), entropy, student_lse, teacher_lse.view(teachers, images)


def _pairs(crops: int, teachers: int, matching: bool) -> int:
    return crops if matching else teachers * (crops - 1)


@forward.register_fake
def _(student, teacher, center, student_temp, teacher_temp, matching):
    def empty(*shape):
        return student.new_empty(shape, dtype=torch.float32)

    return empty(), empty(student.shape[2]), empty(), empty(*student.shape[:2]), empty(*teacher.shape[:2])


@torch.library.custom_op("fastssl::centering_softmax_loss_backward", mutates_args=())
def backward(
    upstream: Tensor, student: Tensor, teacher: Tensor, center: Tensor | None, student_lse: Tensor,
    teacher_lse: Tensor, student_temp: float, teacher_temp: float, matching: bool,
) -> Tensor:  # fmt: skip
    """Gradient of the student's logits, contiguous."""
    student, teacher = _rows(student), _rows(teacher)
    (crops, images, classes), teachers = student.shape, len(teacher)
    gradient = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    tile = _tile(crops, classes)
    scale = 1 / (student_temp * images * _pairs(crops, teachers, matching)) if images else 0.0
    launch(
        _student_backward, (cdiv(classes, tile["BLOCK"]), images), student, teacher, center, student_lse, teacher_lse,
        upstream, gradient, images, classes, *student.stride()[:2], *teacher.stride()[:2],
        1 / student_temp, 1 / teacher_temp, scale,
        V=crops, T=teachers, CENTERED=center is not None, MATCHING=matching, **EXACT, **tile,
    )  # fmt: skip
    return gradient


@backward.register_fake
def _(upstream, student, *rest):
    return torch.empty_like(student, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    student, teacher, center, *ctx.options = inputs
    center = None if center is None else center.clone()  # the method moves its centre before the backward pass
    ctx.save_for_backward(student, teacher, center, *output[3:])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx, upstream, *_):
    return backward(upstream, *ctx.saved_tensors, *ctx.options), *[None] * 5


forward.register_autograd(_differentiate, setup_context=_save)
