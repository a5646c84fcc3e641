"""Online k-NN: while a run goes on, its backbone classifies validation images by their nearest training images."""

from __future__ import annotations

import os
from functools import partial

import torch
from torch import nn

from fastssl.config import Config, ConfigError
from fastssl.evaluation.data import open_labelled, spaced_ids
from fastssl.evaluation.frozen.features import extract
from fastssl.evaluation.frozen.knn_vote import knn_classify

BUDGET = 64 * 2**20  # bytes for similarities: less than the activations that a training step has just given back


class KNNMonitor:
    """Measures k-NN top-1 on evenly spaced parts of data.path and data.val; made once, before training starts.

    Measuring leaves the backbone's weights and modes and the random generators as they were. It needs no more device
    memory than a training step, and on the host two tables with a feature per image.

    Args:
        config: reads data, model.image_size and monitor.
        device: where the run computes.
        dtype: of autocast; float32 switches it off.
        workers: decoding threads.

    Raises:
        ConfigError: data.val is empty.
        SourceError: data.val cannot be opened.
        EvaluationError: data.path or data.val has no labels, or their classes differ.
    """

    def __init__(self, config: Config, *, device: torch.device, dtype: torch.dtype, workers: int) -> None:
        path, val = config.data.path, config.data.val
        if not val:
            raise ConfigError(
                f"monitor.every is {config.monitor.every}, but data.val is empty; "
                "name labelled validation images there, or set monitor.every=0"
            )
        self.train, self.val = open_labelled(path, val, "data.path", "data.val")
        self.train_ids = spaced_ids(len(self.train), config.monitor.train_images)
        self.val_ids = spaced_ids(len(self.val), config.monitor.val_images)
        self.k, self.size, self.batch_size = config.monitor.k, config.model.image_size, config.data.batch_size
        self.same_images = os.path.realpath(path) == os.path.realpath(val)
        self.mean_patch = config.monitor.mean_patch
        self.device, self.dtype, self.workers = device, dtype, workers

    def measure(self, backbone: nn.Module) -> float:
        """Top-1 accuracy of `backbone`, in percent."""
        features = partial(
            extract,
            backbone,
            size=self.size,
            batch_size=self.batch_size,
            workers=self.workers,
            dtype=self.dtype,
            mean_patch=self.mean_patch,
        )
        train = features(self.train, ids=self.train_ids, progress="k-NN: memory")
        val = features(self.val, ids=self.val_ids, progress="k-NN: queries")
        results = knn_classify(train, val, (self.k,), device=self.device, budget=BUDGET, leave_one_out=self.same_images)
        return results[self.k].top1
