"""The proof of an op on one case: outputs and gradients of the kernel against the reference in float64.

The tests run it on small and ragged cases, the bench on every case before it times it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastssl.kernels._path import forced
from fastssl.kernels._spec import Case, Maker, Op, map_tensors, tensors


@dataclass(frozen=True)
class Error:
    """How far one output or gradient is from the reference.

    Attributes:
        name: "output 0", "gradient of student", ..
        relative: ||error|| / ||reference||.
        worst: largest error / largest reference value.
        ok: whether both are within the op's bounds.
    """

    name: str
    relative: float
    worst: float
    ok: bool


def verify(op: Op, case: Case, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> list[Error]:
    """Runs the kernel and the float64 reference on the same inputs and upstream gradients.

    Uninitialised memory is NaN during the kernel's run, so an output that is not written shows.

    Returns:
        One entry per output and per gradient.

    Raises:
        AssertionError: one of them is out of bounds, or has another shape than the reference's.
    """
    inputs = op.inputs(Maker(device, seed), dtype, **case)
    exact = map_tensors(inputs, lambda x: x.double() if x.is_floating_point() else x.clone())
    expected, expected_grads, upstream = run(op, op.reference, exact, None, seed)
    with poisoned(), forced("triton"):
        got, got_grads, _ = run(op, op.call, inputs, upstream, seed)
    assert len(got) == len(expected), f"{op.name}: {len(got)} outputs, the reference has {len(expected)}"
    pairs = [(f"output {i}", got[i], expected[i]) for i in (op.compare or range(len(got)))]
    errors = [_error(op, dtype, *pair) for pair in pairs]
    same = got_grads.keys() == expected_grads.keys()
    assert same, f"{op.name}: not the same outputs as the reference's have a gradient"
    errors += [_error(op, dtype, f"gradient of {n}", got_grads[n], expected_grads[n]) for n in expected_grads]
    bad = [error for error in errors if not error.ok]
    assert not bad, f"{op.name} {case} {dtype}: " + "; ".join(
        f"{error.name} is off by {error.relative:.2e} (relative), {error.worst:.2e} (worst)" for error in bad
    )
    return errors


def run(
    op: Op,
    f: Callable[..., Any],
    inputs: dict[str, Any],
    upstream: list[Tensor] | None,
    seed: int = 0,
    *,
    empty: bool = False,
) -> tuple[list[Tensor], dict[str, Tensor], list[Tensor]]:
    """Calls `f` on copies of the inputs, and back with random (or the given) upstream gradients.

    With `empty`, the inputs themselves are used and upstream gradients hold anything.

    Returns:
        Outputs (then the mutated inputs), gradients by input name ("x[1]" for an item of a list; none if the upstream
        gradients do not fit the outputs that ask for them), upstream gradients.
    """
    if not empty:
        inputs = map_tensors(inputs, _copy)
    leaves = {}
    for name in op.gradients:
        for i, leaf in enumerate(tensors(inputs[name])):
            leaves[name if isinstance(inputs[name], Tensor) else f"{name}[{i}]"] = leaf.requires_grad_()
    outputs = tensors(f(**inputs))
    grads: dict[str, Tensor] = {}
    if leaves:
        roots = [output for output in outputs if output.requires_grad]
        if upstream is None:
            maker = Maker(roots[0].device if roots else "cpu", seed + 1, empty=empty)
            upstream = [maker.normal(*root.shape, scale=op.upstream) for root in roots]
        if [root.shape for root in roots] == [gradient.shape for gradient in upstream]:
            given = [gradient.to(root.dtype) for gradient, root in zip(upstream, roots, strict=True)]
            values = torch.autograd.grad(roots, list(leaves.values()), given, allow_unused=True)
            grads = {
                name: torch.zeros_like(leaf) if value is None else value
                for (name, leaf), value in zip(leaves.items(), values, strict=True)
            }
    outputs = [output.detach() for output in outputs] + [x for name in op.mutates for x in tensors(inputs[name])]
    return outputs, grads, upstream or []


def _copy(x: Tensor) -> Tensor:
    """A copy with the same strides (clone makes an expanded or sliced tensor dense)."""
    if 0 in x.stride() or x.numel() == 0:
        return x.detach().clone()
    copy = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return copy.copy_(x.detach())


@contextmanager
def poisoned() -> Iterator[None]:
    """Within the context new tensors that nothing has written hold NaN (integers: the largest number)."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    setting: Any = torch.utils.deterministic
    fill, setting.fill_uninitialized_memory = setting.fill_uninitialized_memory, True
    try:
        yield
    finally:
        setting.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _error(op: Op, dtype: torch.dtype, name: str, got: Tensor, expected: Tensor) -> Error:
    assert got.shape == expected.shape, f"{op.name}: {name} is {list(got.shape)}, reference {list(expected.shape)}"
    if got.numel() == 0:
        return Error(name, 0.0, 0.0, True)
    bound, worst_bound = op.bounds(dtype)
    if dtype == torch.bfloat16 and got.is_cuda:  # rounded to the nearest; the interpreter cuts off
        bound, worst_bound = bound / 2, worst_bound / 2
    got, expected = got.double(), expected.double()
    same = got == expected  # also infinities
    error = torch.where(same, 0.0, got - expected)
    reference = torch.where(expected.isfinite(), expected, 0.0)
    tiny = 1e-12
    relative = (error.norm() / reference.norm().clamp_min(tiny)).item()
    worst = (error.abs().max() / reference.abs().max().clamp_min(tiny)).item()
    return Error(name, relative, worst, relative <= bound and worst <= worst_bound)  # NaN is not <=
