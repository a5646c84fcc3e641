"""InfoNCE between the patches of two code maps in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastssl.kernels._exact import exact

EPSILON = 1e-10  # added to the norms


@exact
def patch_contrast(a: Tensor, b: Tensor, valid: Tensor, temperature: float = 0.2) -> tuple[Tensor, Tensor]:
    """See `fastssl.kernels.patch_contrast.patch_contrast`."""
    exact = torch.promote_types(a.dtype, torch.float32)
    a, b = (x.to(exact) / (x.to(exact).norm(dim=2, keepdim=True) + EPSILON) for x in (a, b))
    logits = a @ b.transpose(1, 2) / temperature
    losses = logits.logsumexp(2) - logits.diagonal(dim1=1, dim2=2)
    return torch.where(valid, losses, 0).sum(), valid.sum().to(exact)
