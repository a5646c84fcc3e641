"""What the lists of tensors that the ops take must have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastssl.kernels._check import FLOATS, KernelError, check

NAME = "ema_update"
ADAMW = "adamw_ema"
SGD = "sgd_ema"
Items = Sequence[Tensor | None]
Lists = dict[str, Sequence[Any]]  # by the argument's name


def check_ema(teacher: Items, student: Items, copies: Items) -> None:
    """Raises KernelError where the lists do not fit together; [] stands for no copies."""
    lists: Lists = {"teacher": teacher, "student": student}
    _check_lists(NAME, lists | ({"copies": copies} if copies else {}))


def check_adamw(
    params: Sequence[Tensor], grads: Items, exp_avgs: Items, exp_avg_sqs: Items, teacher: Items, copies: Items,
    teacher_copies: Items,
) -> None:  # fmt: skip
    """Likewise; [] stands for no teacher and no copies."""
    _check_step(ADAMW, params, grads, {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}, teacher, copies,
                teacher_copies)  # fmt: skip


def check_sgd(
    params: Sequence[Tensor], grads: Items, sums: Items, _: Items, teacher: Items, copies: Items,
    teacher_copies: Items,
) -> None:  # fmt: skip
    """Likewise."""
    _check_step(SGD, params, grads, {"sums": sums}, teacher, copies, teacher_copies)


def _check_step(
    op: str, params: Sequence[Tensor], grads: Items, state: dict[str, Items], teacher: Items, copies: Items,
    teacher_copies: Items,
) -> None:  # fmt: skip
    lists: Lists = {"params": params, "grads": grads, **state}
    extra = {"teacher": teacher, "copies": copies, "teacher_copies": teacher_copies}
    _check_lists(op, lists | {name: items for name, items in extra.items() if items}, tuple(lists | extra)[1:])
    check(bool(teacher) or not teacher_copies, op, "teacher_copies", "None without a teacher", "a list")
    for i, (param, grad) in enumerate(zip(params, grads, strict=True)):
        exact = param.dtype in (torch.float32, torch.float64)
        check(exact, op, f"params[{i}]", "float32 or float64", name_of(param.dtype))
        for name in state:
            moment = lists[name][i]
            check(grad is None or moment is not None, op, f"{name}[{i}]", "a tensor where a gradient is", None)
            same = moment is None or moment.dtype == param.dtype
            check(same, op, f"{name}[{i}]", f"{name_of(param.dtype)} as params[{i}]", kind(moment))
        if teacher_copies and teacher_copies[i] is not None:
            check(teacher[i] is not None, op, f"teacher_copies[{i}]", f"None as teacher[{i}]", "a tensor")


def _check_lists(op: str, lists: Lists, may_miss: tuple[str, ...] = ()) -> None:
    """Item i of every list must be a tensor like item i of the first (or None in the lists that `may_miss` names)."""
    (first, leaders), *_ = lists.items()
    for name, items in lists.items():
        check(len(items) == len(leaders), op, name, f"a list of {len(leaders)} as {first}", f"a list of {len(items)}")
        for i, (item, leader) in enumerate(zip(items, leaders, strict=True)):
            if item is None and name in may_miss:
                continue
            here = f"{name}[{i}]"
            check(isinstance(item, Tensor), op, here, "a tensor", type(item).__name__)
            if item.dtype not in FLOATS:
                check(False, op, here, "float32 or float16 or bfloat16 or float64", name_of(item.dtype))
            if item.shape != leader.shape:
                check(False, op, here, f"{list(leader.shape)} as {first}[{i}]", list(item.shape))
            if item.device != leaders[0].device:
                raise KernelError(f"{op}: {here} is on {item.device}, {first}[0] on {leaders[0].device}")


def check_array(
    op: str, name: str, value: object, like: Sequence[object], dtypes: tuple[torch.dtype, ...], *shapes: tuple[int, ...]
) -> None:
    """Raises KernelError unless `value` is a contiguous tensor of one of the shapes, on the device of the first of the
    tensors `like`."""
    sizes = " or ".join(f"[{', '.join(map(str, shape))}]" if shape else "a scalar" for shape in shapes)
    kinds = " or ".join(map(name_of, dtypes)) if len(dtypes) < 3 else "floating-point"
    fits = isinstance(value, Tensor) and value.shape in shapes and value.dtype in dtypes and value.is_contiguous()
    check(fits, op, name, f"{sizes}, {kinds}, contiguous", kind(value))
    if like and isinstance(like[0], Tensor) and isinstance(value, Tensor) and value.device != like[0].device:
        raise KernelError(f"{op}: {name} is on {value.device}, the other arguments on {like[0].device}")


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def kind(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{name_of(value.dtype)} {list(value.shape)}" if value.ndim else f"{name_of(value.dtype)} scalar"
