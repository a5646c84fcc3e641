"""What only a GPU can show of the ops: the same bits at every run, no waiting for the host, no access out of bounds."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from fastssl.kernels._bench import FOLDERS, all_ops
from fastssl.kernels._path import forced
from fastssl.kernels._spec import Maker, map_tensors
from fastssl.kernels._verify import run, verify

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
OPS = [op for folder in FOLDERS for op in all_ops(folder)]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_training_sizes_equal_the_reference(op):
    for case in op.bench.values():
        for dtype in op.dtypes:
            try:
                verify(op, case, dtype, "cuda")
            except torch.OutOfMemoryError:  # of the float64 reference
                torch.cuda.empty_cache()


@pytest.mark.parametrize("op", [op for op in OPS if op.deterministic], ids=lambda op: op.name)
def test_repeats_bit_for_bit(op):
    case = next(iter(op.bench.values()))
    for dtype in op.dtypes:
        inputs = op.inputs(Maker("cuda"), dtype, **case)
        with forced("triton"):
            first, grads, upstream = run(op, op.call, inputs, None)
            again, grads_again, _ = run(op, op.call, inputs, upstream)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert all(torch.equal(grads[name], grads_again[name]) for name in grads)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_never_waits_for_the_device(op):
    inputs = op.inputs(Maker("cuda"), op.dtypes[-1], **next(iter(op.bench.values())))
    with forced("triton"):
        _, _, upstream = run(op, op.call, inputs, None)  # compiles, fills caches
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(op, op.call, map_tensors(inputs, lambda x: x), upstream)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.skipif(not shutil.which("compute-sanitizer"), reason="needs compute-sanitizer")
def test_memcheck_finds_nothing(op):
    code = (
        "from fastssl.kernels._bench import all_ops; from fastssl.kernels._verify import verify\n"
        f"[op] = [op for op in all_ops() if op.name == {op.name!r}]\n"
        "for case in op.proof.values():\n    for dtype in op.dtypes:\n        verify(op, case, dtype, 'cuda')\n"
    )
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=_without_caching())
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def _without_caching() -> dict[str, str]:
    """PyTorch's caching allocator would hide accesses past a tensor's end."""
    return os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
