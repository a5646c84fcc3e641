"""The teacher: an exponential moving average of the student's parameters."""

from __future__ import annotations

from torch import nn

from fastssl.kernels import ema_update as op


def ema_update(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher <- momentum x teacher + (1 - momentum) x student, over parameters (buffers stay each module's own).

    One launch on a GPU (`fastssl.kernels.ema_update`).

    Args:
        teacher, student: modules with the same parameters in the same order.
        momentum: 0 copies the student, 1 leaves the teacher as it is.
    """
    op.ema_update(list(teacher.parameters()), list(student.parameters()), momentum)
