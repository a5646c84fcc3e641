"""Batch norm with what follows it: residual sum and ReLU (`kernels/batch_norm_act` in training, else PyTorch's own)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastssl.kernels.batch_norm_act import Running, batch_norm_act, takes
from fastssl.kernels.batch_norm_act.reference import ended


class Norm(_BatchNorm):
    """A batch norm with PyTorch's parameters, buffers and numbers.

    The kernel counts `num_batches_tracked` along, so no launch of its own is spent on it.

    Attributes:
        over_processes: normalises a group by the values of all processes where there is no kernel. None: statistics are
            this process's (`training.batch_norm.synchronise_batch_norm` sets it).
    """

    over_processes: Callable[[_BatchNorm, Tensor], Tensor] | None = None

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """relu(norm(x) + residual), [B, C, ...]."""
        return self.each([x], None if residual is None else [residual], relu)[0]

    def each(self, xs: list[Tensor], residuals: list[Tensor] | None = None, relu: bool = False) -> list[Tensor]:
        """The same of several groups, each by its own statistics."""
        together = self.over_processes is not None
        if self.training and self.momentum is not None and takes(xs, residuals, together):
            running = None
            if self.track_running_stats:
                buffers = (self.running_mean, self.running_var, self.num_batches_tracked)
                running = Running(*cast(tuple[Tensor, Tensor, Tensor], buffers), self.momentum)
            return batch_norm_act(xs, residuals, self.weight, self.bias, running, self.eps, relu, together)
        plain = super().forward if self.over_processes is None else partial(self.over_processes, self)
        normed = [plain(x) for x in xs]
        return [ended(y, None if residuals is None else residuals[i], relu) for i, y in enumerate(normed)]


class BatchNorm2d(Norm, nn.BatchNorm2d):
    """Of maps, [B, C, H, W]."""


class BatchNorm1d(Norm, nn.BatchNorm1d):
    """Of vectors, [B, C]."""


class Chain(nn.Sequential):
    """A sequence in which a ReLU belongs to the norm before it, and which takes several groups at once: only norms
    keep them apart."""

    def forward(self, x: Tensor) -> Tensor:
        """What becomes of x, [B, D]."""
        return self.joined([x])

    def joined(self, groups: list[Tensor]) -> Tensor:
        """What becomes of the rows of all groups, each group normalised by its own statistics."""
        rows = [len(group) for group in groups]
        x = groups[0] if len(groups) == 1 else torch.cat(groups)
        modules, fused = list(self), False
        for module, following in zip(modules, [*modules[1:], None], strict=True):
            if fused:  # this one is the ReLU
                fused = False
            elif isinstance(module, Norm):
                fused = isinstance(following, nn.ReLU)
                if len(rows) == 1:
                    x = module(x, relu=fused)
                else:
                    x = torch.cat(module.each(list(x.split(rows)), relu=fused))
            else:
                x = module(x)
        return x
