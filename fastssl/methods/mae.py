"""MAE: masked autoencoders (He et al. 2022, arXiv 2111.06377).

Three quarters of an image's patches are hidden. The encoder sees only the others; a light decoder paints the hidden
ones, and the loss is the squared error of their pixels, normalised per patch.

Letters: B images, N patches, K visible, M masked, p side of a patch, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from fastssl.batch import Batch
from fastssl.config import Checked, Config, ConfigError, PositiveInt, Range, View, check
from fastssl.kernels.patch_pixel_loss import patch_pixel_loss
from fastssl.loaders.masks import Mask, RandomMask
from fastssl.methods import names
from fastssl.methods.method import Method
from fastssl.models import build_backbone, check_image_size
from fastssl.models.blocks import Drop
from fastssl.models.decoders import MAEDecoder
from fastssl.models.vit import ViT, cut_patches, patch_grid, xavier_init_
from fastssl.pictures import cover, to_picture
from fastssl.step import Step, Values, feature_spread
from fastssl.training.timing import section


@dataclass
class Views:
    """MAE's single crop."""

    main: View = field(default_factory=lambda: View(size=224, scale=(0.2, 1.0)))
    """The image that is masked and painted: crop and flip, no colour changes."""


@dataclass
class Settings(Checked):
    """MAE's own numbers."""

    section: ClassVar[str] = "mae"

    mask_ratio: Annotated[float, Range(above=0, below=1)] = 0.75
    """Fraction of the patches that is hidden."""
    norm_pixel_loss: bool = True
    """Predict each patch's pixels less their mean, divided by their standard deviation."""
    decoder_width: Annotated[int, Range(at_least=4, multiple_of=4)] = 512
    """Width of the decoder's tokens."""
    decoder_depth: PositiveInt = 8
    """Blocks of the decoder."""
    decoder_heads: PositiveInt = 16
    """Attention heads of the decoder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        width, heads = self.decoder_width, self.decoder_heads
        allowed = f"a multiple of {self.section}.decoder_heads, {heads}"
        check(width % heads == 0, self.key("decoder_width"), width, allowed)


class MAE(Method):
    """Encoder, decoder and their loss.

    Args:
        config: a configuration whose views and settings are this file's `Views` and `Settings`.
    """

    Views = Views
    Settings = Settings
    defaults: ClassVar[dict[str, object]] = {
        "model.name": "vit_base",
        "model.positions": "sincos",
        "optim.name": "adamw",
        "optim.lr": 1.5e-4,
        "optim.min_lr": 0.0,
        "optim.weight_decay": 0.05,
        "optim.betas": (0.9, 0.95),
        "schedule.epochs": 800,
        "schedule.warmup_epochs": 40,
        "monitor.mean_patch": True,  # the class token alone has no loss of its own
    }
    backbone_prefix = "encoder."
    layout = names.MAE

    def __init__(self, config: Config) -> None:
        super().__init__()
        s: Settings = config.settings
        view: View = config.views.main
        self.settings: Settings = s
        check(view.count == 1, "views.main.count", view.count, f"1 with method {config.method}")
        self.encoder = build_backbone(config.model)
        if not isinstance(self.encoder, ViT):
            raise ConfigError(f"model.name is '{config.model.name}'; method {config.method} needs a ViT")
        self.masks(config)  # for its checks
        p = self.encoder.patch_size
        side = view.size // p
        self.decoder = MAEDecoder(
            self.encoder.width,
            (side, side),
            3 * p * p,
            width=s.decoder_width,
            depth=s.decoder_depth,
            heads=s.decoder_heads,
        )
        xavier_init_(self)

    def forward(self, batch: Batch, values: Values) -> Step:
        s = self.settings
        images = batch.views["main"][:, 0]  # [B, 3, S, S]
        keep, masked = batch.mask("main")  # [B, K], [B, M]
        with section("encoder"):
            drop = Drop(batch.id, values.seed, values.clock, "encoder")
            tokens = self.encoder.tokens(images, keep, drop)  # [B, 1+K, D]
        with section("decoder"):
            prediction = self.decoder(tokens, keep, masked)  # [B, M, 3 p p]
        with section("loss"):
            loss = patch_pixel_loss(
                prediction, images, masked, patch_size=self.encoder.patch_size, norm_pixels=s.norm_pixel_loss
            )
        return Step(loss, {"feature_std": feature_spread(tokens[:, 0])})

    @staticmethod
    def masks(config: Config) -> list[Mask]:
        """Visible and masked patches, drawn at random."""
        return [RandomMask("main", check_patches(config), config.settings.mask_ratio)]

    def pictures(self, batch: Batch, values: Values) -> dict[str, Tensor]:
        """Per image: the crop, what the encoder sees of it, and the visible patches among the painted ones.

        Where patches are predicted normalised (`norm_pixel_loss`), nobody knows their brightness and contrast; the
        picture borrows both from the true patch.
        """
        images = batch.views["main"][:, 0]
        rows, columns = patch_grid(images, self.encoder.patch_size)
        keep, masked = batch.mask("main")
        prediction = self.decoder(self.encoder.tokens(images, keep), keep, masked)
        painted = paste_patches(images, prediction, masked, self.encoder.patch_size, self.settings.norm_pixel_loss)
        hidden = torch.zeros(len(images), rows * columns, dtype=torch.bool, device=images.device)
        hidden = hidden.scatter(1, masked, True).unflatten(1, (rows, columns))
        picture = to_picture(images)
        return {"reconstruction": torch.stack([picture, cover(picture, hidden), to_picture(painted)], dim=1)}


def check_patches(config: Config) -> int:
    """Patches of an image.

    Raises:
        ConfigError: the image cannot be cut into patches, or the mask ratio keeps none of them.
    """
    s, size = config.settings, config.views.main.size
    check_image_size(config.model, "views.main.size", size)
    patches = (size // config.model.patch_size) ** 2
    check(patches * (1 - s.mask_ratio) + 1e-6 >= 1, f"{s.section}.mask_ratio", s.mask_ratio,
          f"low enough to keep one of the image's {patches} patches")  # fmt: skip
    return patches


def paste_patches(images: Tensor, prediction: Tensor, masked: Tensor, patch_size: int, norm_pixels: bool) -> Tensor:
    """The images with their masked patches replaced by predicted ones.

    Args:
        images: [B, 3, H, W], normalised as the network sees them.
        prediction: [B, M, 3 p p], values in the order row, column, channel.
        masked: int64 [B, M], the patches predicted.
        patch_size: p, pixels.
        norm_pixels: the prediction is normalised per patch; it gets the true patch's mean and deviation.

    Returns:
        float32 [B, 3, H, W].
    """
    rows, columns = patch_grid(images, patch_size)
    patches = cut_patches(images.float(), patch_size)  # [B, N, 3 p p], values in the order channel, row, column
    index = masked[..., None].expand(-1, -1, patches.shape[2])
    painted = prediction.float().unflatten(2, (-1, 3)).transpose(2, 3).flatten(2)
    if norm_pixels:
        true = patches.gather(1, index)
        painted = painted * (true.var(dim=2, keepdim=True) + 1e-6).sqrt() + true.mean(dim=2, keepdim=True)
    cells = patches.scatter(1, index, painted).view(-1, rows, columns, 3, patch_size, patch_size)
    return cells.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
