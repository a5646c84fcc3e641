"""MAE: masked autoencoders (He et al. 2022, arXiv 2111.06377).

Three quarters of an image's patches are hidden. The encoder sees only the others; a light decoder paints the hidden
ones, and the loss is the squared error of their pixels, normalised per patch.

Letters: B images, N patches, K visible, M masked, p side of a patch, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, ClassVar

import torch

from fastssl.batch import Batch
from fastssl.config import Checked, Config, PositiveInt, Range, View, check
from fastssl.kernels.patch_pixel_loss import patch_pixel_loss
from fastssl.loaders.masks import Mask, RandomMask
from fastssl.methods import names
from fastssl.methods.method import Method
from fastssl.models import build_vit, check_image_size
from fastssl.models.blocks import Drop
from fastssl.models.decoders import MAEDecoder
from fastssl.models.vit import cut_patches, join_patches, patch_grid, xavier_init_
from fastssl.pictures import SWATCH, Sheet, cover, cover_key, to_picture
from fastssl.step import Step, Values, feature_spread
from fastssl.training.timing import section

DEVIATIONS = 3  # from black to white in pictures of normalised patches, to either side


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
        "run.recipe_batch": 4096,
        "monitor.mean_patch": True,  # the class token alone has no loss of its own
    }
    backbone_prefix = "encoder."
    layout = names.MAE
    peak_twice = False

    def __init__(self, config: Config) -> None:
        super().__init__()
        s: Settings = config.settings
        view: View = config.views.main
        self.settings: Settings = s
        check(view.count == 1, "views.main.count", view.count, f"1 with method {config.method}")
        self.encoder = build_vit(config.model, config.method)
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

    def pictures(self, batch: Batch, values: Values) -> dict[str, Sheet]:
        """Per image: the crop, what the encoder sees of it, and the visible patches among the predicted ones.

        Where patches are predicted normalised (`norm_pixel_loss`), the network does not know their brightness and
        contrast. The prediction is then shown as it is, beside its target; a last picture takes mean and deviation of
        the hidden patches from the image, and says so.
        """
        images = batch.views["main"][:, 0]
        p = self.encoder.patch_size
        rows, columns = patch_grid(images, p)
        keep, masked = batch.mask("main")
        prediction = self.decoder(self.encoder.tokens(images, keep), keep, masked)
        prediction = prediction.float().unflatten(2, (-1, 3)).transpose(2, 3).flatten(2)  # channel, row, column
        index = masked[..., None].expand(-1, -1, prediction.shape[2])
        hidden = torch.zeros(len(images), rows * columns, dtype=torch.bool, device=images.device)
        picture = to_picture(images)
        shown = [picture, cover(picture, hidden.scatter(1, masked, True).unflatten(1, (rows, columns)))]
        titles, legend = ["image", "what the encoder sees"], [cover_key("hidden from the encoder")]
        patches = cut_patches(images.float(), p)
        join = partial(join_patches, rows=rows, columns=columns)
        if self.settings.norm_pixel_loss:
            mean, deviation = patches.mean(2, keepdim=True), (patches.var(2, keepdim=True) + 1e-6).sqrt()
            target = (patches - mean) / deviation
            guess = target.scatter(1, index, prediction)
            shown += [(join(each) / (2 * DEVIATIONS) + 0.5).clamp(0, 1) for each in (guess, target)]
            shown.append(to_picture(join(guess * deviation + mean)))
            titles += ["prediction: each patch less its mean, over its deviation", "the same of the image: the target",
                       "prediction with the image's own mean and deviation of each patch"]  # fmt: skip
            scale = torch.linspace(0, 1, SWATCH).expand(3, -1)
            legend += [(scale, f"{-DEVIATIONS} to {DEVIATIONS} deviations from the patch's mean"),
                       (None, "In the last column brightness and contrast of the hidden patches are the image's: the "
                        "network does not predict them.")]  # fmt: skip
        else:
            shown.append(to_picture(join(patches.scatter(1, index, prediction))))
            titles.append("prediction where hidden")
        return {"reconstruction": Sheet(torch.stack(shown, dim=1), titles, legend)}


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
