"""Backbones by name."""

from __future__ import annotations

import difflib

from fastssl.config import ConfigError, Model
from fastssl.models.resnet import LAYERS, ResNet
from fastssl.models.vit import ViT

VITS: dict[str, dict[str, int]] = {
    "vit_tiny": {"width": 192, "depth": 12, "heads": 3},
    "vit_small": {"width": 384, "depth": 12, "heads": 6},
    "vit_base": {"width": 768, "depth": 12, "heads": 12},
    "vit_large": {"width": 1024, "depth": 24, "heads": 16},
    "vit_huge": {"width": 1280, "depth": 32, "heads": 16},
}
RESNETS = tuple(LAYERS)


def build_backbone(model: Model, drop_path: float | None = None) -> ViT | ResNet:
    """The backbone that the configuration describes, freshly initialised.

    Both kinds answer `backbone(images) -> [B, width]` and `backbone.represent(images, ...) -> [B, F]`.

    Args:
        model: the `model` section.
        drop_path: replaces `model.drop_path` (a teacher takes 0). A ResNet has no stochastic depth.

    Raises:
        ConfigError: unknown name (the nearest known one is named), or numbers that do not fit together.
    """
    if model.name in RESNETS:
        if model.depth or model.heads or model.layer_scale:
            raise ConfigError(
                f"model.depth, model.heads and model.layer_scale change a ViT; model.name is '{model.name}'"
            )
        return ResNet(model.name, model.small_images, model.width or 64)
    if model.name not in VITS:
        near = difflib.get_close_matches(model.name, [*VITS, *RESNETS], n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"model.name is '{model.name}'; did you mean '{near}'? (known: {', '.join([*VITS, *RESNETS])})"
        )
    if model.small_images:
        raise ConfigError(f"model.small_images changes a ResNet's stem; for {model.name} set model.patch_size instead")
    check_image_size(model, "model.image_size", model.image_size)
    shape = {key: getattr(model, key) or value for key, value in VITS[model.name].items()}
    if shape["width"] % shape["heads"]:
        raise ConfigError(f"model.width is {shape['width']}; it must be a multiple of model.heads, {shape['heads']}")
    return ViT(
        **shape,
        patch_size=model.patch_size,
        image_size=model.image_size,
        positions=model.positions,
        drop_path=model.drop_path if drop_path is None else drop_path,
        layer_scale=model.layer_scale,
    )


def check_image_size(model: Model, key: str, size: int) -> None:
    """Raises ConfigError, naming `key`, if images of `size` pixels cannot be cut into the model's patches."""
    if model.name in VITS and size % model.patch_size:
        raise ConfigError(f"{key} is {size}; it must be a multiple of model.patch_size, {model.patch_size}")
