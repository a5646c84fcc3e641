"""Kept tokens: against the float64 reference, by loops over samples, and by their properties."""

import pytest
import torch

from fastssl.kernels._check import KernelError
from fastssl.kernels._path import forced
from fastssl.kernels.masked_attention_gather import gather_tokens


def tokens_example(device):
    torch.manual_seed(0)
    ids = torch.stack([torch.randperm(7)[:4] for _ in range(3)])
    count = torch.tensor([2, 0, 4])
    ids = torch.where(torch.arange(4) < count[:, None], ids, -(1 << 40))  # not even valid as 32-bit numbers
    return torch.randn(3, 7, 20, device=device, requires_grad=True), ids.to(device), count.to(device)


def test_gather_equals_its_loop(path, device):
    tokens, ids, count = tokens_example(device)
    expected = torch.zeros(3, 4, 20, device=device)
    for b, length in enumerate(count.tolist()):
        for k, n in enumerate(ids[b, :length].tolist()):
            expected[b, k] = tokens[b, n]
    with forced(path):
        out = gather_tokens(tokens, ids, count=count)
        assert torch.equal(out, expected)
        upstream = torch.randn_like(expected)
        [gradient] = torch.autograd.grad(out, tokens, upstream)
    assert torch.equal(gradient, torch.autograd.grad(expected, tokens, upstream)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_gather_keeps_the_type(path, dtype, device):
    """The kernel does not take float64; the reference takes its place."""
    tokens, ids, count = tokens_example(device)
    tokens = tokens.detach().to(dtype).requires_grad_()
    with forced(path):
        out = gather_tokens(tokens, ids, count=count)
        assert out.dtype == dtype
        assert torch.autograd.grad(out.sum(), tokens)[0].dtype == dtype


def test_gather_compiles_without_a_graph_break(device, compiles_whole):
    tokens, ids, count = tokens_example(device)
    compiles_whole(lambda x: gather_tokens(x, ids, count=count), tokens)
    compiles_whole(lambda x: gather_tokens(x, ids[:, :0]), tokens)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"ids": torch.zeros(3, 2, dtype=torch.int64)},
            r"gather_tokens: ids must be \[B, K\] with B = 2, not \[3, 2\]",
        ),
        ({"ids": torch.zeros(2, 2)}, "ids must be int32 or int64, not float32"),
        ({"count": torch.zeros(1, dtype=torch.int64)}, r"count must be \[B\] with B = 2, not \[1\]"),
    ],
)
def test_bad_arguments_of_gather_are_named(change, message):
    inputs = {"tokens": torch.zeros(2, 4, 8), "ids": torch.zeros(2, 2, dtype=torch.int64)}
    with pytest.raises(KernelError, match=message):
        gather_tokens(**inputs | change)
