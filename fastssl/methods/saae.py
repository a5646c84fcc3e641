"""SAAE: semantic-aware auto-encoders (Wang, Tang, Lin, Torr, CVPR 2022), as in the authors' released code.

Auto-encoding across views: a crop goes in, the whole image shall come out. The crop's patch codes are pasted back to
where the crop lay in the image; the cells it did not see hold one learned mask code. A light decoder fills them in, and
only their pixels count: nothing can be copied. A semantic aligner makes two crops of one image agree, as a whole (their
class codes against those of all other images) and cell by cell where both saw the image.

"The image" is squashed to a square first, without regard to its shape. No teacher takes part.

Letters: B images, V = 2 B views (all first crops, then all second ones), G cells along a side of the image, N = G x G
cells, p side of a cell (a patch) in pixels, D width of the encoder, C width of a code.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.batch import Batch
from fastssl.config import (
    Checked,
    Config,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Range,
    View,
    ZeroToOne,
    check,
)
from fastssl.kernels.masked_attention_gather import gather_tokens
from fastssl.kernels.patch_contrast import patch_contrast
from fastssl.kernels.patch_pixel_loss import patch_pixel_loss
from fastssl.kernels.uncrop import cells, uncrop, unseen
from fastssl.methods import names
from fastssl.methods.contrast import nt_xent
from fastssl.methods.method import Method
from fastssl.models import build_vit, check_image_size
from fastssl.models.blocks import Drop, add_norm, run_blocks, transformer_blocks, working_type
from fastssl.models.norms import BatchNorm1d, Chain
from fastssl.models.vit import join_patches, sincos_positions
from fastssl.pictures import Sheet, cover, cover_key, to_picture
from fastssl.step import Step, Values, feature_spread
from fastssl.training import distributed
from fastssl.training.schedule import cosine
from fastssl.training.timing import section

_CROP: dict[str, Any] = {
    "size": 224, "scale": (0.14, 1.0), "squash": 224, "jitter": (0.4, 0.4, 0.2, 0.1), "jitter_p": 0.8, "gray": 0.2,
}  # fmt: skip


@dataclass
class Views:
    """Two crops to encode, and the whole image to paint; all three are cut from the squashed image."""

    crop1: View = field(default_factory=lambda: View(blur=1.0, **_CROP))
    """First crop: always blurred."""
    crop2: View = field(default_factory=lambda: View(blur=0.1, solarize=0.2, **_CROP))
    """Second crop: seldom blurred, sometimes solarized."""
    reference: View = field(
        default_factory=lambda: View(
            size=224, scale=(1.0, 1.0), ratio=(1.0, 1.0), squash=224, flip=0.0, interpolation="bilinear"
        )
    )
    """The squashed image as it is: what the decoder paints."""


@dataclass
class Settings(Checked):
    """SAAE's own numbers."""

    section: ClassVar[str] = "saae"

    cls_weight: NonNegativeFloat = 10 / 8
    """Weight of the class codes' contrast; the pixel term has weight 1. The authors write 10, but their gradients of
    both contrasts come out divided by the number of processes, and their recipe has 8."""
    patch_weight: NonNegativeFloat = 1 / 8
    """Weight of the cells' contrast. The authors write 1; see cls_weight."""
    aligner_gradient: Literal["exact", "authors"] = "exact"
    """exact: the same for any number of processes. authors: both contrasts' gradients divided by that number (with
    cls_weight 10 and patch_weight 1: their runs)."""
    temperature: PositiveFloat = 0.2
    """Temperature of both contrasts."""
    uncrop_flip: Literal["width", "channel"] = "width"
    """How the map of a mirrored crop is turned back before it is pasted: along its width, or, as in the authors' code,
    by reversing its channels, which leaves the map mirrored."""
    code_width: Annotated[int, Range(at_least=4, at_most=512, multiple_of=4)] = 256
    """Width of codes and decoder (C)."""
    head_hidden: PositiveInt = 2048
    """Width of the projector's inner layers."""
    head_batch_norm: bool = True
    """Batch normalisation after the projector's inner layers; behind its last layer it always stands."""
    decoder_depth: PositiveInt = 4
    """Blocks of the decoder."""
    decoder_heads: PositiveInt = 8
    """Attention heads of the decoder."""
    teacher: bool = False
    """Keep a moving average of the encoder, for evaluation and export only: nothing is learned from it."""
    momentum_teacher: ZeroToOne = 0.996
    """Decay of that average at the start; it rises to 1 over the run, as a cosine."""

    def __post_init__(self) -> None:
        super().__post_init__()
        width, heads = self.code_width, self.decoder_heads
        check(width % heads == 0, "saae.code_width", width, f"a multiple of saae.decoder_heads, {heads}")


class SAAE(Method):
    """Encoder, projector, decoder and their losses.

    Args:
        config: a configuration whose views and settings are this file's `Views` and `Settings`.
    """

    Views = Views
    Settings = Settings
    defaults: ClassVar[dict[str, object]] = {
        "data.batch_size": 120,
        "model.name": "vit_base",
        "model.resample": "dino",
        "model.drop_path": 0.1,
        "optim.name": "adamw",
        "optim.lr": 2.4e-4,
        "optim.min_lr": 1e-6,
        "optim.weight_decay": 0.1,
        "optim.clip_grad": 3.0,
        "optim.clip_each": True,
        "schedule.epochs": 400,
        "schedule.warmup_epochs": 10,
        "run.recipe_batch": 960,
    }
    backbone_prefix = "encoder."
    layout = names.SAAE
    batch_terms = ("the contrast of images", "weights of cells")
    spare = ("teacher.",)

    def __init__(self, config: Config) -> None:
        super().__init__()
        s: Settings = config.settings
        self.settings = s
        self.encoder = build_vit(config.model, config.method)
        self.encoder.patch_embed.requires_grad_(False)  # stays at its random start
        self.grid, self.squash = check_views(config)
        self.projector = projector(self.encoder.width, s.head_hidden, s.code_width, s.head_batch_norm)
        self.mask_code = nn.Parameter(torch.empty(1, 1, s.code_width))
        nn.init.trunc_normal_(self.mask_code, std=0.02)
        self.decoder = Decoder(s.code_width, self.grid, self.encoder.patch_size, s.decoder_depth, s.decoder_heads)
        if s.teacher:
            self.teacher = build_vit(config.model, config.method, drop_path=0.0)
            self.teacher.load_state_dict(self.encoder.state_dict())
            self.teacher.requires_grad_(False)
            self.backbone_prefix = "teacher."

    def forward(self, batch: Batch, values: Values) -> Step:
        s = self.settings
        target = batch.views["reference"][:, 0]  # [B, 3, S, S]
        box, flip = self.place(batch)
        drop = Drop(batch.id, values.seed, values.clock, "encoder")
        tokens, cls, canvas = self.encode(batch, box, flip, drop)  # [V, 1+N, D], [V, C], [V, N, C]

        hidden = unseen(box, grid=self.grid)  # [V, N]
        shared = ~hidden.unflatten(0, (2, -1)).any(dim=0)  # [B, N], seen by both crops
        counts = torch.cat([hidden, shared]).sum(dim=1)  # [3 B]
        ids, count = hidden_first(hidden), counts[: len(hidden)]  # [V, N], [V]
        filled = self.decode(cls, canvas)  # [V, N, C]
        with section("paint"):
            painted = self.decoder.paint(gather_tokens(filled, ids, count=count))  # [V, N, 3 p p]

        with section("loss"):
            own = counts.view(3, -1).sum(dim=1, dtype=torch.float32)  # cells: hidden from either crop, seen by both
            mean = distributed.all_reduce_sum(own / distributed.world()).clamp_min(1 / distributed.world())
            crops = zip(painted.chunk(2), ids.chunk(2), count.chunk(2), strict=True)
            pixels = torch.stack([self.pixel_loss(*crop, target) for crop in crops])
            pixel = (own / mean)[:2].mul(pixels).sum()
            contrast = nt_xent(cls.unflatten(0, (2, -1)), s.temperature)
            first, second = canvas.chunk(2)
            agreement = patch_contrast(first, second, shared, s.temperature).total / mean[2]
            aligner = torch.add(s.cls_weight * contrast, agreement, alpha=s.patch_weight)
            if s.aligner_gradient == "authors":
                aligner = scale_gradient(aligner, 1 / distributed.world())
        metrics = {
            "pixel_loss": pixel.detach(),
            "cls_loss": contrast.detach(),
            "patch_loss": agreement.detach(),
            "unseen": hidden.mean(dtype=torch.float32),
            "feature_std": feature_spread(tokens.chunk(2)[0][:, 0]),
        }
        return Step(pixel + aligner, metrics)

    def place(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Where the crops lie in the image, in whole cells: int64 [V, 4] (top, left, height, width); flips [V].

        The boxes come as fractions of the squashed image; rounding gives its pixels back exactly.
        """
        box, flip = (torch.cat([of[name][:, 0] for name in ("crop1", "crop2")]) for of in (batch.box, batch.flip))
        return cells((box * self.squash).round().long(), self.squash // self.grid), flip

    def encode(
        self, batch: Batch, box: Tensor, flip: Tensor, drop: Drop | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens [V, 1+N, D], class codes [V, C] and canvases [V, N, C]: patch codes where the crops lie, mask code
        elsewhere."""
        images = torch.cat([batch.views[name][:, 0] for name in ("crop1", "crop2")])  # [V, 3, S, S]
        with section("encoder"):
            tokens = self.encoder.tokens(images, drop=drop)
        with section("projector"):
            codes = self.projector(tokens.flatten(0, 1)).unflatten(0, tokens.shape[:2])  # [V, 1+N, C]
            first, rest = codes.split([1, codes.shape[1] - 1], dim=1)
        with section("uncrop"):
            canvas = uncrop(rest, self.mask_code.flatten(), box, flip, grid=self.grid,
                            flip_axis=self.settings.uncrop_flip)  # fmt: skip
        return tokens, first.squeeze(1), canvas

    def decode(self, cls: Tensor, canvas: Tensor) -> Tensor:
        """Class codes and canvases -> cells that are ready to be painted, [V, N, C]."""
        with section("decoder"):
            return self.decoder(torch.cat([cls[:, None], canvas], dim=1))

    def pixel_loss(self, painted: Tensor, ids: Tensor, count: Tensor, target: Tensor) -> Tensor:
        """Mean squared error over the pixels that this process's crops did not see; 0 if they saw everything."""
        return patch_pixel_loss(
            painted, target, ids, count=count, patch_size=self.encoder.patch_size, norm_pixels=False,
            channels_last=False,
        )  # fmt: skip

    def scheduled(self, values: Values) -> dict[str, float]:
        """The momentum of the teacher, if there is one."""
        start = self.settings.momentum_teacher
        return {"momentum": cosine(values.step, values.total_steps, start, 1.0)} if self.settings.teacher else {}

    def averages(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.teacher, self.encoder)] if self.settings.teacher else []

    def pictures(self, batch: Batch, values: Values) -> dict[str, Sheet]:
        """Per crop: what goes in, which cells of the image it saw, and the image with the others painted; last the
        image."""
        box, flip = self.place(batch)
        _, cls, canvas = self.encode(batch, box, flip)
        side = (self.grid, self.grid)
        painted = join_patches(self.decoder.paint(self.decode(cls, canvas)), *side)  # [V, 3, S, S]
        hidden = unseen(box, grid=self.grid).unflatten(1, side)  # [V, G, G]
        image = to_picture(batch.views["reference"][:, 0])
        columns = []
        for name, cells_hidden, own in zip(("crop1", "crop2"), hidden.chunk(2), painted.chunk(2), strict=True):
            seen = cover(image, cells_hidden)
            filling = cover(to_picture(own), ~cells_hidden, colour=0.0)
            columns += [to_picture(batch.views[name][:, 0]), seen, cover(image, cells_hidden, colour=0.0) + filling]
        titles = [title for k in (1, 2) for title in (f"crop {k}", f"where crop {k} lies in the image",
                                                      f"the rest painted from crop {k}")]  # fmt: skip
        legend = [cover_key("not seen in the crop"), (None, "Only what the crop did not see is painted.")]
        return {"reconstruction": Sheet(torch.stack([*columns, image], dim=1), [*titles, "image"], legend)}


def check_views(config: Config) -> tuple[int, int]:
    """Cells along a side of the image (G) and the squashed image's side in pixels.

    Raises:
        ConfigError: the view groups do not fit together, the model, or the method.
    """
    size, squash, p = config.views.reference.size, config.views.reference.squash, config.model.patch_size
    check_image_size(config.model, "views.reference.size", size)
    grid = size // p
    check(grid * grid <= 1024, "model.patch_size", p, f"large enough that {size} pixels hold at most 32 patches")
    check(squash > 0 and squash % grid == 0, "views.reference.squash", squash, f"a positive multiple of {grid} "
          "(patches along the image)")  # fmt: skip
    for name, view in vars(config.views).items():
        check(view.count == 1, f"views.{name}.count", view.count, "1 with method saae")
        check(view.size == size, f"views.{name}.size", view.size, f"views.reference.size, {size}")
        check(view.squash == squash, f"views.{name}.squash", view.squash, f"views.reference.squash, {squash}")
    whole = {"scale": (1, 1), "ratio": (1, 1), "flip": 0, "jitter_p": 0, "gray": 0, "blur": 0, "solarize": 0}
    for key, value in {**whole, "same_crop_as": None}.items():
        found = getattr(config.views.reference, key)
        found = tuple(found) if isinstance(value, tuple) else found
        check(found == value, f"views.reference.{key}", found, f"{value}: the image as it is")
    return grid, squash


def projector(width: int, hidden: int, outputs: int, batch_norm: bool) -> nn.Sequential:
    """Four linear layers with ReLU between them, for class and patch tokens alike: [T, D] -> [T, C].

    Batch normalisation (of all tokens of the batch together) closes it, without gain and bias; after the inner layers
    it is optional.
    """
    sizes = [width, hidden, hidden, hidden, outputs]
    layers: list[nn.Module] = []
    for i in range(4):
        linear = nn.Linear(sizes[i], sizes[i + 1], bias=i == 0)
        nn.init.trunc_normal_(linear.weight, std=0.02)
        if i == 0:
            nn.init.zeros_(linear.bias)
        layers.append(linear)
        if i < 3:
            layers += [BatchNorm1d(hidden), nn.ReLU()] if batch_norm else [nn.ReLU()]
    return Chain(*layers, BatchNorm1d(outputs, affine=False))


class Decoder(nn.Module):
    """A light transformer over the canvas; its cells are painted one by one.

    Args:
        width: of a code (C).
        grid: cells along a side (G).
        patch_size: side of a cell, in pixels (p).
        depth, heads: blocks and attention heads.
    """

    def __init__(self, width: int, grid: int, patch_size: int, depth: int, heads: int) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(sincos_positions(width, grid, grid), requires_grad=False)
        self.blocks = transformer_blocks(width, depth, heads)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.linear = nn.Linear(width, width)
        self.last_norm = nn.LayerNorm(width, eps=1e-6)
        # A transposed convolution only in name: it holds the authors' keys, `paint` applies it as a matrix product.
        self.unconv = nn.ConvTranspose2d(width, 3, patch_size, patch_size)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, codes: Tensor) -> Tensor:
        """Class code and canvas [V, 1+N, C] -> cells [V, N, C], ready to be painted."""
        x = run_blocks(self.blocks, codes + self.pos_embed, self.norm)
        x = self.linear(x[:, 1:].flatten(0, 1)).unflatten(0, (len(x), -1))
        return add_norm(x, self.last_norm, working_type(x, self.unconv.weight))[1]

    def paint(self, x: Tensor) -> Tensor:
        """Cells [.., C] -> their pixels [.., 3 p p], in the order channel, row, column."""
        weight = self.unconv.weight.flatten(1)  # [C, 3 p p]
        return F.linear(x, weight.t(), cast(Tensor, self.unconv.bias).repeat_interleave(weight.shape[1] // 3))


def hidden_first(hidden: Tensor) -> Tensor:
    """Each row's cell ids with the hidden cells first, int64 [V, N].

    How many cells a batch has to paint is known on the device alone. Rows of full length, of which only the beginning
    counts, spare the wait for that number.
    """
    return hidden.view(torch.uint8).argsort(dim=1, descending=True, stable=True)


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """x, with its gradient multiplied by `factor`."""
    still = x.detach()
    return still + factor * (x - still)
