"""Batch norm, residual sum and ReLU in plain PyTorch: its own functions, one group after the other."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fastssl.kernels._exact import exact


def batch_norm_act(
    xs: list[Tensor], residuals: list[Tensor] | None, weight: Tensor | None, bias: Tensor | None, running: Any,
    eps: float, relu: bool, together: bool = False,
) -> list[Tensor]:  # fmt: skip
    """See `fastssl.kernels.batch_norm_act.batch_norm_act`; of one process."""
    if running is not None:
        running.batches.add_(len(xs))
    return [
        _normed(x, None if residuals is None else residuals[i], weight, bias, running, eps, relu)
        for i, x in enumerate(xs)
    ]


@exact
def _normed(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, running: Any, eps: float,
    relu: bool,
) -> Tensor:  # fmt: skip
    mean, var, momentum = (None, None, 0.0) if running is None else (running.mean, running.var, running.momentum)
    return ended(F.batch_norm(x, mean, var, weight, bias, True, momentum, eps), residual, relu)


def ended(y: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    """What follows on a norm's output, which it changes."""
    if residual is not None:
        y += residual
    return y.relu_() if relu else y
