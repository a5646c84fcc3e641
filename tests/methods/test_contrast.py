"""The contrasts: known values, nested loops, what has no gradient, and several processes as one."""

import math

import pytest
import torch

from fastssl.methods.contrast import nt_xent, teacher_contrast
from fastssl.training import distributed

DOUBLE = torch.float64


@pytest.mark.parametrize(
    ("codes", "temperature", "expected"),
    [
        (torch.ones(2, 72, 8), 0.5, 4.9628),
        (torch.eye(72).expand(2, -1, -1), 0.5, 3.0066),
        (torch.eye(8).expand(2, -1, -1), 0.5, 1.0629),
        (torch.eye(8, 16).expand(2, -1, -1), 0.2, math.log(1 + 14 * math.exp(-5))),
        (torch.randn(2, 1, 16), 0.2, 0.0),
    ],
    ids=["equal codes", "orthogonal images, 72", "orthogonal images, 8", "colder", "a single image"],
)
def test_nt_xent_of_known_codes(codes, temperature, expected):
    assert nt_xent(codes, temperature).item() == pytest.approx(expected, abs=1e-4)


def test_nt_xent_is_the_nested_loop():
    codes = torch.randn(2, 5, 4, dtype=DOUBLE)
    rows = codes.flatten(0, 1)
    loss = 0.0
    for a in range(10):
        away = [torch.cosine_similarity(rows[a], rows[b], dim=0).item() / 0.3 for b in range(10)]
        loss -= math.log(math.exp(away[(a + 5) % 10]) / sum(math.exp(away[b]) for b in range(10) if b != a)) / 10
    assert nt_xent(codes, 0.3).item() == pytest.approx(loss, abs=1e-12)


def test_nt_xent_does_not_see_lengths_or_order():
    codes = torch.randn(2, 9, 5, dtype=DOUBLE)
    loss = nt_xent(codes, 0.5)
    torch.testing.assert_close(nt_xent(codes * (torch.rand(2, 9, 1, dtype=DOUBLE) + 0.1), 0.5), loss)
    torch.testing.assert_close(nt_xent(codes[:, torch.randperm(9)], 0.5), loss)
    torch.testing.assert_close(nt_xent(codes.flip(0), 0.5), loss)


@pytest.mark.parametrize(("images", "expected"), [(256, 4.4361), (64, 0.8 * math.log(64))])
def test_teacher_contrast_of_equal_codes_is_ln_n(images, expected):
    codes = torch.ones(2, images, 8)
    assert teacher_contrast(codes, 3 * codes, 0.2)[0].item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("images", "expected"), [(256, 0.8), (64, 0.2831)])
def test_teacher_contrast_of_orthogonal_images(images, expected):
    codes = torch.eye(images).expand(2, -1, -1)
    loss, right = teacher_contrast(codes, 2 * codes, 0.2)
    assert loss.item() == pytest.approx(expected, abs=1e-4)
    assert right.item() == 1


def test_keys_have_no_gradient_and_codes_are_compared_with_the_other_view():
    codes, keys = (torch.randn(2, 6, 5, dtype=DOUBLE).requires_grad_() for _ in range(2))
    loss, _ = teacher_contrast(codes, keys, 0.2)
    loss.backward()
    assert keys.grad is None
    moved = keys.detach().clone()
    moved[1] += 1  # only students of view 0 look there
    codes2 = codes.detach().clone().requires_grad_()
    teacher_contrast(codes2, moved, 0.2)[0].backward()
    torch.testing.assert_close(codes2.grad[1], codes.grad[1])
    assert not torch.allclose(codes2.grad[0], codes.grad[0])


CODES, KEYS = torch.randn(2, 2, 6, 5, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)


def on_a_share(rank):
    """Losses of the process's images, each with the codes' gradient as DDP averages it."""
    share = slice(6 * rank // distributed.world(), 6 * (rank + 1) // distributed.world())
    codes = CODES[:, share].clone().requires_grad_()
    losses = {
        "gathered": nt_xent(codes, 0.3),
        "local": nt_xent(codes, 0.3, gather=False),
        "teacher": teacher_contrast(codes, KEYS[:, share], 0.3)[0],
    }
    return {
        name: (loss.detach(), torch.autograd.grad(loss, codes)[0] / distributed.world())
        for name, loss in losses.items()
    }


def test_two_processes_equal_one_where_codes_are_gathered(on_processes):
    halves = on_processes(2, on_a_share)
    for name, (loss, grad) in on_a_share(0).items():
        both = (halves[0][name][0] + halves[1][name][0]) / 2
        if name == "local":
            assert not torch.isclose(both, loss)
            continue
        torch.testing.assert_close(both, loss)
        torch.testing.assert_close(torch.cat([half[name][1] for half in halves], dim=1), grad)
    for rank, half in enumerate(halves):
        torch.testing.assert_close(half["local"][0], nt_xent(CODES[:, 3 * rank : 3 * rank + 3], 0.3))
