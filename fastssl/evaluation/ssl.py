"""The losses that a method trains on, as measures of a checkpoint: their means over a data set.

Every image stands in its central view (shorter side resized, centre cropped) in all view groups of the method, with no
flip and no colour change, so that two checkpoints see the same pixels. What a method itself draws (masks, rotation,
damage) is a function of a fixed seed and the image's place in the data set.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastssl.augment import augment
from fastssl.batch import Batch
from fastssl.config import Config, Data, PositiveInt, Seed
from fastssl.evaluation.accuracy import format_table
from fastssl.evaluation.data import EvaluationError, default_resize
from fastssl.evaluation.options import Hardware, require
from fastssl.evaluation.record import recorded
from fastssl.loaders.engine import decoding_threads, open_loader
from fastssl.loaders.loader import Loader
from fastssl.loaders.sources import Source, open_source
from fastssl.loaders.views import central_batches
from fastssl.methods import view_list
from fastssl.methods.method import Method
from fastssl.progress import progress_bar
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


@recorded("ssl")
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
    values, batches = method_batches(
        saved,
        config,
        method,
        source,
        batch_size=options.batch_size,
        workers=decoding_threads(options.workers, 1),
        seed=options.seed,
    )
    sums: dict[str, Tensor] = {}
    bar = progress_bar(len(source), "losses")
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


def method_batches(
    saved: Checkpoint,
    config: Config,
    method: Method,
    source: Source,
    *,
    batch_size: int,
    workers: int,
    seed: int,
    drawn: bool = False,
) -> tuple[Values, Generator[Batch, None, None]]:
    """What a method is shown of some images, and the step at which it stands.

    Args:
        saved, config, method: as from `open_method`.
        seed: of the masks, and of what is drawn.
        drawn: crops and colours are drawn as in training, and the images are in any order; else every view group has
            the central view.

    Raises:
        EvaluationError: the method needs part maps, and there are none.
    """
    values = _values(saved, seed)
    part_grid = method.part_grid(config) or {}
    if part_grid and not source.has_parts:
        raise EvaluationError(
            f"method {config.method} needs part maps, and {source.path or 'a file of an image'} has none"
        )
    views = view_list(config.views)
    if drawn:
        loader = open_loader(
            source, views, Data(batch_size=batch_size, on_bad="raise"), seed=seed, rank=0, world=1, threads=workers,
            pin_memory=False, part_grid=part_grid, masks=method.masks(config),
        )  # fmt: skip
        return values, _once(loader, values.epoch)
    batches = central_batches(
        source,
        views,
        {view.name: default_resize(view.size) for view in views},
        batch_size=batch_size,
        workers=workers,
        part_grid=part_grid,
        masks=method.masks(config),
        seed=seed,
        schedule_epoch=values.epoch,
    )
    return values, batches


def _once(loader: Loader, schedule_epoch: int) -> Generator[Batch, None, None]:
    """The batches of epoch 0; the loader ends with them."""
    with contextlib.closing(loader), contextlib.closing(loader.epoch(0, schedule_epoch=schedule_epoch)) as stream:
        yield from stream


def _values(saved: Checkpoint, seed: int) -> Values:
    """The last step done: what a method schedules stands as it did there. An import counts as a finished run."""
    epochs = saved.config["schedule"]["epochs"]
    steps_per_epoch = saved.fingerprint.get("steps_per_epoch", 1)
    total = steps_per_epoch * epochs
    done = total if saved.kind == "import" else saved.step
    return Values(min(max(done - 1, 0), total - 1), total, steps_per_epoch, seed)
