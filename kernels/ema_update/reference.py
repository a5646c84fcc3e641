"""EMA and AdamW with EMA in plain PyTorch, tensor by tensor."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from fastssl.kernels.ema_update.lists import Items


@torch.no_grad()
def ema_update(
    teacher: list[Tensor], student: list[Tensor], momentum: float, copies: list[Tensor] | None = None
) -> None:
    """See `fastssl.kernels.ema_update.ema_update`."""
    for i, (t, s) in enumerate(zip(teacher, student, strict=True)):
        _average(t, s, momentum, copies[i] if copies else None)


@torch.no_grad()
def adamw_ema(
    params: list[Tensor], grads: Items, exp_avgs: Items, exp_avg_sqs: Items, step: int, *,
    lr: float | Sequence[float], betas: tuple[float, float], eps: float, weight_decay: float | Sequence[float],
    teacher: Items | None = None, momentum: float = 1.0, copies: Items | None = None,
    teacher_copies: Items | None = None, grad_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """See `fastssl.kernels.ema_update.adamw_ema`."""
    beta1, beta2 = betas
    root = (1 - beta2**step) ** 0.5
    for i, (p, g, m, v) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        if g is not None:
            rate, decay = _of(lr, i, len(params)), _of(weight_decay, i, len(params))
            g = g.to(p.dtype)
            if grad_scale is not None:
                g = g * grad_scale.to(p.dtype)
            assert m is not None  # see check_adamw
            assert v is not None
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            p.sub_(p, alpha=rate * decay)  # not p x (1 - ..): that factor has few digits left in float32
            p.addcdiv_(m, v.sqrt().div_(root).add_(eps), value=-rate / (1 - beta1**step))
        copy, t = (items[i] if items else None for items in (copies, teacher))
        if copy is not None:
            copy.copy_(p)
        if t is not None:
            _average(t, p, momentum, teacher_copies[i] if teacher_copies else None)


def _average(teacher: Tensor, student: Tensor, momentum: float, copy: Tensor | None) -> None:
    exact = reduce(torch.promote_types, (teacher.dtype, student.dtype), torch.float32)
    average = torch.lerp(teacher.to(exact), student.to(exact), 1 - momentum)
    teacher.copy_(average)
    if copy is not None:
        copy.copy_(average)


def _of(values: float | Sequence[float], i: int, n: int) -> float:
    if isinstance(values, (int, float)):
        return values
    return values[i] if len(values) == n else values[0]
