"""One door to a backbone, from whatever holds one: checkpoints of every kind, and libraries' models by name.

Our ViT carries timm's names and our ResNet torchvision's, so nothing is renamed; what we cannot build is refused.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.config import Config, Model, View
from fastssl.methods import METHODS
from fastssl.methods.method import Method
from fastssl.models import VITS, build_backbone
from fastssl.models.resnet import ResNet
from fastssl.models.vit import ViT
from fastssl.training import checkpoint
from fastssl.training.checkpoint import Checkpoint, CheckpointError

RESNET_WEIGHTS = {"resnet18": "IMAGENET1K_V1", "resnet34": "IMAGENET1K_V1", "resnet50": "IMAGENET1K_V2"}


@dataclass
class Backbone:
    """A pretrained backbone, ready to use.

    Attributes:
        module: in eval mode, on the asked device.
        model: what it is.
        config: the run's whole configuration as plain values; of a library's model its `model` section alone.
        step: optimizer steps of the run.
    """

    module: ViT | ResNet
    model: Model
    config: dict[str, Any]
    step: int = 0

    @property
    def image_size(self) -> int:
        """Side of the images it was made for, in pixels."""
        return self.model.image_size

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
        name: a path, `timm:NAME` (plain ViTs with a class token), or `torchvision:NAME` (resnet18, 34, 50). A library's
            weights are downloaded once, into its own cache.
        device: where to put it.

    Raises:
        CheckpointError: no such file or model, not a backbone that we have, or the download failed.
    """
    library, colon, model = str(name).partition(":")
    if not colon or library not in ("timm", "torchvision"):
        found = backbone_of(checkpoint.read(name))
    else:
        try:
            found = _timm(model) if library == "timm" else _torchvision(model)
        except CheckpointError:
            raise
        except Exception as error:  # unknown names, no network, broken downloads: each library has its own types
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CheckpointError(f"{name} could not be loaded ({reason[:200]})") from None
    found.module.to(device).eval()
    return found


def backbone_of(saved: Checkpoint) -> Backbone:
    """The backbone in a record, on the CPU.

    Raises:
        CheckpointError: there is none in it, or not all of it.
    """
    weights = saved.backbone()
    model = saved.section(Model, "model")
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
    name = saved.config.get("method")
    if name not in METHODS:
        raise CheckpointError(f"{saved.path} is of method '{name}'; known: {', '.join(METHODS)}")
    kind = METHODS[name]
    groups = {key: saved.section(View, "views", key, name=key) for key in saved.config.get("views", {})}
    try:
        views = kind.Views(**groups)
    except TypeError as error:
        raise CheckpointError(f"{saved.path}: the views of its config are unusable ({error})") from None
    return Config(name, views, saved.section(kind.Settings, name), model=saved.section(Model, "model"))


def open_method(saved: Checkpoint) -> tuple[Config, Method]:
    """The whole method in a record of a pretraining run or a whole import, in eval mode on the CPU.

    Raises:
        CheckpointError: it is not whole, or does not fit its configuration.
    """
    config = config_of(saved)
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
    return from_timm(theirs, name)


def from_timm(theirs: nn.Module, name: str) -> Backbone:
    """Our backbone with the weights of a timm model.

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
        width=width,
        depth=depth,
        heads=heads,
        layer_scale=0.0 if gamma is None else 1.0,
    )
    state = {key: value for key, value in theirs.state_dict().items() if not key.startswith(("head.", "fc_norm."))}
    return _filled(model, state, f"timm:{name}")


def _torchvision(name: str) -> Backbone:
    import torchvision

    if name not in RESNET_WEIGHTS:
        raise CheckpointError(f"torchvision:{name} is not known; known: {', '.join(RESNET_WEIGHTS)}")
    theirs = torchvision.models.get_model(name, weights=RESNET_WEIGHTS[name])
    return from_torchvision(theirs, name)


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
