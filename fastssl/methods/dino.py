"""DINO: self-distillation with no labels (Caron et al. 2021, arXiv 2104.14294).

A student sees two large and several small crops of an image, a teacher (the student's moving average) only the large
ones. The student learns to give every crop the teacher's soft class of the other large crops. Centring and sharpening
of the teacher's output keep both from agreeing on one answer.

Letters: B images, V crops per image, T of them seen by the teacher (they come first), S side, D width, K prototypes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from itertools import accumulate, groupby
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.batch import Batch
from fastssl.config import Checked, Config, NonNegativeInt, PositiveFloat, PositiveInt, View, ZeroToOne
from fastssl.kernels.centering_softmax_loss import centering_softmax_loss
from fastssl.methods import names
from fastssl.methods.method import Method
from fastssl.models import AnyBackbone, build_backbone, check_image_size
from fastssl.models.blocks import Drop
from fastssl.models.heads import DINOHead
from fastssl.models.vit import ViT
from fastssl.pictures import Sheet, heat, heat_key, to_picture
from fastssl.step import Step, Values, feature_spread
from fastssl.training import distributed
from fastssl.training.schedule import cosine, linear_ramp
from fastssl.training.timing import section

_JITTER: dict[str, Any] = {"jitter": (0.4, 0.4, 0.2, 0.1), "jitter_p": 0.8, "gray": 0.2}


@dataclass
class Views:
    """DINO's crops: two large ones for student and teacher, small ones for the student alone."""

    global1: View = field(default_factory=lambda: View(size=224, scale=(0.4, 1.0), blur=1.0, **_JITTER))
    """First large crop: always blurred."""
    global2: View = field(default_factory=lambda: View(size=224, scale=(0.4, 1.0), blur=0.1, solarize=0.2, **_JITTER))
    """Second large crop: seldom blurred, sometimes solarized."""
    local: View = field(default_factory=lambda: View(count=8, size=96, scale=(0.05, 0.4), blur=0.5, **_JITTER))
    """Small crops; count 0: none."""

    optional: ClassVar[tuple[str, ...]] = ("local",)


@dataclass
class Settings(Checked):
    """DINO's own numbers."""

    section: ClassVar[str] = "dino"

    out_dim: PositiveInt = 65536
    """Outputs of the head (K)."""
    head_layers: PositiveInt = 3
    """Layers of the head before the prototypes."""
    head_hidden: PositiveInt = 2048
    """Width of the head's inner layers."""
    head_bottleneck: PositiveInt = 256
    """Width of the normalised vector before the prototypes."""
    head_batch_norm: bool = False
    """Batch normalisation in the head."""
    norm_last_layer: bool = True
    """Hold the prototypes at length 1: steadier; letting them grow can be better with a ViT-S."""
    freeze_last_layer: NonNegativeInt = 1
    """Epochs at the start during which the prototypes do not learn."""
    student_temp: PositiveFloat = 0.1
    """Temperature of the student's softmax."""
    teacher_temp: PositiveFloat = 0.07
    """Temperature of the teacher's softmax after the warm-up."""
    warmup_teacher_temp: PositiveFloat = 0.04
    """Temperature of the teacher's softmax in the first epoch."""
    warmup_teacher_temp_epochs: NonNegativeInt = 30
    """Epochs over which the teacher's temperature rises, epoch by epoch. 0: constant."""
    center_momentum: ZeroToOne = 0.9
    """Decay of the teacher's centre; it is updated once per micro-batch."""
    momentum_teacher: ZeroToOne = 0.996
    """Decay of the teacher's weights at the start of the run."""
    momentum_teacher_end: ZeroToOne = 1.0
    """Decay of the teacher's weights at the end; a cosine leads there."""


class DINO(Method):
    """Student, teacher and their loss.

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
        "optim.weight_decay_end": 0.4,
        "optim.clip_grad": 3.0,
        "optim.clip_each": True,
        "schedule.epochs": 100,
        "schedule.warmup_epochs": 10,
        "run.recipe_batch": 512,
    }
    backbone_prefix = "teacher.backbone."
    layout = names.DINO
    batch_terms = ("the centre",)
    student: Network
    teacher: Network
    center: Tensor

    @staticmethod
    def network(config: Config, drop_path: float | None = None) -> Network:
        """A freshly initialised student or teacher."""
        return Network(config, drop_path)

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.settings: Settings = config.settings
        for name, view in vars(config.views).items():
            check_image_size(config.model, f"views.{name}.size", view.size)
        self.student = self.network(config)
        self.teacher = self.network(config, drop_path=0.0)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)
        self.register_buffer("center", torch.zeros(self.settings.out_dim))

    @property
    def chance_loss(self) -> float:
        """The loss when student and teacher answer the same to everything."""
        return math.log(self.settings.out_dim)

    def forward(self, batch: Batch, values: Values) -> Step:
        s = self.settings
        large = by_size([batch.views["global1"], batch.views["global2"]])  # each [B, n, 3, S, S]
        small = [batch.views["local"]] if "local" in batch.views else []
        with section("student"):
            drop = Drop(batch.id, values.seed, values.clock, "student")
            _, student = self.student([*large, *small], drop)  # [V, B, K]
        with section("teacher"), torch.no_grad():
            features, teacher = self.teacher(large)  # [T, B, D], [T, B, K]
        with section("loss"):
            temp = self.number("teacher_temp", values)
            result = centering_softmax_loss(student, teacher, self.center, s.student_temp, temp)
            if self.training:
                update_center(self.center, result.column_sum, teacher.shape[0] * teacher.shape[1], s.center_momentum)
        metrics = {
            "teacher_entropy": result.entropy / math.log(s.out_dim),
            "teacher_student_kl": result.divergence,
            "feature_std": feature_spread(features[0]),
            "center_norm": self.center.norm(),
        }
        return Step(result.loss, metrics)

    def scheduled(self, values: Values) -> dict[str, float]:
        """Temperature and momentum of the teacher; 0 while the prototypes do not learn yet, then 1."""
        learn = float(values.epoch >= self.settings.freeze_last_layer)
        return {"teacher_temp": self.teacher_temp(values), "momentum": self.momentum(values), "prototypes": learn}

    def averages(self) -> list[tuple[nn.Module, nn.Module]]:
        return [(self.teacher, self.student)]

    def factors(self) -> dict[str, list[nn.Parameter]]:
        learned = [p for p in self.student.head.last_layer.parameters() if p.requires_grad]
        return {"prototypes": learned} if self.settings.freeze_last_layer else {}

    def momentum(self, values: Values) -> float:
        """Decay of the teacher's weights at this step."""
        s = self.settings
        return cosine(values.step, values.total_steps, s.momentum_teacher, s.momentum_teacher_end)

    def teacher_temp(self, values: Values) -> float:
        """Temperature of the teacher's softmax in this epoch."""
        s = self.settings
        if values.epoch >= s.warmup_teacher_temp_epochs:
            return s.teacher_temp
        return s.warmup_teacher_temp + linear_ramp(
            values.epoch, max(s.warmup_teacher_temp_epochs - 1, 1), 0.0, s.teacher_temp - s.warmup_teacher_temp
        )

    def pictures(self, batch: Batch, values: Values) -> dict[str, Sheet]:
        """Per image: both large crops, each followed by where the teacher looks in it (`attention`)."""
        large = [batch.views[name][:, 0] for name in ("global1", "global2")]
        columns = []
        for crop in large:
            picture = F.interpolate(to_picture(crop), size=large[0].shape[-2:], mode="bilinear")
            columns += [picture, heat(picture, attention(self.teacher.backbone, crop))]
        titles = [title for name in ("first", "second") for title in (f"{name} large crop", "where the teacher looks")]
        vit = isinstance(self.teacher.backbone, ViT)
        what = (
            "attention of the class token in the last block, mean over heads" if vit else "length of the last features"
        )
        return {"attention": Sheet(torch.stack(columns, dim=1), titles, [heat_key(what)])}


class Network(nn.Module):
    """A backbone with DINO's head."""

    def __init__(self, config: Config, drop_path: float | None = None) -> None:
        super().__init__()
        s: Settings = config.settings
        self.backbone = build_backbone(config.model, drop_path)
        self.head = DINOHead(
            self.backbone.width,
            s.out_dim,
            layers=s.head_layers,
            hidden=s.head_hidden,
            bottleneck=s.head_bottleneck,
            batch_norm=s.head_batch_norm,
            norm_last_layer=s.norm_last_layer,
        )

    def forward(self, views: list[Tensor], drop: Drop | None = None) -> tuple[Tensor, Tensor]:
        """View groups, each [B, n, 3, S, S] -> features [V, B, D] and logits [V, B, K] of all crops in order.

        All pass the backbone together if it is a ViT, else those of one size; the head sees all crops at once. `drop`
        is what stochastic depth is drawn from for the first crop of each image.
        """
        groups = by_size(views)
        crops = [group.flatten(0, 1) for group in groups]
        if isinstance(self.backbone, ViT):
            first = accumulate((group.shape[1] for group in groups), initial=drop.first if drop else 0)
            drops = [drop and replace(drop, together=x.shape[1], first=n) for x, n in zip(groups, first, strict=False)]
            made = self.backbone.groups(crops, drops)
        else:
            made = [self.backbone(x) for x in crops]
        features = [x.unflatten(0, group.shape[:2]).transpose(0, 1) for x, group in zip(made, groups, strict=True)]
        joined = torch.cat(features) if len(features) > 1 else features[0]
        return joined, self.head(joined)


def by_size(views: list[Tensor]) -> list[Tensor]:
    """View groups, each [B, n, 3, S, S]; neighbours of one size become one."""
    groups = [list(same) for _, same in groupby(views, key=lambda view: view.shape[-1])]
    return [torch.cat(same, dim=1) if len(same) > 1 else same[0] for same in groups]


@torch.no_grad()
def update_center(center: Tensor, column_sum: Tensor, rows: int, momentum: float) -> None:
    """center <- momentum x center + (1 - momentum) x mean teacher logits over crops, images and processes (equation 4).

    Args:
        center: [K], changed in place.
        column_sum: [K], sum of this process's teacher logits over crops and images.
        rows: T x B, how many were summed; the same on every process.
    """
    mean = distributed.all_reduce_mean(column_sum / rows)
    center.lerp_(mean.to(center.dtype), 1.0 - momentum)


def attention(backbone: AnyBackbone, images: Tensor) -> Tensor:
    """Where a backbone looks, [B, g, g]: a ViT's class attention in its last block, mean over heads (section 4.2.2 of
    the paper); of any other network the length of its last feature map.

    Args:
        images: [B, 3, S, S].
    """
    if not isinstance(backbone, ViT):
        return backbone.stages(images)[-1].norm(dim=1)
    return backbone.class_attention(images).mean(dim=1)
