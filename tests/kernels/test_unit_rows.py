"""Rows of length one: against the float64 reference, PyTorch's functions, and by their properties."""

import pytest
import torch
import torch.nn.functional as F

from fastssl.kernels import _launch
from fastssl.kernels._check import KernelError
from fastssl.kernels._path import forced
from fastssl.kernels.unit_rows import cases, unit_rows

OP = cases.OPS[0]


@pytest.mark.parametrize("dtype", OP.dtypes, ids=str)
def test_rows_have_length_one_times_their_gain(path, dtype, device):
    torch.manual_seed(0)
    x, gain = (torch.randn(5, 24, device=device) * 1e3).to(dtype), torch.randn(5, 1, device=device)
    with forced(path), torch.autocast(device, torch.bfloat16):
        plain, scaled = unit_rows(x), unit_rows(x, gain)
    assert plain.dtype == scaled.dtype == torch.float32
    torch.testing.assert_close(plain.norm(dim=1), torch.ones(5, device=device))
    torch.testing.assert_close(scaled, gain * plain)
    torch.testing.assert_close(F.cosine_similarity(plain, x.float()), torch.ones(5, device=device))


def test_the_plain_path_gives_pytorchs_bits():
    x, gain = torch.randn(5, 24), torch.randn(5, 1)
    assert torch.equal(unit_rows(x), F.normalize(x, dim=-1))
    assert torch.equal(unit_rows(x, gain), gain * F.normalize(x, dim=1))


def test_a_row_of_zeros_stays_and_has_pytorchs_gradient(path, device):
    x = torch.zeros(2, 6, device=device)
    x[1] = 1
    x.requires_grad_()
    with forced(path):
        y = unit_rows(x)
        (got,) = torch.autograd.grad(y[:, 0].sum() * 1e-12, x)
    assert y[0].eq(0).all()
    assert got[0].tolist() == pytest.approx([1.0, 0, 0, 0, 0, 0])


def test_one_launch_each_way(device):
    x = torch.randn(5, 24, device=device, requires_grad=True)
    with forced("triton"), _launch.record() as launches:
        unit_rows(x).sum().backward()
    assert [kernel.__name__ for kernel, *_ in launches] == ["_forward", "_backward"]


def test_compiles_without_a_graph_break(device, compiles_whole):
    x = torch.randn(4, 12, device=device, requires_grad=True)
    gain = torch.randn(4, 1, device=device, requires_grad=True)
    upstream = torch.randn(4, 12, device=device)
    compiles_whole(lambda x, gain: unit_rows(x, gain) * upstream, x, gain)


def test_bad_arguments_are_named():
    with pytest.raises(KernelError, match=r"unit_rows: x must be \[N, D\], not \[4\]"):
        unit_rows(torch.zeros(4))
    with pytest.raises(KernelError, match=r"unit_rows: gain must be \[N, 1\] with N = 4, not \[4\]"):
        unit_rows(torch.zeros(4, 3), torch.zeros(4))
