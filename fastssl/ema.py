"""The teacher: an exponential moving average of the student's parameters."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def ema_update(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum x teacher + (1 - momentum) x student, over parameters (buffers stay each module's own).

    Args:
        teacher, student: modules with the same parameters in the same order.
        momentum: 0 copies the student, 1 leaves the teacher as it is.
    """
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1.0 - momentum)
