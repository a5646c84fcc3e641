"""Cases of ema_update and adamw_ema: the parameter lists of whole networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastssl.kernels._spec import BF16, FP16, FP32, TOLERANCE, Case, Maker, Op, nbytes, tensors
from fastssl.kernels.ema_update import adamw_ema, adamw_numbers, ema_update, reference, sgd_ema, sgd_numbers

Shape = tuple[int, ...]


def vit(width: int, depth: int = 12, patches: int = 196, p: int = 16, classes: int = 0) -> Iterator[Shape]:
    """Parameters of a vision transformer."""
    yield from ((1, 1, width), (1, patches + 1, width), (width, 3, p, p), (width,))
    for _ in range(depth):
        yield from ((width,), (width,), (3 * width, width), (3 * width,), (width, width), (width,))
        yield from ((width,), (width,), (4 * width, width), (4 * width,), (width, 4 * width), (width,))
    yield from ((width,), (width,))
    if classes:
        yield from ((classes, width), (classes,))


def dino(width: int = 384, hidden: int = 2048, bottleneck: int = 256, prototypes: int = 65536) -> Iterator[Shape]:
    """A vision transformer with DINO's head."""
    yield from vit(width)
    yield from ((hidden, width), (hidden,), (hidden, hidden), (hidden,), (bottleneck, hidden), (bottleneck,))
    yield from ((prototypes, 1), (prototypes, bottleneck))


def resnet50(classes: int = 1000) -> Iterator[Shape]:
    """Parameters of ResNet-50."""
    yield from ((64, 3, 7, 7), (64,), (64,))
    inside = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            for shape in ((width, inside, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)):
                yield from (shape, shape[:1], shape[:1])
            if block == 0:
                yield from ((4 * width, inside, 1, 1), (4 * width,), (4 * width,))
            inside = 4 * width
    yield from ((classes, inside), (classes,))


def ragged() -> Iterator[Shape]:
    """A scalar, no values, odd sizes, below, at and above one and two blocks."""
    yield from ((), (0, 3), (7,), (3, 5, 1), (1024,), (2048,), (41, 50), (2051,), (4100,), (2, 6, 3, 3))


NETWORKS: dict[str, Callable[[], Iterator[Shape]]] = {
    "ViT-S/16 DINO": dino,
    "ViT-B/16": lambda: vit(768),
    "ViT-S/16, 21843 classes": lambda: vit(384, classes=21843),
    "ResNet-50": resnet50,
    "ragged": ragged,
    "whole": lambda: iter([(64,), (32, 80), (16,)]),
    "one value": lambda: iter([(1,)]),
    "many": lambda: iter([(3,), (8,)] * 20),
    "nothing": lambda: iter([]),
}
MIXED = (FP32, BF16, FP16)
BETAS = (0.9, 0.95)


def draw(
    make: Maker,
    shapes: list[Shape],
    dtypes: torch.dtype | tuple[torch.dtype, ...],
    layout: str = "",
    scale: float = 1.0,
) -> list[Tensor]:
    """Normal values, items in turn of the types. Layouts: "transposed" (in memory), "strided" (every second value)."""
    drawn = []
    for i, shape in enumerate(shapes):
        dtype = dtypes[i % len(dtypes)] if isinstance(dtypes, tuple) else dtypes
        if layout == "transposed":
            x = make.normal(*reversed(shape), dtype=dtype, scale=scale).permute(list(reversed(range(len(shape)))))
        elif layout == "strided" and shape:
            x = make.normal(*shape[:-1], 2 * shape[-1], dtype=dtype, scale=scale)[..., ::2]
        else:
            x = make.normal(*shape, dtype=dtype, scale=scale)
        drawn.append(x)
    return drawn


def ema_inputs(
    make: Maker,
    dtype: torch.dtype,
    *,
    network: str,
    momentum: float = 0.996,
    teacher: torch.dtype | tuple[torch.dtype, ...] = FP32,
    mixed: bool = False,
    copies: torch.dtype | tuple[torch.dtype, ...] | None = None,
    teacher_layout: str = "",
    student_layout: str = "",
) -> dict[str, Any]:
    """`dtype` is the student's, or with `mixed` that of every second item (the others are float32)."""
    shapes = list(NETWORKS[network]())
    return {
        "teacher": draw(make, shapes, teacher, teacher_layout),
        "student": draw(make, shapes, (dtype, FP32) if mixed else dtype, student_layout),
        "momentum": momentum,
        "copies": None if copies is None else draw(make, shapes, copies, teacher_layout),
    }


def adamw_inputs(
    make: Maker,
    dtype: torch.dtype,
    *,
    network: str,
    step: int = 3,
    groups: bool = False,
    grad_scale: str = "",
    no_grad: int = 0,
    no_teacher: int = 0,
    teacher: torch.dtype | tuple[torch.dtype, ...] | None = FP32,
    copies: torch.dtype | tuple[torch.dtype, ...] | None = None,
    layout: str = "",
    grad_layout: str = "",
) -> dict[str, Any]:
    """`dtype` is the gradients'. Every no_grad-th parameter has no gradient, every no_teacher-th no teacher.

    With `groups` the learning rate falls with depth, and only tensors of more than one dimension decay. `grad_scale` is
    "one" for all or one for "each" parameter.
    """
    shapes = list(NETWORKS[network]())
    n = len(shapes)
    params = draw(make, shapes, FP32, layout)
    grads: list[Tensor | None] = [*draw(make, shapes, dtype, grad_layout or layout)]
    exp_avgs: list[Tensor | None] = [*draw(make, shapes, FP32, layout, scale=0.1)]
    exp_avg_sqs: list[Tensor | None] = [x.square() for x in draw(make, shapes, FP32, layout, scale=0.1)]
    teachers: list[Tensor | None] = [] if teacher is None else [*draw(make, shapes, teacher, layout)]
    param_copies: list[Tensor | None] = [] if copies is None else [*draw(make, shapes, copies, layout)]
    teacher_copies: list[Tensor | None] = [] if copies is None else [*draw(make, shapes, copies, layout)]
    for i in range(n):
        if no_grad and i % no_grad == 0:
            grads[i] = None
            if i % (2 * no_grad) == 0:
                exp_avgs[i] = exp_avg_sqs[i] = None
        if no_teacher and i % no_teacher == 1:
            for items in (teachers, teacher_copies):
                if items:
                    items[i] = None
    numbers = adamw_numbers(step, 1e-3, 0.05, BETAS, 0.996)
    scales = [[0.75 ** (12 * (1 - i / n)), float(len(shape) > 1)] for i, shape in enumerate(shapes)]
    each = make.uniform(n, low=0.5)
    each[1::3] = 0  # these stay
    return {
        "params": params,
        "grads": grads,
        "exp_avgs": exp_avgs,
        "exp_avg_sqs": exp_avg_sqs,
        "numbers": torch.tensor(numbers, dtype=torch.float64, device=make.device),
        "betas": BETAS,
        "eps": 1e-8,
        "scales": torch.tensor(scales, device=make.device).view(n, 2) if groups else None,
        "teacher": teachers or None,
        "copies": param_copies or None,
        "teacher_copies": teacher_copies if teachers and teacher_copies else None,
        "grad_scale": {"": None, "one": make.uniform(low=0.5), "each": each}[grad_scale],
    }


def sgd_inputs(make: Maker, dtype: torch.dtype, **case: Any) -> dict[str, Any]:
    """As `adamw_inputs`."""
    inputs = adamw_inputs(make, dtype, **case)
    del inputs["exp_avg_sqs"], inputs["betas"], inputs["eps"]
    inputs["numbers"] = torch.tensor(sgd_numbers(0.1, 1e-4, 0.9, 0.996), dtype=torch.float64, device=make.device)
    return inputs | {"sums": inputs.pop("exp_avgs")}


def ema_bytes(inputs: dict[str, Any], outputs: list[Tensor], backward: bool) -> int:
    return nbytes(inputs["student"], inputs["teacher"], inputs["teacher"], inputs["copies"])


def adamw_bytes(inputs: dict[str, Any], outputs: list[Tensor], backward: bool) -> int:
    total = nbytes(inputs["grad_scale"], inputs["numbers"], inputs["scales"])
    for i, (param, grad) in enumerate(zip(inputs["params"], inputs["grads"], strict=True)):
        written = [inputs[name][i] for name in ("teacher", "copies", "teacher_copies") if inputs[name]]
        if grad is not None:
            state = [inputs[name][i] for name in ("exp_avgs", "exp_avg_sqs", "sums") if name in inputs]
            total += 2 * nbytes(param, state) + nbytes(grad)
        elif tensors(written):
            total += nbytes(param)
        total += nbytes(written) + (nbytes(inputs["teacher"][i]) if inputs["teacher"] else 0)
    return total


@torch.no_grad()
def foreach_lerp(
    teacher: list[Tensor], student: list[Tensor], momentum: float, copies: list[Tensor] | None = None
) -> None:
    """torch's own calls over lists; the student is cast where its type is another."""
    if not teacher:
        return
    if any(t.dtype != s.dtype for t, s in zip(teacher, student, strict=True)):
        student = [s.to(t.dtype) for t, s in zip(teacher, student, strict=True)]
    torch._foreach_lerp_(teacher, student, 1 - momentum)
    if copies:
        torch._foreach_copy_(copies, teacher)


@torch.no_grad()
def fused_adamw(
    params: list[Tensor], grads: list[Any], exp_avgs: list[Any], exp_avg_sqs: list[Any], numbers: Tensor, *,
    betas: tuple[float, float], eps: float, scales: Tensor | None, teacher: list[Any] | None,
    copies: list[Any] | None, teacher_copies: list[Any] | None, grad_scale: Tensor | None,
) -> None:  # fmt: skip
    """What torch.optim.AdamW(fused=True) calls, once per pair of learning rate and weight decay, and then the EMA; for
    the numbers that `adamw_inputs` gives, and one scale of the gradients at most.

    Each gradient must lie in memory as its parameter does.
    """
    n = len(params)
    pairs = [(1.0, 1.0)] * n if scales is None else [tuple(pair) for pair in scales.tolist()]
    groups: dict[tuple[float, ...], list[int]] = {}
    for i, grad in enumerate(grads):
        if grad is not None:
            groups.setdefault(pairs[i], []).append(i)
    for (rate, decay), members in groups.items():
        p, g, m, v = ([items[i] for i in members] for items in (params, grads, exp_avgs, exp_avg_sqs))
        g = [grad.to(param.dtype) for param, grad in zip(p, g, strict=True)]
        steps = [torch.full((), 3.0, device=params[0].device)] * len(members)
        torch._fused_adamw_(
            p, g, m, v, [], steps, lr=1e-3 * rate, beta1=betas[0], beta2=betas[1], weight_decay=0.05 * decay / rate,
            eps=eps, amsgrad=False, maximize=False,
            grad_scale=None if grad_scale is None else grad_scale.reciprocal(),
        )  # fmt: skip
    moved = [(t, p) for t, p in zip(teacher or [], params, strict=False) if t is not None]
    foreach_lerp([t for t, _ in moved], [p for _, p in moved], 0.996)
    written = [*zip(copies or [], params, strict=False), *zip(teacher_copies or [], teacher or [], strict=False)]
    copied = [(target, source) for target, source in written if target is not None and source is not None]
    if copied:
        torch._foreach_copy_([target for target, _ in copied], [source for _, source in copied])


@torch.no_grad()
def foreach_sgd(
    params: list[Tensor], grads: list[Any], sums: list[Any], numbers: Tensor, *, scales: Tensor | None,
    teacher: list[Any] | None, copies: list[Any] | None, teacher_copies: list[Any] | None, grad_scale: Tensor | None,
) -> None:  # fmt: skip
    """What torch.optim.SGD(fused=True) calls, and then the EMA; for the numbers that `sgd_inputs` gives."""
    pairs = [(1.0, 1.0)] * len(params) if scales is None else [tuple(pair) for pair in scales.tolist()]
    groups: dict[tuple[float, ...], list[int]] = {}
    for i, grad in enumerate(grads):
        if grad is not None:
            groups.setdefault(pairs[i], []).append(i)
    for (rate, decay), members in groups.items():
        p, g, m = ([items[i] for i in members] for items in (params, grads, sums))
        g = [grad.to(param.dtype) for param, grad in zip(p, g, strict=True)]
        torch._fused_sgd_(
            p, g, m, weight_decay=1e-4 * decay, momentum=0.9, lr=0.1 * rate, dampening=0.0, nesterov=False,
            maximize=False, is_first_step=False, grad_scale=None if grad_scale is None else grad_scale.reciprocal(),
        )  # fmt: skip
    moved = [(t, p) for t, p in zip(teacher or [], params, strict=False) if t is not None]
    foreach_lerp([t for t, _ in moved], [p for _, p in moved], 0.996)
    written = [*zip(copies or [], params, strict=False), *zip(teacher_copies or [], teacher or [], strict=False)]
    copied = [(target, source) for target, source in written if target is not None and source is not None]
    if copied:
        torch._foreach_copy_([target for target, _ in copied], [source for _, source in copied])


EMA_PROOF: dict[str, Case] = {
    "ragged": {"network": "ragged"},
    "whole blocks": {"network": "whole"},
    "one value": {"network": "one value", "momentum": 0.9},
    "many": {"network": "many"},
    "near the student": {"network": "ragged", "momentum": 0.3},
    "momentum 1/2": {"network": "whole", "momentum": 0.5},
    "student's types mixed": {"network": "ragged", "mixed": True},
    "same strides": {"network": "ragged", "teacher_layout": "transposed", "student_layout": "transposed"},
    "other strides": {"network": "ragged", "student_layout": "transposed"},
    "gaps": {"network": "ragged", "teacher_layout": "strided", "student_layout": "strided"},
    "no tensors": {"network": "nothing"},
}
COPIES_PROOF: dict[str, Case] = {
    "bfloat16 copies": {"network": "ragged", "copies": BF16},
    "bfloat16 alone": {"network": "ragged", "teacher": BF16, "momentum": 0.5},
    "all types": {"network": "ragged", "teacher": MIXED, "copies": (*MIXED, BF16), "mixed": True},
    "strided": {"network": "ragged", "copies": FP16, "teacher_layout": "strided"},
    "transposed": {
        "network": "ragged", "copies": BF16, "teacher_layout": "transposed", "student_layout": "transposed",
    },
}  # fmt: skip
ADAMW_PROOF: dict[str, Case] = {
    "ragged": {"network": "ragged"},
    "AdamW alone": {"network": "whole", "teacher": None},
    "first step": {"network": "whole", "step": 1},
    "one value": {"network": "one value", "step": 1000},
    "groups": {"network": "ragged", "groups": True},
    "scaled gradients": {"network": "ragged", "groups": True, "grad_scale": "one"},
    "each gradient scaled, some by 0": {"network": "many", "groups": True, "grad_scale": "each"},
    "missing gradients": {"network": "ragged", "no_grad": 2, "grad_scale": "one"},
    "missing gradients and teachers": {"network": "many", "no_grad": 3, "no_teacher": 4},
    "no gradients": {"network": "whole", "no_grad": 1},
    "same strides": {"network": "ragged", "layout": "transposed", "groups": True},
    "other strides": {"network": "ragged", "grad_layout": "transposed", "groups": True, "grad_scale": "one"},
    "no tensors": {"network": "nothing"},
}
ADAMW_COPIES_PROOF: dict[str, Case] = {
    "bfloat16 copies": {"network": "ragged", "copies": BF16},
    "copies of the parameters alone": {"network": "whole", "copies": BF16, "teacher": None},
    "all types": {"network": "ragged", "teacher": MIXED, "copies": (*MIXED, FP16), "no_grad": 3, "no_teacher": 5},
    "strided": {"network": "ragged", "copies": FP16, "layout": "strided", "groups": True, "no_grad": 4},
}
SGD_PROOF = {key: case for key, case in ADAMW_PROOF.items() if key not in ("first step", "one value")}
TRAINING = ("ViT-S/16 DINO", "ViT-B/16", "ResNet-50")
ODD = "ViT-S/16, 21843 classes"
EXACT = {dtype: TOLERANCE[FP32] for dtype in (FP16, BF16)}  # all outputs are float32, whatever the inputs
ROUNDED = {FP32: TOLERANCE[BF16]}

OPS = [
    Op(
        "ema_update", ema_update, reference.ema_update, ema_inputs, EMA_PROOF,
        {name: {"network": name} for name in (*TRAINING, ODD)},
        ema_bytes, mutates=("teacher",), library={"_foreach_lerp_": foreach_lerp}, tolerance=EXACT,
    ),
    Op(
        "ema_update with copies", ema_update, reference.ema_update, ema_inputs, COPIES_PROOF,
        {f"{name}, bf16 copies": {"network": name, "copies": BF16} for name in TRAINING}
        | {"ViT-B/16, bf16 teacher": {"network": "ViT-B/16", "teacher": BF16}},
        ema_bytes, mutates=("teacher", "copies"), library={"_foreach_lerp_, _foreach_copy_": foreach_lerp},
        dtypes=(FP32, BF16), tolerance=ROUNDED,
    ),
    Op(
        "adamw_ema", adamw_ema, reference.adamw_ema, adamw_inputs, ADAMW_PROOF,
        {name: {"network": name} for name in TRAINING}
        | {"ViT-B/16, no teacher": {"network": "ViT-B/16", "teacher": None}},
        adamw_bytes, mutates=("params", "exp_avgs", "exp_avg_sqs", "teacher"),
        library={"_fused_adamw_, _foreach_lerp_": fused_adamw}, tolerance=EXACT,
    ),
    Op(
        "adamw_ema with copies", adamw_ema, reference.adamw_ema, adamw_inputs, ADAMW_COPIES_PROOF,
        {
            "ViT-B/16, bf16 copies": {"network": "ViT-B/16", "copies": BF16},
            f"{ODD}, bf16 copies, groups, scale": {"network": ODD, "copies": BF16, "groups": True, "grad_scale": "one"},
        },
        adamw_bytes, mutates=("params", "exp_avgs", "exp_avg_sqs", "teacher", "copies", "teacher_copies"),
        library={"_fused_adamw_, _foreach_lerp_, _foreach_copy_": fused_adamw}, dtypes=(FP32, BF16), tolerance=ROUNDED,
    ),
    Op(
        "sgd_ema", sgd_ema, reference.sgd_ema, sgd_inputs, SGD_PROOF,
        {"ResNet-50": {"network": "ResNet-50", "grad_scale": "one"}},
        adamw_bytes, mutates=("params", "sums", "teacher"),
        library={"_fused_sgd_, _foreach_lerp_": foreach_sgd}, tolerance=EXACT,
    ),
    Op(
        "sgd_ema with copies", sgd_ema, reference.sgd_ema, sgd_inputs, ADAMW_COPIES_PROOF,
        {"ResNet-50, bf16 copies": {"network": "ResNet-50", "copies": BF16, "grad_scale": "one"}},
        adamw_bytes, mutates=("params", "sums", "teacher", "copies", "teacher_copies"),
        library={"_fused_sgd_, _foreach_lerp_, _foreach_copy_": foreach_sgd}, dtypes=(FP32, BF16), tolerance=ROUNDED,
    ),
]  # fmt: skip
