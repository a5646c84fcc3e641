"""Argument checks: what fits binds its letters, what does not is one line with op, argument, expected and got."""

import pytest
import torch

from fastssl.kernels._check import INTEGERS, KernelError, Shapes, check


def test_letters_are_bound_by_the_first_tensor_and_hold_for_the_next():
    shapes = Shapes("op", D=4)
    assert shapes("x", torch.zeros(2, 3, 4), "B N D") == (2, 3, 4)
    assert shapes.sizes == {"B": 2, "N": 3, "D": 4}
    shapes("scale", torch.zeros(()), "")
    shapes("ids", torch.zeros(2, 5, dtype=torch.int32), "B K", INTEGERS)
    with pytest.raises(KernelError, match=r"^op: y must be \[B, K\] with B = 2, K = 5, not \[2, 6\]$"):
        shapes("y", torch.zeros(2, 6), "B K")


@pytest.mark.parametrize(
    ("value", "shape", "message"),
    [
        (torch.zeros(2), "2 3", r"op: x must be \[2, 3\], not \[2\]"),
        (torch.zeros(3, 3), "2 3", r"op: x must be \[2, 3\], not \[3, 3\]"),
        (torch.zeros(2, dtype=torch.int8), "B", "op: x must be float32 or float16 or bfloat16 or float64, not int8"),
        ([1, 2], "B", r"op: x must be a tensor \[B\], not list"),
        (torch.zeros(5, device="meta"), "B", "op: x is on meta, the other arguments on cpu"),
    ],
)
def test_what_does_not_fit_is_named(value, shape, message):
    shapes = Shapes("op")
    shapes("first", torch.zeros(5), "A")
    with pytest.raises(KernelError, match=message):
        shapes("x", value, shape)


def test_check():
    check(True, "op", "x", "y", "z")
    with pytest.raises(KernelError, match=r"^op: temperature must be positive, not -1$"):
        check(False, "op", "temperature", "positive", -1)
