"""A network that gives every pixel a class, how it looks at images of any size, and how its answers are judged.

Letters: B images, K classes, H x W pixels of an image, h x w positions of a map, S side of a window.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastssl.config import ConfigError
from fastssl.evaluation.data import EvaluationError
from fastssl.evaluation.tuned.label_maps import IGNORED
from fastssl.models.pyramid import Pyramid

AUXILIARY_WIDTH = 256
AUXILIARY_LEVEL = 2
HEAD_STD = 0.01
CLASSES_AT_ONCE = 16  # whose scores are enlarged together
RESAMPLES = 1000  # of the bootstrap
WINDOWS_AT_ONCE = 8


class Segmenter(nn.Module):
    """UPerNet (Xiao et al. 2018, arXiv 1807.10221) on a pyramid, as in CAE (Chen et al. 2022, arXiv 2202.03026).

    The decoder is segmentation_models_pytorch's: it has a layer norm on every level that CAE's lacks. A small fully
    convolutional head on level 2 (3x3 convolution to 256 channels) helps in training alone.

    Args:
        pyramid: trained with the rest.
        classes: K.
        width: channels of the decoder.
        dropout: probability that a channel is left out before the last convolution of either head.
        auxiliary: whether there is the small head.
    """

    def __init__(
        self, pyramid: Pyramid, classes: int, width: int, dropout: float = 0.1, auxiliary: bool = True
    ) -> None:
        super().__init__()
        self.pyramid = pyramid
        # The decoder leaves out the two finest of six levels.
        decoder = _library("segmentation_models_pytorch", "segmentation-models-pytorch").decoders.upernet.decoder
        self.decoder = decoder.UPerNetDecoder([0, 0, *pyramid.channels], decoder_channels=width)
        self.head = nn.Sequential(nn.Dropout2d(dropout), nn.Conv2d(width, classes, 1))
        self.auxiliary = None
        if auxiliary:
            self.auxiliary = nn.Sequential(
                nn.Conv2d(pyramid.channels[AUXILIARY_LEVEL], AUXILIARY_WIDTH, 3, padding=1, bias=False),
                nn.BatchNorm2d(AUXILIARY_WIDTH),
                nn.ReLU(),
                nn.Dropout2d(dropout),
                nn.Conv2d(AUXILIARY_WIDTH, classes, 1),
            )
        for part in (self.decoder, self.head, self.auxiliary):
            for module in part.modules() if part is not None else ():
                if isinstance(module, nn.Conv2d) and module.bias is not None:
                    nn.init.normal_(module.weight, std=HEAD_STD)
                    nn.init.zeros_(module.bias)
                elif isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Normalised images [B, 3, H, W] -> scores [B, K, h, w] at level 0, and in training the small head's."""
        maps = self.pyramid(images)
        small = self.auxiliary(maps[AUXILIARY_LEVEL]) if self.training and self.auxiliary is not None else None
        return self.head(self.decoder([None, None, *maps])), small


def _library(name: str, distribution: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(f"evaluate segment needs {distribution}: pip install 'fastssl-vision[eval]'") from None


def pixel_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in nats per pixel, of scores enlarged (bilinear) to the labels' size, in float32.

    The sum goes over the pixels that count, the mean over all: an image with many ignored pixels weighs less.

    Args:
        scores: [B, K, h, w].
        labels: int64 [B, H, W], IGNORED where a pixel does not count.
    """
    scores = F.interpolate(scores.float(), size=labels.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(scores, labels, ignore_index=IGNORED, reduction="sum") / labels.numel()


# -- images of any size ------------------------------------------------------------------------------------------------


def window_starts(length: int, side: int, stride: int) -> list[int]:
    """Where windows of `side` pixels begin on an axis of `length` pixels: every `stride`, the last one moved inside."""
    count = max(length - side + stride - 1, 0) // stride + 1
    return [max(min(i * stride, length - side), 0) for i in range(count)]


def slide(look: Callable[[Tensor], Tensor], image: Tensor, side: int, stride: int) -> Tensor:
    """Scores of an image from windows that overlap: the mean of all windows that see a pixel.

    Args:
        look: windows [n, 3, S, S] -> scores [n, K, h, w], which are enlarged (bilinear) to S x S.
        image: [3, H, W]; with a side below S it is filled up with 0 on the right and below.
        side: S.
        stride: pixels from one window to the next.

    Returns:
        float32 [K, H, W].
    """
    height, width = image.shape[1:]
    image = F.pad(image, (0, max(side - width, 0), 0, max(side - height, 0)))
    corners = [
        (top, left)
        for top in window_starts(image.shape[1], side, stride)
        for left in window_starts(image.shape[2], side, stride)
    ]
    total = times = torch.zeros(image.shape[1:], device=image.device)
    for begin in range(0, len(corners), WINDOWS_AT_ONCE):
        group = corners[begin : begin + WINDOWS_AT_ONCE]
        windows = torch.stack([image[:, top : top + side, left : left + side] for top, left in group])
        scores = F.interpolate(look(windows).float(), size=(side, side), mode="bilinear", align_corners=False)
        if begin == 0:
            total = scores.new_zeros(scores.shape[1], *image.shape[1:])
        for (top, left), score in zip(group, scores, strict=True):
            total[:, top : top + side, left : left + side] += score
            times[top : top + side, left : left + side] += 1
    return (total / times)[:, :height, :width]


def whole(look: Callable[[Tensor], Tensor], image: Tensor, multiple: int) -> Tensor:
    """Scores of an image that is looked at in one piece, float32 [K, H, W].

    Args:
        look: images [1, 3, H', W'] -> scores [1, K, h, w], which are enlarged (bilinear) to H' x W'.
        image: [3, H, W]; filled up with 0 on the right and below to sides that `multiple` divides.
    """
    height, width = image.shape[1:]
    image = F.pad(image, (0, -width % multiple, 0, -height % multiple))
    scores = F.interpolate(look(image[None]).float(), size=image.shape[1:], mode="bilinear", align_corners=False)
    return scores[0, :, :height, :width]


def best_classes(scores: Tensor, height: int, width: int) -> Tensor:
    """The class with the highest score at each pixel, int64 [height, width], of scores [K, h, w] enlarged (bilinear).

    Only a few classes are enlarged at a time: all scores of a large image may not fit in memory.
    """
    best = torch.full((height, width), -math.inf, device=scores.device)
    classes = torch.zeros(height, width, dtype=torch.int64, device=scores.device)
    for begin in range(0, len(scores), CLASSES_AT_ONCE):
        part = scores[None, begin : begin + CLASSES_AT_ONCE]
        value, index = F.interpolate(part, size=(height, width), mode="bilinear", align_corners=False)[0].max(0)
        better = value > best
        best = torch.where(better, value, best)
        classes = torch.where(better, index + begin, classes)
    return classes


# -- the numbers -------------------------------------------------------------------------------------------------------


def image_counts(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """What an image adds to the numbers, int64 [3, K]: pixels right, pixels of the class, pixels called the class.

    Args:
        predicted: int64 [H, W], 0 to K - 1.
        labels: int64 [H, W], 0 to K - 1, or IGNORED: then the pixel counts nowhere.
        classes: K.
    """
    metrics = _library("torchmetrics", "torchmetrics").functional.classification
    matrix = metrics.multiclass_confusion_matrix(
        predicted, labels, num_classes=classes, ignore_index=IGNORED, validate_args=False
    )  # [true, predicted]
    return torch.stack([matrix.diagonal(), matrix.sum(1), matrix.sum(0)])


@dataclass(frozen=True)
class Overlap:
    """How well classes overlap with the truth, in percent, over all pixels of a set.

    Attributes:
        miou: mean over classes of intersection / union: the headline.
        interval: 95 % interval of miou, from resampling the images (bootstrap).
        macc: mean over classes of the share of its pixels that are right.
        aacc: share of all pixels that are right.
        constant: miou of the best answer that is the same everywhere.
        iou, acc: of each class; None where the set has no such pixel, true (or called so, for iou). Such a class is
            left out of the means.
        images: how many.
    """

    miou: float
    interval: tuple[float, float]
    macc: float
    aacc: float
    constant: float
    iou: list[float | None]
    acc: list[float | None]
    images: int


def overlap(counts: Tensor, seed: int = 0) -> Overlap:
    """The numbers from `image_counts` of every image, int64 [n, 3, K]; `seed` draws the bootstrap's samples.

    Raises:
        EvaluationError: no pixel of the set counts.
    """
    right, true, called = counts.sum(0).double()
    if not true.any():
        raise EvaluationError(f"no pixel of the {len(counts)} label pictures counts; all are ignored")
    iou, acc = _share(right, true + called - right), _share(right, true)
    generator = torch.Generator().manual_seed(seed)
    table = counts.flatten(1).double()
    drawn = torch.randint(len(counts), (RESAMPLES, len(counts)), generator=generator)
    times = torch.zeros(RESAMPLES, len(counts), dtype=torch.float64)
    times.scatter_add_(1, drawn, torch.ones_like(times))
    again = (times @ table).unflatten(1, counts.shape[1:])  # [R, 3, K]
    means = _share(again[:, 0], again[:, 1] + again[:, 2] - again[:, 0]).nanmean(1)
    low, high = (100 * torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64))).tolist()
    everything = true.sum()
    return Overlap(
        miou=100 * iou.nanmean().item(),
        interval=(low, high),
        macc=100 * acc.nanmean().item(),
        aacc=100 * (right.sum() / everything).item(),
        constant=100 * (true.max() / everything / (true > 0).sum()).item(),
        iou=_percent(iou),
        acc=_percent(acc),
        images=len(counts),
    )


def _share(part: Tensor, of: Tensor) -> Tensor:
    """part / of, NaN where `of` is 0."""
    return torch.where(of > 0, part / of, math.nan)


def _percent(shares: Tensor) -> list[float | None]:
    return [None if math.isnan(share) else 100 * share for share in shares.tolist()]
