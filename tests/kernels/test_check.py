"""Argument checks: what fits binds its letters, what does not is one line with op, argument, expected and got."""

import pytest
import torch

from fastssl.kernels._check import INTEGERS, LIMIT, KernelError, Shapes, check, once


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


def test_checks_run_once_per_signature():
    calls = []

    @once
    def checks(x, option):
        calls.append(option)
        Shapes("op")("x", x, "B N")
        return x.shape[0]

    x = torch.zeros(2, 3)
    assert checks(x, 1) == checks(x + 1, 1) == 2
    assert calls == [1]
    others = [(x, 2), (torch.zeros(3, 3), 1), (x.double(), 1), (x.to("meta"), 1)]
    assert [checks(*other) for other in others] == [2, 3, 2, 2]
    assert calls == [1, 2, 1, 1, 1]
    for _ in range(2):  # a list cannot be remembered, an error must not be
        assert checks(x, [1]) == 2
        with pytest.raises(KernelError, match=r"op: x must be \[B, N\]"):
            checks(x[0], 1)
    assert calls[5:] == [[1], 1, [1], 1]


def test_what_is_remembered_is_bounded():
    calls = []
    checks = once(calls.append)
    for option in range(LIMIT + 1):
        checks(option)
    checks(LIMIT)
    assert len(calls) == LIMIT + 1
    checks(0)
    assert len(calls) == LIMIT + 2
