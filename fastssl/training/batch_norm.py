"""Batch normalisation with the statistics of all processes: PyTorch's on CUDA, and the same on the CPU."""

from __future__ import annotations

import torch
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastssl.training import distributed


def synchronise_batch_norm(module: nn.Module, device: torch.device) -> nn.Module:
    """The module with every batch norm normalising over the values of all processes; state-dict keys do not change."""
    if isinstance(module, _BatchNorm):
        return _synchronised(module, device)
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, _BatchNorm):
                setattr(parent, name, _synchronised(child, device))
    return module


def _synchronised(norm: _BatchNorm, device: torch.device) -> nn.Module:
    if hasattr(norm, "over_processes"):  # this project's own (`models.norms`)
        norm.over_processes = over_processes  # type: ignore[assignment]
    elif device.type == "cuda":
        return convert_sync_batchnorm(norm)  # PyTorch's own, that keeps the activation within timm's norms
    else:
        norm.__class__ = SyncBatchNorm
    return norm


def is_synchronised(norm: _BatchNorm) -> bool:
    """Whether a batch norm normalises over the values of all processes."""
    own = getattr(norm, "over_processes", None) is not None
    return own or isinstance(norm, (nn.SyncBatchNorm, SyncBatchNorm))


class SyncBatchNorm(_BatchNorm):
    """For processes on the CPU (gloo)."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, ...] -> the same shape."""
        x = over_processes(self, x)
        for name in ("drop", "act"):  # timm's norms do these too
            x = getattr(self, name, nn.Identity())(x)
        return x

    def _check_input_dim(self, x: Tensor) -> None:
        pass


def over_processes(norm: _BatchNorm, x: Tensor) -> Tensor:
    """What a batch norm of any kind makes of x, [B, C, ...], with the statistics of all processes in training.

    They may bring different numbers of values, or none, but each must take part in forward and backward. Sums are taken
    in float32 or float64.
    """
    if not norm.training or distributed.world() == 1:
        return _BatchNorm.forward(norm, x)
    dims = [0, *range(2, x.ndim)]
    shape = [1, -1, *[1] * (x.ndim - 2)]
    wide = x if x.dtype == torch.float64 else x.float()
    values = wide.new_tensor([x.numel() // x.shape[1]])  # per channel
    sums = distributed.total(torch.cat([wide.sum(dims), values]))
    count = sums[-1].detach().clamp_min(1)
    mean = sums[:-1] / count
    centred = wide - mean.view(shape)
    var = distributed.total(centred.square().sum(dims)) / count
    update_running(norm, mean.detach(), var.detach(), int(count))
    out = centred * (var + norm.eps).rsqrt().view(shape)
    if norm.affine:
        out = out * norm.weight.view(shape) + norm.bias.view(shape)
    return out.to(x.dtype)


@torch.no_grad()
def update_running(norm: _BatchNorm, mean: Tensor, var: Tensor, count: int) -> None:
    """Moves the running statistics of a batch norm of any kind, as PyTorch does.

    Args:
        norm: its buffers are changed in place.
        mean, var: [C], of this batch; `var` is biased, the running one is not.
        count: values per channel that they were taken from.
    """
    batches, running_mean, running_var = norm.num_batches_tracked, norm.running_mean, norm.running_var
    if norm.track_running_stats and batches is not None and running_mean is not None and running_var is not None:
        batches.add_(1)
        factor = 1 / float(batches) if norm.momentum is None else norm.momentum
        running_mean.lerp_(mean.to(running_mean.dtype), factor)
        running_var.lerp_((var * count / max(count - 1, 1)).to(running_var.dtype), factor)
