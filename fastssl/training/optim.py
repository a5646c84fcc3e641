"""Optimizers: which parameters decay, AdamW, SGD and LARS, gradient clipping. Nothing here waits for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.config import Optim


def param_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: those that decay, and those that do not (biases, and all of one dimension).

    Class tokens, mask tokens and learned position tables decay, as in the authors' code of DINO and MAE.
    """
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups[parameter.ndim > 1 and not name.endswith(".bias")].append(parameter)
    return [{"params": params, "decay": decay} for decay, params in groups.items() if params]


def build_optimizer(module: nn.Module, optim: Optim) -> torch.optim.Optimizer:
    """The optimizer of the module's trainable parameters, which must be on their device already.

    The learning rate and weight decay are set by `set_hyperparameters` before each step.
    """
    groups = param_groups(module)
    if optim.name == "adamw":
        built: torch.optim.Optimizer = torch.optim.AdamW(
            groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True
        )
    elif optim.name == "sgd":
        built = torch.optim.SGD(groups, lr=optim.lr, momentum=optim.momentum, foreach=True)
    else:
        built = LARS(groups, lr=optim.lr, momentum=optim.momentum)
    set_hyperparameters(built, optim.lr, optim.weight_decay)
    return built


def set_hyperparameters(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Sets the learning rate of all groups, and the weight decay of those that decay."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay if group["decay"] else 0.0


def trust_ratio(size: Tensor, change: Tensor, trust: float) -> Tensor:
    """LARS's factor of an update: trust x |p| / |d|, and 1 where a norm is zero."""
    return torch.where((size > 0) & (change > 0), trust * size / change, 1.0)


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive SGD (You et al. 2017, arXiv 1708.03888), as self-supervised methods use it.

        d = grad + weight_decay x p;   d = d x trust x |p| / |d|  (where both norms are positive)
        m = momentum x m + d;          p = p - lr x m

    Groups with decay=False (biases, norms) take plain SGD with momentum: no decay, no adaptation.

    Args:
        params: groups as `param_groups` makes them.
        lr: learning rate.
        momentum: decay of the moving sum.
        trust: the trust coefficient.
    """

    def __init__(self, params: list[dict[str, Any]], lr: float, momentum: float = 0.9, trust: float = 0.001) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "trust": trust, "weight_decay": 0.0, "decay": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step; `closure`, if given, recomputes and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            updates = tuple(p.grad for p in params)
            if group["decay"]:
                updates = torch._foreach_add(updates, params, alpha=group["weight_decay"])
                size, change = torch.stack(torch._foreach_norm(params)), torch.stack(torch._foreach_norm(updates))
                ratio = trust_ratio(size, change, group["trust"])
                updates = torch._foreach_mul(updates, list(ratio.unbind()))
            for p in params:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            sums = [self.state[p]["momentum"] for p in params]
            torch._foreach_mul_(sums, group["momentum"])
            torch._foreach_add_(sums, updates)
            torch._foreach_add_(params, sums, alpha=-group["lr"])
        return loss


@torch.no_grad()
def clip_gradients(module: nn.Module, max_norm: float, each: bool = False) -> Tensor:
    """Scales gradients down to a largest norm.

    Args:
        module: its parameters' gradients are changed in place; parameters without a gradient are left out.
        max_norm: largest L2 norm. 0: nothing is changed.
        each: apply it to every parameter tensor by itself, rather than to all gradients as one vector.

    Returns:
        Scalar on the device: the norm of all gradients as one vector, before clipping.
    """
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    if not grads:
        return torch.zeros((), device=next(module.parameters()).device)
    norms = torch.stack(torch._foreach_norm(grads))
    total = torch.linalg.vector_norm(norms)
    if max_norm > 0:
        if each:
            torch._foreach_mul_(grads, list((max_norm / (norms + 1e-6)).clamp(max=1.0).unbind()))
        else:
            torch._foreach_mul_(grads, (max_norm / (total + 1e-6)).clamp(max=1.0))
    return total
