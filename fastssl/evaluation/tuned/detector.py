"""Mask R-CNN (He et al. 2017, arXiv 1703.06870) of torchvision on our backbones.

Letters: B images, H and W their sides in pixels, C channels of the feature pyramid, K categories.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import AnchorGenerator, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from torchvision.transforms.v2 import functional as transforms

from fastssl.config import ConfigError
from fastssl.evaluation.tuned.label_maps import resized
from fastssl.models import AnyBackbone
from fastssl.models.pyramid import Pyramid
from fastssl.models.vit import ViT

LEVELS = ("0", "1", "2", "3")  # P2 to P5; P6 ("pool") is for proposals alone
FULLY_CONNECTED = 1024


def build_detector(
    backbone: AnyBackbone,
    categories: int,
    *,
    channels: int = 256,
    rois: int = 512,
    short_side: int = 800,
    long_side: int = 1333,
    drop_path: float = 0.0,
    checkpointing: bool = False,
    dtype: torch.dtype = torch.float32,
) -> MaskRCNN:
    """Mask R-CNN on four maps of the backbone: at strides 4, 8, 16, 32 for a ResNet or a ViT with patches of 16 pixels.

    As in CAE (Chen et al. 2022, arXiv 2202.03026): FPN to C channels with an extra level P6; anchors of 8 strides in
    three shapes; a box head of four 3x3 convolutions with batch norm and one layer of 1024; a mask head of four. Where
    its detector differs, this one does as torchvision does: smooth L1 on box offsets (weight 1) for GIoU on boxes
    (weight 10), RoIAlign without the half-pixel shift, smooth L1 (beta 1/9) for L1 on the proposals' offsets, every
    object's best anchor positive however little it overlaps, box offsets for the background class too.

    Images go in as a list of float [3, h, w] from 0 to 1. In training they are taken as they are; else they are resized
    here, and boxes and masks come out in pixels of the image that went in.

    Args:
        backbone: trained with the rest; `Pyramid` takes it over.
        categories: K, without the background.
        channels: C, of the pyramid and of the heads' convolutions.
        rois: boxes per image from which the heads learn, a quarter of them on objects.
        short_side, long_side: of images in eval mode, in pixels (`label_maps.resized`).
        drop_path, checkpointing: of a ViT, as in `Pyramid`.
        dtype: of autocast in backbone and heads; boxes, proposals and losses stay float32.

    Raises:
        ConfigError: a ViT whose patches cannot be halved twice.
    """
    features = PyramidMaps(backbone, channels, drop_path, checkpointing, dtype)
    strides = features.strides
    anchors = AnchorGenerator(
        sizes=tuple((8 * stride,) for stride in (*strides, 2 * strides[-1])), aspect_ratios=((0.5, 1.0, 2.0),) * 5
    )
    head = FastRCNNConvFCHead((channels, 7, 7), [channels] * 4, [FULLY_CONNECTED], norm_layer=nn.BatchNorm2d)
    detector = MaskRCNN(
        features,
        min_size=short_side,
        max_size=long_side,
        rpn_anchor_generator=anchors,
        rpn_head=Autocast(RPNHead(channels, anchors.num_anchors_per_location()[0]), dtype),
        box_roi_pool=_pooler(7, strides),
        box_head=Autocast(head, dtype),
        box_predictor=FastRCNNPredictor(FULLY_CONNECTED, categories + 1),
        box_batch_size_per_image=rois,
        mask_roi_pool=_pooler(14, strides),
        mask_head=Autocast(MaskRCNNHeads(channels, [channels] * 4, dilation=1), dtype),
        mask_predictor=MaskRCNNPredictor(channels, channels, categories + 1),
    )
    plain = detector.transform
    detector.transform = Frame(
        short_side, long_side, plain.image_mean, plain.image_std, size_divisible=max(32, 2 * strides[-1])
    )
    return detector


class PyramidMaps(nn.Module):
    """Backbone, four maps, FPN: images [B, 3, H, W] -> five maps [B, C, H / stride, W / stride], float32, by level.

    Attributes:
        body: the pyramid, which gives the four maps.
        out_channels: C.
        strides: of the first four levels, in pixels.
    """

    def __init__(
        self, backbone: AnyBackbone, channels: int, drop_path: float, checkpointing: bool, dtype: torch.dtype
    ) -> None:
        super().__init__()
        side = getattr(backbone, "patch_size", 4)
        if side % 4 or side & (side - 1):
            raise ConfigError(f"model.patch_size is {side}; detection needs 4, 8, 16 or 32")
        vit = isinstance(backbone, ViT)
        self.body = Pyramid(backbone, drop_path=drop_path if vit else 0.0, checkpointing=vit and checkpointing)
        self.fpn = FeaturePyramidNetwork(self.body.channels, channels, LastLevelMaxPool())
        self.out_channels = channels
        self.strides = tuple(int(stride) for stride in self.body.strides)
        self.dtype = dtype

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        with _autocast(images, self.dtype):
            maps = self.fpn(OrderedDict(zip(LEVELS, self.body(images), strict=True)))
        return OrderedDict((level, value.float()) for level, value in maps.items())


class Autocast(nn.Module):
    """A module under autocast to `dtype` whose tensors come out as float32: boxes in bf16 would be off by pixels."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.module = module
        self.dtype = dtype

    def forward(self, x: Tensor | list[Tensor]) -> Any:
        with _autocast(x if isinstance(x, Tensor) else x[0], self.dtype):
            out = self.module(x)
        return _float(out)


class Frame(GeneralizedRCNNTransform):
    """Normalises and pads; resizes in eval mode only, as training images were (antialiased bilinear)."""

    def resize(self, image: Tensor, target: Any = None) -> tuple[Tensor, Any]:
        if self.training:
            return image, target
        height, width = image.shape[-2:]
        size = list(resized(height, width, self.min_size[-1], self.max_size))
        return transforms.resize(image, size, antialias=True), target


def _pooler(bins: int, strides: tuple[int, ...]) -> MultiScaleRoIAlign:
    """RoIAlign, as many samples as fit in a bin, on the level that the box's area asks for (Lin et al. 2017)."""
    # The pooler guesses strides from the first images that it sees, wrongly where padding is large: show it exact ones.
    pooler = MultiScaleRoIAlign(list(LEVELS), output_size=bins, sampling_ratio=0)
    side = strides[-1]
    maps = {name: torch.zeros(1, 1, side // s, side // s) for name, s in zip(LEVELS, strides, strict=True)}
    pooler(maps, [torch.zeros(0, 4)], [(side, side)])
    return pooler


def _autocast(like: Tensor, dtype: torch.dtype) -> torch.autocast:
    return torch.autocast(like.device.type, dtype, enabled=dtype != torch.float32)


def _float(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float()
    return type(value)(_float(item) for item in value)
