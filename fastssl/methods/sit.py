"""SiT: self-supervised vision transformer (Atito, Awais, Kittler 2021, arXiv 2104.03602), the authors' code of 2022.

Blocks of both views of an image are blanked or show another image. The student sees the damaged views, paints them back
(a very light decoder, L1 on the damaged pixels) and gives each view a code; a teacher (the student's moving average)
sees the clean views. A student's code must pick the teacher's code of the image's other view among those of all images.
The first version of the paper, with its rotation task, is `fastssl.methods.sit_v1`.

Letters: B images per process, N = B x processes, S side of a view in pixels, D width, K numbers per code, R blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastssl.batch import Batch
from fastssl.config import (
    BelowOne,
    Checked,
    Config,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Probability,
    View,
    ZeroToOne,
    check,
)
from fastssl.kernels.corrupt import Corrupted, corrupt, draw_blocks
from fastssl.methods import names
from fastssl.methods.contrast import teacher_contrast
from fastssl.methods.damage import both_views, check_group, check_views, picture_sheet, pixel_loss
from fastssl.methods.method import Method
from fastssl.models import build_vit
from fastssl.models.blocks import Drop
from fastssl.models.decoders import PixelDecoder
from fastssl.models.norms import BatchNorm1d, Chain
from fastssl.models.vit import patch_grid
from fastssl.pictures import Sheet
from fastssl.step import Step, Values, feature_spread
from fastssl.training import distributed
from fastssl.training.schedule import cosine
from fastssl.training.timing import section

_CROP: dict[str, Any] = {"size": 224, "scale": (0.2, 1.0), "jitter": (0.4, 0.4, 0.2, 0.1), "jitter_p": 0.8, "gray": 0.2}


@dataclass
class Views:
    """SiT's two crops."""

    view1: View = field(default_factory=lambda: View(**_CROP, blur=1.0))
    """First crop: always blurred."""
    view2: View = field(default_factory=lambda: View(**_CROP, blur=0.1, solarize=0.2))
    """Second crop: seldom blurred, sometimes solarized."""


@dataclass
class Settings(Checked):
    """SiT's own numbers."""

    section: ClassVar[str] = "sit"

    drop: BelowOne = 0.5
    """Share of a view that is blanked; above 0.5 it is the upper end of a range from 0.5."""
    replace: BelowOne = 0.3
    """Share of a view that shows another image, likewise. A view is either blanked or mixed, never both."""
    alien: Probability = 0.5
    """Probability that a view is mixed with another image."""
    fill: Literal["zero", "noise", "zero-noise"] = "zero"
    """What blanked blocks show: the mean colour, normal noise, or one of the two, drawn per view."""
    max_side: Fraction = 0.3
    """Bound on the sides of a block, as a share of the view's side."""
    align: PositiveInt = 1
    """Blocks start and end at multiples of this many pixels; the side of a patch hides whole patches only."""
    uniform_rate: bool = True
    """Every pixel is damaged equally often. False, as the authors: the top and left margins hardly ever are."""
    alien_group: NonNegativeInt = 8
    """The other image is another one of so many consecutive images of the batch (a random order), so that it does not
    depend on the number of processes. 0, as the authors: any image of the process's batch, itself included."""
    rec_region: Literal["damaged", "all"] = "damaged"
    """Pixels that the reconstruction is judged by."""
    rec_weight: NonNegativeFloat = 1.0
    """Weight of the reconstruction loss; the authors advise 5 for small data sets."""
    out_dim: PositiveInt = 256
    """Numbers per code (K)."""
    head_hidden: PositiveInt = 4096
    """Width of the contrastive head's inner layers."""
    temperature: PositiveFloat = 0.2
    """Temperature of the contrastive loss, whose gradient is scaled by twice its value."""
    momentum_teacher: ZeroToOne = 0.996
    """Decay of the teacher's weights at the start; it rises to 1 over the run, as a cosine."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_group("sit.alien_group", self.alien_group)


class SiT(Method):
    """Student, teacher, damage and the two losses.

    Args:
        config: a configuration whose views and settings are this file's `Views` and `Settings`.
    """

    Views = Views
    Settings = Settings
    defaults: ClassVar[dict[str, object]] = {
        "model.name": "vit_small",
        "model.resample": "dino",
        "model.drop_path": 0.1,
        "optim.name": "adamw",
        "optim.lr": 5e-4,
        "optim.min_lr": 1e-6,
        "optim.weight_decay": 0.04,
        "optim.weight_decay_end": 0.1,
        "optim.clip_grad": 3.0,
        "optim.clip_each": True,
        "schedule.epochs": 800,
        "schedule.warmup_epochs": 10,
        "run.recipe_batch": 256,
    }
    backbone_prefix = "teacher.backbone."
    layout = names.SIT
    batch_terms = ("the contrast", "weights of pixels", "images that blocks are taken from")

    def __init__(self, config: Config) -> None:
        super().__init__()
        s = self.settings = config.settings
        side = check_views("sit", config)
        check(s.align < int(s.max_side * side), "sit.align", s.align,
              f"less than the largest block's side, {int(s.max_side * side)} pixels")  # fmt: skip
        self.student = Network(config)
        self.teacher = Network(config, drop_path=0.0)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)

    def forward(self, batch: Batch, values: Values) -> Step:
        s = self.settings
        clean = both_views(batch)  # [2B, 3, S, S]
        with section("damage"):
            damaged, mask = self.damage(clean, batch, values.seed)  # [2B, 3, S, S], [2B, S, S]
        with section("teacher"), torch.no_grad():
            tokens = self.teacher.backbone.tokens(clean)  # [2B, 1+patches, D]
            keys = self.teacher.head(tokens[:, 0]).unflatten(0, (2, -1))  # [2, B, K]
        with section("student"):
            seen = self.student.backbone.tokens(damaged, drop=Drop(batch.id, values.seed, values.clock, "student"))
            codes = self.student.head(seen[:, 0]).unflatten(0, (2, -1))
        with section("decoder"):
            painted = self.student.reconstruct(seen, damaged)
        with section("loss"):
            contrastive, right = teacher_contrast(codes, keys, s.temperature)
            reconstruction = pixel_loss(painted, clean, mask if s.rec_region == "damaged" else None)
        metrics = {
            "contrastive": contrastive.detach(),
            "reconstruction": reconstruction.detach(),
            "contrastive_top1": right,
            "feature_std": feature_spread(tokens[: len(batch), 0]),
        }
        if not self.training:
            chance = 4 * s.temperature * math.log(len(batch) * distributed.world())
            metrics["contrastive_chance"] = torch.full_like(contrastive.detach(), chance)
        return Step(contrastive + s.rec_weight * reconstruction, metrics)

    def damage(self, clean: Tensor, batch: Batch, seed: int) -> Corrupted:
        """Views [2B, 3, S, S] (first views first), blanked or mixed with another image, and where they are damaged; a
        function of (seed, epoch, id, view) and the other image."""
        s, side = self.settings, clean.shape[-1]
        blocks = draw_blocks(
            batch.id,
            views=2,
            height=side,
            width=side,
            drop=s.drop,
            replace=s.replace,
            alien=s.alien,
            noise={"zero": 0.0, "zero-noise": 0.5, "noise": 1.0}[s.fill],
            group=s.alien_group,
            max_side=s.max_side,
            align=s.align,
            uniform_rate=s.uniform_rate,
            max_blocks=(self.most_blocks(s.drop, side), self.most_blocks(s.replace, side)),
            seed=seed,
            epoch=batch.epoch,
        )
        return corrupt(clean, *blocks, ids=batch.id, seed=seed, epoch=batch.epoch)

    def most_blocks(self, share: float, side: int) -> int:
        """A number of blocks that suffices to cover `share` of a view but once in thousands of views: 1.75 times the
        usual number, which is ln(1 / (1 - share)) over the share that a block of middling size covers."""
        middling = (self.settings.align + int(self.settings.max_side * side) - 1) / 2
        return 8 + math.ceil(1.75 * -math.log(1 - share) * ((side + middling) / middling) ** 2)

    def scheduled(self, values: Values) -> dict[str, float]:
        """The teacher's momentum."""
        return {"momentum": self.momentum(values)}

    def averages(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.teacher, self.student)]

    def momentum(self, values: Values) -> float:
        """Decay of the teacher's weights at this step."""
        return cosine(values.step, values.total_steps, self.settings.momentum_teacher, 1.0)

    def pictures(self, batch: Batch, values: Values) -> dict[str, Sheet]:
        """One row per image and, for each view, the columns of `picture_sheet`."""
        clean = both_views(batch)
        damaged = self.damage(clean, batch, values.seed)
        painted = self.student.reconstruct(self.student.backbone.tokens(damaged.views), damaged.views)
        return {"reconstruction": picture_sheet(clean, damaged, painted)}


class Network(nn.Module):
    """A backbone with SiT's contrastive head and its decoder."""

    def __init__(self, config: Config, drop_path: float | None = None) -> None:
        super().__init__()
        s: Settings = config.settings
        self.backbone = build_vit(config.model, config.method, drop_path)
        self.head = contrastive_head(self.backbone.width, s.head_hidden, s.out_dim)
        self.decoder = PixelDecoder(self.backbone.width, self.backbone.patch_size, layers=3)

    def reconstruct(self, tokens: Tensor, images: Tensor) -> Tensor:
        """Output tokens [B, 1+patches, D] of `images` -> painted images [B, 3, S, S]."""
        return self.decoder(tokens[:, 1:], patch_grid(images, self.backbone.patch_size))


def contrastive_head(width: int, hidden: int, out: int) -> nn.Sequential:
    """[B, D] -> [B, K]: three linear layers with batch norm, the last norm without parameters (the authors' mixture of
    ReLU and GELU, and biases before norms, are kept for their weights)."""
    head = Chain(
        nn.Linear(width, hidden),
        BatchNorm1d(hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        BatchNorm1d(hidden),
        nn.GELU(),
        nn.Linear(hidden, out),
        BatchNorm1d(out, affine=False),
    )
    for module in head:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)
    return head
