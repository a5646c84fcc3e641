"""Linear cross-entropy over a codebook: against the float64 reference, PyTorch's own loss, and known values."""

import math

import pytest
import torch
import torch.nn.functional as F

from fastssl.kernels._check import KernelError
from fastssl.kernels._path import forced
from fastssl.kernels.token_cross_entropy import kernel, token_cross_entropy


def make(device="cpu", T=10, D=6, K=20, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    tokens, weight, bias = torch.randn(T, D), torch.randn(K, D), torch.randn(K)
    labels = torch.randint(0, K, (T,))
    return tokens.to(device, dtype), weight.to(device, dtype), bias.to(device, dtype), labels.to(device)


def grads(loss, *leaves, upstream=None):
    return torch.autograd.grad(loss, leaves, upstream)


@pytest.fixture
def in_chunks(monkeypatch):
    """Sets the tokens per chunk."""
    return lambda chunk: monkeypatch.setattr(kernel, "rows_per_chunk", lambda tokens, classes: chunk)


def test_equals_cross_entropy_and_argmax(path, device, in_chunks):
    in_chunks(7)
    tokens, weight, bias, labels = make(device, T=23)
    labels[::4] = -1
    leaves = [x.double().requires_grad_() for x in (tokens, weight, bias)]
    logits = F.linear(*leaves)
    expected = F.cross_entropy(logits, labels, ignore_index=-1)
    hits = (logits.argmax(1) == labels)[labels >= 0].double().mean()
    slopes = grads(expected, *leaves)
    leaves = [x.requires_grad_() for x in (tokens, weight, bias)]
    with forced(path):
        loss, accuracy = token_cross_entropy(*leaves, labels)
    torch.testing.assert_close(loss.item(), expected.item(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(accuracy.item(), hits.item(), rtol=1e-6, atol=0)
    assert not accuracy.requires_grad
    for got, wanted in zip(grads(loss, *leaves), slopes, strict=True):
        torch.testing.assert_close(got, wanted.float(), rtol=1e-4, atol=1e-6)


def test_loss_at_the_start_of_cae(path, device):
    """CAE card, oracle 4: rows with mean 0 and mean square 1 before a Xavier head."""
    torch.manual_seed(0)
    tokens = F.layer_norm(torch.randn(24, 768, device=device), (768,))
    weight = torch.empty(8192, 768, device=device).uniform_(-0.0259, 0.0259)
    labels = torch.randint(0, 8192, (24,), device=device)
    with forced(path):
        result = token_cross_entropy(tokens, weight, torch.zeros(8192, device=device), labels)
    assert 9.0 < result.loss.item() < 9.25
    assert result.accuracy.item() == 0


@pytest.mark.parametrize("K", [3, 8192, 9000])
def test_equal_logits_give_ln_k_and_the_first_code(path, K, device):
    labels = torch.tensor([0, 1, 0, 2, -1], device=device)
    with forced(path):
        loss, accuracy = token_cross_entropy(
            torch.zeros(5, 4, device=device), torch.randn(K, 4, device=device), None, labels
        )
    torch.testing.assert_close(loss.item(), math.log(K), rtol=1e-6, atol=0)
    assert accuracy.item() == 0.5


@pytest.mark.parametrize("K", [40, 9000])
def test_perfect_prediction_and_a_shift_of_the_logits(path, K, device):
    tokens, weight, bias, labels = make(device, K=K)
    bias[:] = 0.5
    with forced(path):
        result = token_cross_entropy(tokens, weight, None, labels)
        shifted = token_cross_entropy(tokens, weight, bias, labels)
        perfect = token_cross_entropy(weight[labels] * 1e3, F.normalize(weight), None, labels)
    torch.testing.assert_close(shifted.loss, result.loss, rtol=1e-6, atol=1e-5)
    assert perfect.accuracy.item() == 1
    assert perfect.loss.item() == pytest.approx(0, abs=1e-5)


def test_tokens_that_do_not_count_have_no_say_and_no_gradient(path, device):
    tokens, weight, bias, labels = make(device)
    labels[[1, 4]] = -1
    kept = labels >= 0
    tokens.requires_grad_()
    with forced(path):
        loss, accuracy = token_cross_entropy(tokens, weight, bias, labels)
        rest = token_cross_entropy(tokens[kept], weight, bias, labels[kept])
    torch.testing.assert_close(loss, rest.loss)
    torch.testing.assert_close(accuracy, rest.accuracy)
    assert (grads(loss, tokens)[0][~kept] == 0).all()


@pytest.mark.parametrize("bad", [20, -2, -100, 2**40])
@pytest.mark.parametrize("K", [20, 8200])
def test_a_label_that_is_no_code_shows_as_nan(path, bad, K, device):
    tokens, weight, bias, labels = make(device, K=K)
    labels[3] = bad if bad != 20 else K
    weight.requires_grad_()
    with forced(path):
        loss, accuracy = token_cross_entropy(tokens, weight, bias, labels)
    assert loss.isnan()
    assert accuracy.isfinite()
    assert grads(loss, weight)[0].isnan().any()


@pytest.mark.parametrize("K", [300, 9000])
def test_chunks_and_repeats_change_nothing(K, device, in_chunks):
    tokens, weight, bias, labels = make(device, T=9, K=K)
    leaves = [x.requires_grad_() for x in (tokens, weight, bias)]
    runs = []
    with forced("triton"):
        for chunk in (128, 128, 4, 1):
            in_chunks(chunk)
            loss, accuracy = token_cross_entropy(*leaves, labels)
            runs.append([loss, accuracy, *grads(loss, *leaves)])
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    for run in runs[2:]:
        torch.testing.assert_close(run, runs[0], rtol=1e-5, atol=1e-6)


def test_the_backward_pass_scales_and_can_run_again(device):
    tokens, weight, bias, labels = make(device)
    leaves = [x.requires_grad_() for x in (tokens, weight, bias)]
    with forced("triton"):
        loss = token_cross_entropy(*leaves, labels).loss
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    tripled = torch.autograd.grad(loss, leaves, torch.tensor(3.0, device=device))
    for a, b in zip(once, tripled, strict=True):
        torch.testing.assert_close(3 * a, b)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), ()])
def test_computes_only_the_gradients_that_are_wanted(wanted, device):
    tensors = make(device)
    leaves = [x.requires_grad_() for x in tensors[:3]]
    with forced("triton"):
        full = token_cross_entropy(*tensors).loss
        part = token_cross_entropy(*[x if i in wanted else x.detach() for i, x in enumerate(leaves)], tensors[3]).loss
        with torch.no_grad():
            none = token_cross_entropy(*tensors).loss
    assert torch.equal(full, part)
    assert torch.equal(full, none)
    assert part.requires_grad == bool(wanted)
    assert not none.requires_grad
    if wanted:
        some = [leaves[i] for i in wanted]
        assert all(torch.equal(a, b) for a, b in zip(grads(part, *some), grads(full, *some), strict=True))


def test_small_probabilities_survive_float16(device):
    """The weights of a code of probability 2e-8, below the smallest float16, still have the right slope."""
    tokens = torch.ones(4, 1, device=device, dtype=torch.float16)
    weight = torch.tensor([[0.0], [-17.75]], device=device, dtype=torch.float16).requires_grad_()
    with forced("triton"):
        loss = token_cross_entropy(tokens, weight, None, torch.zeros(4, dtype=torch.int64, device=device)).loss
        slope = grads(loss, weight, upstream=torch.tensor(65536.0, device=device))[0]
    torch.testing.assert_close(slope[1].item(), 65536 / (1 + math.exp(17.75)), rtol=2e-3, atol=0)


def test_autocast_does_not_reach_inside(device):
    tokens, weight, bias, labels = make(device, T=30, D=64)
    leaves = [x.requires_grad_() for x in (tokens, weight, bias)]
    with forced("triton"):
        plain = token_cross_entropy(*leaves, labels).loss
        with torch.autocast(device, dtype=torch.bfloat16):
            cast = token_cross_entropy(*leaves, labels).loss
    assert torch.equal(plain, cast)
    assert all(torch.equal(a, b) for a, b in zip(grads(plain, *leaves), grads(cast, *leaves), strict=True))


@pytest.mark.parametrize(
    ("tokens", "classes", "rows"),
    [(6272, 8192, 3200), (4096, 8192, 4096), (4097, 8192, 2176), (1, 8192, 128), (10**6, 2**20, 128), (0, 10, 0)],
)
def test_chunk_rule(tokens, classes, rows):
    assert kernel.rows_per_chunk(tokens, classes) == rows
    assert rows % 128 == 0
    assert rows * classes * 4 <= max(kernel.WORKSPACE, 128 * classes * 4)


def test_compiles_without_a_graph_break(device, compiles_whole, in_chunks):
    in_chunks(4)
    tokens, weight, bias, labels = make(device)
    leaves = [x.requires_grad_() for x in (tokens, weight, bias)]
    compiles_whole(lambda *leaves: token_cross_entropy(*leaves, labels).loss, *leaves)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(5, 4)}, r"weight must be \[K, D\] with D = 3, not \[5, 4\]"),
        ({"weight": torch.zeros(5, 3, dtype=torch.float16)}, "weight must be float32, not float16"),
        ({"tokens": torch.zeros(2, 3).half(), "weight": torch.zeros(5, 3).bfloat16()}, "must be float16 or float32"),
        ({"bias": torch.zeros(4)}, r"bias must be \[K\] with K = 5, not \[4\]"),
        ({"labels": torch.zeros(2)}, "labels must be int32 or int64, not float32"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels must be \[T\] with T = 2, not \[3\]"),
        ({"weight": torch.zeros(0, 3), "bias": None}, "weight must be .* K of at least 1"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(change, message):
    inputs = {
        "tokens": torch.zeros(2, 3), "weight": torch.zeros(5, 3), "bias": torch.zeros(5),
        "labels": torch.zeros(2, dtype=torch.int64),
    }  # fmt: skip
    with pytest.raises(KernelError, match=message):
        token_cross_entropy(**inputs | change)
