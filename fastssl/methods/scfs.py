"""SCFS: semantics-consistent feature search (Song et al., ICCV 2023, arXiv 2212.06486).

DINO with a second lesson at three stages of the backbone. What a small crop shows is searched in the teacher's map of
the large crop, and the small crop's target is what was found: the crop of the grass learns from the grass of the image,
not from its dog. DINO's own loss stays as it is (`fastssl.methods.dino`).

Letters: B images, M small crops per image, V crops in all, K prototypes, E outputs of a stage head; per stage C
channels and H x W positions of its map, I channels inside its head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastssl.batch import Batch
from fastssl.config import Config, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, View, check
from fastssl.kernels.centering_softmax_loss import CenteringSoftmaxLoss, centering_softmax_loss
from fastssl.kernels.feature_search import (
    residual_pool,
    scale_norm_relu,
    scaled_moments,
    scaled_statistics,
    search_maps,
)
from fastssl.kernels.unit_rows import unit_rows
from fastssl.methods import dino, names
from fastssl.methods.dino import DINO
from fastssl.models import AnyBackbone
from fastssl.models.norms import BatchNorm1d, BatchNorm2d, Chain
from fastssl.models.resnet import ResNet
from fastssl.models.timm_backbone import TimmBackbone
from fastssl.models.vit import ViT, patch_grid
from fastssl.pictures import Sheet, heat, heat_key, to_picture
from fastssl.step import Step, Values, feature_spread
from fastssl.training import distributed
from fastssl.training.batch_norm import is_synchronised, update_running
from fastssl.training.timing import section

DRAWN_CROPS = 3  # small crops per image in the pictures


@dataclass
class Views(dino.Views):
    """DINO's crops, from other ranges of the image's area."""

    global1: View = field(default_factory=lambda: replace(dino.Views().global1, scale=(0.25, 1.0)))
    """First large crop: always blurred. The small crops are searched in it."""
    global2: View = field(default_factory=lambda: replace(dino.Views().global2, scale=(0.25, 1.0)))
    """Second large crop: seldom blurred, sometimes solarized."""
    local: View = field(default_factory=lambda: replace(dino.Views().local, scale=(0.05, 0.25)))
    """Small crops."""

    optional: ClassVar[tuple[str, ...]] = ()


@dataclass
class Settings(dino.Settings):
    """DINO's numbers, and those of the search."""

    section: ClassVar[str] = "scfs"

    warmup_teacher_temp_epochs: NonNegativeInt = 50
    """Epochs over which the teacher's temperature rises, epoch by epoch. 0: constant."""
    taps: tuple[PositiveInt, ...] | None = None
    """Stages of a ResNet (1 to 4) after which maps are taken; or blocks of a ViT, whose patch tokens then are the map:
    an extension of this project, not of the paper. None: stages 2, 3, 4 (a timm model's last three); blocks at 1/2,
    3/4 and the end of a ViT."""
    stage_weights: tuple[PositiveFloat, ...] | None = None
    """Weight of each tap's loss beside DINO's. None: 1 each."""
    cross_weight: NonNegativeFloat = 0.5
    """Within a tap: weight of the loss between the two large crops."""
    searched_weight: NonNegativeFloat = 0.5
    """Within a tap: weight of the loss between small crops and what the search found for them."""
    search: Literal["first", "both"] = "first"
    """Large crops in which small ones are searched: the first, as the authors do, or both (mean of two losses)."""
    stage_inner: PositiveInt = 256
    """Channels inside a stage head's block (I)."""
    stage_hidden: PositiveInt = 2048
    """Width of the inner layer of a stage head's MLP."""
    stage_out: PositiveInt = 256
    """Outputs of a stage head (E)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.taps is not None:
            ascending = all(a < b for a, b in zip((0, *self.taps), self.taps, strict=False))
            check(ascending, "scfs.taps", self.taps, "stages or blocks in ascending order, from 1 on")
        if self.stage_weights is not None:
            count = 3 if self.taps is None else len(self.taps)
            right = len(self.stage_weights) == count
            check(right, "scfs.stage_weights", self.stage_weights, f"{count} positive numbers, one per tap")


class SCFS(DINO):
    """Student, teacher and their losses; the teacher's update and the freezing of prototypes are DINO's.

    The teacher stays in train mode: it normalises with its own batches and keeps its own running statistics.

    Args:
        config: a configuration whose views and settings are this file's `Views` and `Settings`.
    """

    Views = Views
    Settings = Settings
    defaults: ClassVar[dict[str, object]] = {
        "model.name": "resnet50",
        "model.resample": "dino",  # of a ViT
        "optim.name": "sgd",
        "optim.lr": 0.1,
        "optim.min_lr": 0.0048,
        "optim.weight_decay": 1e-4,
        "optim.clip_grad": 3.0,
        "optim.clip_each": True,
        "schedule.epochs": 200,
        "schedule.warmup_epochs": 10,
        "run.recipe_batch": 256,
    }
    layout = names.SCFS
    batch_terms = ("the centres",)
    student: Network
    teacher: Network
    loss_weights: Tensor  # DINO's, each tap's cross loss, each tap's searched losses

    @staticmethod
    def network(config: Config, drop_path: float | None = None) -> Network:
        return Network(config, drop_path)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.settings: Settings = config.settings
        views = config.views
        for name in ("global1", "global2"):
            check(getattr(views, name).count == 1, f"views.{name}.count", getattr(views, name).count,
                  "1 with method scfs")  # fmt: skip
        check(views.global2.size == views.global1.size, "views.global2.size", views.global2.size,
              f"views.global1.size, {views.global1.size}")  # fmt: skip
        self.taps = self.student.taps
        self.stage_weights = self.settings.stage_weights or (1.0,) * len(self.taps)
        for tap in self.taps:
            self.register_buffer(f"center_{tap}", torch.zeros(self.settings.stage_out))
        searched = 1 if self.settings.search == "first" else 2
        weights = [1.0, *(self.settings.cross_weight * weight for weight in self.stage_weights)]
        for weight in self.stage_weights:
            weights += [self.settings.searched_weight * weight / searched] * searched
        self.register_buffer("loss_weights", torch.tensor(weights, dtype=torch.float64), persistent=False)

    @property
    def chance_loss(self) -> float:
        """The loss when the student gives all outputs the same value, whatever the teacher says."""
        s = self.settings
        stages = sum(self.stage_weights) * (s.cross_weight + s.searched_weight)
        return math.log(s.out_dim) + stages * math.log(s.stage_out)

    def forward(self, batch: Batch, values: Values) -> Step:
        s = self.settings
        large, small = crops(batch)
        with section("student"):
            student = self.student([large, small])
        with section("teacher"), torch.no_grad():
            teacher = self.teacher([large])
        with section("search"):
            targets = [self.targets(i, student, teacher) for i in range(len(self.taps))]

        with section("loss"):
            temps = s.student_temp, self.number("teacher_temp", values)
            results = [centering_softmax_loss(student.logits, teacher.logits, self.center, *temps)]
            searched: list[CenteringSoftmaxLoss] = []
            for i, tap in enumerate(self.taps):
                seen, local, center = student.stages[0][i].out, student.stages[1][i].out, getattr(self, f"center_{tap}")
                results.append(centering_softmax_loss(seen, teacher.stages[0][i].out, center, *temps))
                searched += [centering_softmax_loss(local, t, None, *temps, pairs="matching") for t in targets[i]]
            losses = torch.stack([result.loss for result in results + searched])
            loss = (losses * self.loss_weights.to(losses.dtype)).sum()
            if self.training:
                centers = [self.center, *(getattr(self, f"center_{tap}") for tap in self.taps)]
                sums = [result.column_sum for result in results]
                update_centers(centers, sums, 2 * len(batch), s.center_momentum)
        final, taps = results[0], len(self.taps)
        metrics = {
            "teacher_entropy": final.entropy / math.log(s.out_dim),
            "teacher_student_kl": final.divergence,
            "feature_std": feature_spread(teacher.features[0]),
            "center_norm": self.center.norm(),
        }
        if taps:
            views = len(targets[0])
            entropies = torch.stack([result.entropy for result in searched]) / (views * math.log(s.stage_out))
            named = {
                "loss_cross": losses[1 : 1 + taps].detach(),
                "loss_searched": losses[1 + taps :].detach().unflatten(0, (taps, views)).mean(1),
                "searched_entropy": entropies.unflatten(0, (taps, views)).sum(1),
                "searched_std": spreads(torch.stack([found[0].flatten(0, 1) for found in targets])),
            }
            metrics |= {f"{name}_{tap}": value[i] for name, value in named.items() for i, tap in enumerate(self.taps)}
        return Step(loss, metrics | {"loss_dino": losses[0].detach()})

    @torch.no_grad()
    def targets(self, tap: int, student: Seen, teacher: Seen) -> list[Tensor]:
        """What the teacher's stage head says of the searched maps: per searched large crop [M, B, E].

        Args:
            tap: position in `taps`.
            student: of the large and the small crops.
            teacher: of the large crops.
        """
        name, local, seen = str(self.taps[tap]), student.stages[1][tap], teacher.stages[0][tap]
        head = cast(StageHead, self.teacher.stage_heads[name])
        targets = []
        for view in range(1 if self.settings.search == "first" else 2):
            maps = search(local.map, seen.map[view])
            out = head.searched(seen.inner[view], seen.map[view], maps)
            targets.append(out.unflatten(0, maps.shape[:2]))
        return targets

    def pictures(self, batch: Batch, values: Values) -> dict[str, Sheet]:
        """Per image: the first large crop, then some small crops, each followed by its search map at every tap."""
        large, small = crops(batch)
        small = small[:DRAWN_CROPS]
        student, teacher = self.student([small]), self.teacher([large[:1]])
        picture = to_picture(large[0])
        columns, titles = [picture], ["large crop"]
        level = "block" if isinstance(self.teacher.backbone, ViT) else "stage"
        for m, crop in enumerate(small):
            titles += [f"small crop {m + 1}", *(f"crop {m + 1} in {level} {tap}" for tap in self.taps)]
            columns.append(F.interpolate(to_picture(crop), size=picture.shape[-2:], mode="bilinear"))
            for local, seen in zip(student.stages[0], teacher.stages[0], strict=True):
                columns.append(heat(picture, search(local.map, seen.map[0])[m]))
        key = heat_key(f"where the teacher's map of the large crop, after that {level}, is like the small crop")
        return {"search": Sheet(torch.stack(columns, dim=1), titles, [key])}


# -- networks ---------------------------------------------------------------------------------------------------------


class Stage(NamedTuple):
    """What a network makes of a group of crops at one tap.

    Attributes:
        map: [V, B, C, H, W], the backbone's feature map.
        inner: [V, B, I, H, W], the first convolution of the stage head on it.
        out: [V, B, E], the stage head's output, float32.
    """

    map: Tensor
    inner: Tensor
    out: Tensor


class Seen(NamedTuple):
    """What a network makes of the crops it is shown.

    Attributes:
        features: [V, B, D], the backbone's.
        logits: [V, B, K], the final head's.
        stages: by group of crops and tap.
    """

    features: Tensor
    logits: Tensor
    stages: list[list[Stage]]


class Network(dino.Network):
    """A backbone, DINO's head on its end and a stage head on each tap.

    Attributes:
        taps: stages or blocks, ascending.
    """

    def __init__(self, config: Config, drop_path: float | None = None) -> None:
        super().__init__(config, drop_path)
        s: Settings = config.settings
        self.taps, widths = tapped(self.backbone, s.taps)
        self.stage_heads = nn.ModuleDict(
            {
                str(tap): StageHead(width, inner=s.stage_inner, hidden=s.stage_hidden, out=s.stage_out)
                for tap, width in zip(self.taps, widths, strict=True)
            }
        )

    def forward(self, groups: list[Tensor]) -> Seen:  # type: ignore[override]  # only SCFS calls it
        """Groups of crops, each [V, B, 3, S, S]. Every group passes backbone and stage heads by itself, with its own
        batch statistics; the final head sees all crops at once."""
        crops = [group.shape[:2] for group in groups]
        found = features_and_maps(self.backbone, self.taps, [group.flatten(0, 1) for group in groups])
        stages: list[list[Stage]] = [[] for _ in groups]
        for tap, module in enumerate(self.stage_heads.values()):
            head, maps = cast(StageHead, module), [maps[tap] for _, maps in found]
            inner = [head.conv1(x) for x in maps]
            for number, values in enumerate(zip(maps, inner, head.each(maps, inner), strict=True)):
                stages[number].append(Stage(*(value.unflatten(0, crops[number]) for value in values)))
        joined = torch.cat([feature.unflatten(0, shape) for (feature, _), shape in zip(found, crops, strict=True)])
        return Seen(joined, self.head(joined), stages)


class StageHead(nn.Module):
    """A residual bottleneck block, global average pooling, an MLP, L2 normalisation; the output is used as logits.

    Args:
        channels: of the map (C).
        inner: channels inside the block (I).
        hidden, out: widths of the MLP's inner layer and of its output (E).
    """

    def __init__(self, channels: int, *, inner: int = 256, hidden: int = 2048, out: int = 256) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inner, kernel_size=1, bias=False)
        self.bn1 = BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, kernel_size=3, padding=1, bias=False)
        self.bn2 = BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, channels, kernel_size=1, bias=False)
        self.bn3 = BatchNorm2d(channels)
        self.mlp = Chain(
            nn.Linear(channels, hidden),
            BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, out),
            BatchNorm1d(out),
        )

    def forward(self, x: Tensor, inner: Tensor) -> Tensor:
        """The head on a map.

        Args:
            x: [n, C, H, W].
            inner: [n, I, H, W], conv1 of x.

        Returns:
            [n, E], rows of length 1, float32 also under autocast.
        """
        return self.each([x], [inner])[0]

    def each(self, xs: list[Tensor], inner: list[Tensor]) -> list[Tensor]:
        """The same of several groups, each normalised by its own statistics."""
        z = self._inside(self.bn1.each(inner, relu=True))
        outputs = self._project([y.mean((2, 3)) for y in self.bn3.each(z, xs, relu=True)])
        return list(outputs.split([len(x) for x in xs]))

    @torch.no_grad()
    def searched(self, inner: Tensor, x: Tensor, maps: Tensor) -> Tensor:
        """The head on maps[m, b] * x[b], which is never made: conv1 is linear and 1x1, so conv1(A x) = A conv1(x).

        Args:
            inner: [B, I, H, W], conv1 of x.
            x: [B, C, H, W].
            maps: [M, B, H, W].

        Returns:
            [M B, E], crop-major, rows of length 1, float32 also under autocast.
        """
        mean, var = batch_statistics(self.bn1, inner, maps)
        y = scale_norm_relu(inner, maps, self.bn1.weight, self.bn1.bias, self.bn1.eps, mean, var).out
        (z,) = self._inside([y])
        mean, var = batch_statistics(self.bn3, z, maps.new_ones(1, len(z), *z.shape[2:]))
        pooled = residual_pool(z, self.bn3.weight, self.bn3.bias, mean, var, self.bn3.eps, maps, x)
        return self._project([pooled])

    def _inside(self, xs: list[Tensor]) -> list[Tensor]:
        return [self.conv3(y) for y in self.bn2.each([self.conv2(x) for x in xs], relu=True)]

    def _project(self, pooled: list[Tensor]) -> Tensor:
        return unit_rows(self.mlp.joined(pooled))


@torch.no_grad()
def update_centers(centers: list[Tensor], column_sums: list[Tensor], rows: int, momentum: float) -> None:
    """DINO's `update_center` of several centres at once."""
    sums = tuple(distributed.all_reduce_sum(column_sum) for column_sum in column_sums)
    means = torch._foreach_div(sums, rows * distributed.world())
    torch._foreach_lerp_(centers, [m.to(c.dtype) for m, c in zip(means, centers, strict=True)], 1.0 - momentum)


def spreads(units: Tensor) -> Tensor:
    """`feature_spread` of several taps' rows of length one, [taps, n, E] -> [taps]."""
    return units.std(dim=1, unbiased=False).mean(dim=1) * units.shape[2] ** 0.5


@torch.no_grad()
def batch_statistics(norm: _BatchNorm, y: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] with which a batch norm normalises maps[m, b] * y[b]: over all processes if it is a
    synchronised one. In train mode its running statistics move."""
    if not norm.training:
        return cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    if not is_synchronised(norm) or distributed.world() == 1:
        buffers = cast(tuple[Tensor, Tensor, Tensor], (norm.running_mean, norm.running_var, norm.num_batches_tracked))
        return scaled_statistics(y, maps, *buffers, cast(float, norm.momentum))
    count, mean, m2 = distributed.merge_moments(*scaled_moments(y, maps))
    update_running(norm, mean, m2 / count, count)
    return mean, m2 / count


def search(local: Tensor, feature: Tensor) -> Tensor:
    """Where in a large crop's map small crops are found: the cosine of a small crop's mean feature with each position.

    Below 0, which occurs without a ReLU before the tap (ViT), nothing is found: 0.

    Args:
        local: [M, B, C, h, w], the student's maps of the small crops.
        feature: [B, C, H, W], the teacher's map of the large crop.

    Returns:
        [M, B, H, W], float32 (float64 for a float64 feature), from 0 to 1.
    """
    queries = local.mean((3, 4), dtype=torch.promote_types(local.dtype, torch.float32))
    return search_maps(queries, feature).clamp_min(0)


def tapped(backbone: AnyBackbone, taps: tuple[int, ...] | None) -> tuple[tuple[int, ...], list[int]]:
    """The taps (`Settings.taps`) and the channels of their maps.

    Raises:
        ConfigError: a tap that the backbone does not have.
    """
    if isinstance(backbone, ResNet):
        taps, last, kind = (2, 3, 4) if taps is None else tuple(taps), 4, "stages"
        widths = [backbone.width // 2 ** (4 - tap) for tap in taps]
    elif isinstance(backbone, TimmBackbone):
        last, kind = len(backbone.maps), "feature maps"
        taps = backbone.default_taps() if taps is None else tuple(taps)
        widths = [backbone.maps[tap - 1] for tap in taps if tap <= last]
    else:
        last, kind = backbone.num_blocks, "blocks"
        taps = (last // 2, 3 * last // 4, last) if taps is None else tuple(taps)
        widths = [backbone.width] * len(taps)
    fits = all(0 < a <= last for a in taps) and len(set(taps)) == len(taps)
    check(fits, "scfs.taps", taps, f"different numbers from 1 to {last}, the backbone's {kind}")
    return taps, widths


def features_and_maps(
    backbone: AnyBackbone, taps: tuple[int, ...], groups: list[Tensor]
) -> list[tuple[Tensor, list[Tensor]]]:
    """By group of images the backbone's feature [n, D] and its maps [n, C, H, W] after the taps; a ViT's are its patch
    tokens after the final norm."""
    if isinstance(backbone, ViT):
        return [_of_tokens(backbone, taps, images) for images in groups]
    if isinstance(backbone, TimmBackbone):
        return [backbone.feature_and_maps(images, taps) for images in groups]
    by_group = zip(*backbone.stages_of(groups), strict=True)
    return [(backbone.avgpool(maps[-1]).flatten(1), [maps[tap - 1] for tap in taps]) for maps in by_group]


def _of_tokens(backbone: ViT, taps: tuple[int, ...], images: Tensor) -> tuple[Tensor, list[Tensor]]:
    first = min((backbone.num_blocks, *taps))
    tokens = backbone.intermediate(images, backbone.num_blocks - first + 1)  # from block `first` on: [n, 1+N, D] each
    grid = patch_grid(images, backbone.patch_size)
    maps = [tokens[tap - first][:, 1:].transpose(1, 2).unflatten(2, grid) for tap in taps]
    return tokens[-1][:, 0], maps


def crops(batch: Batch) -> tuple[Tensor, Tensor]:
    """The two large crops [2, B, 3, S, S] and the small ones [M, B, 3, s, s]."""
    views = batch.views
    large = torch.cat([views["global1"], views["global2"]], dim=1)
    return large.transpose(0, 1), views["local"].transpose(0, 1)
