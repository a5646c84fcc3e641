"""The one place where kernels are launched, so that launches can also be recorded without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]  # kernel, arguments, constants and options
_recorded: list[Launch] | None = None
_listener: Callable[[Launch], None] | None = None


# No fused multiply-add: fma(a, b, -c) with c = a x b rounded is the rounding error of c, not 0, so differences that
# cancel (a mean of one value, one prototype) would leave it. For kernels that memory bounds it costs nothing.
EXACT = {"enable_fp_fusion": False}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """kernel[grid](*arguments, **options) on the device of its first tensor; nothing for an empty grid.

    Args:
        kernel: a triton.jit function.
        grid: programs along up to three axes.
        *arguments: tensors and numbers, positional as in the kernel's signature.
        **options: its constexpr parameters, num_warps, num_stages.
    """
    if 0 in grid:
        return
    options.setdefault("enable_fp_fusion", True)
    if _listener is not None:
        _listener((kernel, arguments, options))
    if _recorded is not None:
        _recorded.append((kernel, arguments, options))
        return
    tensor = next(value for value in arguments if isinstance(value, torch.Tensor))
    with torch.cuda.device_of(tensor):
        kernel[grid](*arguments, **options)


def listen(listener: Callable[[Launch], None] | None) -> Callable[[Launch], None] | None:
    """From now on `listener` hears of every launch (None: nobody); returns who heard of them before."""
    global _listener
    before, _listener = _listener, listener
    return before


@contextmanager
def record(keep: bool = True) -> Iterator[list[Launch]]:
    """Within the context `launch` runs nothing and lists what it would have run; not `keep`: nothing is listed, so that
    no tensor lives longer than it would."""
    global _recorded
    before, _recorded = _recorded, [] if keep else _Nothing()
    try:
        yield _recorded
    finally:
        _recorded = before


class _Nothing(list[Launch]):
    def append(self, launch: Launch) -> None:
        """Forgets it."""


def recording() -> bool:
    """Whether launches are being recorded."""
    return _recorded is not None


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two that is at least n (1 for 0)."""
    return 1 << max(n - 1, 0).bit_length()
