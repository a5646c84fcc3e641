"""What a checkpoint is worth: the protocols that `fastssl evaluate` runs, from paths to numbers."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fastssl.checkpoint import Backbone, load_backbone
from fastssl.config import ConfigError, Model
from fastssl.device import choose_device, choose_dtype
from fastssl.evaluation import knn, probe
from fastssl.evaluation.accuracy import format_table
from fastssl.evaluation.features import default_resize, extract, open_labelled
from fastssl.evaluation.knn import KNNResult, knn_classify
from fastssl.evaluation.probe import LRS, ProbeResult, linear_probe, linear_probe_augmented
from fastssl.models import VITS, check_image_size

HEADLINE_K = 20  # the k that papers quote


@dataclass
class KNNOptions:
    """Weighted k-NN on frozen features (Wu et al. 2018; Caron et al. 2021)."""

    checkpoint: str = ""
    """Checkpoint of a pretraining run, e.g. runs/dino/last.pt."""
    data: str = ""
    """Labelled images whose features vote: a .beton file, a glob of shards, or a folder with one sub-folder per class."""
    val: str = ""
    """Labelled images to classify, same forms as data. The same as data: each image is classified by all the others."""
    ks: tuple[int, ...] = (10, 20, 100, 200)
    """Numbers of neighbours that vote; 20 (or the first one) gives the headline."""
    temperature: float = 0.07
    """A neighbour with cosine similarity s votes with weight exp(s / temperature)."""
    size: int = 0
    """Side of the images that the network sees, in pixels. 0: the checkpoint's."""
    resize: int = 0
    """Side to which the shorter side is resized before the central crop, in pixels. 0: 256/224 of size, or size up to 64."""
    blocks: int = 1
    """Concatenate the class tokens of this many last blocks (ViT)."""
    mean_patch: bool = False
    """Append the last block's mean patch token (ViT)."""
    batch_size: int = 64
    """Images per forward pass."""
    workers: int = 0
    """Decoding threads. 0: this machine's cores."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Arithmetic of the network. auto: bf16 on a GPU that has it, fp16 on an older GPU, fp32 on the CPU."""

    def __post_init__(self) -> None:
        _check_common(self)
        if self.blocks < 1:
            raise ConfigError(f"blocks is {self.blocks}; it must be 1 or more")
        knn.check_numbers(self.ks, self.temperature)


@dataclass
class LinearOptions:
    """Linear classification of frozen features (Caron et al. 2021)."""

    checkpoint: str = ""
    """Checkpoint of a pretraining run, e.g. runs/dino/last.pt."""
    data: str = ""
    """Labelled training images: a .beton file, a glob of shards, or a folder with one sub-folder per class."""
    val: str = ""
    """Labelled images to classify, same forms as data, other images."""
    lrs: tuple[float, ...] = LRS
    """Learning rates for a batch of 256, all tried at once; the one that does best on a held-out tenth of data counts."""
    epochs: int = 100
    """Passes over data."""
    step_size: int = 1024
    """Images per optimizer step; the learning rate is multiplied by step_size / 256."""
    augment: bool = False
    """Draw random crops and flips in every epoch, as DINO does: each epoch then takes a pass through the network. Without,
    the central crop goes through the network once."""
    size: int = 0
    """Side of the images that the network sees, in pixels. 0: the checkpoint's."""
    resize: int = 0
    """Side to which the shorter side is resized before the central crop, in pixels. 0: 256/224 of size, or size up to 64."""
    blocks: int = 0
    """Concatenate the class tokens of this many last blocks (ViT). 0: 4, or 1 for a width of 768 and more, as DINO does."""
    mean_patch: bool | None = None
    """Append the last block's mean patch token (ViT). None: for a width of 768 and more, as DINO does."""
    batch_size: int = 64
    """Images per forward pass."""
    workers: int = 0
    """Decoding threads. 0: this machine's cores."""
    seed: int = 0
    """Seed of the first weights, of the order, the crops and the held-out tenth."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Arithmetic of the network (the linear layer is always fp32). auto: bf16 on a GPU that has it, fp16 on an older GPU,
    fp32 on the CPU."""

    def __post_init__(self) -> None:
        _check_common(self)
        if self.blocks < 0:
            raise ConfigError(f"blocks is {self.blocks}; it must be 0 (DINO's choice) or more")
        if os.path.realpath(self.data) == os.path.realpath(self.val):
            raise ConfigError(f"val is the same as data ({self.data}); name images that are not trained on")
        probe.check_numbers(self.lrs, self.epochs, self.step_size)


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
            f"{self.checkpoint} (step {self.step}): {self.train_images} training and {self.val_images} validation images, "
            f"{self.width} numbers per feature, {self.seconds:.0f} s"
        )


@dataclass(frozen=True)
class KNNEvaluation:
    """Results by k. `top1` is that of k = 20 if it was asked for, else of the first k."""

    measured: Measured
    results: dict[int, KNNResult]
    k: int

    @property
    def top1(self) -> float:
        return self.results[self.k].top1

    def as_dict(self) -> dict[str, Any]:
        by_k = {str(k): result.as_dict() for k, result in self.results.items()}
        return {"k": self.k, **self.results[self.k].as_dict(), "ks": by_k, **vars(self.measured)}

    def table(self) -> str:
        rows = [("k", "top-1 %", "95 % interval", "top-5 %")]
        for k, result in self.results.items():
            low, high = result.interval
            voters = f"{k}" if result.neighbours == k else f"{k} (all {result.neighbours})"
            rows.append((voters, f"{result.top1:.2f}", f"{low:.2f} to {high:.2f}", f"{result.top5:.2f}"))
        return f"k-NN, {self.measured.line()}\n\n{format_table(rows)}"


@dataclass(frozen=True)
class LinearEvaluation:
    """The chosen linear layer's result."""

    measured: Measured
    result: ProbeResult

    @property
    def top1(self) -> float:
        return self.result.top1

    def as_dict(self) -> dict[str, Any]:
        return {**self.result.as_dict(), **vars(self.measured)}

    def table(self) -> str:
        result, (low, high) = self.result, self.result.interval
        rows = [("lr", "top-1 %", "95 % interval", "top-5 %")]
        rows.append((f"{result.lr:g}", f"{result.top1:.2f}", f"{low:.2f} to {high:.2f}", f"{result.top5:.2f}"))
        text = f"linear, {self.measured.line()}\n\n{format_table(rows)}"
        if result.held_out:
            tried = [("lr", "held-out top-1 %"), *((f"{lr:g}", f"{top1:.2f}") for lr, top1 in result.held_out.items())]
            text += f"\n\nchosen among:\n{format_table(tried)}"
        if result.at_edge:
            text += "\nthe best learning rate is at the edge of those tried; --lrs with a wider range may do better"
        return text


def evaluate_knn(options: KNNOptions) -> KNNEvaluation:
    """Classify images by their nearest neighbours among the features of a checkpoint's backbone."""
    begin = time.perf_counter()
    train_source, val_source = open_labelled(options.data, options.val)
    backbone, dtype, size = _open(options)
    how = {
        "size": size,
        "resize": options.resize,
        "batch_size": options.batch_size,
        "workers": options.workers,
        "dtype": dtype,
        "blocks": options.blocks,
        "mean_patch": options.mean_patch,
    }
    same = os.path.realpath(options.data) == os.path.realpath(options.val)
    train = extract(backbone.module, train_source, progress="features of data", **how)
    val = train if same else extract(backbone.module, val_source, progress="features of val", **how)
    results = knn_classify(
        train,
        val,
        options.ks,
        temperature=options.temperature,
        device=choose_device(options.device, "device"),
        leave_one_out=same,
        progress="k-NN",
    )
    measured = _measured(options, backbone, len(train), val, begin)
    return KNNEvaluation(measured, results, HEADLINE_K if HEADLINE_K in results else options.ks[0])


def evaluate_linear(options: LinearOptions) -> LinearEvaluation:
    """Train a linear layer on the frozen features of a checkpoint's backbone and classify with it."""
    begin = time.perf_counter()
    train_source, val_source = open_labelled(options.data, options.val)
    backbone, dtype, size = _open(options)
    blocks, mean_patch = _dino_choice(backbone, options.blocks, options.mean_patch)
    how = {
        "size": size,
        "resize": options.resize,
        "workers": options.workers,
        "dtype": dtype,
        "blocks": blocks,
        "mean_patch": mean_patch,
    }
    training = {
        "lrs": options.lrs,
        "epochs": options.epochs,
        "batch_size": options.step_size,
        "seed": options.seed,
        "progress": "linear layers",
    }
    batch_size = options.batch_size
    val = extract(backbone.module, val_source, batch_size=batch_size, progress="features of val", **how)
    if options.augment:
        result = linear_probe_augmented(backbone.module, train_source, val, forward_size=batch_size, **how, **training)
    else:
        train = extract(backbone.module, train_source, batch_size=batch_size, progress="features of data", **how)
        result = linear_probe(train, val, device=choose_device(options.device, "device"), **training)
    return LinearEvaluation(_measured(options, backbone, len(train_source), val, begin), result)


def _check_common(options: KNNOptions | LinearOptions) -> None:
    for key, what in (("checkpoint", "a checkpoint"), ("data", "labelled images"), ("val", "labelled images")):
        if not getattr(options, key):
            raise ConfigError(f"{key} is empty; name {what} with --{key}")
    for key in ("size", "resize", "workers"):
        if getattr(options, key) < 0:
            raise ConfigError(f"{key} is {getattr(options, key)}; it must be 0 (automatic) or more")
    if options.batch_size < 1:
        raise ConfigError(f"batch_size is {options.batch_size}; it must be 1 or more")


def _open(options: KNNOptions | LinearOptions) -> tuple[Backbone, torch.dtype, int]:
    """The backbone on its device, the dtype of autocast, and the side of the images in pixels."""
    device = choose_device(options.device, "device")
    dtype = choose_dtype(options.precision, device, "precision")
    backbone = load_backbone(options.checkpoint, device)
    size = options.size or backbone.image_size
    check_image_size(Model(**backbone.config["model"]), "size", size)
    if options.resize and options.resize < size:
        raise ConfigError(
            f"resize is {options.resize}; it must be at least size, {size}, or 0 ({default_resize(size)})"
        )
    return backbone, dtype, size


def _dino_choice(backbone: Backbone, blocks: int, mean_patch: bool | None) -> tuple[int, bool]:
    """Caron et al. 2021, appendix F.2: four class tokens for small ViTs, one and the mean patch for wide ones."""
    vit = backbone.config["model"]["name"] in VITS
    wide = backbone.module.width >= 768
    return blocks or (4 if vit and not wide else 1), (vit and wide) if mean_patch is None else mean_patch


def _measured(
    options: KNNOptions | LinearOptions, backbone: Backbone, train_images: int, val, begin: float
) -> Measured:
    width, seconds = val.values.shape[1], round(time.perf_counter() - begin, 1)
    return Measured(options.checkpoint, backbone.step, train_images, len(val), width, seconds)
