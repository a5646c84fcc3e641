"""Images with a class for every pixel: folders of pictures and label PNGs, read, checked, and cut for training.

Letters: H and W sides of an image in pixels, S side of a training crop, K classes.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from fastssl.batch import IMAGENET_MEAN, IMAGENET_STD
from fastssl.config import ConfigError, printable
from fastssl.evaluation.data import EvaluationError
from fastssl.loaders.ahead import read_ahead
from fastssl.loaders.decode import SUFFIXES, DecodeError, Frame, check_frame, read_indices, read_picture
from fastssl.loaders.philox import below, random_words, uniform
from fastssl.loaders.sources import list_images
from fastssl.progress import progress_bar
from fastssl.training import distributed

log = logging.getLogger(__name__)

IGNORED = -1  # the label of a pixel that does not count
LABEL_FOLDERS = ("labels", "annotations", "masks")
CROPS = 11  # a crop that one class dominates is drawn anew, up to ten times
DOMINATED = 0.75
MOST = 2**16  # a label is below it
LISTED = 8  # values named in an error message


@dataclass(frozen=True)
class LabelledFolder:
    """Images and label pictures that belong together by name.

    Attributes:
        images, labels: paths, in the same order.
        ignore: the value in a label picture that does not count.
        reduce_zero_label: 0 does not count either, and every other value is a class one too high.
        frame: what the label pictures of images that EXIF turns were drawn on.
        values: the value that means class 0, 1, .., even if it is `ignore`. Empty: a value is its class.
    """

    images: list[Path]
    labels: list[Path]
    ignore: int
    reduce_zero_label: bool
    frame: Frame = ""
    values: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def picture(self, i: int, like: Tensor) -> Tensor:
        """uint8 [3, H, W], turned as its label picture `like`, [H, W], is.

        Raises:
            EvaluationError: it cannot be decoded, or the two do not fit.
        """
        try:
            pixels = read_picture(str(self.images[i]), (like.shape[0], like.shape[1]), self.frame)
        except DecodeError as error:
            raise self._error(i, error) from None
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def check_frame(self, i: int, like: Tensor) -> None:
        """Raises EvaluationError where `picture` would, as far as the image's header tells."""
        try:
            check_frame(str(self.images[i]), (like.shape[0], like.shape[1]), self.frame)
        except DecodeError as error:
            raise self._error(i, error) from None

    def _error(self, i: int, error: DecodeError) -> EvaluationError:
        return EvaluationError(
            f"{printable(str(self.images[i]))} {error} (label picture: {printable(str(self.labels[i]))})"
        )

    def label_map(self, i: int) -> Tensor:
        """int64 [H, W]: a class index of 0 or more, or IGNORED.

        Raises:
            EvaluationError: the file is not a picture, or one of colours rather than of class indices, or it has a
                value that means nothing.
        """
        try:
            values = read_indices(str(self.labels[i]))
        except DecodeError as error:
            raise EvaluationError(f"{printable(str(self.labels[i]))} {error}") from None
        values = values.astype(np.int64)
        ignored = values == self.ignore
        if self.values:
            classes = np.argsort(self.values)
            known = np.sort(self.values)
            at = np.searchsorted(known, values).clip(max=len(known) - 1)
            listed = known[at] == values
            if (odd := ~(listed | ignored)).any():
                raise EvaluationError(
                    f"{printable(str(self.labels[i]))} has value {values[odd][0]} in {int(odd.sum())} pixels, which is "
                    f"neither among --values {_listed(self.values)} nor --ignore {self.ignore}"
                )
            return torch.from_numpy(np.where(listed, classes[at], IGNORED))
        if self.reduce_zero_label:
            ignored |= values == 0
            values -= 1
        values[ignored] = IGNORED
        return torch.from_numpy(values)

    def pair(self, i: int, classes: int) -> tuple[Tensor, Tensor]:
        """`picture` and `label_map`, once it is sure that they fit.

        Raises:
            EvaluationError: different sizes, or a label outside 0 .. classes - 1.
        """
        labels = self.label_map(i)
        picture = self.picture(i, labels)
        self.check_range(i, labels, classes)
        return picture, labels

    def check_range(self, i: int, labels: Tensor, classes: int) -> None:
        """Raises EvaluationError if one of the labels of image `i` is outside 0 .. classes - 1."""
        outside = (labels >= classes) | (labels < IGNORED)
        if outside.any():
            shift = int(self.reduce_zero_label)
            raise EvaluationError(
                f"{self.labels[i]} has label {int(labels[outside][0]) + shift} in {int(outside.sum())} pixels; labels "
                f"are {shift} to {classes - 1 + shift}, and {self.ignore} (--ignore) for pixels that do not count; "
                "--values says which other values mean classes"
            )

    def value(self, label: int) -> int:
        """What means the class `label`, or IGNORED, in a label picture."""
        if label == IGNORED:
            return 0 if self.reduce_zero_label else self.ignore
        return self.values[label] if self.values else label + int(self.reduce_zero_label)


def _listed(values: Sequence[int]) -> str:
    return f"[{','.join(map(str, values[:LISTED]))}{',..' if len(values) > LISTED else ''}]"


def open_labelled_folder(
    path: str,
    labels: str,
    key: str,
    ignore: int = 255,
    reduce_zero_label: bool = False,
    frame: Frame = "",
    values: tuple[int, ...] = (),
) -> LabelledFolder:
    """Lists images and finds the label picture of each: the same path below the labels' folder, ending in .png.

    Args:
        path: folder of images, sub-folders included; with empty `labels`, a folder that holds `images` and `labels` (or
            `annotations`, or `masks`).
        labels: folder of label pictures.
        key: what the messages call the option; the labels' is called key_labels.
        ignore, reduce_zero_label, frame, values: as in `LabelledFolder`.

    Raises:
        ConfigError: no such folder, or no images in it.
        EvaluationError: an image without a label picture.
    """
    root = Path(path)
    folder = root
    if not labels:
        folder = root / "images"
        found = [root / name for name in LABEL_FOLDERS if (root / name).is_dir()]
        if not folder.is_dir() or not found:
            raise ConfigError(
                f"{key} is {path!r}, which does not hold the folders images and labels; where they stand apart, name "
                f"the images with --{key} and the label pictures with --{key}_labels"
            )
        labels = str(found[0])
    for where, name in ((folder, key), (Path(labels), f"{key}_labels")):
        if not where.is_dir():
            raise ConfigError(f"{name} is {str(where)!r}, which is not a folder")
    listed = list_images(folder)
    if left_out := listed.left_out():
        log.warning("%s: %s", printable(str(folder)), left_out)
    images = [folder / name for name in listed.files]
    if not images:
        raise ConfigError(f"{key}: {folder} has no images in it; known endings: {' '.join(sorted(SUFFIXES))}")
    maps = [Path(labels) / image.relative_to(folder).with_suffix(".png") for image in images]
    missing = [number for number, label in enumerate(maps) if not label.is_file()]
    if missing:
        raise EvaluationError(
            f"{len(missing)} of {len(images)} images in {folder} have no label picture, the first is "
            f"{printable(images[missing[0]].name)}: expected {printable(str(maps[missing[0]]))}"
        )
    return LabelledFolder(images, maps, ignore, reduce_zero_label, frame, values)


def read_labels(
    data: LabelledFolder, classes: int, workers: int, device: torch.device | str = "cpu", progress: str = ""
) -> int:
    """Reads all label pictures, dealt to the processes; 1 + the largest label.

    Args:
        classes: labels must be below it. 0: they may be any.
        device: where the process group communicates.

    Raises:
        EvaluationError: as `LabelledFolder`; or the values cannot be class indices: one class alone is left, or, where
            `classes` is 0, half of the classes up to the largest, or more, are not there.
    """

    def labels_of(i: int) -> Tensor:
        labels = data.label_map(i)
        data.check_frame(i, labels)
        data.check_range(i, labels, classes or MOST)
        return (labels - IGNORED).flatten().bincount().nonzero()[:, 0]

    own = range(distributed.rank(), len(data), distributed.world())
    there = torch.zeros(MOST - IGNORED, dtype=torch.int64)
    bar = progress_bar(len(own), progress)
    with bar, contextlib.closing(read_ahead(own, labels_of, workers)) as found:
        for labels in found:
            there[labels] = 1
            bar.update()
    present = (distributed.all_reduce_max(there.to(device)).cpu().nonzero()[:, 0] + IGNORED).tolist()
    counted = [label for label in present if label != IGNORED]
    if not counted:
        raise EvaluationError(
            f"no pixel of the {len(data)} label pictures beside {data.images[0].parent} counts; all are ignored"
        )
    values = sorted(map(data.value, present))
    sparse = not classes and len(counted) <= (counted[-1] + 1) / 2
    if sparse or (len(counted) == 1 and len(present) > 1):
        option = "--reduce-zero-label" if data.reduce_zero_label else "--ignore"
        ignored = f", of which {data.value(IGNORED)} does not count ({option})" if len(present) > len(counted) else ""
        raise EvaluationError(
            f"the label pictures beside {data.images[0].parent} hold the values {_listed(values)[1:-1]}{ignored}: "
            f"no class indices 0, 1, 2, ..; say which value means which class, e.g. --values {_listed(values)} for "
            f"classes 0 to {len(values) - 1}{', or how many there are with --classes' if sparse else ''}"
        )
    return counted[-1] + 1


def resized(height: int, width: int, short: int, long: int) -> tuple[int, int]:
    """(height, width) with the shorter side `short` pixels long, unless the longer one would pass `long`."""
    factor = min(short / min(height, width), long / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


def normalise(picture: Tensor) -> Tensor:
    """[3, H, W] from 0 to 255 -> float32 with ImageNet's mean and standard deviation taken out."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (picture.float() / 255 - mean) / std


# -- training crops ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Crop:
    """How a training image is cut; sides in pixels.

    Attributes:
        side: S.
        short_side, long_side: the image is resized as `resized` says, after both are multiplied by a factor drawn
            from `scale`.
        scale: range of that factor.
        flip: probability of a horizontal flip.
        distort: whether brightness, contrast, saturation and hue are changed.
    """

    side: int
    short_side: int
    long_side: int
    scale: tuple[float, float]
    flip: float = 0.5
    distort: bool = True


def cut(picture: Tensor, labels: Tensor, how: Crop, *, seed: int, epoch: int, number: int) -> tuple[Tensor, Tensor]:
    """One training view: resized, cropped, flipped, distorted, normalised, padded on the right and below.

    Of up to eleven crops, the first one counts that has two classes at least and none with 75 % of the pixels that
    count; else the last one. What is drawn is a function of (seed, epoch, number).

    Args:
        picture: uint8 [3, H, W].
        labels: int64 [H, W].
        number: the image's, below 2^32.

    Returns:
        float32 [3, S, S], 0 where padded, and int64 [S, S], IGNORED where padded.

    Source: the pipeline of CAE's and BEiT's segmentation (section "Semantic segmentation" of arXiv 2106.08254).
    """
    scale, flipped, *_ = random_words(seed, "segment", number, epoch)
    factor = float(uniform(scale, *how.scale))
    height, width = labels.shape
    size = list(resized(height, width, int(how.short_side * factor), int(how.long_side * factor)))
    picture = transforms.resize(picture, size, InterpolationMode.BILINEAR, antialias=True)
    labels = transforms.resize(labels[None], size, InterpolationMode.NEAREST_EXACT)[0]

    down, right, *_ = random_words(seed, "segment/crop", number, epoch, np.arange(CROPS))
    tops = below(down, max(size[0] - how.side, 0) + 1).tolist()
    lefts = below(right, max(size[1] - how.side, 0) + 1).tolist()
    for top, left in zip(tops, lefts, strict=True):
        window = (slice(top, top + how.side), slice(left, left + how.side))
        if balanced(labels[window]):
            break
    picture, labels = picture[(slice(None), *window)], labels[window]
    if uniform(flipped) < how.flip:
        picture, labels = picture.flip(-1), labels.flip(-1)
    if how.distort:
        picture = distort(picture, seed=seed, epoch=epoch, number=number)
    space = (0, how.side - labels.shape[1], 0, how.side - labels.shape[0])
    return F.pad(normalise(picture), space), F.pad(labels, space, value=IGNORED)


def balanced(labels: Tensor) -> bool:
    """Whether two classes at least are there, and none has 75 % or more of the pixels that count."""
    counts = torch.bincount(labels[labels != IGNORED])
    return int((counts > 0).sum()) > 1 and bool(counts.max() < DOMINATED * counts.sum())


def distort(picture: Tensor, *, seed: int, epoch: int, number: int) -> Tensor:
    """Photometric distortion (Liu et al. 2016, arXiv 1512.02325): each change with probability one half.

    In this order: brightness plus up to 32 of 255 either way; contrast times 0.5 to 1.5, here or, by a coin flip, at
    the end; saturation times 0.5 to 1.5; hue turned by up to 36 degrees either way. Values are cut off at 0 and 255.

    Args:
        picture: uint8 [3, H, W].

    Returns:
        float32 [3, H, W], 0 to 255.
    """
    draw = [
        float(uniform(word))
        for block in range(3)
        for word in random_words(seed, "segment/distort", number, epoch, 0, block)
    ]
    x = picture.float()
    if draw[0] < 0.5:
        x = (x + (2 * draw[1] - 1) * 32).clamp(0, 255)
    contrast = 0.5 + draw[3] if draw[2] < 0.5 else 1.0
    early = draw[4] < 0.5
    if early:
        x = (x * contrast).clamp(0, 255)
    if draw[5] < 0.5:
        x = saturate(x, 0.5 + draw[6])
    if draw[7] < 0.5:
        x = transforms.adjust_hue(x / 255, (2 * draw[8] - 1) * 0.1) * 255
    return x if early else (x * contrast).clamp(0, 255)


def saturate(picture: Tensor, factor: float) -> Tensor:
    """Multiplies the saturation of HSV, 1 at most; hue and value stay. [3, H, W], not negative."""
    value, least = picture.amax(0, keepdim=True), picture.amin(0, keepdim=True)
    most = value / (value - least).clamp_min(1e-6)  # the factor at which the least channel is 0
    return (value - (value - picture) * most.clamp(max=factor)).clamp_min(0)
