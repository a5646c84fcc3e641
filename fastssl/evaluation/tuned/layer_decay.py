"""Layer-wise learning-rate decay: the earlier a layer of the backbone, the smaller its steps (Clark et al. 2020, arXiv
2003.10555; for ViT: Bao et al. 2022, arXiv 2106.08254)."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from fastssl.models import AnyBackbone
from fastssl.models.timm_backbone import TimmBackbone
from fastssl.models.vit import ViT


def layer_groups(
    module: nn.Module, backbone: AnyBackbone, layer_decay: float, weight_decay: float
) -> list[dict[str, Any]]:
    """The trainable parameters of `module` by layer and by whether they decay, as timm makes them.

    Layer 0 is what makes the tokens (a ResNet's stem), layers 1 to L are a ViT's blocks (a ResNet's stages; of a timm
    model what timm itself calls its layers), L + 1 is everything else in `module`. Biases, norms, the class token and
    the position table do not decay; a relative position bias does.

    Args:
        module: the network that is trained.
        backbone: a part of it, at any depth.
        layer_decay: the learning rate of a layer is to be this multiple of the next one's.
        weight_decay: of what decays.

    Returns:
        Groups with keys `params`, `weight_decay`, and `lr_scale` = layer_decay^(L + 1 - layer), the factor by which the
        training loop has to multiply the learning rate.
    """
    name = next(name for name, part in module.named_modules() if part is backbone)
    prefix = f"{name}." if name else ""
    still = ["cls_token", "pos_embed"]
    layers: Any = {"stem": r"^conv1|bn1", "blocks": r"^layer(\d+)"}
    if isinstance(backbone, ViT):
        layers = {"stem": r"^cls_token|pos_embed|patch_embed", "blocks": r"^blocks\.(\d+)"}
    elif isinstance(backbone, TimmBackbone):
        prefix += "net."
        layers = backbone.net.group_matcher(coarse=False)
        still = list(getattr(backbone.net, "no_weight_decay", list)())
    layers = _behind(prefix, layers)
    described: Any = SimpleNamespace(named_parameters=module.named_parameters, group_matcher=lambda coarse: layers)
    return param_groups_layer_decay(
        described,
        weight_decay=weight_decay,
        no_weight_decay_list=tuple(f"{prefix}{key}" for key in still),
        layer_decay=layer_decay,
    )


def _behind(prefix: str, names: Any) -> Any:
    """timm's description of layers (regular expressions, in whatever they stand) for parameters behind a prefix."""
    if isinstance(names, dict):
        return {key: _behind(prefix, value) for key, value in names.items()}
    if isinstance(names, list | tuple):
        return type(names)(_behind(prefix, value) for value in names)
    return f"^{re.escape(prefix)}(?:{names.replace('^', '')})" if isinstance(names, str) else names


def set_rates(optimizer: torch.optim.Optimizer, lr: float) -> dict[str, float]:
    """Gives each of the groups of `layer_groups` its share of the learning rate; returns what a log line says of it."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    return {"lr": lr}
