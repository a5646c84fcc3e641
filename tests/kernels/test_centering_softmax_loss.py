"""Centred-softmax cross-entropy: against the float64 reference, the papers' double loops, and known values."""

import math

import pytest
import torch

from fastssl.kernels._check import KernelError
from fastssl.kernels._path import forced
from fastssl.kernels.centering_softmax_loss import centering_softmax_loss


def make(device="cpu", V=4, B=3, K=50, T=2, seed=0):
    torch.manual_seed(seed)
    shape = (V, B, K), (T, B, K), (K,)
    return tuple(torch.randn(s, device=device) * 0.5 for s in shape)


def naive(student, teacher, center, student_temp, teacher_temp, pairs):
    """The papers' loops, image by image."""
    total, count = 0.0, 0
    for t in range(len(teacher)):
        for v in range(len(student)):
            if (v == t) != (pairs == "matching"):
                continue
            count += 1
            for b in range(student.shape[1]):
                x = (teacher[t, b] - center) / teacher_temp
                q = torch.exp(x - x.max())
                q = q / q.sum()
                y = student[v, b] / student_temp
                log_p = y - (y - y.max()).exp().sum().log() - y.max()
                total = total - (q * log_p).sum() / student.shape[1]
    return total / count


@pytest.mark.parametrize(("V", "T", "pairs"), [(10, 2, "others"), (2, 2, "others"), (8, 8, "matching")])
def test_equals_the_papers_loop(path, V, T, pairs, device):
    student, teacher, center = make(device, V=V, T=T)
    student = student.double().requires_grad_()
    expected = naive(student, teacher.double(), center.double(), 0.1, 0.05, pairs)
    slope = torch.autograd.grad(expected, student)[0].float()
    student = student.detach().float().requires_grad_()
    with forced(path):
        loss = centering_softmax_loss(student, teacher, center, 0.1, 0.05, pairs=pairs).loss
        loss.backward()
    torch.testing.assert_close(loss.item(), expected.item(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(student.grad, slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("K", [256, 9001])
def test_uniform_student_gives_ln_k(path, K, device):
    """SCFS card, oracle 4."""
    student = torch.full((2, 1, K), 1 / 16, device=device)
    teacher = torch.randn(2, 1, K, device=device)
    with forced(path):
        result = centering_softmax_loss(student, teacher, None, 0.1, 0.07)
    torch.testing.assert_close(result.loss.item(), math.log(K), rtol=1e-5, atol=0)
    torch.testing.assert_close((result.divergence + result.entropy).item(), math.log(K), rtol=1e-5, atol=0)


def test_one_hot_unit_logits_give_the_lower_bound(path, device):
    """SCFS card, oracle 5: -ln(e^10 / (e^10 + 255))."""
    one_hot = torch.eye(256, device=device)[None, :3]
    with forced(path):
        result = centering_softmax_loss(one_hot, one_hot * 100, None, 0.1, 0.07, pairs="matching")
    torch.testing.assert_close(result.loss.item(), 0.01151, rtol=1e-3, atol=0)
    assert result.entropy.item() == pytest.approx(0, abs=1e-6)


def test_images_may_change_places_and_the_teacher_may_shift(path, device):
    student, teacher, center = make(device)
    order = torch.tensor([2, 0, 1], device=device)
    with forced(path):
        result = centering_softmax_loss(student, teacher, center, 0.1, 0.05)
        permuted = centering_softmax_loss(student[:, order], teacher[:, order], center, 0.1, 0.05)
        shifted = centering_softmax_loss(student, teacher + 3, center, 0.1, 0.05)
        moved = centering_softmax_loss(student, teacher + center, 2 * center, 0.1, 0.05)
        swapped = centering_softmax_loss(student[[1, 0, 2, 3]], teacher.flip(0), center, 0.1, 0.05)
    for other in (permuted, shifted, moved, swapped):
        torch.testing.assert_close(other.loss, result.loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other.entropy, result.entropy, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.column_sum, teacher.sum((0, 1)))
    torch.testing.assert_close(permuted.column_sum, result.column_sum)


def test_logits_of_any_size(path, device):
    """Large logits do not overflow, a logit of -inf is a prototype that nobody takes."""
    student, teacher, center = make(device)
    with forced(path):
        large = centering_softmax_loss(student * 1e4, teacher * 1e4, center, 0.1, 0.05)
        student[..., :5], teacher[..., :5] = -math.inf, -math.inf
        masked = centering_softmax_loss(student, teacher, center, 0.1, 0.05)
        cut = centering_softmax_loss(student[..., 5:], teacher[..., 5:], center[5:], 0.1, 0.05)
    assert all(value.isfinite().all() for value in large)
    if path == "triton":
        torch.testing.assert_close(masked.loss, cut.loss)
        torch.testing.assert_close(masked.entropy, cut.entropy)


def test_only_the_loss_has_a_gradient(device):
    student, teacher, center = make(device)
    teacher.requires_grad_()
    for path in ("reference", "triton"):
        with forced(path):
            result = centering_softmax_loss(student.clone().requires_grad_(), teacher, center, 0.1, 0.05)
        assert [value.requires_grad for value in result] == [True, False, False, False]
        result.loss.backward()
        assert teacher.grad is None


def test_compiles_without_a_graph_break(device, compiles_whole):
    student, teacher, center = make(device)
    student.requires_grad_()
    compiles_whole(lambda student: centering_softmax_loss(student, teacher, center, 0.1, 0.05).loss, student)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": torch.zeros(2, 2, 5)}, r"teacher must be \[T, B, K\] with B = 3, K = 5, not \[2, 2, 5\]"),
        ({"center": torch.zeros(1, 5)}, r"center must be \[K\] with K = 5, not \[1, 5\]"),
        ({"student_temp": 0.0}, "student_temp must be positive"),
        ({"pairs": "all"}, "pairs must be 'others' or 'matching', not 'all'"),
        ({"pairs": "matching"}, "teacher must be as many crops as the student's 4, not 2"),
        ({"student": torch.zeros(1, 3, 5)}, "student must be 2 crops or more, at least the teacher's 2, not 1"),
        ({"student": torch.zeros(4, 3, 5, dtype=torch.int64)}, "student must be float32 or float16 or"),
    ],
)
def test_bad_arguments_are_named(change, message):
    inputs = {
        "student": torch.zeros(4, 3, 5), "teacher": torch.zeros(2, 3, 5), "center": torch.zeros(5),
        "student_temp": 0.1, "teacher_temp": 0.05,
    }  # fmt: skip
    with pytest.raises(KernelError, match=message):
        centering_softmax_loss(**inputs | change)
