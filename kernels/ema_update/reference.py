"""EMA and AdamW with EMA in plain PyTorch, tensor by tensor."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from fastssl.kernels.ema_update.lists import Items


@torch.no_grad()
def ema_update(
    teacher: list[Tensor], student: list[Tensor], momentum: float | Tensor, copies: list[Tensor] | None = None
) -> None:
    """See `fastssl.kernels.ema_update.ema_update`."""
    weight = 1 - (momentum.double() if isinstance(momentum, Tensor) else momentum)
    for i, (t, s) in enumerate(zip(teacher, student, strict=True)):
        _average(t, s, weight, copies[i] if copies else None)


@torch.no_grad()
def adamw_ema(
    params: list[Tensor], grads: Items, exp_avgs: Items, exp_avg_sqs: Items, numbers: Tensor, *,
    betas: tuple[float, float], eps: float, scales: Tensor | None = None, teacher: Items | None = None,
    copies: Items | None = None, teacher_copies: Items | None = None, grad_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """See `fastssl.kernels.ema_update.adamw_ema`."""
    beta1, beta2 = betas
    rate, shrink, root, weight = numbers.unbind()
    for i, (p, g, m, v) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        if g is not None:
            assert m is not None  # see check_adamw
            assert v is not None
            of_rate, of_shrink = (1.0, 1.0) if scales is None else scales[i].unbind()
            before = None
            g = g.to(p.dtype)
            if grad_scale is not None:
                factor = grad_scale[i] if grad_scale.ndim else grad_scale
                g, before = g * factor.to(p.dtype), [x.clone() for x in (p, m, v)]
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            p.sub_(p * (shrink * of_shrink))  # not p x (1 - ..): that factor has few digits left in float32
            p.sub_(m / (v.sqrt().mul_(root).add_(eps)) * (rate * of_rate))
            if before is not None:
                for x, old in zip((p, m, v), before, strict=True):
                    x.copy_(torch.where(factor == 0, old, x))
        copy, t = (items[i] if items else None for items in (copies, teacher))
        if copy is not None:
            copy.copy_(p)
        if t is not None:
            _average(t, p, weight, teacher_copies[i] if teacher_copies else None)


@torch.no_grad()
def sgd_ema(
    params: list[Tensor], grads: Items, sums: Items, numbers: Tensor, *, scales: Tensor | None = None,
    teacher: Items | None = None, copies: Items | None = None, teacher_copies: Items | None = None,
    grad_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """See `fastssl.kernels.ema_update.sgd_ema`."""
    rate, decay, momentum, weight = numbers.unbind()
    for i, (p, g, m) in enumerate(zip(params, grads, sums, strict=True)):
        factor = None if grad_scale is None else grad_scale[i] if grad_scale.ndim else grad_scale
        if g is not None:
            assert m is not None  # see check_sgd
            of_rate, of_decay = (1.0, 1.0) if scales is None else scales[i].unbind()
            g = g.to(p.dtype) if factor is None else g.to(p.dtype) * factor.to(p.dtype)
            new = m * momentum + (g + p * (decay * of_decay))
            moved = p - new * (rate * of_rate)
            for x, value in ((m, new), (p, moved)):
                x.copy_(value if factor is None else torch.where(factor == 0, x, value))
        copy, t = (items[i] if items else None for items in (copies, teacher))
        if copy is not None:
            copy.copy_(p)
        if t is not None:
            _average(t, p, weight, teacher_copies[i] if teacher_copies else None)


def _average(teacher: Tensor, student: Tensor, weight: float | Tensor, copy: Tensor | None) -> None:
    exact = reduce(torch.promote_types, (teacher.dtype, student.dtype), torch.float32)
    if isinstance(weight, Tensor):
        weight = weight.to(exact)
    average = torch.lerp(teacher.to(exact), student.to(exact), weight)
    teacher.copy_(average)
    if copy is not None:
        copy.copy_(average)
