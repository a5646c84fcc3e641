"""`evaluate linear`: from paths to the accuracy of a linear layer on frozen features.

Caron et al. 2021, section 4.1 and appendix F.2; He et al. 2022, appendix A.1. The training
of the layers: linear_probe.py.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, Literal

from fastssl.config import ConfigError, NonNegativeInt, PositiveFloat, PositiveInt, Seed
from fastssl.evaluation.accuracy import format_table
from fastssl.evaluation.data import open_labelled
from fastssl.evaluation.frozen.features import extract_cached
from fastssl.evaluation.frozen.linear_probe import (
    LRS,
    MAE_LRS,
    ProbeResult,
    check_numbers,
    linear_probe,
    linear_probe_augmented,
)
from fastssl.evaluation.frozen.opening import Measured, measured, open_network
from fastssl.evaluation.options import FrozenOptions
from fastssl.evaluation.record import recorded
from fastssl.evaluation.shared import check_shared
from fastssl.models.vit import ViT
from fastssl.training.device import choose_device
from fastssl.weights.backbone import Backbone

WIDE = 768  # from this width on DINO takes one block and the mean patch token


@dataclass
class LinearOptions(FrozenOptions):
    """Linear classification of frozen features."""

    protocol: Literal["dino", "mae"] = "dino"
    """dino: SGD. mae: a batch norm without gains before the layer, LARS, warm-up over a ninth of the epochs (in the
    paper 90 epochs, steps of 16384 images, drawn crops)."""
    lrs: tuple[PositiveFloat, ...] | None = None
    """Learning rates for a batch of 256, tried at once; the one that does best on a held-out tenth of data counts.
    None: 0.001 to 1 (dino) or 0.01 to 1 (mae)."""
    epochs: PositiveInt = 100
    """Passes over data."""
    step_size: PositiveInt = 1024
    """Images per optimizer step; the learning rate is multiplied by step_size / 256."""
    augment: bool = False
    """True: random crops and flips, drawn and put through the network anew in every epoch, as DINO does. False: the
    central crop goes through the network once."""
    blocks: NonNegativeInt = 0
    """Concatenate the class tokens of this many last blocks (ViT). 0: as DINO, 4 (all, if fewer), or 1 for a width of
    768 and more; as MAE, 1."""
    mean_patch: bool | None = None
    """Append the last block's mean patch token (ViT). None: as DINO, for a width of 768 and more; as MAE, no."""
    hidden: NonNegativeInt = 0
    """Units of a hidden layer (tanh) between the features and the linear layer, e.g. 1024. 0: none."""
    seed: Seed = 0
    """Seed of the first weights, the order, the crops and the held-out tenth."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.same_images:
            raise ConfigError(f"val is the same as data ({self.data}); name images that are not trained on")
        if self.lrs is None:
            self.lrs = LRS if self.protocol == "dino" else MAE_LRS
        check_numbers(self.lrs, self.epochs, self.step_size, self.hidden, self.protocol)


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


@recorded("linear")
def evaluate_linear(options: LinearOptions) -> LinearEvaluation:
    """Train a linear layer on the frozen features of a checkpoint's backbone and classify images with it.

    Source: Caron et al. 2021, section 4.1 and appendix F.2.
    """
    begin = time.perf_counter()
    train_source, val_source = open_labelled(options.data, options.val)
    check_shared(train_source, val_source, f"data ({options.data})", f"val ({options.val})", options.allow_shared)
    backbone, how = open_network(options)
    blocks, mean_patch = _as_dino(backbone) if options.protocol == "dino" else (1, False)
    how["blocks"] = options.blocks or blocks
    how["mean_patch"] = mean_patch if options.mean_patch is None else options.mean_patch
    training: dict[str, Any] = {
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
    return LinearEvaluation(measured(options, backbone, len(train_source), val, begin), result, options.hidden)


def _as_dino(backbone: Backbone) -> tuple[int, bool]:
    """(blocks, mean_patch) of the paper's linear layer: four class tokens, or one and the mean patch for wide ViTs."""
    if not isinstance(backbone.module, ViT):
        return 1, False
    return (1, True) if backbone.module.width >= WIDE else (min(4, backbone.module.num_blocks), False)
