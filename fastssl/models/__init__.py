"""Backbones by name."""

from __future__ import annotations

import difflib
from dataclasses import replace

from fastssl.config import ConfigError, Model
from fastssl.models import timm_backbone
from fastssl.models.resnet import LAYERS, ResNet
from fastssl.models.timm_backbone import PREFIX, TimmBackbone
from fastssl.models.vit import ViT

VITS: dict[str, dict[str, int]] = {
    "vit_tiny": {"width": 192, "depth": 12, "heads": 3},
    "vit_small": {"width": 384, "depth": 12, "heads": 6},
    "vit_base": {"width": 768, "depth": 12, "heads": 12},
    "vit_large": {"width": 1024, "depth": 24, "heads": 16},
    "vit_huge": {"width": 1280, "depth": 32, "heads": 16},
}
RESNETS = tuple(LAYERS)
AnyBackbone = ViT | ResNet | TimmBackbone


def build_backbone(model: Model, drop_path: float | None = None) -> AnyBackbone:
    """The backbone that the configuration describes, freshly initialised.

    All kinds answer `backbone(images) -> [B, width]` and `backbone.represent(images, ...) -> [B, F]`.

    Args:
        model: the `model` section.
        drop_path: replaces `model.drop_path` (a teacher takes 0). A ResNet has no stochastic depth.

    Raises:
        ConfigError: unknown name (the nearest known one is named), or numbers that do not fit together.
    """
    if model.name.startswith(PREFIX):
        _check_named_by_timm(model)
        rate = model.drop_path if drop_path is None else drop_path
        return TimmBackbone(model.name.removeprefix(PREFIX), model.image_size, rate)
    if model.name in RESNETS:
        if model.depth or model.heads or model.layer_scale:
            raise ConfigError(
                f"model.depth, model.heads and model.layer_scale change a ViT; model.name is '{model.name}'"
            )
        return ResNet(model.name, model.small_images, model.width or 64)
    if model.name not in VITS:
        near = difflib.get_close_matches(model.name, [*VITS, *RESNETS], n=1, cutoff=0.0)[0]
        raise ConfigError(
            f"model.name is '{model.name}'; did you mean '{near}'? (known: {', '.join([*VITS, *RESNETS])}, and "
            f"{PREFIX}NAME of timm)"
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
        resample=model.resample,
        drop_path=model.drop_path if drop_path is None else drop_path,
        layer_scale=model.layer_scale,
    )


def check_image_size(model: Model, key: str, size: int) -> None:
    """Raises ConfigError, naming `key`, if the model cannot take images of `size` pixels."""
    if model.name in VITS and size % model.patch_size:
        raise ConfigError(f"{key} is {size}; it must be a multiple of model.patch_size, {model.patch_size}")
    if model.name.startswith(PREFIX):
        timm_backbone.check_size(model, key, size)


def resolved(model: Model) -> Model:
    """The model section with our ViT's numbers where it names a plain ViT of timm; any other section as it is.

    So a ViT that timm has in other sizes or with other patches is our ViT, which every method and protocol takes.

    Raises:
        ConfigError: timm has no such model, or numbers are given that the name already says.
    """
    if not model.name.startswith(PREFIX):
        return model
    found = timm_backbone.shape_of_plain_vit(timm_backbone.on_meta(model.name.removeprefix(PREFIX), model.image_size))
    if found is None:
        return model
    _check_named_by_timm(model, patch_size=found["patch_size"], layer_scale=model.layer_scale)
    shape = {key: found[key] for key in ("width", "depth", "heads")}
    name = next((name for name, numbers in VITS.items() if numbers == shape), None)
    if name is not None:
        shape = dict.fromkeys(shape, 0)
    found["layer_scale"] = found["layer_scale"] or model.layer_scale
    return replace(model, **{**found, **shape}, name=name or "vit_base")


def _check_named_by_timm(model: Model, **allowed: float) -> None:
    """Raises ConfigError if a number is given that a model of timm has by its name, but for these."""
    default = Model()
    for key in ("width", "depth", "heads", "layer_scale", "small_images", "patch_size"):
        value = getattr(model, key)
        if value not in (getattr(default, key), allowed.get(key, 0)):
            raise ConfigError(f"model.{key} is {value}, but model.name, {model.name}, says it already; leave it out")


def build_vit(model: Model, method: str, drop_path: float | None = None) -> ViT:
    """`build_backbone` for a method that needs the tokens of our ViT.

    Raises:
        ConfigError: the configuration describes another network.
    """
    other = model.name in RESNETS or model.name.startswith(PREFIX)
    network = None if other else build_backbone(model, drop_path)
    if not isinstance(network, ViT):
        raise ConfigError(
            f"model.name is '{model.name}'; method {method} needs a ViT: {', '.join(VITS)}, or a plain one of timm "
            "(with a class token, without registers)"
        )
    return network
