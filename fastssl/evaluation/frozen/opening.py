"""What every protocol on frozen features does first, and what it says of it at the end."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from fastssl.evaluation.data import central_view
from fastssl.evaluation.frozen.features import Features
from fastssl.evaluation.options import EvaluateOptions
from fastssl.loaders.engine import decoding_threads
from fastssl.models import check_image_size
from fastssl.training import distributed
from fastssl.training.device import choose_device, choose_dtype
from fastssl.weights.backbone import Backbone, open_backbone


@dataclass(frozen=True)
class Measured:
    """What was measured, and how long it took.

    Attributes:
        checkpoint: its path.
        step: optimizer steps of its run.
        train_images, val_images: how many.
        width: numbers per feature.
        seconds: in all.
    """

    checkpoint: str
    step: int
    train_images: int
    val_images: int
    width: int
    seconds: float

    def line(self) -> str:
        return (
            f"{self.checkpoint} (step {self.step}): {self.train_images} training images, {self.val_images} validation "
            f"images, {self.width} numbers per feature, {self.seconds:.0f} s"
        )


def open_network(options: EvaluateOptions) -> tuple[Backbone, dict[str, Any]]:
    """The backbone on its device, and how images go through it."""
    device = choose_device(options.device, "device")
    dtype = choose_dtype(options.precision, device, "precision")
    distributed.start(device)
    backbone = open_backbone(options.checkpoint, device)
    size = options.size or backbone.image_size
    check_image_size(backbone.model, "size", size)
    workers = decoding_threads(options.workers, distributed.local_world())
    return backbone, {"size": size, **central_view(options.resize, backbone, size), "workers": workers, "dtype": dtype}


def measured(options: EvaluateOptions, backbone: Backbone, images: int, val: Features, begin: float) -> Measured:
    seconds = round(time.perf_counter() - begin, 1)
    return Measured(options.checkpoint, backbone.step, images, len(val), val.values.shape[1], seconds)
