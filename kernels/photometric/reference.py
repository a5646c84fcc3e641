"""Photometric augmentation in plain PyTorch: on the CPU the path that users run, elsewhere one that never waits.

The operations are those of torchvision.transforms.v2.functional on float images in [0, 1].

Letters: M crops of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

BLUR_RADIUS = 6  # pixels: three standard deviations of a blur of 2
CONTRAST, SATURATION, HUE = 1, 2, 3
CPU_CHUNK = 2**18  # values worked on at once, so that they stay in the cache


def photometric(
    crops: Tensor, jitter: Tensor | None = None, order: Tensor | None = None, factor: Tensor | None = None,
    gray: Tensor | None = None, blur_sigma: Tensor | None = None, solarize: Tensor | None = None, *,
    mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """See `fastssl.kernels.photometric.photometric`.

    On the CPU only the crops that drew an operation are worked on. On an accelerator every operation is computed for
    every crop and selected, so that nothing waits for the device.
    """
    exact = torch.promote_types(dtype, torch.float32)
    drawn: list[Any] = [jitter, order, factor, gray, blur_sigma, solarize]  # all or none
    if factor is not None:
        exact = torch.promote_types(exact, factor.dtype)
        drawn = [value.to(exact) if value.is_floating_point() else value for value in drawn]
    out = torch.empty(crops.shape, dtype=dtype, device=crops.device)
    chunk = max(CPU_CHUNK // max(crops[:1].numel(), 1), 1) if crops.device.type == "cpu" else max(len(crops), 1)
    for start in range(0, len(crops), chunk):
        part = slice(start, start + chunk)
        x = crops[part].to(exact).div_(255)
        if factor is not None:
            x = _operations(x, *(value[part] for value in drawn))
        for channel in range(3):
            out[part, channel] = x[:, channel].sub_(mean[channel]).div_(std[channel])
    return out


def _operations(
    x: Tensor, jitter: Tensor, order: Tensor, factor: Tensor, gray: Tensor, blur_sigma: Tensor, solarize: Tensor
) -> Tensor:
    """The drawn operations on x [M, 3, H, W] in [0, 1]."""
    for position in range(4):
        op = order[:, position].long()
        amount = factor.gather(1, op[:, None])[:, 0]
        x = _where(jitter & (op != HUE), _blend, x, op, amount)
        x = _where(jitter & (op == HUE) & (amount != 0), _rotate_hue, x, amount)
    x = _where(gray, lambda x: _gray(x).repeat(1, 3, 1, 1), x)
    x = _where(blur_sigma > 0, _blur, x, blur_sigma)
    return _where(solarize <= 255, _solarize, x, solarize / 255)


def _where(mask: Tensor, f: Callable[..., Tensor], x: Tensor, *parameters: Tensor) -> Tensor:
    """f(x, *parameters) for the crops in mask [M], x for the others. May change x."""
    return (_only_chosen if x.device.type == "cpu" else _select)(mask, f, x, *parameters)


def _only_chosen(mask: Tensor, f: Callable[..., Tensor], x: Tensor, *parameters: Tensor) -> Tensor:
    chosen = mask.nonzero()[:, 0]
    if len(chosen) == len(x):
        return f(x, *parameters)
    if len(chosen):
        x[chosen] = f(*(value.index_select(0, chosen) for value in (x, *parameters)))
    return x


def _select(mask: Tensor, f: Callable[..., Tensor], x: Tensor, *parameters: Tensor) -> Tensor:
    return torch.where(_per_crop(mask), f(x, *parameters), x)


def _per_crop(value: Tensor) -> Tensor:
    return value.view(-1, 1, 1, 1)


def _gray(x: Tensor) -> Tensor:
    """Luma [M, 1, H, W] with the weights of ITU-R BT.601, as PIL and torchvision have them."""
    red, green, blue = x.unbind(1)
    return (red * 0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)[:, None]


def _blend(x: Tensor, op: Tensor, factor: Tensor) -> Tensor:
    """Brightness, contrast and saturation: move away from black, from the crop's mean gray, from its own gray."""
    op = _per_crop(op)
    gray = _gray(x)
    target = torch.where(op == CONTRAST, gray.mean((2, 3), keepdim=True), gray * (op == SATURATION))
    return torch.lerp(target, x, _per_crop(factor)).clamp_(0, 1)


def _rotate_hue(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue of HSV by so many turns; saturation and value stay.

    In the HSV model each channel is value - chroma * clip(2 - |k - 2|, 0, 1) with k = (6 hue + n) mod 6 and n = 5, 3, 1
    for red, green, blue.
    """
    red, green, blue = x.unbind(1)
    value, low = x.amax(1), x.amin(1)
    chroma = value - low
    scale = chroma.clamp_min(torch.finfo(x.dtype).tiny).reciprocal_()
    hue6 = torch.where(value == green, (blue - red).mul_(scale).add_(2), (red - green).mul_(scale).add_(4))
    hue6 = torch.where(value == red, (green - blue).mul_(scale), hue6).add_(6 * turns.view(-1, 1, 1))
    k = hue6[:, None] + torch.arange(5, 0, -2, device=x.device).view(3, 1, 1)
    k.sub_((k / 6).floor_(), alpha=6).sub_(2).abs_().neg_().add_(2).clamp_(0, 1)
    return torch.addcmul(value[:, None], k, chroma[:, None], value=-1)


def _blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur with a standard deviation per crop, cut off at BLUR_RADIUS pixels; the edge pixels are repeated.

    PIL's GaussianBlur (the official DINO code) repeats edge pixels too, but approximates the Gaussian by three boxes.
    """
    offsets = torch.arange(BLUR_RADIUS + 1, device=x.device)
    weights = torch.exp(-0.5 * (offsets / sigma.clamp_min(1e-3)[:, None]) ** 2)  # [M, radius + 1]
    weights = weights / (2 * weights.sum(1, keepdim=True) - weights[:, :1])
    for dim in (3, 2):
        side = x.shape[dim]
        index = torch.arange(-BLUR_RADIUS, side + BLUR_RADIUS, device=x.device).clamp_(0, side - 1)
        padded = x.index_select(dim, index)
        x = x * _per_crop(weights[:, 0])
        for offset in range(1, BLUR_RADIUS + 1):
            weight = _per_crop(weights[:, offset])
            x.addcmul_(padded.narrow(dim, BLUR_RADIUS - offset, side), weight)
            x.addcmul_(padded.narrow(dim, BLUR_RADIUS + offset, side), weight)
    return x


def _solarize(x: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(x >= _per_crop(threshold), 1 - x, x)
