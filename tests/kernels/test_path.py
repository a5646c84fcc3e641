"""Which path a call takes."""

import importlib.util
import os

import pytest
import torch

from fastssl.kernels import _launch, _path
from fastssl.kernels._check import KernelError
from fastssl.kernels._path import VARIABLE, forced, use_triton

CPU = torch.zeros(1)


def test_the_reference_runs_on_the_cpu_unless_told_otherwise(monkeypatch):
    for mode in ("auto", "reference"):
        with forced(mode):
            assert not use_triton("op", CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with forced("triton"):
        assert use_triton("op", CPU)


def test_a_kernel_that_cannot_run_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with forced("triton"), pytest.raises(KernelError, match="op: FASTSSL_KERNELS=triton needs CUDA tensors"):
        use_triton("op", CPU)
    monkeypatch.setattr(_path, "_find", lambda package: False)
    with forced("triton"), pytest.raises(KernelError, match="the package triton is not installed"):
        use_triton("op", CPU)
    with forced("cuda"), pytest.raises(KernelError, match="FASTSSL_KERNELS is 'cuda'; it must be one of auto, ref"):
        use_triton("op", CPU)


def test_forced_puts_the_variable_back(monkeypatch):
    """Also in the environment, which processes that are started meanwhile inherit."""
    mode = _path._mode
    for before in ("reference", None):
        monkeypatch.setenv(VARIABLE, before) if before else monkeypatch.delenv(VARIABLE, raising=False)
        with forced("triton"):
            assert (_path._mode, os.environ[VARIABLE]) == ("triton", "triton")
        with pytest.raises(RuntimeError), forced("triton"):
            raise RuntimeError
        assert (_path._mode, os.environ.get(VARIABLE)) == (mode, before)


@pytest.mark.parametrize(("value", "mode"), [("reference", "reference"), ("", "auto"), (None, "auto")])
def test_the_variable_is_read_at_import(value, mode, monkeypatch):
    monkeypatch.setenv(VARIABLE, value) if value is not None else monkeypatch.delenv(VARIABLE, raising=False)
    spec = importlib.util.spec_from_file_location("read_again", _path.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module._mode == mode


def test_launches_are_recorded_instead_of_run():
    def kernel():
        raise AssertionError("must not run")

    with _launch.record() as outer:
        assert _launch.recording()
        _launch.launch(kernel, (1,), CPU, 3, BLOCK=8)
        _launch.launch(kernel, (4, 0), CPU)  # an empty grid is no launch
    assert not _launch.recording()
    assert outer == [(kernel, (CPU, 3), {"BLOCK": 8, "enable_fp_fusion": True})]


def test_rounding():
    assert [_launch.power_of_2(n) for n in (0, 1, 2, 3, 64, 65)] == [1, 1, 2, 4, 64, 128]
    assert [_launch.cdiv(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]


def test_the_compiled_twin_is_for_the_cpu_unless_told_otherwise(monkeypatch):
    monkeypatch.setattr(_path, "_mode", "auto")
    monkeypatch.setattr(_path, "_find", lambda package: package == "numba")
    assert _path.use_numba(CPU)
    assert not _path.use_numba(CPU, torch.zeros(1, device="meta"))
    for mode in ("reference", "triton"):
        with forced(mode):
            assert not _path.use_numba(CPU)
    monkeypatch.setattr(_path, "_find", lambda package: False)
    assert not _path.use_numba(CPU)
