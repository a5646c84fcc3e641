"""EMA and AdamW with EMA in Triton: one launch over all tensors, each read once and written once.

    AdamW    m = m + (1 - b1) (g - m)     v = b2 v + (1 - b2) g^2
             p = p - shrink p - rate m / (sqrt(v) root + eps)
    SGD      m = root m + (g + shrink p)     p = p - rate m
    EMA      t = t + weight (p - t)     the EMA alone: p is the student, only read

with, for AdamW, rate = lr / (1 - b1^k), shrink = lr x weight decay, root = 1 / sqrt(1 - b2^k); for SGD the learning
rate, the weight decay and the momentum of m; weight = 1 - momentum of the teacher.

The launch gets no tensors but a table with a row of addresses per parameter. A program looks up its tensor and its
block within it. What tensors there are of each type is known when the kernel is compiled ("kinds"): with one kind, the
usual case, there is no branch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import chain, compress
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastssl.kernels._check import KernelError
from fastssl.kernels._launch import launch
from fastssl.kernels.ema_update import reference
from fastssl.kernels.ema_update.lists import check_adamw, check_ema, check_sgd

# A row of the table: addresses of param, grad, exp_avg, exp_avg_sq, teacher, copy and teacher_copy (0: none), number of
# values, index of the kind, and whether accesses of the kind's full width are aligned.
NUMEL, KIND, WIDE, COLUMNS = 7, 8, 9, 10
CODES = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}  # 0: no tensor
VALUES = {False: 2048, True: 1024}  # per program, without and with gradients: 16 or 8 per thread
WARPS = 4
LIMIT = 64  # plans and layouts that are kept


@triton.jit
def _pointer(
    row,  # of the table
    start,  # first value of the block
    COLUMN: tl.constexpr,
    CODE: tl.constexpr,
    WIDTH: tl.constexpr,  # values per access
):
    """Pointer to the block's first value, with the alignment that lets a thread move WIDTH values at once."""
    address = tl.load(row + COLUMN)
    if CODE == 1:
        return tl.multiple_of(address.to(tl.pointer_type(tl.float32)) + start, 4 * WIDTH)
    elif CODE == 2:
        return tl.multiple_of(address.to(tl.pointer_type(tl.bfloat16)) + start, 2 * WIDTH)
    else:
        return tl.multiple_of(address.to(tl.pointer_type(tl.float16)) + start, 2 * WIDTH)


@triton.jit
def _lerp(a, b, weight):
    """torch.lerp: of its two forms one is a at weight 0, the other b at weight 1."""
    near = weight < 0.5
    return tl.where(near, a, b) + tl.where(near, weight, weight - 1.0) * (b - a)


@triton.jit
def _block(
    row,
    start,
    size,  # values of this block
    factor,  # of the gradient; 0: parameter and moments stay
    rate,  # lr / (1 - b1^k)
    shrink,  # lr x weight decay
    weight1,  # 1 - b1
    beta2,
    weight2,  # 1 - b2
    root,  # 1 / sqrt(1 - b2^k)
    eps,
    weight,  # 1 - momentum
    PARAM: tl.constexpr,  # codes of the types; 0: no such tensor
    GRAD: tl.constexpr,
    TEACHER: tl.constexpr,
    COPY: tl.constexpr,
    TEACHER_COPY: tl.constexpr,
    WIDTH: tl.constexpr,
    SCALE: tl.constexpr,
    ADAM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of one tensor: all reads first, so that they are in flight together."""
    lane = tl.arange(0, BLOCK)
    inside = lane < size // WIDTH * WIDTH  # a tensor's last block overruns it; size is a multiple of WIDTH
    param = _pointer(row, start, 0, PARAM, WIDTH) + lane
    p = tl.load(param, mask=inside, other=0.0).to(tl.float32)
    if GRAD:
        grad = _pointer(row, start, 1, GRAD, WIDTH) + lane
        exp_avg = _pointer(row, start, 2, 1, WIDTH) + lane
        g = tl.load(grad, mask=inside, other=0.0).to(tl.float32)
        m = tl.load(exp_avg, mask=inside, other=0.0)
        if ADAM:
            exp_avg_sq = _pointer(row, start, 3, 1, WIDTH) + lane
            v = tl.load(exp_avg_sq, mask=inside, other=0.0)
    if TEACHER:
        teacher = _pointer(row, start, 4, TEACHER, WIDTH) + lane
        t = tl.load(teacher, mask=inside, other=0.0).to(tl.float32)
    if GRAD:
        if SCALE:
            g *= factor
        if ADAM:
            new_m = _lerp(m, g, weight1)
            new_v = beta2 * v + weight2 * g * g
            if SCALE:
                new_v = tl.where(factor == 0, v, new_v)
            tl.store(exp_avg_sq, new_v, mask=inside)
            new_p = p - shrink * p
            new_p -= rate * new_m / (tl.sqrt_rn(new_v) * root + eps)
        else:
            new_m = root * m + (g + shrink * p)
            new_p = p - rate * new_m
        if SCALE:
            new_m = tl.where(factor == 0, m, new_m)
            new_p = tl.where(factor == 0, p, new_p)
        p = new_p
        tl.store(param, p, mask=inside)
        tl.store(exp_avg, new_m, mask=inside)
    if COPY:
        copy = _pointer(row, start, 5, COPY, WIDTH) + lane
        tl.store(copy, p.to(copy.dtype.element_ty), mask=inside)
    if TEACHER:
        t = _lerp(t, p, weight)
        tl.store(teacher, t.to(teacher.dtype.element_ty), mask=inside)
    if TEACHER_COPY:
        teacher_copy = _pointer(row, start, 6, TEACHER_COPY, WIDTH) + lane
        tl.store(teacher_copy, t.to(teacher_copy.dtype.element_ty), mask=inside)


@triton.jit
def _step(
    table,  # int64 [tensors, COLUMNS]
    blocks,  # int32 [programs, 2]: tensor, and which of its blocks
    numbers,  # float64 [4]: rate, shrink, root, weight; or the scalar momentum; or nothing
    scales,  # [tensors, 2]: factors of rate and shrink of each tensor, or nothing
    grad_scale,  # scalar, or [tensors], or nothing
    weight,  # where `numbers` is nothing
    weight1,
    beta2,
    weight2,
    eps,
    KINDS: tl.constexpr,  # per kind: codes of param, grad, teacher, copy and teacher_copy, width of an access
    RAGGED: tl.constexpr,  # some blocks cannot be moved in accesses of full width
    NUMBERS: tl.constexpr,  # 4, 1 or 0 of them
    SCALES: tl.constexpr,
    SCALE: tl.constexpr,  # 0: nothing, 1: a scalar, 2: one per tensor
    ADAM: tl.constexpr,  # AdamW, or SGD with momentum
    NUMEL: tl.constexpr,  # columns of the table
    KIND: tl.constexpr,
    WIDE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    tensor = tl.load(blocks + 2 * program)
    start = tl.load(blocks + 2 * program + 1).to(tl.int64) * BLOCK
    row = table + tensor * COLUMNS
    size = tl.minimum(tl.load(row + NUMEL) - start, BLOCK).to(tl.int32)
    rate = 0.0
    shrink = 0.0
    root = 0.0
    factor = 1.0
    if NUMBERS == 4:
        rate = tl.load(numbers).to(tl.float32)
        shrink = tl.load(numbers + 1).to(tl.float32)
        root = tl.load(numbers + 2).to(tl.float32)
        weight = tl.load(numbers + 3).to(tl.float32)
    if NUMBERS == 1:
        weight = (1.0 - tl.load(numbers).to(tl.float64)).to(tl.float32)
    if SCALES:
        rate *= tl.load(scales + 2 * tensor).to(tl.float32)
        shrink *= tl.load(scales + 2 * tensor + 1).to(tl.float32)
    if SCALE == 1:
        factor = tl.load(grad_scale).to(tl.float32)
    if SCALE == 2:
        factor = tl.load(grad_scale + tensor).to(tl.float32)
    kind = tl.load(row + KIND)
    wide = tl.load(row + WIDE)
    for k in tl.static_range(len(KINDS)):
        if len(KINDS) == 1 or kind == k:
            if not RAGGED or (wide > 0 and size % KINDS[k][5] == 0):
                _block(
                    row, start, size, factor, rate, shrink, weight1, beta2, weight2, root, eps, weight,
                    KINDS[k][0], KINDS[k][1], KINDS[k][2], KINDS[k][3], KINDS[k][4], KINDS[k][5], SCALE, ADAM, BLOCK,
                )  # fmt: skip
            else:
                _block(
                    row, start, size, factor, rate, shrink, weight1, beta2, weight2, root, eps, weight,
                    KINDS[k][0], KINDS[k][1], KINDS[k][2], KINDS[k][3], KINDS[k][4], 1, SCALE, ADAM, BLOCK,
                )  # fmt: skip


Tensors = Sequence[Tensor]
Lists = Sequence[Sequence[Tensor | None]]  # the seven columns of addresses; () for a column without any


class _Layout(NamedTuple):
    """What a launch must know of shapes and types, without the addresses."""

    rows: Tensor  # int64 [tensors, COLUMNS] on the host: the table without its addresses
    slots: Tensor  # int64 [tensors given]: where in the flat table the address of each goes
    widths: Tensor  # int64 [tensors given]: bytes that its address must be a multiple of for accesses of full width
    uneven: bool  # whether some last block is no multiple of the full width
    blocks: Tensor  # int32 [programs, 2] on the device
    kinds: tuple[tuple[int, ...], ...]  # constant of the kernel
    values: int  # per program
    left: tuple[int, ...]  # indices not for the kernel: float64, or items that lie in memory in different orders


class _Plan(NamedTuple):
    """A layout with its table on the device."""

    likeness: tuple[Any, ...]  # sizes, types and the rest of what the plan was made for, beside the addresses
    layout: _Layout
    table: Tensor  # int64 [tensors, COLUMNS]
    ragged: bool  # whether some accesses cannot have full width


_plans: OrderedDict[Any, _Plan] = OrderedDict()
_layouts: OrderedDict[Any, _Layout] = OrderedDict()
_dtype = attrgetter("dtype")


def _keep(cache: OrderedDict, key: Any, value: Any) -> None:
    """cache[key] = value; beyond LIMIT the entry unused for longest goes."""
    cache[key] = value
    cache.move_to_end(key)
    if len(cache) > LIMIT:
        cache.popitem(last=False)


def _plan(lists: Lists, check: Callable[[], None]) -> _Plan:
    """The plan of a call: the kept one where all tensors have the addresses, sizes, types and strides of its call.

    The way to a kept plan is the host's cost of every call, so it runs through `map` and does not look at shapes: of
    contiguous tensors the kernel needs none. `check` is called where shapes and types are new.
    """
    items: list[Any] = list(chain.from_iterable(lists))
    present = None
    try:
        addresses = tuple(map(Tensor.data_ptr, items))
    except TypeError:  # some are None
        present = tuple(item is not None for item in items)
        items = list(compress(items, present))
        if not all(isinstance(item, Tensor) for item in items):
            check()
        addresses = tuple(map(Tensor.data_ptr, items))
    device = items[0].device
    contiguous = all(map(Tensor.is_contiguous, items))
    likeness = (
        tuple(map(Tensor.numel, items)),
        tuple(map(_dtype, items)),
        tuple(map(len, lists)),
        present,
        device,
        None if contiguous else [(item.shape, item.stride()) for item in items],
    )
    plan = _plans.get(addresses)
    if plan is not None and plan.likeness == likeness:
        _plans.move_to_end(addresses)
        return plan
    key = (*likeness[1:5], *((item.shape, item.stride()) for item in items))
    layout = _layouts.get(key)
    if layout is None:
        check()
        layout = _lay_out(lists, device)
        _keep(_layouts, key, layout)
    if 0 in addresses and any(item.numel() for item, address in zip(items, addresses, strict=True) if not address):
        raise KernelError("ema_update, adamw_ema: tensors must have memory of their own (pass a DTensor's to_local())")
    where = torch.tensor(addresses, device="cpu")
    table = layout.rows.clone()
    table.view(-1)[layout.slots] = where
    narrow = layout.slots[where % layout.widths != 0] // COLUMNS
    table[narrow, WIDE] = 0
    plan = _Plan(likeness, layout, _send(table, device), layout.uneven or narrow.numel() > 0)
    _keep(_plans, addresses, plan)
    return plan


def _lay_out(lists: Lists, device: torch.device) -> _Layout:
    """The layout of tensors that have been checked."""
    numel: list[int] = []
    kinds: list[tuple[int, ...] | None] = []
    left: list[int] = []
    for i in range(len(lists[0])):
        row: list[Any] = [items[i] if items else None for items in lists]
        if row[1] is None:
            row[2:4] = None, None  # moments without a gradient stay as they are
        present = [item for item in row if item is not None]
        fits = all(item.dtype in CODES for item in present) and _alike(present)
        if not fits:
            left.append(i)
        if fits and (row[1] is not None or row[4:] != [None] * 3):
            codes = tuple(0 if row[column] is None else CODES[row[column].dtype] for column in (0, 1, 4, 5, 6))
            kinds.append((*codes, 4 if 1 in codes else 8))  # accesses of 16 bytes (and of 8 where types are mixed)
            numel.append(row[0].numel())
        else:
            kinds.append(None)
            numel.append(0)
    constants = sorted({kind for kind in kinds if kind})
    rows = [[0] * NUMEL + [n, constants.index(kind) if kind else 0, 1] for n, kind in zip(numel, kinds, strict=True)]
    slots, widths = [], []
    for column, items in enumerate(lists):
        for i, item in enumerate(items):
            if item is not None:
                kind = kinds[i]
                slots.append(i * COLUMNS + column)
                widths.append(kind[5] * item.element_size() if kind else 1)
    values = VALUES[any(grad is not None for grad in lists[1])]
    sizes = torch.tensor(numel, device="cpu")
    programs = (sizes + values - 1) // values
    tensor = torch.arange(len(numel), device="cpu").repeat_interleave(programs)
    block = torch.arange(len(tensor), device="cpu") - (programs.cumsum(0) - programs)[tensor]
    return _Layout(
        torch.tensor(rows, device="cpu"),
        torch.tensor(slots, device="cpu"),
        torch.tensor(widths, device="cpu"),
        any(n % kind[5] for n, kind in zip(numel, kinds, strict=True) if kind),
        _send(torch.stack([tensor, block], 1).to(torch.int32), device),
        tuple(constants),
        values,
        tuple(left),
    )


def _alike(items: list[Tensor]) -> bool:
    """Whether the items' values, taken in the order of memory, belong together."""
    if all(item.is_contiguous() for item in items):
        return True
    orders = {tuple((d, s) for d, s in enumerate(item.stride()) if item.shape[d] > 1) for item in items}
    expected = 1
    for stride, size in sorted(zip(items[0].stride(), items[0].shape, strict=True)):
        if size > 1 and stride != expected:
            return False  # with gaps or overlaps
        expected *= size
    return len(orders) == 1


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, whole when this returns: any stream may read it."""
    if device.type != "cuda":
        return tensor
    if torch.cuda.is_current_stream_capturing():
        raise KernelError("ema_update, adamw_ema: capture by a CUDA graph needs the same tensors in a call before")
    return tensor.to(device)


def plans() -> list[Any]:
    """The tables in use; who captures a launch in a CUDA graph keeps them as long as the graph."""
    return list(_plans.values())


def _launch(
    plan: _Plan, numbers: Tensor | None, scales: Tensor | None, grad_scale: Tensor | None, *rest: float,
    adam: bool = True,
) -> None:  # fmt: skip
    layout = plan.layout
    launch(
        _step, (layout.blocks.shape[0],), plan.table, layout.blocks, numbers, scales, grad_scale, *rest,
        KINDS=layout.kinds, RAGGED=plan.ragged, NUMBERS=0 if numbers is None else numbers.numel(),
        SCALES=scales is not None, SCALE=0 if grad_scale is None else 1 + grad_scale.ndim, ADAM=adam,
        NUMEL=NUMEL, KIND=KIND, WIDE=WIDE, COLUMNS=COLUMNS, BLOCK=layout.values, num_warps=WARPS,
    )  # fmt: skip


def ema_update_eager(teacher: Tensors, student: Tensors, copies: Tensors, momentum: float | Tensor) -> None:
    """See the public op; [] stands for no copies."""
    _ema_update(teacher, student, copies, momentum)
    torch.autograd.graph.increment_version([*teacher, *copies])


def _ema_update(teacher: Tensors, student: Tensors, copies: Tensors, momentum: float | Tensor) -> None:
    plan = _plan((student, (), (), (), teacher, (), copies), lambda: check_ema(teacher, student, copies))
    if isinstance(momentum, Tensor):
        _launch(plan, momentum, None, None, *[0.0] * 5)
    else:
        _launch(plan, None, None, None, 1.0 - momentum, *[0.0] * 4)
    for i in plan.layout.left:
        reference.ema_update([teacher[i]], [student[i]], momentum, [copies[i]] if copies else None)


@torch.library.custom_op("fastssl::ema_update", mutates_args=("teacher", "copies"))
def _ema_update_op(teacher: list[Tensor], student: list[Tensor], copies: list[Tensor], momentum: Tensor) -> None:
    _ema_update(teacher, student, copies, momentum)


@_ema_update_op.register_fake
def _(teacher, student, copies, momentum):
    pass


def ema_update(teacher: list[Tensor], student: list[Tensor], copies: list[Tensor], momentum: float | Tensor) -> None:
    """For torch.compile: a custom op takes a microsecond for every three tensors, so the eager path goes around it."""
    if not isinstance(momentum, Tensor):
        momentum = torch.tensor(momentum, dtype=torch.float64, device=teacher[0].device)
    _ema_update_op(teacher, student, copies, momentum)


def adamw_ema_eager(lists: Lists, *rest: Any) -> None:
    """See the public op; [] stands for no teacher and no copies, lists of one number for one of all parameters.

    `lists`: params, grads, exp_avgs, exp_avg_sqs, teacher, copies, teacher_copies.
    """
    _adamw_ema(lists, *rest)
    torch.autograd.graph.increment_version([x for x in chain(lists[0], *lists[2:]) if x is not None])


def _adamw_ema(
    lists: Any, numbers: Tensor, scales: Tensor | None, grad_scale: Tensor | None, beta1: float, beta2: float,
    eps: float,
) -> None:  # fmt: skip
    plan = _plan(lists, lambda: check_adamw(*lists))
    _launch(plan, numbers, scales, grad_scale, 0.0, 1.0 - beta1, float(beta2), 1.0 - beta2, float(eps))
    for i in plan.layout.left:
        (p, g, m, v), (t, c, tc) = ([x[i]] for x in lists[:4]), ([x[i]] if x else None for x in lists[4:])
        reference.adamw_ema(
            p, g, m, v, numbers, betas=(beta1, beta2), eps=eps, scales=None if scales is None else scales[i : i + 1],
            teacher=t, copies=c, teacher_copies=tc,
            grad_scale=grad_scale[i] if grad_scale is not None and grad_scale.ndim else grad_scale,
        )  # fmt: skip


def sgd_ema_eager(lists: Any, numbers: Tensor, scales: Tensor | None, grad_scale: Tensor | None) -> None:
    """See the public op; `lists` as for `adamw_ema_eager`, without second moments."""
    plan = _plan(lists, lambda: check_sgd(*lists))
    _launch(plan, numbers, scales, grad_scale, *[0.0] * 5, adam=False)
    for i in plan.layout.left:
        (p, g, m), (t, c, tc) = ([x[i]] for x in lists[:3]), ([x[i]] if x else None for x in lists[4:])
        reference.sgd_ema(
            p, g, m, numbers, scales=None if scales is None else scales[i : i + 1], teacher=t, copies=c,
            teacher_copies=tc, grad_scale=grad_scale[i] if grad_scale is not None and grad_scale.ndim else grad_scale,
        )  # fmt: skip
    torch.autograd.graph.increment_version([x for x in chain(*lists[:1], *lists[2:]) if x is not None])


def adamw_ema(lists: Lists, *rest: Any) -> None:
    """For torch.compile, as `ema_update`: a custom op can change lists of tensors, but no lists with None in them."""
    given = [[item for item in items if item is not None] for items in lists]
    present = [len(items) > i and items[i] is not None for items in lists for i in range(len(lists[0]))]
    _adamw_ema_op(*given, present, *rest)


@torch.library.custom_op(
    "fastssl::adamw_ema", mutates_args=("params", "exp_avgs", "exp_avg_sqs", "teacher", "copies", "teacher_copies")
)
def _adamw_ema_op(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    teacher: list[Tensor], copies: list[Tensor], teacher_copies: list[Tensor], present: list[bool],
    numbers: Tensor, scales: Tensor | None, grad_scale: Tensor | None, beta1: float, beta2: float, eps: float,
) -> None:  # fmt: skip
    given = (iter(items) for items in (params, grads, exp_avgs, exp_avg_sqs, teacher, copies, teacher_copies))
    n = len(params)
    lists = [[next(items) if there else None for there in present[n * j :][:n]] for j, items in enumerate(given)]
    lists[4:] = ([] if items == [None] * n else items for items in lists[4:])
    _adamw_ema(lists, numbers, scales, grad_scale, beta1, beta2, eps)


@_adamw_ema_op.register_fake
def _(*arguments):
    pass
