"""The losses that a method trains on, as measures of a checkpoint: their means over a data set.

Every image stands in its central view (shorter side resized, centre cropped) in all view groups of the method, with no
flip and no colour change, so that two checkpoints see the same pixels. What a method itself draws (masks, rotation,
damage) is a function of a fixed seed and the image's place in the data set.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastssl.augment import augment
from fastssl.config import PositiveInt, Seed
from fastssl.evaluation.accuracy import format_table
from fastssl.evaluation.data import EvaluationError, default_resize
from fastssl.evaluation.options import Hardware, require
from fastssl.loaders.engine import decoding_threads
from fastssl.loaders.sources import open_source
from fastssl.loaders.views import central_batches
from fastssl.methods import view_list
from fastssl.step import Values
from fastssl.training import checkpoint
from fastssl.training.checkpoint import Checkpoint
from fastssl.training.device import choose_device, choose_dtype
from fastssl.weights.backbone import open_method

CHANCE = "_chance"  # a metric NAME_chance is the value of NAME when all images get the same output


@dataclass
class SSLOptions(Hardware):
    """Whose losses, and on which images."""

    checkpoint: str = ""
    """Checkpoint of a pretraining run, e.g. runs/sit/last.pt."""
    data: str = ""
    """Images, labelled or not: a .beton file, a glob of shards, or a folder."""
    batch_size: PositiveInt = 64
    """Images per forward pass; a contrastive loss depends on it. The last pass may be smaller."""
    seed: Seed = 0
    """Seed of masks, rotation and damage."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, checkpoint="a checkpoint", data="images")


@dataclass(frozen=True)
class SSLEvaluation:
    """Means over the images.

    Attributes:
        checkpoint, method: what was measured.
        step: optimizer steps of its run.
        images, batch_size: how many, and how many at a time.
        values: by name, `loss` first: each forward pass counts by its images.
        seconds: in all.
    """

    checkpoint: str
    method: str
    step: int
    images: int
    batch_size: int
    values: dict[str, float]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        rest = {key: value for key, value in vars(self).items() if key != "values"}
        return {**self.values, **rest}

    def table(self) -> str:
        rows = [("", "mean", "by chance")]
        for name, value in self.values.items():
            if not name.endswith(CHANCE):
                chance = self.values.get(name + CHANCE)
                rows.append((name, f"{value:.4f}", "" if chance is None else f"{chance:.4f}"))
        head = (
            f"{self.method}, {self.checkpoint} (step {self.step}): {self.images} images, {self.batch_size} at a time, "
            f"{self.seconds:.0f} s"
        )
        return f"{head}\n\n{format_table(rows)}"


def evaluate_ssl(options: SSLOptions) -> SSLEvaluation:
    """Mean of each of a method's own losses and metrics over the images of a data set.

    Raises:
        CheckpointError, SourceError: one of the two cannot be opened.
        EvaluationError: the checkpoint does not fit its method, or the method needs part maps that the data lacks.
        BadSampleError: an image cannot be read.
    """
    begin = time.perf_counter()
    device = choose_device(options.device, "device")
    dtype = choose_dtype(options.precision, device, "precision")
    saved = checkpoint.read(options.checkpoint, "pretrain", "import")
    source = open_source(options.data)
    config, method = open_method(saved)
    method = method.to(device)
    values = _values(saved, options.seed)
    part_grid = method.part_grid(config) or {}
    if part_grid and not source.has_parts:
        raise EvaluationError(f"method {config.method} needs part maps, and {options.data} has none")

    views = view_list(config.views)
    batches = central_batches(
        source,
        views,
        {view.name: default_resize(view.size) for view in views},
        batch_size=options.batch_size,
        workers=decoding_threads(options.workers, 1),
        part_grid=part_grid,
        masks=method.masks(config),
        seed=options.seed,
        schedule_epoch=values.epoch,
    )
    sums: dict[str, Tensor] = {}
    bar = tqdm(total=len(source), desc="losses", unit="img", leave=False)
    with torch.random.fork_rng(), torch.no_grad(), contextlib.closing(batches), bar:
        torch.manual_seed(options.seed)
        for batch in batches:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                out = method(augment(batch.to(device)), values)
            for name, value in {"loss": out.loss, **out.metrics}.items():
                sums[name] = sums.get(name, 0) + value.double() * len(batch)
            bar.update(len(batch))
    means = {name: value.item() / len(source) for name, value in sums.items()}
    seconds = round(time.perf_counter() - begin, 1)
    return SSLEvaluation(options.checkpoint, config.method, saved.step, len(source), options.batch_size, means, seconds)


def _values(saved: Checkpoint, seed: int) -> Values:
    """The last step done: what a method schedules stands as it did there. An import counts as a finished run."""
    epochs = saved.config["schedule"]["epochs"]
    steps_per_epoch = saved.fingerprint.get("steps_per_epoch", 1)
    total = steps_per_epoch * epochs
    done = total if saved.kind == "import" else saved.step
    return Values(min(max(done - 1, 0), total - 1), total, steps_per_epoch, seed)
