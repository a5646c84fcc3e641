"""Pixel loss of masked patches in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def patch_pixel_loss(
    prediction: Tensor, images: Tensor, masked: Tensor, patch_size: int, norm_pixels: bool = True,
    channels_last: bool = True, count: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """See `fastssl.kernels.patch_pixel_loss.patch_pixel_loss`."""
    exact = torch.promote_types(prediction.dtype, torch.float32)
    with torch.no_grad():
        target = cut(images.to(exact), masked, patch_size, channels_last)
        if norm_pixels:
            variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) * torch.rsqrt(variance + 1e-6)
        counts = torch.ones_like(masked, dtype=torch.bool)
        if count is not None:
            counts = torch.arange(masked.shape[1], device=masked.device) < count[:, None]
    error = (prediction.to(exact) - target).square()
    return torch.where(counts[:, :, None], error, 0).sum() / (counts.sum() * error.shape[2]).clamp_min(1)


def cut(images: Tensor, masked: Tensor, patch_size: int, channels_last: bool) -> Tensor:
    """The patches named by `masked`: [B, 3, H, W], [B, M] -> [B, M, 3 p p]."""
    x = images.unflatten(2, (-1, patch_size)).unflatten(4, (-1, patch_size))  # [B, 3, rows, p, columns, p]
    x = x.permute(0, 2, 4, 3, 5, 1) if channels_last else x.permute(0, 2, 4, 1, 3, 5)
    patches = x.flatten(3).flatten(1, 2)  # [B, N, 3 p p]
    return patches.gather(1, masked.long()[:, :, None].expand(-1, -1, patches.shape[2]))
