"""Backbones of timm that have no like here (ConvNeXt, Swin, ViTs with registers, ..), with the face of ours."""

from __future__ import annotations

import functools
import itertools
from typing import Any, cast

import timm
import timm.layers
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from fastssl.config import ConfigError, Model
from fastssl.models.vit import ViT

PREFIX = "timm:"
LIBRARY_OPTIONS: tuple[dict[str, Any], ...] = (  # how families of timm are told of the image's size, the best first
    {"img_size": True, "dynamic_img_size": True},
    {"img_size": True},
    {},
)
STAGES = 6  # a network of no more feature maps has stages, one of more has blocks


def create(name: str, image_size: int, drop_path: float = 0.0) -> tuple[nn.Module, dict[str, Any]]:
    """timm's model without its classifier, for images of `image_size` pixels and, where it can, of any other.

    Returns:
        The model, and how it was told of the size.

    Raises:
        ConfigError: timm does not know it, or it has no stochastic depth and `drop_path` is not 0.
    """
    depth: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
    reason = ""
    for sized in LIBRARY_OPTIONS:
        given: dict[str, Any] = {key: image_size if key == "img_size" else value for key, value in sized.items()}
        try:
            return timm.create_model(name, num_classes=0, **given, **depth), given
        except TypeError as error:  # an argument that this family does not have
            reason = str(error)
        except (RuntimeError, ValueError, AssertionError) as error:
            reason = str(error)
            break
    if "drop_path_rate" in reason:
        raise ConfigError(f"timm:{name} has no stochastic depth; set model.drop_path to 0, not {drop_path}")
    raise ConfigError(
        f"timm:{name} cannot be built ({' '.join(reason.split())[:160]}); timm.list_models() has all names"
    )


class TimmBackbone(nn.Module):
    """A network of timm that ends in its pooled feature. Its state dict has timm's keys behind `net.`.

    Its own stochastic depth draws from PyTorch's generator, unlike that of our ViT.

    Args:
        name: timm's, without `timm:`.
        image_size: side of the images for which its tables are made, if it has any, in pixels.
        drop_path: its stochastic depth.

    Attributes:
        width: of the pooled feature (C).
        maps: channels of each feature map, from the first to the last.
        options: arguments of timm.create_model that its size needed.
        memory_format: how its weights are best laid out.

    Raises:
        ConfigError: see `create`; or it has no feature maps to offer.
    """

    memory_format = torch.channels_last

    def __init__(self, name: str, image_size: int = 224, drop_path: float = 0.0) -> None:
        super().__init__()
        self.net: Any
        self.net, self.options = create(name, image_size, drop_path)
        if not hasattr(self.net, "forward_intermediates"):
            raise ConfigError(f"timm:{name} offers no feature maps; take one that has forward_intermediates")
        self.width: int = getattr(self.net, "head_hidden_size", None) or self.net.num_features
        self.maps: list[int] = [one["num_chs"] for one in self.net.feature_info]

    def compile_parts(self) -> list[nn.Module]:
        """What torch.compile takes piece by piece: the network."""
        return [self.net]

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, C]."""
        return self.net(images)

    def represent(self, images: Tensor, blocks: int = 1, mean_patch: bool = False) -> Tensor:
        """The image's feature for evaluation, [B, C]. `blocks` and `mean_patch` are our ViT's: 1 and False here."""
        if blocks != 1 or mean_patch:
            raise ConfigError(
                f"a model of timm has one pooled feature: blocks is {blocks} and mean_patch {mean_patch}, they must "
                "be 1 and False"
            )
        return self(images)

    def stages(self, images: Tensor) -> list[Tensor]:
        """All feature maps, [B, C_l, H_l, W_l]."""
        return self.net.forward_intermediates(images, intermediates_only=True, output_fmt="NCHW")

    def feature_and_maps(self, images: Tensor, taps: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
        """What `forward` gives, and the maps of these numbers, counted from 1; all in one pass."""
        indices = [tap - 1 for tap in taps]
        last, maps = self.net.forward_intermediates(images, indices=indices, output_fmt="NCHW")
        return self.net.forward_head(last), maps

    def pyramid(self, levels: int) -> tuple[list[int], list[float]]:
        """Channels and strides of the last feature maps.

        Raises:
            ConfigError: each is not half as fine as the one before.
        """
        strides = [float(one["reduction"]) for one in self.net.feature_info][-levels:]
        if len(strides) < levels or any(2 * a != b for a, b in itertools.pairwise(strides)):
            raise ConfigError(
                f"the model of timm has feature maps at strides {strides}; a pyramid needs {levels} that double"
            )
        return self.maps[-levels:], strides

    def default_taps(self) -> tuple[int, ...]:
        """Three maps of several depths: the last three stages, or blocks at 1/2, 3/4 and the end."""
        last = len(self.maps)
        return tuple(range(max(last - 2, 1), last + 1)) if last <= STAGES else (last // 2, 3 * last // 4, last)


@functools.lru_cache(maxsize=2)
def on_meta(name: str, image_size: int) -> Any:
    """The network without its values."""
    with torch.device("meta"):
        return create(name, image_size)[0].eval()


def check_size(model: Model, key: str, size: int) -> None:
    """Raises ConfigError, naming `key`, if the model of timm cannot take images of `size` pixels: it is tried, without
    values."""
    name = model.name.removeprefix(PREFIX)
    net = on_meta(name, model.image_size)
    try:
        with torch.no_grad(), torch.device("meta"):
            net(torch.empty(1, 3, size, size))
    except NotImplementedError:
        return  # an operation that needs values
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ConfigError(
            f"{key} is {size}; timm:{name}, made for model.image_size {model.image_size}, cannot take it ({reason})"
        ) from None


def shape_of_plain_vit(net: Any) -> dict[str, Any] | None:
    """width, depth, heads, patch_size and layer_scale of a network of timm that computes what our ViT computes: square
    patches, a class token, a learned table with a row for it, pre-norm blocks with exact GELU; None for any other."""
    if type(net) is not VisionTransformer or not net.has_class_token or len(net.blocks) == 0:
        return None
    block, size = cast(Any, net.blocks[0]), net.patch_embed.patch_size
    plain = (
        type(block) is Block
        and type(block.mlp.act) is nn.GELU
        and type(net.norm) is timm.layers.LayerNorm
        and net.norm.eps == block.norm1.eps == 1e-6
        and net.pos_embed is not None
        and size[0] == size[1]
    )
    if not plain:
        return None
    scaled = isinstance(block.ls1, timm.layers.LayerScale)
    shape = {
        "width": net.embed_dim,
        "depth": len(net.blocks),
        "heads": block.attn.num_heads,
        "patch_size": size[0],
        "layer_scale": getattr(block.ls1, "init_values", 1e-5) if scaled else 0.0,
    }
    with torch.device("meta"):
        ours = ViT(**shape, image_size=net.patch_embed.img_size[0]).state_dict()
    theirs = {key: value for key, value in net.state_dict().items() if not key.startswith("head.")}
    same = ours.keys() == theirs.keys() and all(ours[key].shape == value.shape for key, value in theirs.items())
    return shape if same else None
