"""InfoNCE between the patches of two code maps of one image; the similarities never reach memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastssl.kernels._check import FLOATS, Shapes, check, once
from fastssl.kernels._path import use_triton
from fastssl.kernels.patch_contrast import reference

NAME = "patch_contrast"


class PatchContrast(NamedTuple):
    """Sums over the valid patches; of several ranks, add both before dividing. The mean: total / count.clamp(min=1).

    Attributes:
        total: scalar, sum of the losses, nats; the only part with a gradient.
        count: scalar, number of valid patches.
    """

    total: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count


def patch_contrast(a: Tensor, b: Tensor, valid: Tensor, temperature: float = 0.2) -> PatchContrast:
    """Cross-entropy that picks a patch of `b` out of all patches of its image by the code of the same patch of `a`
    (the patch term of SAAE's semantic aligner: Wang et al. 2022).

        for n in range(N):
            for p in range(P):
                if valid[n, p]:
                    s[q] = cosine(a[n, p], b[n, q]) / temperature  # all q, also those that are not valid
                    total += logsumexp(s) - s[p]
                    count += 1

    A cosine is the product of the codes over (norm + 1e-10) each. Products are of the codes as given, float32 sums;
    only the gradients' products round g, the slope of the similarities, to the codes' type. The backward pass computes
    the similarities again: log-sum-exps and norms are kept, [N, P]. Blocks of patches that do not count cost nothing.

    Args:
        a: [N, P, C], float32, float16 or bfloat16; P up to 1024, C up to 512.
        b: [N, P, C], the type of `a`.
        valid: bool [N, P], the patches that count (SAAE: seen by both crops).
        temperature: above 0.

    Returns:
        PatchContrast, both float32 (float64 for float64 codes); the loss is total / count.clamp(min=1).

    Raises:
        KernelError: a shape or type that does not fit.
    """
    _check(a, b, valid, temperature)
    if use_triton(NAME, a) and a.dtype in FLOATS[:3]:
        from fastssl.kernels.patch_contrast import kernel

        return PatchContrast(*kernel.forward(a, b, valid, temperature)[:2])
    return PatchContrast(*reference.patch_contrast(a, b, valid, temperature))


@once
def _check(a: Tensor, b: Tensor, valid: Tensor, temperature: float) -> None:
    shapes = Shapes(NAME)
    _, patches, width = shapes("a", a, "N P C")
    shapes("b", b, "N P C", (a.dtype,))
    shapes("valid", valid, "N P", (torch.bool,))
    check(1 <= patches <= 1024 and 1 <= width <= 512, NAME, "a", "[N, P to 1024, C to 512]", list(a.shape))
    check(temperature > 0, NAME, "temperature", "above 0", temperature)
