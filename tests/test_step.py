"""What methods and trainer tell each other: how spread features are."""

from __future__ import annotations

import pytest
import torch

from fastssl.step import feature_spread


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_spread_is_the_deviation_of_unit_vectors(dtype):
    torch.manual_seed(0)
    x = torch.randn(40, 16).to(dtype)
    x[3] = 0
    unit = x.double() / x.double().norm(dim=-1, keepdim=True).clamp_min(1e-12)
    expected = (unit - unit.mean(0)).square().mean(0).sqrt().mean() * 4
    torch.testing.assert_close(feature_spread(x).double(), expected, rtol=1e-6, atol=0)


def test_spread_of_equal_vectors_and_of_noise():
    torch.manual_seed(0)
    assert feature_spread(torch.randn(1, 16).expand(5, -1)).item() == pytest.approx(0, abs=1e-6)
    assert feature_spread(torch.randn(2000, 16)).item() == pytest.approx(1, abs=0.05)
    assert not feature_spread(torch.randn(4, 8, requires_grad=True)).requires_grad
