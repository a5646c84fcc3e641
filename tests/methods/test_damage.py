"""What both SiTs share: which other image a view shows, and the loss of painted pixels."""

import pytest
import torch

from fastssl.kernels.corrupt.reference import alien_source
from fastssl.methods.damage import pixel_loss

DOUBLE = torch.float64


def test_the_other_image():
    words = torch.randint(2**32, (20000,))
    source, here = alien_source(words, 8), torch.arange(20000)
    assert (source // 8 == here // 8).all()
    assert (source != here).all()
    assert torch.bincount((source - here) % 8, minlength=8)[1:].min() > 2600  # of about 2857
    assert alien_source(words[:5], 4).tolist()[4] == 4  # alone in its group
    whole = alien_source(words, 0)
    assert whole.min() < 20
    assert whole.max() > 19980


def test_pixel_loss():
    clean = torch.randn(3, 3, 8, 8, dtype=DOUBLE)
    mask = torch.rand(3, 8, 8) < 0.4
    painted = (clean + 0.25).requires_grad_()
    loss = pixel_loss(painted, clean, mask)
    assert loss.item() == pytest.approx(0.25)
    loss.backward()
    expected = mask[:, None].expand_as(clean).double() / (3 * mask.sum())
    torch.testing.assert_close(painted.grad, expected)
    changed = torch.where(mask[:, None], clean, clean + 9)
    assert pixel_loss(painted, changed, mask).item() == pytest.approx(0.25)
    assert pixel_loss(painted, clean, torch.zeros_like(mask)).item() == 0
    painted.grad = None
    pixel_loss(painted, clean, None).backward()
    torch.testing.assert_close(painted.grad, torch.full_like(clean, 1 / clean.numel()))
