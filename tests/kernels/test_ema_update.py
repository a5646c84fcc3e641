"""EMA and AdamW with EMA: against the float64 reference, torch.lerp and torch.optim.AdamW, and by properties."""

import os
import subprocess
import sys

import pytest
import torch

from fastssl.kernels import _launch
from fastssl.kernels._check import KernelError
from fastssl.kernels._path import forced
from fastssl.kernels._spec import Maker, map_tensors, tensors
from fastssl.kernels.ema_update import adamw_ema, adamw_numbers, cases, ema_update, sgd_ema, sgd_numbers

# "triton" is refused for CPU tensors where there is a GPU.
CPU_PATHS = ["reference"] if torch.cuda.is_available() else ["reference", "triton"]
SHAPES = [(3, 5), (2050,), (1,), (4, 8)]
STEP = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def adamw(params, grads, m, v, step, *, lr, weight_decay, betas, momentum=1.0, **rest):
    """`adamw_ema` for numbers of the host."""
    numbers = adamw_numbers(step, lr, weight_decay, betas, momentum)
    numbers = torch.tensor(numbers, dtype=torch.float64, device=m[0].device)
    adamw_ema(params, grads, m, v, numbers, betas=betas, **rest)


def normal(device, shapes=SHAPES, dtype=torch.float32, seed=0):
    make = Maker("cpu", seed)
    return [make.normal(*shape).to(device, dtype) for shape in shapes]


def state(device, shapes=SHAPES):
    """Parameters, gradients and fresh moments."""
    params, grads = normal(device, shapes, seed=1), normal(device, shapes, seed=2)
    return params, grads, [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]


@pytest.fixture
def launches(monkeypatch):
    """Grids of the launches so far."""
    from fastssl.kernels.ema_update import kernel

    seen = []
    monkeypatch.setattr(
        kernel, "launch", lambda k, grid, *a, **o: (seen.append((grid, o)), _launch.launch(k, grid, *a, **o))
    )
    return seen


@pytest.mark.parametrize("op", cases.OPS, ids=lambda op: op.name)
def test_library_calls_do_the_same(op, device):
    """What the bench compares with is the same update."""
    for case in op.proof.values():
        if case.get("grad_layout") or case.get("step") or case.get("grad_scale") == "each":
            continue  # the fused call wants one layout, the bench's step, one factor
        inputs = op.inputs(Maker(device), torch.float32, **case)
        if inputs.get("teacher") and any(t.dtype != torch.float32 for t in tensors(inputs["teacher"])):
            continue  # it rounds the teacher before it copies
        others = map_tensors(inputs, torch.clone)
        op.reference(**inputs)
        for call in op.library.values():
            call(**others)
        for name in op.mutates:
            for x, y in zip(tensors(inputs[name]), tensors(others[name]), strict=True):
                torch.testing.assert_close(y, x, rtol=1e-5 if x.dtype == torch.float32 else 1e-2, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.996, 0.6, 0.5, 0.2])
def test_ema_is_torch_lerp(path, momentum, device):
    teacher, student = normal(device), normal(device, seed=1)
    expected = [torch.lerp(t, s, 1 - momentum) for t, s in zip(teacher, student, strict=True)]
    with forced(path):
        ema_update(teacher, student, momentum)
    torch.testing.assert_close(teacher, expected, rtol=2e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_momentum_1_keeps_every_bit_and_0_copies_the_student(path, dtype, device):
    teacher, student = normal(device, dtype=dtype), normal(device, dtype=dtype, seed=1)
    teacher[0] *= 2.0**50  # the difference then has no bit of the student: only the right one of lerp's forms copies it
    student[1] *= 2.0**50
    with forced(path):
        kept = [t.clone() for t in teacher]
        ema_update(kept, student, 1.0)
        ema_update(teacher, student, 0.0)
    assert all(map(torch.equal, teacher, student))
    torch.testing.assert_close(kept[0], normal(device, dtype=dtype)[0] * 2.0**50, rtol=0, atol=0)
    torch.testing.assert_close(kept[1:], normal(device, dtype=dtype)[1:], rtol=0, atol=0)


def test_bfloat16_teacher_stands_still_and_a_float32_one_with_copies_moves(path, device):
    """From 1 towards 1.5 the first step is 0.002, bfloat16's spacing there 0.0078."""
    student = [torch.full((3,), 1.5, device=device)]
    low, copies = ([torch.ones(3, device=device, dtype=torch.bfloat16)] for _ in range(2))
    master = [torch.ones(3, device=device)]
    with forced(path):
        for _ in range(20):
            ema_update(low, student, 0.996)
            ema_update(master, student, 0.996, copies)
    assert (low[0] == 1).all()
    torch.testing.assert_close(master[0], torch.full_like(master[0], 1.5 - 0.5 * 0.996**20))
    assert (copies[0].float() > 1.03).all()
    assert ((copies[0].float() - master[0]).abs() < 2.0**-7).all()


def test_copies_come_from_the_float32_result(path, device):
    teacher, student = normal(device, dtype=torch.bfloat16), normal(device, dtype=torch.float16, seed=1)
    expected = [torch.lerp(t.float(), s.float(), 0.25) for t, s in zip(teacher, student, strict=True)]
    exact, half = normal(device, seed=2), normal(device, dtype=torch.float16, seed=2)
    with forced(path):
        ema_update([t.clone() for t in teacher], student, 0.75, half)
        ema_update(teacher, student, 0.75, exact)
    torch.testing.assert_close(exact, expected, rtol=2e-7, atol=1e-7)
    assert all(torch.equal(c, x.half()) for c, x in zip(half, exact, strict=True))
    assert any((t.float() != x).any() for t, x in zip(teacher, exact, strict=True))


def test_one_launch_for_all_types_and_dense_layouts(device, launches):
    shapes = [(16, 3, 3, 3), (2, 8, 1, 1), (5,), (700, 3), (8, 1, 3)]
    teacher, student = normal(device, shapes), normal(device, shapes, seed=1)
    copies = normal(device, shapes, torch.bfloat16)
    student[2], copies[3] = student[2].half(), copies[3].float()
    for items in (teacher, student, copies):
        items[0] = items[0].to(memory_format=torch.channels_last)
        items[3] = items[3].t().contiguous().t()
    teacher[1] = teacher[1].to(memory_format=torch.channels_last)  # one layout under two names
    student[4] = student[4][:, 0].t().contiguous().t()[:, None]  # here too: strides of a dimension of one do not matter
    for items in (teacher, copies):
        items[4] = items[4].permute(2, 1, 0).contiguous().permute(2, 1, 0)
    expected = [torch.lerp(t, s.float(), 0.1) for t, s in zip(teacher, student, strict=True)]
    with forced("triton"):
        ema_update(teacher, student, 0.9, copies)
    assert teacher[4].stride() != student[4].stride()
    assert [grid for grid, _ in launches] == [(6,)]
    torch.testing.assert_close(teacher, expected, rtol=2e-7, atol=1e-7)
    torch.testing.assert_close([c.float() for c in copies], expected, rtol=1e-2, atol=1e-2)


def test_only_the_tensors_themselves_are_written(device, launches):
    """Views at odd places of one buffer: their neighbours stay, and only whole aligned vectors are moved as vectors."""
    from fastssl.kernels.ema_update import kernel

    for offset, n in ((0, 2050), (1, 2048), (4, 4096), (3, 5)):
        buffers = {name: torch.full((4200,), 7.0, device=device) for name in ("teacher", "copy", "m", "v", "param")}
        views = {name: [buffer[offset : offset + n]] for name, buffer in buffers.items()}
        grad = [torch.ones(n, device=device)]
        with forced("triton"):
            adamw(
                views["param"], grad, views["m"], views["v"], 1, **STEP, teacher=views["teacher"], momentum=0.5,
                teacher_copies=views["copy"],
            )  # fmt: skip
            ema_update(views["teacher"], grad, 0.5, views["copy"])
        for name, buffer in buffers.items():
            assert (buffer[offset : offset + n] != 7).all(), name
            assert (buffer[:offset] == 7).all(), name
            assert (buffer[offset + n :] == 7).all(), name
        torch.testing.assert_close(views["copy"], views["teacher"])
        plan = next(reversed(kernel._plans.values()))
        assert plan.table[0, kernel.WIDE].item() == (offset % 4 == 0)
        assert [options["RAGGED"] for _, options in launches[-2:]] == [offset % 4 != 0 or n % 4 != 0] * 2
        assert [grid for grid, _ in launches[-2:]] == [(_launch.cdiv(n, 1024),), (_launch.cdiv(n, 2048),)]


def test_reused_memory_never_meets_a_stale_table(device):
    """Other sizes, types, strides, places and partners at an address that was seen before."""
    buffer, student = torch.zeros(4096, device=device), torch.ones(4096, device=device)
    views = [
        (buffer[:3000], student[:3000]),
        (buffer[:1000], student[:1000]),
        (buffer[:1000].view(torch.bfloat16), student[:2000]),
        (buffer[:1000].view(torch.float16), student[:2000]),
        (buffer[:1000].view(50, 20), student[:1000].view(50, 20)),
        (buffer[:1000].view(20, 50).t(), student[:1000].view(50, 20)),
        (buffer[:1000].view(20, 50).t(), student[:1000].view(20, 50).t()),
        (buffer[:2000:2], student[:1000]),
        (buffer[:1000], student[2000:3000]),
        (buffer[:1000], student[1:1001]),
        (buffer[1:1001], student[:1000]),
    ]
    with forced("triton"):
        for _ in range(2):
            for t, s in views:
                buffer.zero_()
                student.copy_(torch.arange(4096.0) % 61 + 1)
                touched = torch.zeros(4096, device=device)
                touched.as_strided(t.shape, t.stride(), t.storage_offset()).fill_(1)
                ema_update([t], [s], 0.5)
                torch.testing.assert_close(t.float(), s / 2)
                if t.dtype == torch.float32:
                    assert (buffer[touched == 0] == 0).all()
                else:
                    assert (buffer[1000:] == 0).all()
        a, b, c = (student[i * 500 :][:500].clone() for i in range(3))
        ema_update([a], [b], 0.5, [c])
        assert torch.equal(a, c)
        before = c.clone()
        ema_update([a, b], [c, c], 0.0)  # the same three addresses and one more
        assert torch.equal(a, before)
        assert torch.equal(b, before)


def test_same_tensors_in_other_roles_get_their_own_table(device):
    params, grads, m, v = state(device, [(3,), (3,)])
    before, copies = [p.clone() for p in params], normal(device, [(3,), (3,)], seed=5)
    with forced("triton"):
        adamw(params, [grads[0], None], m, v, 1, **STEP)
        assert not torch.equal(params[0], before[0])
        assert torch.equal(params[1], before[1])
        before = [p.clone() for p in params]
        adamw(params, [None, grads[0]], m, v, 1, **STEP)
        assert torch.equal(params[0], before[0])
        assert not torch.equal(params[1], before[1])
        adamw(params, grads, m, v, 1, **STEP, copies=copies)
        assert all(map(torch.equal, copies, params))
        before = [c.clone() for c in copies]
        adamw(params, grads, m, v, 1, **STEP, teacher=copies, momentum=1.0)
    assert all(map(torch.equal, copies, before))


def test_tables_are_kept_and_bounded(device, monkeypatch):
    from fastssl.kernels.ema_update import kernel

    monkeypatch.setattr(kernel, "LIMIT", 5)
    kernel._plans.clear()
    kernel._layouts.clear()
    teacher, student = normal(device), normal(device, seed=1)
    with forced("triton"):
        ema_update(teacher, student, 0.9)
        plan = next(reversed(kernel._plans.values()))
        for n in range(kernel.LIMIT - 1):
            ema_update([torch.zeros(n + 1, device=device)], [torch.ones(n + 1, device=device)], 0.9)
        ema_update(teacher, student, 0.9)
        assert next(reversed(kernel._plans.values())) is plan
        for n in range(2 * kernel.LIMIT):
            ema_update([torch.zeros(n + 1, device=device)], [torch.ones(n + 1, device=device)], 0.9)
    assert len(kernel._plans) == kernel.LIMIT
    assert len(kernel._layouts) <= kernel.LIMIT


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("per_tensor", [False, True], ids=["one group", "groups"])
def test_equals_torch_adamw_then_lerp_over_several_steps(path, dtype, per_tensor, device):
    """Gradients that come and go, values that change at every step; state against torch.optim.AdamW's own."""
    params = normal(device, dtype=dtype)
    mirror = [p.clone().requires_grad_() for p in params]
    teacher, averages = ([p.clone() for p in params] for _ in range(2))
    moments = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    groups = [mirror[::2], mirror[1::2]] if per_tensor else [mirror]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups], betas=(0.9, 0.95), foreach=False)
    for step in range(1, 5):
        grads = normal(device, dtype=dtype, seed=step)
        momentum = 1 - 0.1 * step
        for k, group in enumerate(optimizer.param_groups):
            group |= {"lr": 1e-2 / step * (k + 1), "weight_decay": 0.5 * k + 0.25 * step, "eps": 1e-6}
        for p, g in zip(mirror, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        first, second = optimizer.param_groups[0], optimizer.param_groups[-1]
        factors = [[1.0, 1.0], [second["lr"] / first["lr"], 1.0]]  # the weight decay counts with the learning rate
        factors[1][1] = second["lr"] * second["weight_decay"] / (first["lr"] * first["weight_decay"])
        scales = torch.tensor(factors * 2, dtype=dtype, device=device) if per_tensor else None
        values = {key: first[key] for key in ("lr", "weight_decay")}
        with forced(path):
            adamw(
                params, grads, *moments, step, betas=(0.9, 0.95), eps=1e-6, **values, teacher=teacher,
                momentum=momentum, scales=scales,
            )  # fmt: skip
        averages = [torch.lerp(a, p.detach(), 1 - momentum) for a, p in zip(averages, mirror, strict=True)]
    exact = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-6, "atol": 5e-7}
    torch.testing.assert_close(params, [p.detach() for p in mirror], **exact)
    torch.testing.assert_close(teacher, averages, **exact)
    for key, mine in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
        torch.testing.assert_close(mine, [optimizer.state[p][key] for p in mirror], **exact)


def test_without_a_gradient_torch_skips_and_the_teacher_moves(path, device):
    params, grads, m, v = state(device)
    mirror = [p.clone().requires_grad_() for p in params]
    optimizer = torch.optim.AdamW(mirror, foreach=False, **STEP)
    teacher, copies = normal(device, seed=5), normal(device, seed=6)
    averages = [t.clone() for t in teacher]
    grads[1] = m[1] = v[1] = None
    grads[2] = None
    for p, g in zip(mirror, grads, strict=True):
        p.grad = g
    optimizer.step()
    with forced(path):
        adamw(params, grads, m, v, 1, **STEP, teacher=[*teacher[:3], None], momentum=0.25, copies=copies)
    mirror = [p.detach() for p in mirror]
    torch.testing.assert_close(params, mirror, rtol=1e-6, atol=1e-7)
    assert all(map(torch.equal, copies, params))
    expected = [torch.lerp(a, p, 0.75) for a, p in zip(averages, mirror, strict=True)]
    torch.testing.assert_close(teacher, [*expected[:3], averages[3]], rtol=1e-6, atol=1e-6)
    assert (m[2] == 0).all()
    assert (v[2] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_grad_scale_is_a_scaled_gradient(path, dtype, device):
    one, other = state(device), state(device)
    one[1][:] = [g.to(dtype) for g in one[1]]
    other[1][:] = [g.float() * 0.25 for g in one[1]]
    kept = [g.clone() for g in one[1]]
    with forced(path):
        adamw(*one, 1, **STEP, grad_scale=torch.tensor(0.25, device=device))
        adamw(*other, 1, **STEP)
    assert all(map(torch.equal, [*one[0], *one[2], *one[3]], [*other[0], *other[2], *other[3]]))
    assert all(map(torch.equal, one[1], kept))


def test_first_step_moves_by_the_learning_rate_and_decay_by_their_product(path, device):
    params, grads, m, v = state(device)
    before = [p.clone() for p in params]
    with forced(path):
        adamw(params, grads, m, v, 1, lr=0.125, betas=(0.9, 0.99), eps=0.0, weight_decay=0.0)
        torch.testing.assert_close(params, [b - 0.125 * g.sign() for b, g in zip(before, grads, strict=True)])
        still = [torch.zeros_like(p) for p in params]
        before = [p.clone() for p in params]
        moments = [[torch.zeros_like(p) for p in params] for _ in range(2)]
        scales = torch.tensor([[1.0, 1.0], [9.0, 0.5]] * 2, device=device)
        adamw(params, still, *moments, 7, lr=0.5, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.5, scales=scales)
    torch.testing.assert_close(params, [b * f for b, f in zip(before, [0.75, 0.875] * 2, strict=True)])


def test_one_launch_for_the_step_and_the_average(device, launches):
    params, grads, m, v = state(device)
    grads[0] = grads[0].bfloat16()
    grads[3] = None
    teacher, copies, teacher_copies = (normal(device, dtype=dtype) for dtype in cases.MIXED)
    with forced("triton"):
        adamw(
            params, grads, m, v, 1, **STEP, teacher=teacher, momentum=0.9, copies=copies,
            teacher_copies=teacher_copies, grad_scale=torch.ones((), device=device),
            scales=torch.ones(4, 2, device=device),
        )  # fmt: skip
        adamw(params, [None] * 4, m, v, 1, **STEP)  # nothing to do
    assert [grid for grid, _ in launches] == [(6,), (0,)]


def test_autograd_hears_of_the_change(path, device):
    """Changed parameters need no gradient mode, and a graph that saved them before refuses to go back."""
    params, grads, m, v = state(device)
    teacher = normal(device)
    for p in (*params, *teacher):
        p.requires_grad_()
    loss = (params[1] ** 2).sum() + (teacher[1] ** 2).sum()
    with forced(path):
        adamw(params, grads, m, v, 1, **STEP)
        ema_update(teacher, params, 0.9)
    assert all(p.is_leaf for p in (*params, *teacher))
    for leaf in (params[1], teacher[1]):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(loss, leaf, retain_graph=True)


def test_compiles_without_a_graph_break(device):
    def update(teacher, student, copies):
        ema_update(teacher, student, 0.75, copies)

    def step(params, grads, m, v, teacher, copies, scale, numbers):
        adamw_ema(
            params, grads, m, v, numbers, betas=(0.9, 0.95), eps=1e-8, teacher=teacher, teacher_copies=copies,
            grad_scale=scale,
        )  # fmt: skip

    params, grads, m, v = state(device)
    teacher, copies, half = normal(device, seed=5), *(normal(device, dtype=torch.float16) for _ in range(2))
    grads[1] = m[1] = v[1] = teacher[2] = copies[2] = None
    scale = torch.tensor(0.5, device=device)
    numbers = torch.tensor([0.01, 0.001, 4.0, 0.25], dtype=torch.float64, device=device)
    calls = [
        (update, [normal(device), normal(device, seed=1), half]),
        (step, [params, grads, m, v, teacher, copies, scale, numbers]),
    ]
    torch.compiler.reset()
    for f, arguments in calls:
        others, before = (map_tensors(arguments, torch.clone) for _ in range(2))
        with forced("triton"):
            f(*arguments)
            torch.compile(f, fullgraph=True, backend="aot_eager")(*others)
        assert all(map(torch.equal, tensors(arguments), tensors(others)))
        assert not any(map(torch.equal, tensors(others[0])[:1], tensors(before[0])[:1]))


def test_accesses_are_16_bytes_wide():
    """For sm_90 every access of a float32 launch is a vector of four, and none goes through shared memory."""
    code = """
import re
from fastssl.kernels._compile import _launches, _target
from fastssl.kernels._spec import FP32, Op
from fastssl.kernels.ema_update import cases
for index, loads, stores in ((0, 8, 4), (2, 10, 8)):
    op = cases.OPS[index]
    one = Op(op.name, op.call, op.reference, op.inputs, {}, {"": {"network": "whole"}}, op.min_bytes, dtypes=(FP32,))
    with _target(90):
        ((_, _, (kernel, arguments, options)),) = _launches(one)
        text = kernel.warmup(*arguments, grid=(1,), **options).asm["ptx"]
    assert text.count("ld.global.v4.b32") == loads, text
    assert text.count("st.global.v4.b32") == stores, text
    assert not re.search(r"st.global.b|st.shared|bar.sync", text), text
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("path", CPU_PATHS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"momentum": 1.5}, r"ema_update: momentum must be in \[0, 1\], not 1.5"),
        ({"student": [torch.zeros(3)]}, "student must be a list of 2 as teacher, not a list of 1"),
        (
            {"student": [torch.zeros(3), torch.zeros(2, 5)]},
            r"student\[1\] must be \[2, 4\] as teacher\[1\], not \[2, 5\]",
        ),
        ({"copies": [torch.zeros(3), None]}, r"copies\[1\] must be a tensor, not NoneType"),
        ({"teacher": [None, torch.zeros(2, 4)]}, r"teacher\[0\] must be a tensor, not NoneType"),
        ({"teacher": [torch.zeros(3).int(), torch.zeros(2, 4)]}, r"teacher\[0\] must be float32 or .*, not int32"),
        (
            {"student": [torch.zeros(3), torch.zeros(2, 4, device="meta")]},
            r"student\[1\] is on meta, teacher\[0\] on cpu",
        ),
    ],
)
def test_bad_arguments_of_ema_update_are_named(path, change, message):
    inputs = {"teacher": [torch.zeros(3), torch.zeros(2, 4)], "student": [torch.zeros(3), torch.zeros(2, 4)]}
    with forced(path), pytest.raises(KernelError, match=message):
        ema_update(**inputs | {"momentum": 0.5} | change)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the path is refused before")
def test_tensors_without_memory_are_refused():
    """Addresses of 0, such as those of distributed tensors, never reach the kernel."""
    with forced("triton"), pytest.raises(KernelError, match=r"memory of their own \(pass a DTensor's to_local\(\)\)"):
        ema_update([torch.empty(3, device="meta")], [torch.empty(3, device="meta")], 0.5)


@pytest.mark.parametrize("path", CPU_PATHS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\), not \(0.9, 1.0\)"),
        ({"eps": -1.0}, "eps must be at least 0, not -1.0"),
        ({"numbers": torch.ones(3)}, r"numbers must be \[4\], float64, contiguous, not float32 \[3\]"),
        ({"scales": torch.ones(3, 2)}, r"scales must be \[2, 2\], floating-point, contiguous, not float32 \[3, 2\]"),
        (
            {"grad_scale": torch.ones(1)},
            r"grad_scale must be a scalar or \[2\], floating-point, contiguous, not float32 \[1\]",
        ),
        ({"grad_scale": 0.5}, "grad_scale must be a scalar or .*, not float"),
        ({"grad_scale": torch.ones((), device="meta")}, "grad_scale is on meta, the other arguments on cpu"),
        ({"params": [torch.zeros(3), torch.zeros(2).half()]}, r"params\[1\] must be float32 or float64, not float16"),
        ({"params": [None, torch.zeros(2)]}, r"params\[0\] must be a tensor, not NoneType"),
        ({"grads": [None]}, "grads must be a list of 2 as params, not a list of 1"),
        ({"exp_avgs": [torch.zeros(3), None]}, r"exp_avgs\[1\] must be a tensor where a gradient is, not None"),
        (
            {"exp_avg_sqs": [torch.zeros(3), torch.zeros(2).half()]},
            r"exp_avg_sqs\[1\] must be float32 as params\[1\], not float16 \[2\]",
        ),
        ({"teacher": [None, torch.zeros(3)]}, r"teacher\[1\] must be \[2\] as params\[1\], not \[3\]"),
        ({"teacher_copies": [None, torch.zeros(2)]}, "teacher_copies must be None without a teacher, not a list"),
        (
            {"teacher": [torch.zeros(3), None], "teacher_copies": [None, torch.zeros(2)]},
            r"teacher_copies\[1\] must be None as teacher\[1\], not a tensor",
        ),
    ],
)
def test_bad_arguments_of_adamw_ema_are_named(path, change, message):
    lists = {name: [torch.zeros(3), torch.zeros(2)] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs")}
    given = {"numbers": torch.ones(4, dtype=torch.float64), "betas": (0.9, 0.95), "eps": 1e-8}
    with forced(path), pytest.raises(KernelError, match=message):
        adamw_ema(**lists | given | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 0}, "adamw_ema: step must be at least 1, not 0"),
        ({"momentum": -0.1}, r"momentum must be in \[0, 1\], not -0.1"),
        ({"betas": (1.0, 0.9)}, r"betas must be in \[0, 1\), not \(1.0, 0.9\)"),
    ],
)
def test_bad_numbers_are_named(change, message):
    with pytest.raises(KernelError, match=message):
        adamw_numbers(**{"step": 1, "lr": 0.1, "weight_decay": 0.1, "betas": (0.9, 0.95)} | change)


def test_a_factor_of_0_is_no_gradient(path, device):
    """Parameter and moments keep every bit, whatever the gradient holds; the teacher moves; the others have their own
    factors."""
    params, grads, m, v = state(device)
    m, v = normal(device, seed=3), [x.square() for x in normal(device, seed=4)]
    teacher, average = normal(device, seed=5), normal(device, seed=5)
    grads[1].fill_(torch.nan)
    grads[2].fill_(torch.inf)
    before = [[x.clone() for x in items] for items in (params, m, v)]
    other = [[x.clone() for x in items] for items in (params, grads, m, v)]
    factors = torch.tensor([0.5, 0.0, 0.0, 2.0], device=device)
    with forced(path):
        adamw(params, grads, m, v, 3, **STEP, grad_scale=factors, teacher=teacher, momentum=0.75)
        for i, factor in ((0, 0.5), (3, 2.0)):
            one = [[x[i]] for x in other]
            one[1][0] *= factor
            adamw(*one, 3, **STEP)
    for items, others, old in zip((params, m, v), (other[0], *other[2:]), before, strict=True):
        assert torch.equal(items[1], old[1])
        assert torch.equal(items[2], old[2])
        assert torch.equal(items[0], others[0])
        assert torch.equal(items[3], others[3])
    expected = [torch.lerp(a, p, 0.25) for a, p in zip(average, params, strict=True)]
    torch.testing.assert_close(teacher, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sgd_equals_torch_over_several_steps(path, dtype, device):
    params, _, sums, _ = state(device)
    params, sums = ([x.to(dtype) for x in items] for items in (params, sums))
    mirror = [p.clone().requires_grad_() for p in params]
    optimizer = torch.optim.SGD(mirror, lr=1.0, momentum=0.8, foreach=False)
    for step in range(1, 5):
        grads = normal(device, dtype=dtype, seed=step)
        grads[step % 4] = None
        optimizer.param_groups[0] |= {"lr": 0.1 / step, "weight_decay": 0.01 * step}
        for p, g in zip(mirror, grads, strict=True):
            p.grad = g if g is None else g.clone()
        optimizer.step()
        numbers = sgd_numbers(0.1 / step, 0.01 * step, 0.8)
        with forced(path):
            sgd_ema(params, grads, sums, torch.tensor(numbers, dtype=torch.float64, device=device))
    exact = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-6, "atol": 5e-7}
    torch.testing.assert_close(params, [p.detach() for p in mirror], **exact)


def test_momentum_may_lie_on_the_device(path, device):
    """Given as float64 it keeps its digits: 1 - 0.99996 in float32 would be off by a thousandth."""
    teacher, student = normal(device), normal(device, seed=1)
    other = [t.clone() for t in teacher]
    with forced(path):
        ema_update(teacher, student, 0.99996)
        ema_update(other, student, torch.tensor(0.99996, dtype=torch.float64, device=device))
    assert all(map(torch.equal, teacher, other))
