"""`evaluate knn`: from paths to accuracies by number of neighbours.

Wu et al. 2018, section 3.4; Caron et al. 2021, section 4.1. The voting itself: knn_vote.py.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fastssl.config import PositiveFloat, PositiveInt
from fastssl.evaluation.accuracy import format_table
from fastssl.evaluation.data import open_labelled
from fastssl.evaluation.frozen.features import extract_cached, pixels
from fastssl.evaluation.frozen.knn_vote import KNNResult, check_numbers, knn_classify
from fastssl.evaluation.frozen.opening import Measured, measured, open_network
from fastssl.evaluation.options import FrozenOptions
from fastssl.evaluation.record import recorded
from fastssl.evaluation.shared import check_shared
from fastssl.models import build_backbone
from fastssl.training.device import choose_device

HEADLINE_K = 20  # the k that papers quote


@dataclass
class KNNOptions(FrozenOptions):
    """Weighted k-NN on frozen features. With val the same as data, each image is classified by all the others."""

    ks: tuple[PositiveInt, ...] = (10, 20, 100, 200)
    """Numbers of neighbours that vote; 20 (or the first one) gives the headline."""
    temperature: PositiveFloat = 0.07
    """A neighbour with cosine similarity s votes with weight exp(s / temperature)."""
    blocks: PositiveInt = 1
    """Concatenate the class tokens of this many last blocks (ViT)."""
    mean_patch: bool | None = None
    """Append the last block's mean patch token (ViT). None: as the run's own monitor did (yes for MAE, no for DINO)."""
    baselines: bool = False
    """Also measure what pretraining has to beat: raw pixels (32 x 32), and the same network with random weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_numbers(self.ks, self.temperature)


@dataclass(frozen=True)
class KNNEvaluation:
    """Accuracies by number of neighbours; `k` is the one that gives the headline.

    `baselines` has the top-1 accuracy, in percent, of `pixels` and `random` weights with `k` neighbours, if asked for.
    """

    measured: Measured
    results: dict[int, KNNResult]
    k: int
    baselines: dict[str, float]

    @property
    def top1(self) -> float:
        """Headline, in percent."""
        return self.results[self.k].top1

    def as_dict(self) -> dict[str, Any]:
        by_k = {str(k): result.as_dict() for k, result in self.results.items()}
        baselines = {f"top1_{name}": top1 for name, top1 in self.baselines.items()}
        return {"k": self.k, **self.results[self.k].as_dict(), **baselines, "ks": by_k, **vars(self.measured)}

    def table(self) -> str:
        rows: list[tuple[str, ...]] = [("neighbours", "top-1 %", "95 % interval", "top-5 %")]
        for k, result in self.results.items():
            voters = f"{k}" if result.neighbours == k else f"{k} (all {result.neighbours})"
            rows.append((voters, *result.cells()))
        lines = [f"k-NN, {self.measured.line()}", "", format_table(rows)]
        if self.baselines:
            others = [f"{top1:.1f} % with {name}" for name, top1 in self.baselines.items()]
            lines += ["", f"to compare, {self.k} neighbours: {', '.join(others)}"]
        return "\n".join(lines)


@recorded("knn")
def evaluate_knn(options: KNNOptions) -> KNNEvaluation:
    """Classify images by their nearest neighbours among the features of a checkpoint's backbone.

    Sources: Wu et al. 2018, section 3.4; Caron et al. 2021, section 4.1.
    """
    begin = time.perf_counter()
    train_source, val_source = open_labelled(options.data, options.val)
    if not options.same_images:
        check_shared(train_source, val_source, f"data ({options.data})", f"val ({options.val})", options.allow_shared)
    backbone, how = open_network(options)
    mean_patch = backbone.mean_patch if options.mean_patch is None else options.mean_patch
    how |= {"blocks": options.blocks, "mean_patch": mean_patch, "batch_size": options.batch_size}
    how |= {"cache": options.cache_folder, "shared": True}
    train = extract_cached(backbone.module, train_source, progress="features of data", **how)
    val = train
    if not options.same_images:
        val = extract_cached(backbone.module, val_source, progress="features of val", **how)
    device = choose_device(options.device, "device")
    vote = partial(knn_classify, temperature=options.temperature, device=device, leave_one_out=options.same_images)
    results = vote(train, val, options.ks, progress="k-NN")
    headline = HEADLINE_K if HEADLINE_K in results else options.ks[0]
    baselines = {}
    if options.baselines:
        with torch.random.fork_rng():
            torch.manual_seed(backbone.seed)
            untrained = build_backbone(backbone.model).to(device)
        tables = {
            "pixels": [pixels(source, workers=options.workers) for source in (train_source, val_source)],
            "random": [extract_cached(untrained, source, **how) for source in (train_source, val_source)],
        }
        for name, (memory, queries) in tables.items():
            baselines[name] = vote(memory, queries, (headline,))[headline].top1
    return KNNEvaluation(measured(options, backbone, len(train), val, begin), results, headline, baselines)
