"""The teacher's moving average over all parameters in one launch, alone or inside the AdamW step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastssl.kernels._check import KernelError, check
from fastssl.kernels._path import use_triton
from fastssl.kernels.ema_update import reference
from fastssl.kernels.ema_update.lists import ADAMW, NAME, check_adamw, check_ema, kind


@torch.no_grad()
def ema_update(
    teacher: list[Tensor], student: list[Tensor], momentum: float, copies: list[Tensor] | None = None
) -> None:
    """teacher <- momentum x teacher + (1 - momentum) x student, in place (Tarvainen and Valpola 2017, section 2).

        for t, s, c in zip(teacher, student, copies):
            x = lerp(t, s, 1 - momentum)  # in float32, by torch.lerp's formula: momentum 1 leaves t, momentum 0 gives s
            t = x, rounded to t's type
            c = x, rounded to c's type

    A bfloat16 teacher stands still at usual momenta (a step of 0.4 % of the difference is below half its spacing): keep
    the teacher in float32 and pass bfloat16 copies.

    torch.compile takes the call into its graph, but compiles anew for every new momentum: leave it outside.

    Args:
        teacher: parameters of any shapes; float32, bfloat16, float16 or float64, item by item. Items of one index that
            are dense with equal strides (channels_last, say) are updated in the one launch, others each by its own.
        student: likewise, with the teacher's shapes.
        momentum: in [0, 1].
        copies: working copies of the teacher, likewise; they are only written.

    Raises:
        KernelError: lengths, shapes, types or devices that do not fit.
    """
    check(0 <= momentum <= 1, NAME, "momentum", "in [0, 1]", momentum)
    if teacher and isinstance(teacher[0], Tensor) and use_triton(NAME, teacher[0]):
        from fastssl.kernels.ema_update import kernel

        run = kernel.ema_update if torch.compiler.is_compiling() else kernel.ema_update_eager
        run(teacher, student, copies or [], momentum)
        return
    check_ema(teacher, student, copies or [])
    reference.ema_update(teacher, student, momentum, copies)


@torch.no_grad()
def adamw_ema(
    params: list[Tensor],
    grads: list[Tensor | None],
    exp_avgs: list[Tensor | None],
    exp_avg_sqs: list[Tensor | None],
    step: int,
    *,
    lr: float | Sequence[float],
    betas: tuple[float, float],
    eps: float,
    weight_decay: float | Sequence[float],
    teacher: list[Tensor | None] | None = None,
    momentum: float = 1.0,
    copies: list[Tensor | None] | None = None,
    teacher_copies: list[Tensor | None] | None = None,
    grad_scale: Tensor | None = None,
) -> None:
    """AdamW's step (Loshchilov and Hutter 2019, algorithm 2, as torch.optim.AdamW) and the teacher's EMA, in place.

        for p, g, m, v, t in zip(params, grads, exp_avgs, exp_avg_sqs, teacher):
            if g is not None:
                g = grad_scale x g
                m = lerp(m, g, 1 - beta1);  v = beta2 x v + (1 - beta2) x g^2
                p = p - lr x weight_decay x p
                p = p - lr / (1 - beta1^step) x m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
            t = lerp(t, p, 1 - momentum)  # as ema_update
        copies = params and teacher_copies = teacher, rounded

    All in one launch and one pass: every tensor is read once and written once. Strides and torch.compile as for
    `ema_update`.

    Args:
        params: float32 (or float64), any shapes.
        grads: float32, bfloat16 or float16. None: this parameter and its moments stay (its teacher moves).
        exp_avgs: m, first moments, of the parameters' type. May be None where the gradient is.
        exp_avg_sqs: v, second moments, likewise.
        step: number of this step, from 1.
        lr: learning rate, one for all or one per parameter. Values may change at every step.
        betas: decay of the first and of the second moment, in [0, 1).
        eps: added to the denominator.
        weight_decay: likewise one for all or one per parameter.
        teacher: as for `ema_update`; an item may be None. None: AdamW alone.
        momentum: of the teacher, in [0, 1].
        copies: working copies of the parameters, only written; an item may be None.
        teacher_copies: working copies of the teacher, only written; an item may be None (and is where the teacher is).
        grad_scale: scalar on the device that multiplies the gradients (a clipping coefficient, 1 / loss scale); the
            gradients themselves stay. None: 1.

    Raises:
        KernelError: lengths, shapes, types or devices that do not fit.
    """
    check(step >= 1, ADAMW, "step", "at least 1", step)
    check(0 <= momentum <= 1, ADAMW, "momentum", "in [0, 1]", momentum)
    check(all(0 <= beta < 1 for beta in betas), ADAMW, "betas", "in [0, 1)", betas)
    check(eps >= 0, ADAMW, "eps", "at least 0", eps)
    lrs = [lr] if isinstance(lr, (int, float)) else list(lr)
    decays = [weight_decay] if isinstance(weight_decay, (int, float)) else list(weight_decay)
    for name, values in (("lr", lrs), ("weight_decay", decays)):
        check(
            len(values) in (1, len(params)), ADAMW, name, f"a number or {len(params)} numbers", f"{len(values)} numbers"
        )
    if grad_scale is not None:
        fits = isinstance(grad_scale, Tensor) and grad_scale.ndim == 0 and grad_scale.is_floating_point()
        check(fits, ADAMW, "grad_scale", "a floating-point scalar tensor", kind(grad_scale))
        device = params[0].device if params and isinstance(params[0], Tensor) else grad_scale.device
        if grad_scale.device != device:
            raise KernelError(f"{ADAMW}: grad_scale is on {grad_scale.device}, the other arguments on {device}")
    lists = (params, grads, exp_avgs, exp_avg_sqs, teacher or [], copies or [], teacher_copies or [])
    if params and isinstance(params[0], Tensor) and use_triton(ADAMW, params[0]):
        from fastssl.kernels.ema_update import kernel

        run = kernel.adamw_ema if torch.compiler.is_compiling() else kernel.adamw_ema_eager
        run(lists, grad_scale, lrs, decays, step, *betas, eps, momentum)
        return
    check_adamw(*lists)
    reference.adamw_ema(
        params, grads, exp_avgs, exp_avg_sqs, step, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
        teacher=teacher, momentum=momentum, copies=copies, teacher_copies=teacher_copies, grad_scale=grad_scale,
    )  # fmt: skip
