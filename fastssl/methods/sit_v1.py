"""SiT, first version: self-supervised vision transformer (Atito, Awais, Kittler 2021, arXiv 2104.03602v1).

One transformer, three tasks on two rotated and damaged views of an image: paint the clean view back, name the view's
rotation (from a token of its own), and find the image's other view among all views of the batch (from a second token).
Three learned scalars balance the losses. The version that came after is `fastssl.methods.sit`.

Letters: B images per process, N = B x processes, S side of a view in pixels, D width, K numbers per code, R blocks.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.batch import Batch
from fastssl.config import BelowOne, Checked, Config, NonNegativeInt, PositiveFloat, PositiveInt, View
from fastssl.kernels.corrupt import ALIEN, NOISE, corrupt
from fastssl.masks import philox
from fastssl.methods import names
from fastssl.methods.contrast import nt_xent
from fastssl.methods.damage import (
    NAMES,
    Damaged,
    alien_source,
    check_group,
    check_views,
    picture_rows,
    pixel_loss,
    wide,
)
from fastssl.methods.method import Method
from fastssl.models import build_backbone
from fastssl.models.decoders import PixelDecoder
from fastssl.models.vit import patch_grid
from fastssl.step import Step, Values, feature_spread
from fastssl.training import distributed
from fastssl.training.timing import section

BLOCKS = 48  # candidates for a view's noise (alien) blocks; about 8 are used, and 16 where the budget is largest
BLUR = 7  # pixels to each side of the widest blur
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
    }
    backbone_prefix = "encoder."
    layout = names.SIT_V1

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.settings: Settings = config.settings
        check_views("sit_v1", config)
        self.encoder = build_backbone(config.model)
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
            clean, turns = rotated_views(batch, values.seed)  # [2B, 3, S, S], [2B]
            damaged, mask = self.damage(clean, batch, values.seed)
        with section("encoder"):
            tokens = self.tokens(damaged)  # [2B, 2+patches, D]
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

    def tokens(self, images: Tensor) -> Tensor:
        """[B, 3, S, S] -> output tokens [B, 2+patches, D]: rotation, contrastive, patches."""
        x = self.encoder.embed(images)
        first = (self.rotation_token + self.rotation_position).to(x.dtype).expand(len(x), -1, -1)
        x = torch.cat([first, x], dim=1)
        for block in self.encoder.blocks:
            x = block(x)
        return self.encoder.norm(x)

    def reconstruct(self, tokens: Tensor, images: Tensor) -> Tensor:
        """Output tokens of `images` -> painted images [B, 3, S, S]."""
        return self.decoder(tokens[:, 2:], patch_grid(images, self.encoder.patch_size))

    def damage(self, clean: Tensor, batch: Batch, seed: int) -> Damaged:
        """Damages both views, [2B, 3, S, S] (first views first); see `damage`."""
        s = self.settings
        both = [
            damage(images, batch.id, s.share, s.alien_group, s.alien_clean, seed=seed, epoch=batch.epoch, view=view)
            for view, images in enumerate(clean.chunk(2))
        ]
        return Damaged(*(torch.cat(pair) for pair in zip(*both, strict=True)))

    def pictures(self, batch: Batch, values: Values) -> dict[str, Tensor]:
        """One row per image and, for each (rotated) view, the columns of `picture_rows`."""
        clean, _ = rotated_views(batch, values.seed)
        damaged = self.damage(clean, batch, values.seed)
        painted = self.reconstruct(self.tokens(damaged.views), damaged.views)
        return {"reconstruction": picture_rows(clean, damaged, painted)}


# -- the losses --------------------------------------------------------------------------------------------------------


def weighted_sum(losses: dict[str, Tensor], scalars: dict[str, Tensor]) -> Tensor:
    """Sum over the tasks of exp(-kappa s) x loss + s / 2 with learned s (homoscedastic uncertainty, Kendall et al.
    2018, arXiv 1705.07115); kappa is 1, and 1/2 for the reconstruction. The weight settles at 1 / (2 kappa x loss)."""
    terms = [(-KAPPA[task] * s).exp() * losses[task] + s / 2 for task, s in scalars.items()]
    return torch.stack(terms).sum()


# -- rotation and damage, on the device --------------------------------------------------------------------------------


def rotated_views(batch: Batch, seed: int) -> tuple[Tensor, Tensor]:
    """Each view turned by its own random multiple of 90 degrees, a function of (seed, epoch, id, view).

    Returns:
        Views [2B, 3, S, S] (first views first), and quarter turns clockwise, int64 [2B] in 0 .. 3.
    """
    purpose = zlib.crc32(b"sit/rotation")
    turns = torch.cat([philox((batch.id, batch.epoch, view, 0), (seed, purpose))[0] >> 30 for view in (0, 1)])
    return rotate(torch.cat([batch.views[name][:, 0] for name in NAMES]), turns), turns


def rotate(images: Tensor, turns: Tensor) -> Tensor:
    """Images [B, 3, S, S], each turned clockwise by int64 [B] quarter turns."""
    turns = turns[:, None, None, None]
    half = torch.where(turns >= 2, images.flip(-2, -1), images)
    return torch.where(turns % 2 == 1, half.transpose(-2, -1).flip(-1), half)


@torch.no_grad()
def damage(
    images: Tensor,
    ids: Tensor,
    share: float,
    group: int,
    alien_clean: bool,
    *,
    seed: int,
    epoch: int,
    view: int,
) -> Damaged:
    """A block in gray, a blurred block, noise blocks, and blocks of another image, painted over one another in this
    order (the authors' `distortImages`). Sizes are those of the authors at S = 224, and in proportion else; the blur's
    are in pixels. A function of (seed, epoch, id, view) and the other image.

    Args:
        images: [B, 3, S, S], normalised.
        ids: int64 [B].
        share, group, alien_clean: `Settings`.
        seed, epoch, view: 32-bit numbers.
    """
    side = images.shape[-1]
    where = {"seed": seed, "epoch": epoch, "view": view}
    source, noise_budget, alien_budget, _ = (word[:, 0] for word in _words(ids, "damage", 1, **where))
    kernel, spread, _, _ = (word[:, 0] for word in _words(ids, "blur/kernel", 1, **where))
    source = alien_source(source, group)
    unlike = source != torch.arange(len(ids), device=ids.device)

    gray, blur = (draw(ids, name, 1, side, side, **where)[:, 0] for name in ("gray", "blur"))  # [B, 4]
    noise, alien = (
        within_budget(draw(ids, name, BLOCKS, side, side // 4, **where), budget, share * side * side)
        for name, budget in (("noise", noise_budget), ("alien", alien_budget))
    )
    alien = alien * unlike[:, None, None]
    kind = torch.where(torch.arange(2 * BLOCKS, device=ids.device) < BLOCKS, NOISE, ALIEN).int()
    kind = kind.expand(len(ids), -1).contiguous()
    painted, covered = corrupt(images, torch.cat([noise, alien], dim=1), kind, source, ids=ids, **where)

    in_gray, in_blur = (inside(box, side)[:, None] for box in (gray, blur))  # [B, 1, S, S]
    beneath = torch.where(in_gray, images.mean(dim=1, keepdim=True), images)
    beneath = torch.where(in_blur, blurred(beneath, blur, kernel, spread), beneath)
    damaged = torch.where(covered[:, None], painted, beneath)
    if not alien_clean:
        shown = corrupt(images, alien, kind[:, BLOCKS:].contiguous(), source, ids=ids, **where).mask[:, None]
        pool = images.clone()
        for i in range(len(ids)):
            pool[i] = torch.where(shown[i], pool[source[i]], damaged[i])
        damaged = pool
    return Damaged(damaged, covered | (in_gray | in_blur)[:, 0])


def draw(ids: Tensor, purpose: str, count: int, side: int, limit: int, *, seed: int, epoch: int, view: int) -> Tensor:
    """Random blocks, int32 [B, R, 4]: top, left, height, width.

    Height and width are uniform in {least, .., limit - 1} with least = 11 of 224 pixels, top and left uniform in
    {0, .., side - least - 1}; what lies outside is cut off.
    """
    least = max(1, round(side * 11 / 224))
    words = torch.stack(_words(ids, purpose, count, seed=seed, epoch=epoch, view=view), dim=-1)  # [B, R, 4]
    start = words[..., :2] * (side - least) >> 32
    size = least + (words[..., 2:] * max(limit - least, 1) >> 32)
    return torch.cat([start, size.minimum(side - start)], dim=-1).int()


def within_budget(boxes: Tensor, word: Tensor, most: float) -> Tensor:
    """The first of the blocks [B, R, 4], until their areas add up to a budget uniform in [0, most] pixels; 0 behind."""
    budget = word.double() * (most * 2.0**-32)
    area = boxes[..., 2] * boxes[..., 3]
    return boxes * (area.cumsum(1) - area < budget[:, None])[..., None]


def blurred(images: Tensor, box: Tensor, kernel: Tensor, spread: Tensor) -> Tensor:
    """Images [B, 3, S, S] whose block is blurred by itself, reflected at its borders; other pixels are of no use.

    As two products with matrices [B, S, S] that hold the weights of the neighbours.

    Args:
        box: int32 [B, 4].
        kernel, spread: int64 [B], 32-bit words: the kernel has 2 (u div 2) + 1 pixels with u uniform in {3, .., 15}
            and a standard deviation uniform in [0.1, 5.1).
    """
    half = (3 + (kernel * 13 >> 32)) // 2
    sigma = 0.1 + 5 * spread.double() * 2.0**-32
    tap = torch.arange(-BLUR, BLUR + 1, device=box.device)
    weight = (-0.5 * (tap / sigma[:, None]).square()).exp() * (tap.abs() <= half[:, None])  # [B, taps]
    weight = (weight / weight.sum(1, keepdim=True)).to(torch.promote_types(images.dtype, torch.float32))
    pixel = torch.arange(images.shape[-1], device=box.device)
    matrices = []
    for begin, length in ((box[:, 0:1], box[:, 2:3]), (box[:, 1:2], box[:, 3:4])):
        period = (2 * length - 2).clamp_min(1)
        matrix = torch.zeros(len(box), len(pixel), len(pixel), dtype=weight.dtype, device=box.device)
        for k in range(2 * BLUR + 1):
            offset = (pixel - begin + (k - BLUR)) % period
            neighbour = begin + offset.minimum(period - offset)  # [B, S]
            matrix += weight[:, k, None, None] * (neighbour[:, :, None] == pixel)
        matrices.append(matrix[:, None])
    down, across = matrices
    with torch.autocast(images.device.type, enabled=False):
        return (down @ images.to(weight.dtype) @ across.transpose(-2, -1)).to(images.dtype)


def inside(box: Tensor, side: int) -> Tensor:
    """Which pixels lie in one block per image: [B, 4] -> bool [B, S, S]."""
    pixel = torch.arange(side, device=box.device)
    top, left, height, width = box[:, :, None].unbind(1)  # [B, 1]
    rows, columns = (pixel >= top) & (pixel < top + height), (pixel >= left) & (pixel < left + width)
    return rows[:, :, None] & columns[:, None, :]


def _words(ids: Tensor, purpose: str, count: int, *, seed: int, epoch: int, view: int) -> tuple[Tensor, ...]:
    """Four tensors of 32-bit words, int64 [B, count]."""
    block = torch.arange(count, device=ids.device)
    return philox((ids[:, None], epoch, view, block), (seed, zlib.crc32(f"sit/{purpose}".encode())))
