"""Online k-NN: while a run goes on, its backbone classifies validation images by their nearest training images."""

from __future__ import annotations

import os
import sys
from functools import partial

import numpy as np
import torch
from torch import nn

from fastssl.config import Config
from fastssl.evaluation.data import open_labelled, spaced_ids
from fastssl.evaluation.frozen.features import extract
from fastssl.evaluation.frozen.knn_vote import knn_classify
from fastssl.evaluation.shared import shared_sentence
from fastssl.loaders.sources import Source
from fastssl.training import distributed

BUDGET = 64 * 2**20  # bytes for similarities: less than the activations that a training step has just given back


def why_off(config: Config, source: Source) -> str:
    """Why nothing can be measured although monitor.every asks for it; empty where it can, or where nothing is asked."""
    if config.monitor.every and not config.data.val:
        return "data.val names no labelled images"
    if config.monitor.every and (np.asarray(source.labels) < 0).all():
        return f"{config.data.path} has no labels"
    return ""


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
        SourceError: data.val cannot be opened.
        EvaluationError: data.path or data.val has no labels, or their classes differ.
    """

    def __init__(self, config: Config, *, device: torch.device, dtype: torch.dtype, workers: int) -> None:
        path, val = config.data.path, config.data.val
        self.train, self.val = open_labelled(path, val, "data.path", "data.val")
        self.same_images = os.path.realpath(path) == os.path.realpath(val)
        if not self.same_images:
            sentence = shared_sentence(self.train, self.val, f"data.path ({path})", f"data.val ({val})")
            if sentence and distributed.is_main():
                print(f"monitor: {sentence}; its k-NN accuracy will be too good", file=sys.stderr)
        self.train_ids = spaced_ids(len(self.train), config.monitor.train_images)
        self.val_ids = spaced_ids(len(self.val), config.monitor.val_images)
        self.k, self.size, self.batch_size = config.monitor.k, config.model.image_size, config.data.batch_size
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
        shown = distributed.is_main()  # where the network is sharded, every process has to measure
        train = features(self.train, ids=self.train_ids, progress="k-NN: memory" if shown else "")
        val = features(self.val, ids=self.val_ids, progress="k-NN: queries" if shown else "")
        results = knn_classify(train, val, (self.k,), device=self.device, budget=BUDGET, leave_one_out=self.same_images)
        return results[self.k].top1
