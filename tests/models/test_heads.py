"""DINO's head against PyTorch's own weight normalisation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastssl.models.heads import DINOHead


def official_head(head: DINOHead, gain: bool) -> nn.Module:
    """The head from PyTorch's parts, with the same weights."""
    last = nn.Linear(head.last_layer.weight_v.shape[1], head.last_layer.weight_v.shape[0], bias=False).double()
    last = nn.utils.parametrizations.weight_norm(last)
    last.parametrizations.weight.original0.data.copy_(head.last_layer.weight_g.data)
    last.parametrizations.weight.original1.data.copy_(head.last_layer.weight_v.data)
    last.parametrizations.weight.original0.requires_grad = gain
    return last


@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_values_and_gradients_against_weight_norm(norm_last_layer):
    torch.manual_seed(0)
    head = DINOHead(12, 20, hidden=16, bottleneck=8, norm_last_layer=norm_last_layer).double()
    if not norm_last_layer:
        nn.init.uniform_(head.last_layer.weight_g, 0.5, 2.0)
    last = official_head(head, gain=not norm_last_layer)
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    upstream = torch.randn(3, 5, 20, dtype=torch.float64)

    logits = head(x)
    logits.backward(upstream)
    mlp = head.mlp(x.flatten(0, 1))
    expected = last(F.normalize(mlp, dim=-1)).unflatten(0, (3, 5))
    torch.testing.assert_close(logits, expected)
    expected.backward(upstream)  # adds to the MLP's gradients, not to the prototypes'
    direction = last.parametrizations.weight.original1.grad
    torch.testing.assert_close(head.last_layer.weight_v.grad, direction)
    if norm_last_layer:
        assert not head.last_layer.weight_g.requires_grad
        assert logits.abs().max() <= 1
    else:
        torch.testing.assert_close(head.last_layer.weight_g.grad, last.parametrizations.weight.original0.grad)


def test_keys_are_those_of_the_authors():
    shapes = {key: tuple(value.shape) for key, value in DINOHead(2048, 100).state_dict().items()}
    assert shapes == {
        "mlp.0.weight": (2048, 2048),
        "mlp.0.bias": (2048,),
        "mlp.2.weight": (2048, 2048),
        "mlp.2.bias": (2048,),
        "mlp.4.weight": (256, 2048),
        "mlp.4.bias": (256,),
        "last_layer.weight_g": (100, 1),
        "last_layer.weight_v": (100, 256),
    }
    with_bn = DINOHead(8, 4, hidden=8, bottleneck=4, batch_norm=True).state_dict()
    assert {"mlp.0.weight", "mlp.1.running_mean", "mlp.3.weight", "mlp.4.running_mean", "mlp.6.weight"} <= set(with_bn)
    assert set(DINOHead(8, 4, layers=1, bottleneck=4).state_dict()) >= {"mlp.0.weight"}


def test_start_values():
    torch.manual_seed(0)
    head = DINOHead(256, 300)
    assert head.last_layer.weight_g.eq(1).all()
    assert head.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert head.mlp[0].bias.abs().max() == 0


def test_logits_are_float32_under_autocast():
    head = DINOHead(12, 20, hidden=16, bottleneck=8)
    x = torch.randn(4, 12)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(x)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, head(x), rtol=0, atol=0.02)
    assert not torch.equal(logits, logits.bfloat16().float())
