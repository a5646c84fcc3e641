"""ResNet (He et al. 2016, arXiv 1512.03385): torchvision's network without its classifier, with taps on its stages.

The state dict has torchvision's keys, less `fc`.
"""

from __future__ import annotations

from typing import cast

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import resnet

from fastssl.config import ConfigError
from fastssl.models.norms import BatchNorm2d, Norm


class _Block(nn.Module):
    """What torchvision's blocks do, on several groups of images at once; each is normalised by its own statistics."""

    depth: int  # convolutions, conv1, conv2, .., each with its norm

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        """[B, C, H, W] each."""
        residuals = xs
        if self.downsample is not None:
            conv, norm = cast(nn.Sequential, self.downsample)
            residuals = cast(Norm, norm).each([conv(x) for x in xs])
        for number in range(1, self.depth + 1):
            conv, norm = getattr(self, f"conv{number}"), getattr(self, f"bn{number}")
            xs = norm.each([conv(x) for x in xs], residuals if number == self.depth else None, relu=True)
        return xs


class BasicBlock(_Block, resnet.BasicBlock):
    """Two 3x3 convolutions."""

    depth = 2


class Bottleneck(_Block, resnet.Bottleneck):
    """A 1x1, a 3x3 and a 1x1 convolution."""

    depth = 3


LAYERS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], list[int]]] = {
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
}


class ResNet(torchvision.models.ResNet):
    """A ResNet that ends in its pooled features.

    Args:
        name: resnet18, resnet34 or resnet50.
        small_images: 3x3 stem with stride 1 and no max-pool, for images of about 32 pixels.
        channels: of the stem and the first stage; each later stage has twice as many as the one before.

    Attributes:
        width: channels of the pooled feature (C).
        memory_format: how its weights are best laid out (on CUDA; a narrow one on a CPU fails in it).
    """

    memory_format = torch.channels_last

    def __init__(self, name: str, small_images: bool = False, channels: int = 64) -> None:
        block, layers = LAYERS[name]
        super().__init__(block, layers, norm_layer=BatchNorm2d)
        self.fc = nn.Identity()
        self.width = 8 * channels * block.expansion
        if channels != 64:
            self.inplanes = channels
            self.conv1 = nn.Conv2d(3, channels, kernel_size=7, stride=2, padding=3, bias=False)
            self.bn1 = BatchNorm2d(channels)
            for stage, count in enumerate(layers):
                made = self._make_layer(block, channels * 2**stage, count, stride=1 if stage == 0 else 2)
                setattr(self, f"layer{stage + 1}", made)
        if small_images:
            self.conv1 = nn.Conv2d(3, channels, kernel_size=3, stride=1, padding=1, bias=False)
            self.maxpool = nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def compile_parts(self) -> list[nn.Module]:
        """What torch.compile takes piece by piece: the stages."""
        return [self.layer1, self.layer2, self.layer3, self.layer4]

    def stages(self, images: Tensor) -> list[Tensor]:
        """Feature maps after layers 1 to 4: [B, C_l, H_l, W_l], at 1/4, 1/8, 1/16, 1/32 of the image's side
        (1, 1/2, 1/4, 1/8 with `small_images`)."""
        return [maps[0] for maps in self.stages_of([images])]

    def stages_of(self, groups: list[Tensor]) -> list[list[Tensor]]:
        """`stages` of several groups of images, each normalised by its own statistics: by stage and group."""
        xs = self.bn1.each([self.conv1(images) for images in groups], relu=True)
        xs = [self.maxpool(x) for x in xs]
        maps = []
        for layer in self.compile_parts():
            xs = layer(xs)
            maps.append(xs)
        return maps

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> the mean of the last feature map over its positions, [B, C]."""
        return torch.flatten(self.avgpool(self.stages(images)[-1]), 1)

    def represent(self, images: Tensor, blocks: int = 1, mean_patch: bool = False) -> Tensor:
        """The image's feature for evaluation, [B, C]. `blocks` and `mean_patch` are a ViT's: 1 and False here."""
        if blocks != 1 or mean_patch:
            raise ConfigError(
                f"a ResNet has one pooled feature: blocks is {blocks} and mean_patch {mean_patch}, "
                "they must be 1 and False"
            )
        return self(images)
