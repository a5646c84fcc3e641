"""SiT, first version: self-supervised vision transformer (Atito, Awais, Kittler 2021, arXiv 2104.03602v1).

One transformer, three tasks on two rotated and damaged views of an image: paint the clean view back, name the view's
rotation (from a token of its own), and find the image's other view among all views of the batch (from a second token).
Three learned scalars balance the losses. The version that came after is `fastssl.methods.sit`.

Letters: B images per process, N = B x processes, S side of a view in pixels, D width, K numbers per code, R blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.batch import Batch
from fastssl.config import BelowOne, Checked, Config, NonNegativeInt, PositiveFloat, PositiveInt, View
from fastssl.kernels.corrupt import ALIEN, Corrupted, FirstBlocks, corrupt, draw_first
from fastssl.methods import names
from fastssl.methods.contrast import nt_xent
from fastssl.methods.damage import both_views, check_group, check_views, picture_sheet, pixel_loss, wide
from fastssl.methods.method import Method
from fastssl.models import build_vit
from fastssl.models.blocks import Drop, run_blocks
from fastssl.models.decoders import PixelDecoder
from fastssl.models.vit import patch_grid
from fastssl.pictures import Sheet
from fastssl.step import Step, Values, feature_spread
from fastssl.training import distributed
from fastssl.training.timing import section

KAPPA = {"rotation": 1.0, "contrastive": 1.0, "reconstruction": 0.5}
_CROP: dict[str, Any] = {"size": 224, "scale": (0.08, 1.0), "jitter": (0.4, 0.4, 0.4, 0.0), "jitter_p": 1.0}


@dataclass
class Views:
    """Two crops of the same kind; they are rotated and damaged on the device."""

    view1: View = field(default_factory=lambda: View(**_CROP))
    """First crop."""
    view2: View = field(default_factory=lambda: View(**_CROP))
    """Second crop."""


@dataclass
class Settings(Checked):
    """The first SiT's own numbers."""

    section: ClassVar[str] = "sit_v1"

    out_dim: PositiveInt = 512
    """Numbers per code (K)."""
    temperature: PositiveFloat = 0.5
    """Temperature of the contrastive loss."""
    gather_negatives: bool = False
    """Compare codes with those of all processes. False, as the authors: with those of the process's own batch."""
    rec_region: Literal["all", "damaged"] = "all"
    """Pixels that the reconstruction is judged by; all, as the authors, is mostly copying."""
    share: BelowOne = 0.3
    """Noise blocks are added up to a share of the view drawn between 0 and this, alien blocks likewise."""
    alien_group: NonNegativeInt = 8
    """The other image is another one of so many consecutive images of the batch (a random order), so that it does not
    depend on the number of processes. 0, as the authors: any image of the process's batch; none if itself."""
    alien_clean: bool = True
    """Alien blocks show the clean other image. False, as the authors: as it is by then, damaged if it stands earlier in
    the batch (which goes image by image: slow)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_group("sit_v1.alien_group", self.alien_group)


class SiTv1(Method):
    """One network with three heads, and its three losses.

    The encoder is a plain ViT whose class token is the contrastive token; the rotation token and its row of the
    position table are added here, so that evaluation takes the backbone as it is.

    Args:
        config: a configuration whose views and settings are this file's `Views` and `Settings`.
    """

    Views = Views
    Settings = Settings
    defaults: ClassVar[dict[str, object]] = {
        "model.name": "vit_base",
        "model.drop_path": 0.1,
        "optim.name": "adamw",
        "optim.lr": 1e-3,
        "optim.lr_batch": 512,
        "optim.min_lr": 5e-6,
        "optim.weight_decay": 0.05,
        "schedule.epochs": 501,
        "schedule.warmup_epochs": 5,
        "run.recipe_batch": 288,
    }
    backbone_prefix = "encoder."
    layout = names.SIT_V1
    batch_terms = ("the contrast", "weights of pixels", "images that blocks are taken from")
    peak_twice = False
    undecayed = ("_token", "pos_embed", "rotation_position")

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.settings: Settings = config.settings
        check_views("sit_v1", config)
        self.encoder = build_vit(config.model, config.method)
        width = self.encoder.width
        self.rotation_token = nn.Parameter(torch.empty(1, 1, width))
        self.rotation_position = nn.Parameter(torch.empty(1, 1, width))
        self.rotation_head = nn.Linear(width, 4)
        self.contrastive_head = nn.Linear(width, self.settings.out_dim)
        self.decoder = PixelDecoder(width, self.encoder.patch_size, layers=0)
        self.uncertainty = nn.ParameterDict({task: torch.ones(1) for task in KAPPA})
        for weight in (self.rotation_token, self.rotation_position):
            nn.init.trunc_normal_(weight, std=0.02)
        for head in (self.rotation_head, self.contrastive_head):
            nn.init.trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)

    def forward(self, batch: Batch, values: Values) -> Step:
        s = self.settings
        with section("damage"):
            clean, damaged, mask, turns = self.damage(batch, values.seed)  # [2B, 3, S, S] twice, [2B, S, S], [2B]
        with section("encoder"):
            drop = Drop(batch.id, values.seed, values.clock, "encoder")
            tokens = self.tokens(damaged, drop)  # [2B, 2+patches, D]
        with section("decoder"):
            painted = self.reconstruct(tokens, damaged)
        with section("loss"):
            named = self.rotation_head(tokens[:, 0])  # [2B, 4]
            codes = self.contrastive_head(tokens[:, 1]).unflatten(0, (2, -1))  # [2, B, K]
            losses = {
                "rotation": F.cross_entropy(wide(named), turns),
                "contrastive": nt_xent(codes, s.temperature, s.gather_negatives),
                "reconstruction": pixel_loss(painted, clean, mask if s.rec_region == "damaged" else None),
            }
            loss = weighted_sum(losses, dict(self.uncertainty.items()))
        metrics = {task: value.detach() for task, value in losses.items()}
        metrics |= {f"{task}_weight": (-KAPPA[task] * s.detach()).exp()[0] for task, s in self.uncertainty.items()}
        metrics["rotation_top1"] = (named.detach().argmax(-1) == turns).float().mean()
        metrics["feature_std"] = feature_spread(tokens[: len(batch), 1])
        if not self.training:
            compared = 2 * len(batch) * (distributed.world() if s.gather_negatives else 1) - 1
            metrics["contrastive_chance"] = torch.full_like(loss.detach(), math.log(compared))
            metrics["rotation_chance"] = torch.full_like(loss.detach(), math.log(4))
        return Step(loss, metrics)

    def tokens(self, images: Tensor, drop: Drop | None = None) -> Tensor:
        """[B, 3, S, S] -> output tokens [B, 2+patches, D]: rotation, contrastive, patches."""
        x = self.encoder.embed(images)
        first = (self.rotation_token + self.rotation_position).to(x.dtype).expand(len(x), -1, -1)
        x = torch.cat([first, x], dim=1)
        return run_blocks(self.encoder.blocks, x, self.encoder.norm, drop)

    def reconstruct(self, tokens: Tensor, images: Tensor) -> Tensor:
        """Output tokens of `images` -> painted images [B, 3, S, S]."""
        return self.decoder(tokens[:, 2:], patch_grid(images, self.encoder.patch_size))

    def damage(self, batch: Batch, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Turns each view by its own random multiple of 90 degrees, and damages it; a function of (seed, epoch, id,
        view) and the other image.

        Returns:
            Turned views and damaged ones, [2B, 3, S, S] (first views first), where they are damaged, bool [2B, S, S],
            and quarter turns clockwise, int64 [2B].
        """
        s, clean = self.settings, both_views(batch)
        where: dict[str, Any] = {"seed": seed, "epoch": batch.epoch}
        drawn = draw_first(batch.id, views=2, side=clean.shape[-1], share=s.share, group=s.alien_group, **where)
        clean = rotate(clean, drawn.turns)
        damaged = damage(clean, drawn, s.alien_clean, ids=batch.id, **where)
        return clean, *damaged, drawn.turns

    def pictures(self, batch: Batch, values: Values) -> dict[str, Sheet]:
        """One row per image and, for each (rotated) view, the columns of `picture_sheet`."""
        clean, damaged, mask, _ = self.damage(batch, values.seed)
        painted = self.reconstruct(self.tokens(damaged), damaged)
        return {"reconstruction": picture_sheet(clean, Corrupted(damaged, mask), painted)}


# -- the losses --------------------------------------------------------------------------------------------------------


def weighted_sum(losses: dict[str, Tensor], scalars: dict[str, Tensor]) -> Tensor:
    """Sum over the tasks of exp(-kappa s) x loss + s / 2 with learned s (homoscedastic uncertainty, Kendall et al.
    2018, arXiv 1705.07115); kappa is 1, and 1/2 for the reconstruction. The weight settles at 1 / (2 kappa x loss)."""
    terms = [(-KAPPA[task] * s).exp() * losses[task] + s / 2 for task, s in scalars.items()]
    return torch.stack(terms).sum()


# -- rotation and damage, on the device --------------------------------------------------------------------------------


def rotate(images: Tensor, turns: Tensor) -> Tensor:
    """Images [B, 3, S, S], each turned clockwise by int64 [B] quarter turns."""
    turns = turns[:, None, None, None]
    half = torch.where(turns >= 2, images.flip(-2, -1), images)
    return torch.where(turns % 2 == 1, half.transpose(-2, -1).flip(-1), half)


@torch.no_grad()
def damage(clean: Tensor, drawn: FirstBlocks, alien_clean: bool, **where: Any) -> Corrupted:
    """A block in gray, a blurred block, noise blocks, and blocks of another image, painted over one another in this
    order (the authors' `distortImages`).

    Args:
        clean: [2B, 3, S, S], normalised.
        drawn: blocks of `draw_first`.
        alien_clean: `Settings`.
        **where: ids, seed, epoch as of `corrupt`.
    """
    boxes, kind, source, soft, weights, _ = drawn
    damaged, mask = corrupt(clean, boxes, kind, source, soft=soft, weights=weights, **where)
    if not alien_clean:
        alien = boxes * (kind == ALIEN)[..., None]
        shown = corrupt(clean, alien, kind, source, **where).mask[:, None]
        pool = clean.clone()
        for i in range(len(pool)):
            pool[i] = torch.where(shown[i], pool[source[i]], damaged[i])
        damaged = pool
    return Corrupted(damaged, mask)
