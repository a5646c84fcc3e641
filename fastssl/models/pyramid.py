"""Feature maps at four scales from a backbone, for segmentation and detection.

A ViT has one scale; its pyramid follows BEiT (Bao et al. 2022, arXiv 2106.08254) and CAE (Chen et al. 2022, arXiv
2202.03026): the tokens after four blocks, brought to four sizes. A ResNet has the four scales in its stages.

Letters: B images, C channels, H x W pixels, R x K patches (rows, columns), p side of a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastssl.config import ConfigError
from fastssl.models.relative_positions import add_relative_positions, attention_bias
from fastssl.models.resnet import ResNet
from fastssl.models.timm_backbone import TimmBackbone
from fastssl.models.vit import ViT, patch_grid

LEVELS = 4


class Pyramid(nn.Module):
    """Four feature maps of an image, from fine to coarse; it takes the backbone over and changes it.

    With a ViT, whose tokens after block t_l make a map [B, C, R, K]:

        level 0: ConvT 2x2 stride 2, batch norm, GELU, ConvT 2x2 stride 2 of the first tap   [B, C, 4R, 4K]
        level 1: ConvT 2x2 stride 2 of the second                                            [B, C, 2R, 2K]
        level 2: the third as it is                                                          [B, C, R, K]
        level 3: max-pool 2x2 stride 2 of the fourth                                   [B, C, ceil(R/2), ceil(K/2)]

    No final norm is applied; the norm and the blocks after the last tap are removed.

    Args:
        backbone: a ViT, a ResNet, or a model of timm with stages.
        taps: four blocks of the ViT, zero-based and not descending. None: the last of each quarter, [2, 5, 8, 11] of 12
            blocks, except that 12 and 24 blocks have the papers' [3, 5, 7, 11] and [7, 11, 15, 23].
        drop_path: stochastic depth of the ViT's last block, growing linearly from 0 at the first; replaces the
            backbone's own.
        window: (rows, columns) of patches for which every block gets a learned relative position bias, zero at first;
            images must then have exactly this grid. None: no bias.
        checkpointing: compute the blocks anew in the backward pass rather than keep what they computed.

    Attributes:
        backbone: the network.
        channels: of each level.
        strides: image pixels per position of each level. A ViT's are p/4, p/2, p, 2p: 4, 8, 16, 32 for 16.

    Raises:
        ConfigError: taps that the backbone does not have; an option of a ViT with a ResNet.
    """

    relative_index: Tensor  # where `window` is given
    channels: list[int]
    strides: list[float]

    def __init__(
        self,
        backbone: ViT | ResNet | TimmBackbone,
        taps: Sequence[int] | None = None,
        drop_path: float = 0.0,
        window: tuple[int, int] | None = None,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.window = window
        self.checkpointing = checkpointing
        width = backbone.width
        if not isinstance(backbone, ViT):
            if taps is not None or drop_path or window or checkpointing:
                raise ConfigError("taps, drop_path, window and checkpointing change a ViT; the backbone is none")
            if isinstance(backbone, TimmBackbone):
                self.channels, self.strides = backbone.pyramid(LEVELS)
                return
            self.channels = [width // 8, width // 4, width // 2, width]
            first = 1 if isinstance(backbone.maxpool, nn.Identity) else 4
            self.strides = [first * 2**level for level in range(LEVELS)]
            return

        self.taps = check_taps(default_taps(backbone.num_blocks) if taps is None else taps, backbone.num_blocks)
        set_drop_path(backbone, drop_path)
        backbone.norm = nn.Identity()
        del backbone.blocks[self.taps[-1] + 1 :]
        index = add_relative_positions(backbone, *window) if window else None
        self.register_buffer("relative_index", index, persistent=False)
        self.channels = [width] * LEVELS
        side = backbone.patch_size
        self.strides = [side / 4, side / 2, side, 2 * side]
        self.resize = nn.ModuleList(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(width, width, 2, 2),
                    nn.BatchNorm2d(width),
                    nn.GELU(),
                    nn.ConvTranspose2d(width, width, 2, 2),
                ),
                nn.ConvTranspose2d(width, width, 2, 2),
                nn.Identity(),
                nn.MaxPool2d(2, 2, ceil_mode=True),
            ]
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """float [B, 3, H, W], sides that the patch divides -> four maps, see above.

        Raises:
            ConfigError: sides that the patch does not divide, or another grid than `window`.
        """
        if not isinstance(self.backbone, ViT):
            return self.backbone.stages(images)[-LEVELS:]
        return [resize(tapped) for resize, tapped in zip(self.resize, self._tapped(images), strict=True)]

    def _tapped(self, images: Tensor) -> list[Tensor]:
        """The patch tokens after each tap as maps, four times [B, C, R, K]."""
        vit = cast(ViT, self.backbone)
        grid = patch_grid(images, vit.patch_size)
        if self.window is not None and grid != self.window:
            raise ConfigError(
                f"the relative position bias is made for {self.window[0]} x {self.window[1]} patches, "
                f"the images have {grid[0]} x {grid[1]}"
            )
        x = vit.embed(images)
        after = []
        for block in vit.blocks:
            bias = None if self.window is None else attention_bias(block, self.relative_index)
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, bias, use_reentrant=False)
            else:
                x = block(x, bias)
            after.append(x)
        return [after[tap][:, 1:].transpose(1, 2).unflatten(2, grid) for tap in self.taps]


def default_taps(blocks: int) -> list[int]:
    """The blocks that a ViT of so many blocks is tapped after: the papers' for 12 and 24, else the quarters' last."""
    known = {12: [3, 5, 7, 11], 24: [7, 11, 15, 23]}
    return known.get(blocks) or [max(blocks * quarter // LEVELS, 1) - 1 for quarter in range(1, LEVELS + 1)]


def check_taps(taps: Sequence[int], blocks: int) -> list[int]:
    """The taps as a list, once it is sure that they are four blocks of a ViT of so many, in order; else ConfigError."""
    taps = list(taps)
    if len(taps) != LEVELS or taps != sorted(taps) or taps[0] < 0 or taps[-1] >= blocks:
        raise ConfigError(f"taps is {taps}; it must be {LEVELS} blocks in ascending order, out of 0 to {blocks - 1}")
    return taps


def set_drop_path(vit: ViT, rate: float) -> None:
    """Stochastic depth (Huang et al. 2016, arXiv 1603.09382), growing linearly to `rate` at the ViT's last block."""
    for i, block in enumerate(vit.blocks):
        share = rate * i / max(len(vit.blocks) - 1, 1)
        for branch in ("drop_path1", "drop_path2"):
            setattr(block, branch, DropPath(share) if share else nn.Identity())
