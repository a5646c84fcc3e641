"""Projection heads."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.kernels.unit_rows import unit_rows
from fastssl.models.norms import BatchNorm1d


class DINOHead(nn.Module):
    """MLP, L2 normalisation, weight-normalised prototypes (Caron et al. 2021, arXiv 2104.14294, appendix C).

    Normalisation and prototypes are computed in float32 even under autocast: bfloat16 logits just below 1 are 1/256
    apart, which the teacher's temperature of 0.04 would turn into steps of 0.1.

    Args:
        width: channels of the backbone's feature (D).
        prototypes: outputs (K).
        layers, hidden, bottleneck: layers of the MLP, width of its inner layers, and of its output.
        batch_norm: batch normalisation after every inner layer of the MLP.
        norm_last_layer: hold the prototypes at length 1 (their gain `last_layer.weight_g` is not trained).
    """

    def __init__(
        self,
        width: int,
        prototypes: int,
        *,
        layers: int = 3,
        hidden: int = 2048,
        bottleneck: int = 256,
        batch_norm: bool = False,
        norm_last_layer: bool = True,
    ) -> None:
        super().__init__()
        sizes = [width, *[hidden] * (layers - 1), bottleneck]
        mlp: list[nn.Module] = []
        for i in range(layers):
            mlp.append(nn.Linear(sizes[i], sizes[i + 1]))
            if i < layers - 1:
                mlp += [BatchNorm1d(hidden), nn.GELU()] if batch_norm else [nn.GELU()]
        for module in mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.mlp = nn.Sequential(*mlp)
        self.last_layer = Prototypes(bottleneck, prototypes, train_gain=not norm_last_layer)

    def forward(self, features: Tensor) -> Tensor:
        """[.., D] -> logits [.., K], float32 also under autocast."""
        shape = features.shape[:-1]
        x = self.mlp(features.flatten(0, -2))
        with torch.autocast(x.device.type, enabled=False):
            return self.last_layer(unit_rows(x)).unflatten(0, shape)


class Prototypes(nn.Module):
    """A linear layer without bias whose rows are gain x direction / |direction| (weight normalisation).

    Parameters: `weight_g` [K, 1] starts at 1, `weight_v` [K, D] (the keys of torch.nn.utils.weight_norm).
    """

    also: ClassVar[tuple[str, ...]] = ()  # see `models.blocks.Unit`

    def __init__(self, width: int, prototypes: int, train_gain: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(prototypes, 1), requires_grad=train_gain)
        self.weight_v = nn.Parameter(nn.Linear(width, prototypes, bias=False).weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        weight = unit_rows(self.weight_v, self.weight_g)
        return F.linear(x.to(weight.dtype), weight)
