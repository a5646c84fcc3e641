"""Ahead-of-time build of every kernel that the ops launch, without a GPU: registers, spills and shared memory.

The launches are not listed by hand: each op runs forward and backward on its cases while launches are only recorded,
and what was recorded is compiled for each architecture exactly as a real launch would be.
"""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fastssl.kernels import _launch
from fastssl.kernels._check import KernelError
from fastssl.kernels._path import forced, has_triton
from fastssl.kernels._spec import Maker, Op, map_tensors
from fastssl.kernels._verify import run

ARCHS = (80, 90, 100)  # A100, H100 and H200, B200
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes of shared memory that a block can have

# Spills of one version of Triton's compiler, where the others have none. They are the compiler's, and allowed up to the
# bytes given, by Triton's major.minor, op, dtype and architecture. Every other spill is a failure.
KNOWN_SPILLS: dict[tuple[str, str, str, int], int] = {}


@dataclass(frozen=True)
class Build:
    """One kernel variant on one architecture.

    Attributes:
        op, case, dtype: the first that launches it.
        kernel: name of the function.
        arch: 80, 90 or 100.
        registers: per thread.
        spills: bytes of local memory per thread, for want of registers.
        shared: bytes of shared memory per block.
        warps: per block.
    """

    op: str
    case: str
    dtype: str
    kernel: str
    arch: int
    registers: int
    spills: int
    shared: int
    warps: int

    @property
    def known(self) -> bool:
        """Spills, but no more than this version of Triton is known for."""
        known = KNOWN_SPILLS.get((triton_version(), self.op, self.dtype, self.arch), 0)
        return 0 < self.spills <= known

    @property
    def ok(self) -> bool:
        """No spills but known ones, and the shared memory fits."""
        return (self.spills == 0 or self.known) and self.shared <= SHARED_LIMIT[self.arch]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"path": "triton", "arch": f"sm_{self.arch}"}


def build_all(ops: list[Op], archs: tuple[int, ...] = ARCHS) -> list[Build]:
    """Compiles every variant that the ops launch on their training sizes (cases.py lists one case per path).

    Raises:
        KernelError: Triton is missing or set to interpret.
    """
    if not has_triton():
        raise KernelError("the package triton is not installed, so no kernel can be built")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise KernelError("TRITON_INTERPRET=1 is set, so kernels are interpreted and cannot be built; unset it")
    workers = min(len(ops), os.cpu_count() or 1)
    if workers < 2:
        return [build for op in ops for build in _build(op, archs)]
    _shared[:] = ops
    context = multiprocessing.get_context("fork")  # the children touch no GPU
    with ProcessPoolExecutor(workers, context) as pool:
        jobs = [pool.submit(_build_number, number, archs) for number in range(len(ops))]
        return [build for job in jobs for build in job.result()]


_shared: list[Op] = []  # what the forked processes inherit; an Op holds functions, which cannot be sent


def _build_number(number: int, archs: tuple[int, ...]) -> list[Build]:
    return _build(_shared[number], archs)


def _build(op: Op, archs: tuple[int, ...]) -> list[Build]:
    """Every variant of one op, once per architecture."""
    launches = list(_launches(op))
    builds = []
    for arch in archs:
        seen: set[str] = set()
        with _target(arch):
            for case, dtype, (kernel, arguments, options) in launches:
                compiled = kernel.warmup(*arguments, grid=(1,), **options)
                if compiled.hash not in seen:
                    seen.add(compiled.hash)
                    builds.append(_measure(op.name, case, dtype, arch, compiled))
    return builds


def _launches(op: Op) -> Iterator[tuple[str, str, _launch.Launch]]:
    """Case, dtype and launch of every kernel launch of the op."""
    for case, parameters in op.bench.items():
        for dtype in op.dtypes:
            inputs = op.inputs(Maker(empty=True), dtype, **parameters)
            inputs = map_tensors(inputs, lambda x: x.to("cpu"))
            with _launch.record() as recorded, forced("triton"):
                run(op, op.call, inputs, None, empty=True)
            for found in recorded:
                yield case, str(dtype).removeprefix("torch."), found


class _Driver:
    """Stands in for the GPU's driver: says which architecture to compile for."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.arch = arch
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return -self.arch  # no real device: the kernels' caches of real ones stay as they are

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


@contextmanager
def _target(arch: int) -> Iterator[None]:
    from triton.runtime import driver

    driver.set_active(_Driver(arch))
    try:
        yield
    finally:
        if torch.cuda.is_available():
            driver.reset_active()


def _measure(op: str, case: str, dtype: str, arch: int, compiled: Any) -> Build:
    """What the built kernel says it uses. Without arrays of its own, a kernel's stack frame holds what was spilled."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise KernelError(f"{op}, {case}, {dtype}, sm_{arch}: cuobjdump failed: {done.stderr.strip().splitlines()[0]}")
    registers, stack = (int(_found(rf"{name}:(\d+)", done.stdout)) for name in ("REG", "STACK"))
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    return Build(op, case, dtype, compiled.metadata.name, arch, registers, stack, shared, warps)


def _found(pattern: str, text: str) -> str:
    """The group of the pattern where it first matches."""
    match = re.search(pattern, text, re.MULTILINE)
    if match is None:
        raise KernelError(f"the compiler's output has no match for {pattern}")
    return match[1]


def triton_version() -> str:
    """Major and minor number of the installed Triton, "3.8"."""
    return ".".join(importlib.metadata.version("triton").split(".")[:2])


def device_arch() -> int | None:
    """The architecture number of this machine's GPU, as in ARCHS."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor
