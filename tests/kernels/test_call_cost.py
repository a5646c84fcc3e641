"""What a call of an op costs the host: with launches left out, little more than a trivial autograd function."""

import time
from collections.abc import Callable

import pytest
import torch

from fastssl.kernels import _launch
from fastssl.kernels._path import forced
from fastssl.kernels.masked_attention_gather import gather_tokens

CALLS, REPEATS = 50, 60


class Trivial(torch.autograd.Function):
    """Forward and backward make one tensor each."""

    @staticmethod
    def forward(ctx, x):
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, upstream):
        return torch.empty_like(upstream)


class Nothing(list):
    """Keeps no launch: kept tensors would be copied by whoever else is given them."""

    def append(self, item):
        pass


@pytest.fixture(autouse=True)
def _no_launches():
    with _launch.record(), forced("triton"):
        _launch._recorded = Nothing()
        yield


def least(*functions: Callable[[], None]) -> list[float]:
    """Process time of one call of each in microseconds, the least of many short runs that take turns."""
    found = [float("inf")] * len(functions)
    for _ in range(REPEATS):
        for i, f in enumerate(functions):
            start = time.process_time()
            for _ in range(CALLS):
                f()
            found[i] = min(found[i], (time.process_time() - start) / CALLS * 1e6)
    return found


def assert_within(limit: float, trivial: Callable[[], None], op: Callable[[], None]) -> None:
    """A busy machine may have several tries; a slow op fails all of them."""
    times = []
    for _ in range(5):
        bare, whole = least(trivial, op)
        if whole <= limit * bare:
            return
        times.append(f"{whole:.1f} to {bare:.1f} us")
    raise AssertionError(f"more than {limit} times a trivial function: {', '.join(times)}")


def test_gather_costs_at_most_twice_a_trivial_function():
    tokens = torch.randn(2, 8, 16, requires_grad=True)
    ids = torch.arange(4).repeat(2, 1)
    upstream, kept_upstream = torch.ones(2, 8, 16), torch.ones(2, 4, 16)

    def trivial():
        torch.autograd.backward(Trivial.apply(tokens), upstream)
        tokens.grad = None

    def gather():
        torch.autograd.backward(gather_tokens(tokens, ids), kept_upstream)
        tokens.grad = None

    assert_within(2, trivial, gather)


@torch.no_grad()
def test_gather_without_a_gradient_costs_little():
    tokens, ids = torch.randn(2, 8, 16), torch.arange(4).repeat(2, 1)
    assert_within(5, lambda: Trivial.apply(tokens), lambda: gather_tokens(tokens, ids))
