"""What a checkpoint is worth: the protocols that `fastssl evaluate` runs, from paths to numbers."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fastssl import distributed
from fastssl.checkpoint import Backbone
from fastssl.config import ConfigError, Model
from fastssl.device import choose_device, choose_dtype
from fastssl.evaluation import knn, probe
from fastssl.evaluation.accuracy import format_table
from fastssl.evaluation.features import Features, extract_cached, open_labelled, pixels
from fastssl.evaluation.knn import KNNResult, knn_classify
from fastssl.evaluation.probe import ProbeResult, linear_probe, linear_probe_augmented
from fastssl.libraries import open_backbone
from fastssl.loaders.engine import decoding_threads
from fastssl.models import VITS, build_backbone, check_image_size

HEADLINE_K = 20  # the k that papers quote
WIDE = 768  # from this width on DINO takes one block and the mean patch token


@dataclass
class EvaluateOptions:
    """What every protocol needs: a checkpoint, images, and how the images go through the network."""

    checkpoint: str = ""
    """Checkpoint of a pretraining run, e.g. runs/dino/last.pt."""
    data: str = ""
    """Labelled training images: a .beton file, a glob of shards, or a folder with one sub-folder per class."""
    val: str = ""
    """Labelled images to classify, same forms as data."""
    size: int = 0
    """Side of the images that the network sees, in pixels. 0: the checkpoint's."""
    resize: int = 0
    """The shorter side is resized to this before the central crop, in pixels. 0: size x 256/224, or size up to 64."""
    batch_size: int = 64
    """Images per forward pass."""
    workers: int = 0
    """Decoding threads. 0: this machine's cores."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Arithmetic of the network. auto: bf16 on a GPU that has it, fp16 on an older GPU, fp32 on the CPU."""

    def __post_init__(self) -> None:
        for key, what in (("checkpoint", "a checkpoint"), ("data", "labelled images"), ("val", "labelled images")):
            if not getattr(self, key):
                raise ConfigError(f"{key} is empty; name {what} with --{key}")
        for key in ("size", "resize", "workers"):
            if getattr(self, key) < 0:
                raise ConfigError(f"{key} is {getattr(self, key)}; it must be 0 (automatic) or more")
        if self.batch_size < 1:
            raise ConfigError(f"batch_size is {self.batch_size}; it must be 1 or more")

    @property
    def same_images(self) -> bool:
        """Whether data and val are one and the same."""
        return os.path.realpath(self.data) == os.path.realpath(self.val)


@dataclass
class FrozenOptions(EvaluateOptions):
    """What the protocols need that look at each image once, through a frozen network."""

    cache: str = "auto"
    """Folder in which features are kept for the next time, by weights, data and settings. auto: `features` beside the
    checkpoint; none: they are not kept."""

    @property
    def cache_folder(self) -> Path | None:
        """The folder of the kept features; None where they are not kept."""
        if self.cache != "auto":
            return None if self.cache == "none" else Path(self.cache)
        path = Path(self.checkpoint)
        return path.parent / "features" if path.is_file() else None


@dataclass
class KNNOptions(FrozenOptions):
    """Weighted k-NN on frozen features. With val the same as data, each image is classified by all the others."""

    ks: tuple[int, ...] = (10, 20, 100, 200)
    """Numbers of neighbours that vote; 20 (or the first one) gives the headline."""
    temperature: float = 0.07
    """A neighbour with cosine similarity s votes with weight exp(s / temperature)."""
    blocks: int = 1
    """Concatenate the class tokens of this many last blocks (ViT)."""
    mean_patch: bool | None = None
    """Append the last block's mean patch token (ViT). None: as the run's own monitor did (yes for MAE, no for DINO)."""
    baselines: bool = False
    """Also measure what pretraining has to beat: raw pixels (32 x 32), and the same network with random weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blocks < 1:
            raise ConfigError(f"blocks is {self.blocks}; it must be 1 or more")
        knn.check_numbers(self.ks, self.temperature)


@dataclass
class LinearOptions(FrozenOptions):
    """Linear classification of frozen features."""

    protocol: Literal["dino", "mae"] = "dino"
    """dino: SGD. mae: a batch norm without gains before the layer, LARS, warm-up over a ninth of the epochs (in the
    paper 90 epochs, steps of 16384 images, drawn crops)."""
    lrs: tuple[float, ...] | None = None
    """Learning rates for a batch of 256, tried at once; the one that does best on a held-out tenth of data counts.
    None: 0.001 to 1 (dino) or 0.01 to 1 (mae)."""
    epochs: int = 100
    """Passes over data."""
    step_size: int = 1024
    """Images per optimizer step; the learning rate is multiplied by step_size / 256."""
    augment: bool = False
    """True: random crops and flips, drawn and put through the network anew in every epoch, as DINO does. False: the
    central crop goes through the network once."""
    blocks: int = 0
    """Concatenate the class tokens of this many last blocks (ViT). 0: as DINO, 4 (all, if fewer), or 1 for a width of
    768 and more; as MAE, 1."""
    mean_patch: bool | None = None
    """Append the last block's mean patch token (ViT). None: as DINO, for a width of 768 and more; as MAE, no."""
    hidden: int = 0
    """Units of a hidden layer (tanh) between the features and the linear layer, e.g. 1024. 0: none."""
    seed: int = 0
    """Seed of the first weights, the order, the crops and the held-out tenth."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.blocks < 0:
            raise ConfigError(f"blocks is {self.blocks}; it must be 0 (as DINO) or more")
        if self.same_images:
            raise ConfigError(f"val is the same as data ({self.data}); name images that are not trained on")
        if self.lrs is None:
            self.lrs = probe.LRS if self.protocol == "dino" else probe.MAE_LRS
        probe.check_numbers(self.lrs, self.epochs, self.step_size, self.hidden, self.protocol)


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
        rows = [("neighbours", "top-1 %", "95 % interval", "top-5 %")]
        for k, result in self.results.items():
            voters = f"{k}" if result.neighbours == k else f"{k} (all {result.neighbours})"
            rows.append((voters, *result.cells()))
        lines = [f"k-NN, {self.measured.line()}", "", format_table(rows)]
        if self.baselines:
            others = [f"{top1:.1f} % with {name}" for name, top1 in self.baselines.items()]
            lines += ["", f"to compare, {self.k} neighbours: {', '.join(others)}"]
        return "\n".join(lines)


@dataclass(frozen=True)
class LinearEvaluation:
    """Accuracy of the chosen linear layer, behind a hidden layer of so many units (0: none)."""

    measured: Measured
    result: ProbeResult
    hidden: int = 0

    @property
    def top1(self) -> float:
        """In percent."""
        return self.result.top1

    def as_dict(self) -> dict[str, Any]:
        return {**self.result.as_dict(), "hidden": self.hidden, **vars(self.measured)}

    def table(self) -> str:
        result = self.result
        name = f"linear behind {self.hidden} hidden units" if self.hidden else "linear"
        rows = [("learning rate", "top-1 %", "95 % interval", "top-5 %"), (f"{result.lr:g}", *result.cells())]
        parts = [f"{name}, {self.measured.line()}", format_table(rows)]
        if result.held_out:
            tried = [(f"{lr:g}", f"{top1:.2f}") for lr, top1 in result.held_out.items()]
            parts.append(format_table([("learning rate", "top-1 % on the held-out tenth"), *tried]))
        if result.at_edge:
            parts.append("the chosen learning rate is the smallest or largest one tried; others in --lrs may do better")
        return "\n\n".join(parts)


def evaluate_knn(options: KNNOptions) -> KNNEvaluation:
    """Classify images by their nearest neighbours among the features of a checkpoint's backbone.

    Sources: Wu et al. 2018, section 3.4; Caron et al. 2021, section 4.1.
    """
    begin = time.perf_counter()
    train_source, val_source = open_labelled(options.data, options.val)
    backbone, how = _open(options)
    mean_patch = (
        backbone.config["monitor"].get("mean_patch", False) if options.mean_patch is None else options.mean_patch
    )
    how |= {"blocks": options.blocks, "mean_patch": mean_patch, "batch_size": options.batch_size}
    how |= {"cache": options.cache_folder, "shared": True}
    train = extract_cached(backbone.module, train_source, progress="features of data", **how)
    val = train
    if not options.same_images:
        val = extract_cached(backbone.module, val_source, progress="features of val", **how)
    voting = {
        "temperature": options.temperature,
        "device": choose_device(options.device, "device"),
        "leave_one_out": options.same_images,
    }
    results = knn_classify(train, val, options.ks, progress="k-NN", **voting)
    headline = HEADLINE_K if HEADLINE_K in results else options.ks[0]
    baselines = {}
    if options.baselines:
        with torch.random.fork_rng():
            torch.manual_seed(backbone.config["run"]["seed"])
            untrained = build_backbone(Model(**backbone.config["model"])).to(voting["device"])
        tables = {
            "pixels": [pixels(source, workers=options.workers) for source in (train_source, val_source)],
            "random": [extract_cached(untrained, source, **how) for source in (train_source, val_source)],
        }
        baselines = {name: knn_classify(*table, (headline,), **voting)[headline].top1 for name, table in tables.items()}
    return KNNEvaluation(_measured(options, backbone, len(train), val, begin), results, headline, baselines)


def evaluate_linear(options: LinearOptions) -> LinearEvaluation:
    """Train a linear layer on the frozen features of a checkpoint's backbone and classify images with it.

    Source: Caron et al. 2021, section 4.1 and appendix F.2.
    """
    begin = time.perf_counter()
    train_source, val_source = open_labelled(options.data, options.val)
    backbone, how = _open(options)
    blocks, mean_patch = _as_dino(backbone) if options.protocol == "dino" else (1, False)
    how["blocks"] = options.blocks or blocks
    how["mean_patch"] = mean_patch if options.mean_patch is None else options.mean_patch
    training = {
        "lrs": options.lrs,
        "epochs": options.epochs,
        "batch_size": options.step_size,
        "seed": options.seed,
        "progress": "linear layers",
        "hidden": options.hidden,
        "protocol": options.protocol,
    }
    batch = options.batch_size
    once = {**how, "cache": options.cache_folder, "batch_size": batch, "shared": True}
    val = extract_cached(backbone.module, val_source, progress="features of val", **once)
    if options.augment:
        result = linear_probe_augmented(backbone.module, train_source, val, forward_size=batch, **how, **training)
    else:
        train = extract_cached(backbone.module, train_source, progress="features of data", **once)
        result = linear_probe(train, val, device=choose_device(options.device, "device"), **training)
    return LinearEvaluation(_measured(options, backbone, len(train_source), val, begin), result, options.hidden)


def _open(options: EvaluateOptions) -> tuple[Backbone, dict[str, Any]]:
    """The backbone on its device, and how images go through it."""
    device = choose_device(options.device, "device")
    dtype = choose_dtype(options.precision, device, "precision")
    distributed.start(device)
    backbone = open_backbone(options.checkpoint, device)
    size = options.size or backbone.image_size
    check_image_size(Model(**backbone.config["model"]), "size", size)
    if 0 < options.resize < size:
        raise ConfigError(f"resize is {options.resize}; it must be 0 (automatic) or at least size, {size}")
    workers = decoding_threads(options.workers, distributed.local_world())
    return backbone, {"size": size, "resize": options.resize, "workers": workers, "dtype": dtype}


def _as_dino(backbone: Backbone) -> tuple[int, bool]:
    """(blocks, mean_patch) of the paper's linear layer: four class tokens, or one and the mean patch for wide ViTs."""
    if backbone.config["model"]["name"] not in VITS:
        return 1, False
    return (1, True) if backbone.module.width >= WIDE else (min(4, backbone.module.num_blocks), False)


def _measured(options: EvaluateOptions, backbone: Backbone, images: int, val: Features, begin: float) -> Measured:
    seconds = round(time.perf_counter() - begin, 1)
    return Measured(options.checkpoint, backbone.step, images, len(val), val.values.shape[1], seconds)
