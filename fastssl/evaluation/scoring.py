"""Classifiers judged on a data set that the processes share: every image counts once, on any number of processes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fastssl.augment import augment
from fastssl.evaluation.accuracy import Accuracy, class_ranks
from fastssl.evaluation.data import default_resize
from fastssl.loaders.engine import decoding_threads
from fastssl.loaders.sources import Source
from fastssl.loaders.views import evaluation_batches
from fastssl.progress import progress_bar
from fastssl.training import distributed


@dataclass(frozen=True)
class Scored(Accuracy):
    """Accuracy of a classifier.

    Attributes:
        loss: mean cross-entropy in nats; infinite where a score is NaN.
    """

    loss: float

    def as_dict(self) -> dict[str, Any]:
        return {**super().as_dict(), "loss": self.loss if math.isfinite(self.loss) else None}

    def cells(self) -> tuple[str, ...]:
        """Top-1, its interval, top-5 and the loss as text for a table."""
        return *super().cells(), f"{self.loss:.4f}"


@torch.no_grad()
def score(
    classify: Callable[[Tensor], Tensor],
    source: Source,
    *,
    size: int,
    resize: int = 0,
    classifiers: int = 1,
    batch_size: int = 64,
    workers: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    ids: np.ndarray | None = None,
    progress: str = "",
    interpolation: str = "bicubic",
) -> list[Scored]:
    """Judges R classifiers on the evaluation views (resized, centre cropped) of a labelled data set.

    The batches are the same for any number of processes; each process takes every world-th of them.

    Args:
        classify: images float [B, 3, size, size] on the device -> scores [R, B, C].
        source: the images; labels from 0 to C - 1.
        size, resize, interpolation, workers: as in `features.extract`.
        classifiers: R.
        batch_size: images per call of `classify`; the last batch may be smaller.
        device: where the images go.
        dtype: of autocast; float32 switches autocast off.
        ids: int64 [n], positions of the images to judge, in this order; None takes all.
        progress: label of the progress bar; empty shows none.

    Returns:
        One result for each of the R classifiers, the same on every process.
    """
    device = torch.device(device)
    ids = np.arange(len(source)) if ids is None else ids
    share = [ids[begin : begin + batch_size] for begin in range(0, len(ids), batch_size)]
    share = share[distributed.rank() :: distributed.world()]
    mine = np.concatenate(share) if share else ids[:0]
    batches = evaluation_batches(
        source,
        size=size,
        resize=resize or default_resize(size),
        batch_size=batch_size,
        workers=decoding_threads(workers, distributed.local_world()),
        ids=mine,
        interpolation=interpolation,
    )
    bar = progress_bar(len(mine), progress if distributed.is_main() else "")
    sums = torch.zeros(3, classifiers, dtype=torch.float64, device=device)  # right, right among five, nats
    with contextlib.closing(batches), bar:
        for batch in batches:
            images, labels = augment(batch.to(device)).views["eval"][:, 0], batch.label.to(device)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                scores = classify(images).float()  # [R, B, C]
            for column, rows in enumerate(scores):
                ranks = class_ranks(rows, labels)
                nats = cross_entropy(rows, labels, reduction="none").double()
                sums[:, column] += torch.stack([(ranks == 0).sum(), (ranks < 5).sum(), nats.sum()])
            bar.update(len(labels))
    sums = distributed.all_reduce_sum(sums).cpu() / len(ids)
    losses = [loss if math.isfinite(loss) else math.inf for loss in sums[2].tolist()]
    return [
        Scored(100.0 * first, 100.0 * five, len(ids), loss)
        for first, five, loss in zip(*sums[:2].tolist(), losses, strict=True)
    ]
