"""Feature search in plain PyTorch. Each function: see the one of the same name in `fastssl.kernels.feature_search`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.kernels._exact import exact


@exact
def search_maps(queries: Tensor, feature: Tensor) -> Tensor:
    keys = F.normalize(_wide(feature), dim=1)
    return torch.einsum("mbc,bchw->mbhw", F.normalize(queries.to(keys.dtype), dim=2), keys)


@exact
def scaled_moments(y: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and m2."""
    x = _scaled(maps, y).transpose(0, 2).flatten(1)  # [C, M B H W]
    mean = x.sum(dim=1) / max(x.shape[1], 1)
    return mean, (x - mean[:, None]).square().sum(dim=1)


@exact
def scale_norm_relu(
    y: Tensor, maps: Tensor, weight: Tensor, bias: Tensor, eps: float, mean: Tensor, var: Tensor
) -> Tensor:
    """Only the output."""
    x = _scaled(maps, y)
    mean, var, weight, bias = (v.to(x.dtype)[:, None, None] for v in (mean, var, weight, bias))
    return _as_map(((x - mean) * torch.rsqrt(var + eps) * weight + bias).relu(), y)


@exact
def residual_pool(
    z: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float, maps: Tensor, feature: Tensor
) -> Tensor:
    residual = _scaled(maps, feature).flatten(0, 1)
    weight, bias, mean, var = (v.to(residual.dtype) for v in (weight, bias, mean, var))
    scale = weight * (var + eps).rsqrt()
    scale, shift = scale[:, None, None], (bias - mean * scale)[:, None, None]
    return (z.to(residual.dtype) * scale + shift + residual).relu().mean(dim=(2, 3)).to(z.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _scaled(maps: Tensor, feature: Tensor) -> Tensor:
    """[M, B, C, H, W], at least float32."""
    return maps.to(_wide(feature).dtype)[:, :, None] * _wide(feature)


def _as_map(x: Tensor, like: Tensor) -> Tensor:
    """[M, B, C, H, W] -> [M B, C, H, W] with the dtype and memory format of a map."""
    dense = torch.contiguous_format if like.is_contiguous() else torch.channels_last
    return x.flatten(0, 1).to(like.dtype).contiguous(memory_format=dense)
