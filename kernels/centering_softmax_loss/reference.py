"""Centred-softmax cross-entropy in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def centering_softmax_loss(
    student: Tensor, teacher: Tensor, center: Tensor | None, student_temp: float,
    teacher_temp: float | Tensor, pairs: str = "others",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """See `fastssl.kernels.centering_softmax_loss.centering_softmax_loss`: loss, column sums, entropy, divergence."""
    crops, teachers = len(student), len(teacher)
    with torch.no_grad():
        exact = teacher.to(torch.promote_types(teacher.dtype, torch.float32))
        column_sum = exact.sum((0, 1))
        log_q = F.log_softmax((exact if center is None else exact - center) / teacher_temp, dim=-1)
        q = log_q.exp()
        # Where log q is -inf (a logit of -inf), q log q is 0.
        entropy = -torch.where(q > 0, q * log_q, 0).sum(-1).mean()
        everything = q.sum(0) if pairs == "others" else None  # [B, K]
    total = column_sum.new_zeros(())
    for v in range(crops):  # cross-entropy is linear in q: each crop is compared once, with the sum of its targets
        if everything is None:
            target = q[v]
        else:
            target = everything - q[v] if v < teachers else everything
        logits = student[v].to(torch.promote_types(student.dtype, torch.float32)) / student_temp
        total = total - (target * F.log_softmax(logits, dim=-1)).sum(-1).mean()
    loss = total / (teachers * crops - teachers if pairs == "others" else crops)
    return loss, column_sum, entropy, loss.detach() - entropy
