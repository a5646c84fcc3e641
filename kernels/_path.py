"""Which path an op takes: the Triton kernel or the PyTorch reference.

The environment variable FASTSSL_KERNELS decides: `auto` (default; the kernel for CUDA tensors where Triton is
installed), `reference` (never the kernel), `triton` (always the kernel; on the CPU only under TRITON_INTERPRET=1). An
op may have a compiled twin for the CPU (numba); `auto` takes it where numba is installed. The variable is read once,
when this module is imported; `forced` sets it afterwards.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from fastssl.kernels import _launch
from fastssl.kernels._check import KernelError

VARIABLE = "FASTSSL_KERNELS"
MODES = ("auto", "reference", "triton")
_mode = os.environ.get(VARIABLE) or "auto"


def kernel_mode() -> str:
    """The mode at present, one of MODES where the environment is right."""
    return _mode


def use_triton(op: str, *tensors: Tensor) -> bool:
    """Whether a call with these tensors goes to the kernel.

    Raises:
        KernelError: the variable has another value, or demands a kernel that cannot run.
    """
    if _mode not in MODES:
        raise KernelError(f"{VARIABLE} is '{_mode}'; it must be one of {', '.join(MODES)}")
    if _mode == "reference":
        return False
    on_gpu = True
    for tensor in tensors:
        on_gpu = on_gpu and tensor.is_cuda
    if _mode == "auto":
        return on_gpu and has_triton()
    if not has_triton():
        raise KernelError(f"{op}: {VARIABLE}=triton, but the package triton is not installed")
    if not (on_gpu or _interpreted()):
        raise KernelError(f"{op}: {VARIABLE}=triton needs CUDA tensors (or TRITON_INTERPRET=1 on the CPU)")
    return True


def use_numba(*tensors: Tensor) -> bool:
    """Whether a call with these tensors goes to the op's compiled CPU twin."""
    on_cpu = all(tensor.device.type == "cpu" for tensor in tensors)
    return on_cpu and _mode == "auto" and not torch.compiler.is_compiling() and _find("numba")


@torch.compiler.assume_constant_result
def _interpreted() -> bool:
    return _launch.recording() or os.environ.get("TRITON_INTERPRET") == "1"


@torch.compiler.assume_constant_result
def has_triton() -> bool:
    return _find("triton")


@cache
def _find(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@contextmanager
def forced(mode: str) -> Iterator[None]:
    """Within the context every op takes the path `mode`, one of MODES, here and in processes started meanwhile."""
    global _mode
    before, variable = _mode, os.environ.get(VARIABLE)
    _mode = os.environ[VARIABLE] = mode
    try:
        yield
    finally:
        _mode = before
        if variable is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = variable
