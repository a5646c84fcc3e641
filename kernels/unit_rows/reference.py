"""Rows of length one in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.kernels._exact import exact


@exact
def unit_rows(x: Tensor, gain: Tensor | None = None) -> Tensor:
    """See `fastssl.kernels.unit_rows.unit_rows`."""
    unit = F.normalize(x if x.dtype == torch.float64 else x.float(), dim=1)
    return unit if gain is None else gain * unit
