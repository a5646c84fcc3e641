"""The proof itself: it passes what is right and finds each kind of wrong."""

from dataclasses import replace

import pytest
import torch

from fastssl.kernels._spec import FP16, FP32, Maker, Op, map_tensors, nbytes, tensors
from fastssl.kernels._verify import poisoned, verify


def double(x, y):
    return 2 * x + y, x.sum()


def accumulate(x, y):
    y += x


OP = Op(
    name="double",
    call=double,
    reference=double,
    inputs=lambda make, dtype, n: {"x": make.normal(n, 3, dtype=dtype), "y": make.normal(n, 3, dtype=dtype)},
    proof={},
    bench={},
    min_bytes=lambda inputs, outputs, backward: nbytes(inputs),
    gradients=("x",),
)


def test_what_is_right_passes():
    names = [error.name for error in verify(OP, {"n": 5}, FP32)]
    assert names == ["output 0", "output 1", "gradient of x"]
    verify(OP, {"n": 0}, FP32)
    verify(replace(OP, call=accumulate, reference=accumulate, gradients=(), mutates=("y",)), {"n": 5}, FP16)


class WrongSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):
        return double(x, y)

    @staticmethod
    def backward(ctx, first, second):
        return 2 * first, None  # forgets the sum


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x, y: (torch.where(torch.arange(15).view(5, 3) == 7, 0, 2 * x + y), x.sum()), "output 0 is off"),
        (lambda x, y: (2 * x + y, x.sum() * 1.001), "output 1 is off"),
        (lambda x, y: (2 * x + y, torch.empty_like(x.sum()) + 0 * x.sum()), "output 1 is off by nan"),
        (lambda x, y: (2 * x + y,), "1 outputs, the reference has 2"),
        (lambda x, y: (2 * x.T + y.T, x.sum()), r"output 0 is \[3, 5\], reference \[5, 3\]"),
        (lambda x, y: WrongSlope.apply(x, y), "gradient of x is off"),
    ],
)
def test_what_is_wrong_is_found(wrong, message):
    with pytest.raises(AssertionError, match=message):
        verify(replace(OP, call=wrong), {"n": 5}, FP32)


def test_an_input_that_should_change_and_does_not_is_found():
    op = replace(OP, call=lambda x, y: None, reference=accumulate, gradients=(), mutates=("y",))
    with pytest.raises(AssertionError, match="output 0 is off"):
        verify(op, {"n": 5}, FP32)


def test_tolerance_follows_the_type():
    rough = replace(OP, call=lambda x, y: (2 * x + y, x.sum() * (1 + 5e-4)), tolerance={})
    verify(rough, {"n": 5}, FP16)
    with pytest.raises(AssertionError):
        verify(rough, {"n": 5}, FP32)
    verify(replace(rough, tolerance={FP32: (1e-3, 1e-3)}), {"n": 5}, FP32)


def test_poison_fills_what_nothing_writes():
    with poisoned():
        assert torch.empty(3).isnan().all()
        assert (torch.empty(3, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_maker_repeats_and_nests_are_walked():
    first, again, other = (Maker(seed=seed).normal(4) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    ids = Maker().choice(3, 7, 4)
    assert all(row.unique().numel() == 4 for row in ids)
    nest = {"a": [torch.ones(2), None], "b": (torch.zeros(3), 5)}
    assert [x.numel() for x in tensors(nest)] == [2, 3]
    assert map_tensors(nest, lambda x: x + 1)["b"][0].sum() == 3
