"""Photometric augmentation on the device: uint8 crops and their drawn parameters become normalised float views.

Order: the four jitter operations in the crop's own drawn order, gray, Gaussian blur, solarize, normalise, cast. The
operations are those of torchvision.transforms.v2.functional on float images in [0, 1]; all arithmetic is float32.
On 8-bit images torchvision and PIL cut off the fraction after every operation and so come out darker, after the four
jitter operations by about 1.5 of 255 levels; single values differ by up to 8 (torchvision) and 24 levels (PIL, which
turns hues in 256 steps). A blur differs from PIL's by about 0.5 levels, up to 4.

Letters: M crops (images x crops of the group), S side in pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fastssl.batch import Batch, Photometric

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
BLUR_RADIUS = 6  # three standard deviations of the widest blur that config.View allows
CONTRAST, SATURATION, HUE = 1, 2, 3
CPU_CHUNK = 2**18  # values worked on at once, so that they stay in the cache


@torch.no_grad()
def augment(
    batch: Batch,
    *,
    dtype: torch.dtype = torch.float32,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
) -> Batch:
    """The batch with every group of uint8 crops turned into normalised views, on the device where they are.

    A group without drawn parameters (its name is not in `batch.photometric`) is only normalised.

    Args:
        batch: `views` uint8 [B, n, 3, S, S] per group.
        dtype: type of the result.
        mean, std: per channel, for pixel values in [0, 1].

    Raises:
        ValueError: a group is not uint8 [B, n, 3, S, S].
    """
    views = {
        name: photometric(crops, batch.photometric.get(name), mean=mean, std=std, dtype=dtype)
        for name, crops in batch.views.items()
    }
    return replace(batch, views=views)


def photometric(
    views: Tensor,
    p: Photometric | None,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Apply each crop's drawn photometric operations, then normalise.

    On the CPU only the crops that drew an operation are worked on. On an accelerator every operation is computed for
    every crop and selected, so that nothing waits for the device.

    Args:
        views: uint8 [B, n, 3, S, S].
        p: parameters of the B x n crops; None: normalise only.
        mean, std: per channel, for pixel values in [0, 1].
        dtype: type of the result.

    Returns:
        `dtype` [B, n, 3, S, S], contiguous.

    Raises:
        ValueError: `views` is not uint8 [B, n, 3, S, S].
    """
    if views.dtype != torch.uint8 or views.ndim != 5 or views.shape[2] != 3:
        raise ValueError(f"photometric takes uint8 [B, n, 3, S, S], not {views.dtype} {list(views.shape)}")
    crops = views.flatten(0, 1)
    p = p.map(lambda value: value.flatten(0, 1)) if p else None
    out = torch.empty(crops.shape, dtype=dtype, device=crops.device)
    chunk = CPU_CHUNK // crops[0].numel() if crops.device.type == "cpu" and len(crops) else len(crops)
    for start in range(0, len(crops), max(chunk, 1)):
        part = slice(start, start + max(chunk, 1))
        x = crops[part].float().div_(255)
        if p:
            x = _operations(x, p.map(lambda value, part=part: value[part]))
        for channel in range(3):
            out[part, channel] = x[:, channel].sub_(mean[channel]).div_(std[channel])
    return out.view(views.shape)


def _operations(x: Tensor, p: Photometric) -> Tensor:
    """The drawn operations on float32 x [M, 3, S, S] in [0, 1]; parameters per crop, without the [B, n] split."""
    for position in range(4):
        op = p.order[:, position]
        factor = p.factor.gather(1, op[:, None])[:, 0]
        x = _where(p.jitter & (op != HUE), _blend, x, op, factor)
        x = _where(p.jitter & (op == HUE) & (factor != 0), _rotate_hue, x, factor)
    x = _where(p.gray, lambda x: _gray(x).repeat(1, 3, 1, 1), x)
    x = _where(p.blur_sigma > 0, _blur, x, p.blur_sigma)
    return _where(p.solarize <= 255, _solarize, x, p.solarize / 255)


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
    """Luma [M, 1, S, S] with the weights of ITU-R BT.601, as PIL and torchvision have them."""
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
