"""What an op's cases.py says about it: inputs to prove and time it with, and what it must move and compute at least."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Case = dict[str, Any]
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16

# Per dtype of the inputs: bound on ||error|| / ||reference||, and on the worst error / the largest reference value.
# BF16 is for Triton's interpreter, which cuts a float32 off instead of rounding it: on a card half of it holds.
TOLERANCE = {FP32: (2e-6, 2e-5), FP16: (1e-3, 4e-3), BF16: (8e-3, 3e-2)}


class Maker:
    """Draws the inputs of a case on a device, from a seed; `empty` draws nothing (for recording launches).

    Args:
        device: where the tensors are made.
        seed: of the generator; the same seed gives the same inputs on one device.
        empty: leave every tensor uninitialised.
    """

    def __init__(self, device: torch.device | str = "cpu", seed: int = 0, *, empty: bool = False) -> None:
        self.device = torch.device(device)
        self.empty = empty
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = FP32, scale: float = 1.0) -> Tensor:
        """Normal values with standard deviation `scale`, rounded to `dtype`."""
        if self.empty:
            return torch.empty(shape, dtype=dtype, device=self.device)
        return (torch.randn(shape, generator=self.generator, device=self.device) * scale).to(dtype)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0, dtype: torch.dtype = FP32) -> Tensor:
        """Values uniform in [low, high)."""
        if self.empty:
            return torch.empty(shape, dtype=dtype, device=self.device)
        return (torch.rand(shape, generator=self.generator, device=self.device) * (high - low) + low).to(dtype)

    def integers(self, *shape: int, low: int = 0, high: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Integers uniform in [low, high)."""
        if self.empty:
            return torch.empty(shape, dtype=dtype, device=self.device)
        return torch.randint(low, high, shape, generator=self.generator, device=self.device).to(dtype)

    def boolean(self, *shape: int, p: float = 0.5) -> Tensor:
        """True with probability p."""
        if self.empty:
            return torch.empty(shape, dtype=torch.bool, device=self.device)
        return torch.rand(shape, generator=self.generator, device=self.device) < p

    def choice(self, rows: int, n: int, k: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Per row k different numbers below n, ascending: [rows, k]."""
        if self.empty:
            return torch.empty(rows, k, dtype=dtype, device=self.device)
        scores = torch.rand(rows, n, generator=self.generator, device=self.device)
        return scores.argsort(dim=1)[:, :k].sort(dim=1).values.to(dtype)


@dataclass(frozen=True)
class Op:
    """One op and how to prove and time it.

    Attributes:
        name: as in the table.
        call: the public op; takes what `inputs` returns as keyword arguments, returns tensors (one, tuple, dict).
        reference: the same in plain PyTorch, exact in float64.
        inputs: (maker, dtype, **case) -> keyword arguments of both.
        proof: small and ragged cases by name, for the tests.
        bench: training sizes by name, for timing and for the ahead-of-time build.
        min_bytes: (inputs, outputs, backward) -> bytes that any implementation must move between chip and memory: each
            input read once, each output written once; `backward` counts the backward pass alone.
        flops: likewise, floating-point operations of the matrix products; 0 for a memory-bound op.
        gradients: names of the inputs that get a gradient.
        mutates: names of the inputs that are changed in place; they count as outputs.
        dtypes: of the inputs.
        library: the strongest library calls that do the same (or the nearest), by name; arguments as for `call`.
        tolerance: overrides of TOLERANCE.
        upstream: scale of the random upstream gradients (what a loss scaler does for float16).
        deterministic: whether two runs give the same bits.
        compare: outputs by position that the proof compares; None: all.
    """

    name: str
    call: Callable[..., Any]
    reference: Callable[..., Any]
    inputs: Callable[..., dict[str, Any]]
    proof: dict[str, Case]
    bench: dict[str, Case]
    min_bytes: Callable[[dict[str, Any], list[Tensor], bool], int]
    flops: Callable[[dict[str, Any], list[Tensor], bool], int] = lambda inputs, outputs, backward: 0
    gradients: tuple[str, ...] = ()
    mutates: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (FP32, FP16, BF16)
    library: dict[str, Callable[..., Any]] = field(default_factory=dict)
    tolerance: dict[torch.dtype, tuple[float, float]] = field(default_factory=dict)
    upstream: float = 1.0
    deterministic: bool = True
    compare: tuple[int, ...] | None = None

    def bounds(self, dtype: torch.dtype) -> tuple[float, float]:
        """(bound on the relative error, bound on the worst error) for inputs of this type."""
        return self.tolerance.get(dtype, TOLERANCE[dtype])


def tensors(value: Any) -> list[Tensor]:
    """All tensors in a nest of tuples, lists and dicts, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return []
    return [tensor for item in value for tensor in tensors(item)]


def map_tensors(value: Any, f: Callable[[Tensor], Tensor]) -> Any:
    """The same nest with `f` applied to every tensor."""
    if isinstance(value, Tensor):
        return f(value)
    if isinstance(value, dict):
        return {key: map_tensors(item, f) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, f) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(item, f) for item in value)
    return value


def nbytes(*values: Any) -> int:
    """Bytes of all tensors in the values."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(values))
