"""Cross-entropy between a teacher's centred, sharpened softmax and the student's, over pairs of crops."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastssl.kernels._check import Shapes, check, once
from fastssl.kernels._path import use_triton
from fastssl.kernels.centering_softmax_loss import reference

NAME = "centering_softmax_loss"


class CenteringSoftmaxLoss(NamedTuple):
    """What one pass over the logits gives.

    Attributes:
        loss: scalar; the only part with a gradient.
        column_sum: [K], the sum of the teacher's rows, for the update of the centre.
        entropy: scalar, mean entropy of the teacher's distributions, nats.
        divergence: scalar, mean KL divergence from a teacher's distribution to its student's, nats.
    """

    loss: Tensor
    column_sum: Tensor
    entropy: Tensor
    divergence: Tensor


def centering_softmax_loss(
    student: Tensor,
    teacher: Tensor,
    center: Tensor | None,
    student_temp: float,
    teacher_temp: float | Tensor,
    *,
    pairs: str = "others",
) -> CenteringSoftmaxLoss:
    """The loss of DINO (Caron et al. 2021, eq. 3 with the centre of eq. 4) and of SCFS (Song et al. 2023).

        for t in range(T):
            q = softmax((teacher[t] - center) / teacher_temp)
            for v in range(V):
                if v != t:  # "others"; with "matching": if v == t
                    total += mean over images of -sum(q * log_softmax(student[v] / student_temp))
        loss = total / number of pairs

    Cross-entropy is linear in q, so the kernel reads each student logit once (and once more backward) and compares it
    with the sum of its targets; no [.., K] array is made but the gradient. Each teacher logit is read twice forward,
    once backward. The result is the same, bit for bit, at every run.

    Args:
        student: logits [V, B, K], float32, float16 or bfloat16.
        teacher: logits [T, B, K]; no gradient flows to them.
        center: [K], subtracted from the teacher's logits. None: nothing is.
        student_temp, teacher_temp: softmax temperatures, positive. The teacher's may be a scalar on the device, whose
            value is not checked.
        pairs: "others": every student crop with every teacher crop but itself; the first T student crops are the
            teacher's (DINO with V > T; cross-view only with V = T). "matching": crop by crop, V = T.

    Returns:
        All float32 (float64 for float64 logits).

    Raises:
        KernelError: a shape, type or number that does not fit.
    """
    _check(student, teacher, center, student_temp, teacher_temp, pairs)
    if use_triton(NAME, student) and torch.float64 not in (student.dtype, teacher.dtype):
        from fastssl.kernels.centering_softmax_loss import kernel

        teacher = teacher.detach() if teacher.requires_grad else teacher
        warmth, temp = (teacher_temp, 1.0) if isinstance(teacher_temp, Tensor) else (None, teacher_temp)
        outputs = kernel.forward(student, teacher, center, warmth, student_temp, temp, pairs == "matching")
        return CenteringSoftmaxLoss(*outputs[:4])
    return CenteringSoftmaxLoss(
        *reference.centering_softmax_loss(student, teacher, center, student_temp, teacher_temp, pairs)
    )


@once
def _check(
    student: Tensor, teacher: Tensor, center: Tensor | None, student_temp: float, teacher_temp: float | Tensor,
    pairs: str,
) -> None:  # fmt: skip
    shapes = Shapes(NAME)
    crops, images, classes = shapes("student", student, "V B K")
    teachers, _, _ = shapes("teacher", teacher, "T B K")
    if center is not None:
        shapes("center", center, "K")
    if isinstance(teacher_temp, Tensor):
        shapes("teacher_temp", teacher_temp, "")
    else:
        check(teacher_temp > 0, NAME, "teacher_temp", "positive", teacher_temp)
    check(student_temp > 0, NAME, "student_temp", "positive", student_temp)
    check(pairs in ("others", "matching"), NAME, "pairs", "'others' or 'matching'", repr(pairs))
    check(images > 0 and classes > 0, NAME, "student", "[V, B, K] with B and K at least 1", list(student.shape))
    if pairs == "matching":
        check(crops == teachers > 0, NAME, "teacher", f"as many crops as the student's {crops}", teachers)
    else:
        check(1 <= teachers <= crops > 1, NAME, "student", f"2 crops or more, at least the teacher's {teachers}", crops)
