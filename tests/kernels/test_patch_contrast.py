"""InfoNCE between patches: against the float64 reference, SAAE's own formulation, and its card's oracles."""

import math

import pytest
import torch
import torch.nn.functional as F

from fastssl.kernels._check import KernelError
from fastssl.kernels._path import forced
from fastssl.kernels.patch_contrast import cases, patch_contrast

OP = cases.OPS[0]


def make(device="cpu", N=2, P=19, C=16, seed=0):
    torch.manual_seed(seed)
    a, b = torch.randn(N, P, C), torch.randn(N, P, C)
    return a.to(device), b.to(device), (torch.rand(N, P) < 0.4).to(device)


def grads(result, *leaves):
    return torch.autograd.grad(result.total, leaves)


def naive(a, b, valid, temperature):
    """The card's way: positives in column 0, negatives after them, target 200 where a row does not count."""
    a, b = a / (a.norm(dim=-1, keepdim=True) + 1e-10), b / (b.norm(dim=-1, keepdim=True) + 1e-10)
    logits = torch.bmm(a, b.mT)
    N, P, _ = logits.shape
    same = torch.eye(P, dtype=torch.bool, device=a.device).expand(N, P, P)
    positive, negative = logits[same].view(N, P, 1), logits[~same].view(N, P, P - 1)
    logits = torch.cat([positive, negative], -1).flatten(0, 1) / temperature
    target = torch.where(valid.flatten(), 0, 200)
    return F.cross_entropy(logits, target, ignore_index=200)


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_equals_the_cards_way(path, temperature, device):
    a, b, valid = make(device)
    leaves = [x.double().requires_grad_() for x in (a, b)]
    expected = naive(*leaves, valid, temperature)
    slopes = torch.autograd.grad(expected, leaves)
    leaves = [x.requires_grad_() for x in (a, b)]
    with forced(path):
        result = patch_contrast(*leaves, valid, temperature)
    loss = result.total / result.count.clamp(min=1)
    assert result.count.item() == valid.sum().item()
    assert not result.count.requires_grad
    torch.testing.assert_close(loss.item(), expected.item(), rtol=1e-5, atol=0)
    for got, wanted in zip(torch.autograd.grad(loss, leaves), slopes, strict=True):
        torch.testing.assert_close(got, wanted.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("dtype", "P", "C"), [(torch.float32, 34, 34), (torch.bfloat16, 196, 256)])
def test_known_values(path, dtype, P, C, device):
    """SAAE card, oracle 5: equal codes give ln P, equal orthonormal maps ln(1 + (P - 1) / e^5)."""
    valid = torch.ones(1, P, dtype=torch.bool, device=device)
    equal = torch.ones(1, P, C, device=device, dtype=dtype) * 0.3
    orthonormal = torch.eye(P, C, device=device, dtype=dtype)[None]
    with forced(path):
        uniform = patch_contrast(equal, equal, valid)
        sharp = patch_contrast(orthonormal, orthonormal, valid)
    assert uniform.count.item() == P
    torch.testing.assert_close(uniform.total.item() / P, math.log(P), rtol=1e-5, atol=0)
    torch.testing.assert_close(sharp.total.item() / P, math.log(1 + (P - 1) * math.exp(-5)), rtol=1e-5, atol=0)
    if P == 196:
        assert uniform.total.item() / P == pytest.approx(5.2781, abs=5e-5)
        assert sharp.total.item() / P == pytest.approx(0.8389, abs=5e-5)


def test_lengths_of_codes_do_not_matter(path, device):
    a, b, valid = make(device)
    longer = [x * torch.rand(*x.shape[:2], 1, device=device).mul(5).exp() for x in (a, b)]
    leaves = [x.requires_grad_() for x in (a, b, *longer)]
    with forced(path):
        first, second = patch_contrast(*leaves[:2], valid), patch_contrast(*leaves[2:], valid)
    torch.testing.assert_close(first.total, second.total, rtol=1e-5, atol=0)
    for x, slope in zip(leaves, (*grads(first, *leaves[:2]), *grads(second, *leaves[2:])), strict=True):
        assert ((x * slope).sum(-1).abs() <= 1e-6 * x.norm(dim=-1) * slope.norm(dim=-1) + 1e-6).all()


def test_rows_that_do_not_count_have_no_say_but_their_cells_of_b_are_negatives(path, device):
    """SAAE card, oracle 5."""
    a, b, valid = make(device)
    other_a = torch.where(valid[..., None], a, torch.randn_like(a))
    other_b = torch.where(valid[..., None], b, torch.randn_like(b))
    leaves = [x.requires_grad_() for x in (a, b)]
    with forced(path):
        result = patch_contrast(*leaves, valid)
        assert patch_contrast(other_a, b, valid).total == result.total
        assert (patch_contrast(a, other_b, valid).total - result.total).abs() > 0.1
        slope_a, slope_b = grads(result, *leaves)
    assert (slope_a[~valid] == 0).all()
    assert (slope_a[valid] != 0).any(-1).all()
    assert (slope_b != 0).any(-1).all()


def test_images_are_on_their_own_and_patches_may_change_places(path, device):
    a, b, valid = make(device)
    order = torch.randperm(a.shape[1], device=device)
    with forced(path):
        whole = patch_contrast(a, b, valid)
        parts = [patch_contrast(a[i : i + 1], b[i : i + 1], valid[i : i + 1]) for i in range(2)]
        moved = patch_contrast(a[:, order], b[:, order], valid[:, order])
        swapped = patch_contrast(b, a, valid)
    torch.testing.assert_close(sum(part.total for part in parts), whole.total)
    assert sum(part.count for part in parts) == whole.count
    torch.testing.assert_close(moved.total, whole.total)
    assert (swapped.total - whole.total).abs() > 0.1  # rows come from a only


def test_one_patch_has_nothing_to_tell_apart(path, device):
    a, b, valid = make(device, P=1)
    leaves = [x.requires_grad_() for x in (a, b)]
    with forced(path):
        result = patch_contrast(*leaves, torch.ones_like(valid))
    assert result.total.item() == pytest.approx(0, abs=1e-5)
    assert result.count.item() == 2
    assert all(slope.abs().max() < 1e-5 for slope in grads(result, *leaves))


@pytest.mark.parametrize("dtype", OP.dtypes, ids=str)
def test_a_code_of_zeros_is_no_nan(dtype, device):
    a, b, valid = (x.to(dtype) if x.is_floating_point() else x for x in make(device))
    valid[:, 5] = False
    a[:, 5], b[:, 7] = 0, 0
    with forced("triton"):
        result = patch_contrast(a.requires_grad_(), b, valid)
    expected = naive(a.double(), b.double(), valid, 0.2).item()
    torch.testing.assert_close((result.total / result.count).item(), expected, rtol=1e-5, atol=0)
    assert grads(result, a)[0].isfinite().all()


@pytest.mark.parametrize("length", [1e-3, 1e3])
def test_float16_codes_may_be_short_or_long(length, device):
    """Slopes over lengths that a float16 cannot hold."""
    a, b, valid = make(device)
    a, b = (a * length).half(), (b * length).half()
    b[:, ::2] /= 8
    exact = [x.double().requires_grad_() for x in (a, b)]
    slopes = torch.autograd.grad(naive(*exact, valid, 0.2) * length, exact)
    leaves = [x.requires_grad_() for x in (a, b)]
    with forced("triton"):
        result = patch_contrast(*leaves, valid)
    got = torch.autograd.grad(result.total / result.count * length, leaves)
    for g, e in zip(got, slopes, strict=True):
        assert ((g.double() - e).norm() / e.norm()).item() < 2e-3


@pytest.mark.parametrize("wanted", [0, 1])
def test_one_side_may_be_a_constant(wanted, device):
    a, b, valid = make(device)
    with forced("triton"):
        both = patch_contrast(a.requires_grad_(), b.requires_grad_(), valid)
        slope = grads(both, a, b)[wanted]
        codes = [a.detach(), b.detach()]
        codes[wanted].requires_grad_()
        assert torch.equal(grads(patch_contrast(*codes, valid), codes[wanted])[0], slope)


def test_compiles_without_a_graph_break(device, compiles_whole):
    a, b, valid = make(device, N=1, P=10)
    compiles_whole(lambda a, b: patch_contrast(a, b, valid).total, a.requires_grad_(), b.requires_grad_())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": torch.zeros(2, 4)}, r"a must be \[N, P, C\], not \[2, 4\]"),
        ({"b": torch.zeros(2, 4, 5)}, r"b must be \[N, P, C\] with N = 2, P = 4, C = 3, not \[2, 4, 5\]"),
        ({"b": torch.zeros(2, 4, 3).half()}, "b must be float32, not float16"),
        ({"valid": torch.zeros(2, 4)}, "valid must be bool, not float32"),
        ({"valid": torch.zeros(2, 5, dtype=torch.bool)}, r"valid must be \[N, P\] with N = 2, P = 4, not \[2, 5\]"),
        ({"temperature": 0.0}, "temperature must be above 0, not 0.0"),
        ({"a": torch.zeros(2, 1025, 3), "b": torch.zeros(2, 1025, 3)}, "valid must be"),
    ],
)
def test_bad_arguments_are_named(change, message):
    inputs = {"a": torch.zeros(2, 4, 3), "b": torch.zeros(2, 4, 3), "valid": torch.zeros(2, 4, dtype=torch.bool)}
    with pytest.raises(KernelError, match=message):
        patch_contrast(**inputs | change)


@pytest.mark.parametrize("shape", [(1, 1025, 3), (1, 4, 513), (1, 0, 3)])
def test_sizes_have_bounds(shape):
    codes = torch.zeros(shape)
    with pytest.raises(KernelError, match=r"a must be \[N, P to 1024, C to 512\], not"):
        patch_contrast(codes, codes, torch.zeros(shape[:2], dtype=torch.bool))
