"""Contrasts of codes over the images of all processes: two views of one image find each other among all others.

Letters: B images per process, N = B x processes, K numbers per code.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.kernels.unit_rows import unit_rows
from fastssl.training import distributed


def nt_xent(codes: Tensor, temperature: float, gather: bool = True) -> Tensor:
    """Each view's code must find the image's other view among all other views (NT-Xent of SimCLR: Chen et al. 2020,
    arXiv 2002.05709, equation 1).

        loss = 0
        for a in all 2B views of this process:  # b: all 2N views but a; p: the other view of a's image
            loss -= log(exp(cos(a, p) / temperature) / sum(exp(cos(a, b) / temperature) for b)) / 2B

    The mean of the processes' losses is the loss of the whole batch, and the mean of their gradients its gradient.

    Args:
        codes: [2, B, K] by view, as many on every process.
        temperature: of the softmax.
        gather: b goes through the views of all processes; False: through those of this process alone.

    Returns:
        Scalar; ln(2N - 1) where all codes are equal, 0 for a single image. Float32 (float64) also under autocast.
    """
    with torch.autocast(codes.device.type, enabled=False):
        query = _of_length_one(codes)  # [2, B, K]
        keys = _gathered(query) if gather else query
        first = codes.shape[1] * distributed.rank() if gather else 0
        itself, other = _pairs(codes.shape[1], keys.shape[1], first, query.dtype, codes.device)
        rows, columns = query.flatten(0, 1), keys.flatten(0, 1)
        return F.cross_entropy(torch.addmm(itself, rows, columns.t(), alpha=1 / temperature), other)  # [2B, 2N]


@cache
def _pairs(images: int, count: int, first: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """What is added to the logits, [2B, 2N]: minus infinity for a view with itself; and the place of each view's
    partner, int64 [2B]. Constants, made once."""
    place = first + torch.arange(images, device=device)
    own, other = torch.cat([place, count + place]), torch.cat([count + place, place])
    itself = own[:, None] == torch.arange(2 * count, device=device)
    return torch.zeros(itself.shape, dtype=dtype, device=device).masked_fill_(itself, -math.inf), other


def teacher_contrast(codes: Tensor, keys: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Each view's code must find the teacher's code of the image's other view, among the teacher's codes of that view
    (MoCo v3: Chen et al. 2021, arXiv 2104.02057, algorithm 1).

        loss = 0
        for a, b in ((0, 1), (1, 0)):
            for i in range(B):
                p = softmax([cos(codes[a, i], keys[b, n]) / temperature for n in range(N)])
                loss -= 2 * temperature * log(p[i]) / B

    The factor 2 x temperature holds the gradient's size. No gradient flows to the keys.

    Args:
        codes, keys: [2, B, K] by view, as many on every process.
        temperature: of the softmax.

    Returns:
        The loss, 4 x temperature x ln N where all codes are equal, and the share of codes whose nearest key is the
        right one, detached. Float32 (float64) also under autocast.
    """
    with torch.autocast(codes.device.type, enabled=False):
        every = _gathered(_of_length_one(keys.detach()))
        logits = _of_length_one(codes) @ every.flip(0).transpose(1, 2) / temperature  # [2, B, N]
        place = _places(codes.shape[1], codes.shape[1] * distributed.rank(), codes.device)
        loss = F.cross_entropy(logits.flatten(0, 1), place)  # mean over 2B
        right = (logits.detach().flatten(0, 1).argmax(-1) == place).float().mean()
        return 4 * temperature * loss, right


@cache
def _places(images: int, first: int, device: torch.device) -> Tensor:
    """Where this process's images are among those of all, int64 [2B]: for one view and the other. Made once."""
    return (first + torch.arange(images, device=device)).repeat(2)


def _of_length_one(codes: Tensor) -> Tensor:
    """[2, B, K], float32 (float64)."""
    return unit_rows(codes.flatten(0, 1)).unflatten(0, codes.shape[:2])


def _gathered(codes: Tensor) -> Tensor:
    """[2, B, K] -> the codes of all processes [2, N, K]."""
    if distributed.world() == 1:
        return codes
    return distributed.gather(codes.transpose(0, 1).contiguous()).transpose(0, 1)
