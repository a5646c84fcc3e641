"""One door to a backbone, from whatever holds one: checkpoints of every kind, and libraries' models by name.

Our ViT carries timm's names and our ResNet torchvision's, so nothing is renamed; what we cannot build is refused.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from timm.data import resolve_data_config
from torch import Tensor, nn

from fastssl.batch import IMAGENET_MEAN, IMAGENET_STD
from fastssl.config import OLD_RESAMPLE, Config, Model, View
from fastssl.methods import METHODS
from fastssl.methods.method import Method
from fastssl.models import VITS, AnyBackbone, build_backbone
from fastssl.models.timm_backbone import PREFIX, TimmBackbone
from fastssl.models.vit import ViT
from fastssl.training import checkpoint
from fastssl.training.checkpoint import Checkpoint, CheckpointError

SAME = 0.999  # cosine similarity of what two networks make of an image, below which they are not the same
LIBRARIES = ("timm", "torchvision")
RESNET_WEIGHTS = {"resnet18": "IMAGENET1K_V1", "resnet34": "IMAGENET1K_V1", "resnet50": "IMAGENET1K_V2"}


@dataclass
class Backbone:
    """A pretrained backbone, ready to use. It takes images with ImageNet's mean and deviation taken out.

    Attributes:
        module: in eval mode, on the asked device.
        model: what it is.
        config: the run's whole configuration as plain values; of a library's model its `model` section, and with what
            central view the library judges it (`judged`).
        step: optimizer steps of the run.
    """

    module: AnyBackbone
    model: Model
    config: dict[str, Any]
    step: int = 0

    @property
    def image_size(self) -> int:
        """Side of the images it was made for, in pixels."""
        return self.model.image_size

    def central(self, size: int) -> dict[str, Any]:
        """The library's own way to a central view of `size` pixels, as `resize` (the shorter side before, in pixels)
        and `interpolation`; empty for a model of ours."""
        judged = self.config.get("judged")
        if not judged:
            return {}
        return {"resize": int(size / judged["crop_pct"] + 1e-6), "interpolation": judged["interpolation"]}

    @property
    def mean_patch(self) -> bool:
        """Whether the run's own monitor appended the mean patch token to the class token."""
        return bool(self.config.get("monitor", {}).get("mean_patch", False))

    @property
    def seed(self) -> int:
        """Seed of the run; 0 where there was none."""
        return int(self.config.get("run", {}).get("seed", 0))


def open_backbone(name: str | Path, device: torch.device | str = "cpu") -> Backbone:
    """The backbone in a checkpoint file, or a library's model with the library's weights.

    Args:
        name: a path, `timm:NAME` (a plain ViT becomes ours), or `torchvision:NAME` (resnet18, 34, 50). A library's
            weights are downloaded once, into its own cache.
        device: where to put it.

    Raises:
        CheckpointError: no such file or model, not a backbone that we have, or the download failed.
    """
    library, colon, model = str(name).partition(":")
    if not colon or library not in LIBRARIES:
        found = backbone_of(checkpoint.read(name))
    else:
        try:
            found = _timm(model) if library == "timm" else _torchvision(model)
        except CheckpointError:
            raise
        except Exception as error:  # unknown names, no network, broken downloads: each library has its own types
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CheckpointError(f"{name} could not be loaded ({reason[:200]})") from None
    check_finite(str(name), found.module.state_dict())
    found.module.to(device).eval()
    return found


def digest(module: nn.Module) -> str:
    """A checksum of all weights and buffers."""
    found = hashlib.sha256()
    for key, value in module.state_dict().items():
        found.update(key.encode())
        found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def check_finite(source: str, weights: dict[str, Tensor]) -> None:
    """Raises CheckpointError if one of the weights from `source` is not finite."""
    for name, value in weights.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise CheckpointError(f"{source}: {name} is not finite; the weights are broken")


def backbone_of(saved: Checkpoint) -> Backbone:
    """The backbone in a record, on the CPU.

    Raises:
        CheckpointError: there is none in it, or not all of it.
    """
    weights = saved.backbone()
    model = saved.section(Model, "model", resample=OLD_RESAMPLE)
    module = build_backbone(model)
    missing, unexpected = module.load_state_dict(weights, strict=False)
    if missing or unexpected:
        raise CheckpointError(
            f"{saved.path} does not hold a whole {model.name}: missing {missing}, unexpected {unexpected}"
        )
    return Backbone(module, model, saved.config, saved.step)


def config_of(saved: Checkpoint) -> Config:
    """The part of a configuration that its method reads (views, settings, model), typed.

    Raises:
        CheckpointError: the method is not known, or a section is missing or unusable.
    """
    name = str(saved.config.get("method"))
    if name not in METHODS:
        raise CheckpointError(f"{saved.path} is of method '{name}'; known: {', '.join(METHODS)}")
    kind = METHODS[name]
    groups = {key: saved.section(View, "views", key, name=key) for key in saved.config.get("views", {})}
    try:
        views = kind.Views(**groups)
    except TypeError as error:
        raise CheckpointError(f"{saved.path}: the views of its config are unusable ({error})") from None
    return Config(
        name, views, saved.section(kind.Settings, name), model=saved.section(Model, "model", resample=OLD_RESAMPLE)
    )


def open_method(saved: Checkpoint) -> tuple[Config, Method]:
    """The whole method in a record of a pretraining run or a whole import, in eval mode on the CPU.

    Raises:
        CheckpointError: it is not whole, or does not fit its configuration.
    """
    config = config_of(saved)
    check_finite(saved.path, saved.network)
    with torch.random.fork_rng():
        method = METHODS[config.method](config)
    try:
        method.load_state_dict(saved.network)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{saved.path} does not hold a whole {config.method} with {config.model.name} ({reason[:160]})"
        ) from None
    return config, method.eval()


def _timm(name: str) -> Backbone:
    import timm

    theirs = timm.create_model(name, pretrained=True, num_classes=0)
    try:
        return from_timm(theirs, name)
    except CheckpointError:  # not our ViT: as it is
        return _as_it_is(theirs, name)


def _as_it_is(theirs: Any, name: str) -> Backbone:
    """A model of timm behind our interface, made to take ImageNet's mean and deviation instead of its own.

    Raises:
        CheckpointError: that cannot be done exactly, for its first convolution pads the image.
    """
    own = resolve_data_config(model=theirs)
    model = Model(name=f"{PREFIX}{name}", image_size=own["input_size"][-1])
    module = TimmBackbone(name, model.image_size)
    module.net.load_state_dict(theirs.state_dict())
    if (tuple(own["mean"]), tuple(own["std"])) != (IMAGENET_MEAN, IMAGENET_STD):
        first = theirs.pretrained_cfg.get("first_conv")
        layer = module.net.get_submodule(first) if isinstance(first, str) else None
        if not isinstance(layer, nn.Conv2d) or any(layer.padding) or layer.bias is None:
            raise CheckpointError(
                f"timm:{name} takes images with mean {own['mean']} and deviation {own['std']}, and its first layer "
                "cannot be made to take ImageNet's"
            )
        _take_imagenet(layer, own["mean"], own["std"])
    judged = {key: own[key] for key in ("crop_pct", "interpolation")}
    return Backbone(module, model, {"model": asdict(model), "judged": judged})


@torch.no_grad()
def _take_imagenet(layer: nn.Conv2d, own_mean: tuple[float, ...], own_std: tuple[float, ...]) -> None:
    """Changes a convolution without padding that takes images with one mean and deviation to take ImageNet's."""
    mean, std, theirs, wide = (
        torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD, own_mean, own_std)
    )
    # w (x - m') / s' + b  =  (w s / s') (x - m) / s  +  b + w (m - m') / s', summed over the pixels of a patch
    cast(Tensor, layer.bias).add_((layer.weight * (mean - theirs) / wide).sum((1, 2, 3)))
    layer.weight.mul_(std / wide)


def from_timm(theirs: nn.Module, name: str) -> Backbone:
    """Our backbone with the weights of a timm model, made to take ImageNet's mean and deviation instead of the model's.

    Raises:
        CheckpointError: it is not a plain ViT with a class token.
    """
    vit: Any = theirs  # if it is one
    try:
        side, patch = vit.patch_embed.img_size[0], vit.patch_embed.patch_size[0]
        heads = vit.blocks[0].attn.num_heads
        width, depth = vit.embed_dim, len(vit.blocks)
        gamma = getattr(vit.blocks[0].ls1, "gamma", None)
    except (AttributeError, IndexError, TypeError):
        raise CheckpointError(
            f"timm:{name} is not a plain ViT; plain ViTs and torchvision's ResNets are known"
        ) from None
    model = Model(
        name=next((key for key, shape in VITS.items() if shape["width"] == width), "vit_base"),
        image_size=side,
        patch_size=patch,
        resample="antialiased",
        width=width,
        depth=depth,
        heads=heads,
        layer_scale=0.0 if gamma is None else 1.0,
    )
    state = {key: value for key, value in theirs.state_dict().items() if not key.startswith(("head.", "fc_norm."))}
    found = _filled(model, state, f"timm:{name}")
    own = resolve_data_config(model=theirs)
    found.config["judged"] = {key: own[key] for key in ("crop_pct", "interpolation")}
    mean, std, own_mean, own_std = (
        torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD, own["mean"], own["std"])
    )
    images = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _take_imagenet(cast(nn.Conv2d, found.module.get_submodule("patch_embed.proj")), own["mean"], own["std"])
        ours, theirs_blocks = cast(ViT, found.module.eval()), vit.blocks
        ours_blocks, ours.blocks, vit.blocks = ours.blocks, ours.blocks[:1], theirs_blocks[:1]  # one tells
        got, expected = ours.tokens((images - mean) / std), vit.eval().forward_features((images - own_mean) / own_std)
        ours.blocks, vit.blocks = ours_blocks, theirs_blocks
    if torch.cosine_similarity(expected.flatten(), got.flatten(), dim=0) < SAME:
        raise CheckpointError(f"timm:{name} computes something else with its weights than a plain ViT")
    return found


def _torchvision(name: str) -> Backbone:
    import torchvision

    if name not in RESNET_WEIGHTS:
        raise CheckpointError(f"torchvision:{name} is not known; known: {', '.join(RESNET_WEIGHTS)}")
    weights = torchvision.models.get_model_weights(name)[RESNET_WEIGHTS[name]]
    view = weights.transforms()
    found = from_torchvision(torchvision.models.get_model(name, weights=weights), name)
    crop = view.crop_size[0] / view.resize_size[0]
    found.config["judged"] = {"crop_pct": crop, "interpolation": view.interpolation.value}
    return found


def from_torchvision(theirs: nn.Module, name: str) -> Backbone:
    """Our backbone with the weights of a torchvision ResNet."""
    state = {key: value for key, value in theirs.state_dict().items() if not key.startswith("fc.")}
    return _filled(Model(name=name), state, f"torchvision:{name}")


def _filled(model: Model, state: dict[str, Tensor], source: str) -> Backbone:
    module = build_backbone(model)
    own = module.state_dict()
    odd = sorted(own.keys() ^ state.keys()) + [
        key for key in own if key in state and own[key].shape != state[key].shape
    ]
    if odd:
        raise CheckpointError(f"{source} is not a backbone that we have; what differs: {', '.join(odd[:6])}")
    module.load_state_dict(state)
    return Backbone(module, model, {"model": asdict(model)})
