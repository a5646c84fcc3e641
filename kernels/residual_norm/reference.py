"""Residual sum and layer norm in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.kernels._exact import exact


@exact
def residual_norm(
    x: Tensor, branch: Tensor | None, gain: Tensor | None, keep: Tensor | None, weight: Tensor, bias: Tensor,
    eps: float, out_dtype: torch.dtype, shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `fastssl.kernels.residual_norm.residual_norm`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if branch is not None:
        x = residual_add(x, branch, gain, keep, shift)
    normed = F.layer_norm(x.to(wide), x.shape[-1:], weight.to(wide), bias.to(wide), eps)
    return x, normed.to(out_dtype)


@exact
def residual_add(
    x: Tensor, branch: Tensor, gain: Tensor | None, keep: Tensor | None, shift: Tensor | None = None
) -> Tensor:
    """See `fastssl.kernels.residual_norm.residual_add`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) + scaled(branch.to(wide), gain, keep, shift)).to(x.dtype)


def scaled(branch: Tensor, gain: Tensor | None, keep: Tensor | None, shift: Tensor | None) -> Tensor:
    """keep[b] * gain * (branch + shift), [B, N, D]; what is None is left out."""
    if shift is not None:
        branch = branch + shift
    if gain is not None:
        branch = branch * gain
    return branch if keep is None else branch * keep[:, None, None]
