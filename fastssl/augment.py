"""Photometric augmentation on the device: uint8 crops and their drawn parameters become normalised float views.

Order: the four jitter operations in the crop's own drawn order, gray, Gaussian blur, solarize, normalise, cast. The
operations are those of torchvision.transforms.v2.functional on float images in [0, 1]; all arithmetic is float32.
On 8-bit images torchvision and PIL cut off the fraction after every operation and so come out darker, after the four
jitter operations by about 1.5 of 255 levels; single values differ by up to 8 (torchvision) and 24 levels (PIL, which
turns hues in 256 steps). A blur differs from PIL's by about 0.5 levels, up to 4.

The arithmetic is in `fastssl.kernels.photometric`. Letters: B images, n crops of the group, S side in pixels.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastssl.batch import IMAGENET_MEAN, IMAGENET_STD, Batch, Photometric
from fastssl.kernels import photometric as op
from fastssl.kernels.photometric import BLUR_RADIUS as BLUR_RADIUS
from fastssl.memory import Memory

_memory = Memory()  # of views on the CPU


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

    Nothing waits for the device. On a GPU with Triton one fused operation works on the crops, each with its own drawn
    operations only. On the CPU, too, only the crops that drew an operation are worked on; on an accelerator without
    Triton every operation is computed for every crop and selected.

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
    drawn = vars(p.map(lambda value: value.flatten(0, 1))) if p else {}
    crops = views.flatten(0, 1)
    out = _memory.take(crops.shape, dtype) if crops.device.type == "cpu" else None
    return op.photometric(crops, **drawn, mean=mean, std=std, dtype=dtype, out=out).view(views.shape)
