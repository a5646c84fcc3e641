"""The teacher's moving average over all parameters in one launch, alone or inside the step of AdamW or SGD."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.kernels._check import FLOATS, check
from fastssl.kernels._path import use_triton
from fastssl.kernels.ema_update import reference
from fastssl.kernels.ema_update.lists import ADAMW, NAME, SGD, check_adamw, check_array, check_ema, check_sgd


@torch.no_grad()
def ema_update(
    teacher: list[Tensor], student: list[Tensor], momentum: float | Tensor, copies: list[Tensor] | None = None
) -> None:
    """teacher <- momentum x teacher + (1 - momentum) x student, in place (Tarvainen and Valpola 2017, section 2).

        for t, s, c in zip(teacher, student, copies):
            x = lerp(t, s, 1 - momentum)  # in float32, by torch.lerp's formula: momentum 1 leaves t, momentum 0 gives s
            t = x, rounded to t's type
            c = x, rounded to c's type

    A bfloat16 teacher stands still at usual momenta (a step of 0.4 % of the difference is below half its spacing): keep
    the teacher in float32 and pass bfloat16 copies.

    torch.compile takes the call into its graph, but compiles anew for every new number: give a tensor there.

    Args:
        teacher: parameters of any shapes; float32, bfloat16, float16 or float64, item by item. Items of one index that
            are dense with equal strides (channels_last, say) are updated in the one launch, others each by its own.
        student: likewise, with the teacher's shapes.
        momentum: in [0, 1]; or a scalar tensor on the device (best float64: 1 - momentum is small), whose value is not
            checked.
        copies: working copies of the teacher, likewise; they are only written.

    Raises:
        KernelError: lengths, shapes, types or devices that do not fit.
    """
    if isinstance(momentum, Tensor):
        check_array(NAME, "momentum", momentum, teacher, FLOATS, ())
    else:
        check(0 <= momentum <= 1, NAME, "momentum", "in [0, 1]", momentum)
    if teacher and isinstance(teacher[0], Tensor) and use_triton(NAME, teacher[0]):
        from fastssl.kernels.ema_update import kernel

        run = kernel.ema_update if torch.compiler.is_compiling() else kernel.ema_update_eager
        run(teacher, student, copies or [], momentum)
        return
    check_ema(teacher, student, copies or [])
    reference.ema_update(teacher, student, momentum, copies)


def adamw_numbers(
    step: int, lr: float, weight_decay: float, betas: tuple[float, float], momentum: float = 1.0
) -> list[float]:
    """What of a step's numbers `adamw_ema` takes, to be written into a tensor on the device.

    Args:
        step: number of the step, from 1.
        lr: learning rate.
        weight_decay: decoupled from the gradient, times lr.
        betas: decay of the first and of the second moment, in [0, 1).
        momentum: of the teacher, in [0, 1].

    Returns:
        lr / (1 - beta1^step), lr x weight_decay, 1 / sqrt(1 - beta2^step), 1 - momentum.

    Raises:
        KernelError: a number outside its range.
    """
    check(step >= 1, ADAMW, "step", "at least 1", step)
    check(0 <= momentum <= 1, ADAMW, "momentum", "in [0, 1]", momentum)
    check(all(0 <= beta < 1 for beta in betas), ADAMW, "betas", "in [0, 1)", betas)
    return [lr / (1 - betas[0] ** step), lr * weight_decay, (1 - betas[1] ** step) ** -0.5, 1 - momentum]


@torch.no_grad()
def adamw_ema(
    params: list[Tensor],
    grads: list[Tensor | None],
    exp_avgs: list[Tensor | None],
    exp_avg_sqs: list[Tensor | None],
    numbers: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    scales: Tensor | None = None,
    teacher: list[Tensor | None] | None = None,
    copies: list[Tensor | None] | None = None,
    teacher_copies: list[Tensor | None] | None = None,
    grad_scale: Tensor | None = None,
) -> None:
    """AdamW's step (Loshchilov and Hutter 2019, algorithm 2, as torch.optim.AdamW) and the teacher's EMA, in place.

        rate, shrink, root, weight = numbers  # see `adamw_numbers`
        for p, g, m, v, t, (a, b) in zip(params, grads, exp_avgs, exp_avg_sqs, teacher, scales):
            if g is not None and grad_scale != 0:
                g = grad_scale x g
                m = lerp(m, g, 1 - beta1);  v = beta2 x v + (1 - beta2) x g^2
                p = p - b x shrink x p
                p = p - a x rate x m / (sqrt(v) x root + eps)
            t = lerp(t, p, weight)  # as ema_update
        copies = params and teacher_copies = teacher, rounded

    All in one launch and one pass: every tensor is read once and written once. Everything that changes from step to
    step lies on the device, so a CUDA graph can hold the call. Strides and torch.compile as for `ema_update`.

    Args:
        params: float32 (or float64), any shapes.
        grads: float32, bfloat16 or float16. None: this parameter and its moments stay (its teacher moves).
        exp_avgs: m, first moments, of the parameters' type. May be None where the gradient is.
        exp_avg_sqs: v, second moments, likewise.
        numbers: float64 [4] on the device, `adamw_numbers` of the step.
        betas: decay of the first and of the second moment, in [0, 1).
        eps: added to the denominator.
        scales: [parameters, 2], what `rate` and `shrink` are multiplied by for each parameter. None: 1.
        teacher: as for `ema_update`; an item may be None. None: AdamW alone.
        copies: working copies of the parameters, only written; an item may be None.
        teacher_copies: working copies of the teacher, only written; an item may be None (and is where the teacher is).
        grad_scale: what multiplies the gradients (clipping, 1 / loss scale), on the device: one scalar, or one per
            parameter. The gradients themselves stay. 0: as if there were no gradient, whatever it holds. None: 1.

    Raises:
        KernelError: lengths, shapes, types or devices that do not fit.
    """
    check(all(0 <= beta < 1 for beta in betas), ADAMW, "betas", "in [0, 1)", betas)
    check(eps >= 0, ADAMW, "eps", "at least 0", eps)
    count = len(params)
    check_array(ADAMW, "numbers", numbers, params, (torch.float64,), (4,))
    if scales is not None:
        check_array(ADAMW, "scales", scales, params, FLOATS, (count, 2))
    if grad_scale is not None:
        check_array(ADAMW, "grad_scale", grad_scale, params, FLOATS, (), (count,))
    lists = (params, grads, exp_avgs, exp_avg_sqs, teacher or [], copies or [], teacher_copies or [])
    if params and isinstance(params[0], Tensor) and use_triton(ADAMW, params[0]):
        from fastssl.kernels.ema_update import kernel

        run = kernel.adamw_ema if torch.compiler.is_compiling() else kernel.adamw_ema_eager
        run(lists, numbers, scales, grad_scale, *betas, eps)
        return
    check_adamw(*lists)
    reference.adamw_ema(
        params, grads, exp_avgs, exp_avg_sqs, numbers, betas=betas, eps=eps, scales=scales, teacher=teacher,
        copies=copies, teacher_copies=teacher_copies, grad_scale=grad_scale,
    )  # fmt: skip


def sgd_numbers(lr: float, weight_decay: float, momentum: float, teacher: float = 1.0) -> list[float]:
    """What of a step's numbers `sgd_ema` takes, to be written into a tensor on the device.

    Args:
        lr: learning rate.
        weight_decay: times the parameter, added to the gradient.
        momentum: decay of the moving sum, in [0, 1).
        teacher: momentum of the teacher, in [0, 1].

    Raises:
        KernelError: a number outside its range.
    """
    check(0 <= momentum < 1, SGD, "momentum", "in [0, 1)", momentum)
    check(0 <= teacher <= 1, SGD, "teacher", "in [0, 1]", teacher)
    return [lr, weight_decay, momentum, 1 - teacher]


@torch.no_grad()
def sgd_ema(
    params: list[Tensor],
    grads: list[Tensor | None],
    sums: list[Tensor | None],
    numbers: Tensor,
    *,
    scales: Tensor | None = None,
    teacher: list[Tensor | None] | None = None,
    copies: list[Tensor | None] | None = None,
    teacher_copies: list[Tensor | None] | None = None,
    grad_scale: Tensor | None = None,
) -> None:
    """A step of SGD with momentum (as torch.optim.SGD without dampening) and the teacher's EMA, in place.

        rate, decay, momentum, weight = numbers  # see `sgd_numbers`
        for p, g, m, t, (a, b) in zip(params, grads, sums, teacher, scales):
            if g is not None and grad_scale != 0:
                m = momentum x m + (grad_scale x g + b x decay x p)
                p = p - a x rate x m
            t = lerp(t, p, weight)
        copies = params and teacher_copies = teacher, rounded

    All in one launch and one pass, as `adamw_ema`; torch.compile does not take it.

    Args:
        sums: m, moving sums of the gradients, from 0; of the parameters' type. May be None where the gradient is.
        numbers: float64 [4] on the device, `sgd_numbers` of the step.
        params, grads, scales, teacher, copies, teacher_copies, grad_scale: as for `adamw_ema`.

    Raises:
        KernelError: lengths, shapes, types or devices that do not fit.
    """
    count = len(params)
    check_array(SGD, "numbers", numbers, params, (torch.float64,), (4,))
    if scales is not None:
        check_array(SGD, "scales", scales, params, FLOATS, (count, 2))
    if grad_scale is not None:
        check_array(SGD, "grad_scale", grad_scale, params, FLOATS, (), (count,))
    lists = (params, grads, sums, (), teacher or [], copies or [], teacher_copies or [])
    if params and isinstance(params[0], Tensor) and use_triton(SGD, params[0]):
        from fastssl.kernels.ema_update import kernel

        kernel.sgd_ema_eager(lists, numbers, scales, grad_scale)
        return
    check_sgd(*lists)
    reference.sgd_ema(
        params, grads, sums, numbers, scales=scales, teacher=teacher, copies=copies, teacher_copies=teacher_copies,
        grad_scale=grad_scale,
    )  # fmt: skip
