"""Labelled images and networks in eval mode: what every protocol stands on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from fastssl.config import check
from fastssl.loaders.sources import Source, open_source
from fastssl.weights.backbone import Backbone


class EvaluationError(ValueError):
    """The data or the features cannot be evaluated; the message says which and what to do."""


class Labelled(Protocol):
    """What has a class index per image, -1 where there is none, and class names or none."""

    @property
    def labels(self) -> Any: ...

    @property
    def classes(self) -> Sequence[str]: ...


def default_resize(size: int) -> int:
    """Side to which the shorter side is resized before the central crop of `size`, both in pixels.

    256 for 224, the custom on ImageNet, and in proportion for other sizes; but up to 64 pixels `size` itself, since
    data sets of small images (CIFAR, Tiny ImageNet) are evaluated whole.
    """
    return size if size <= 64 else round(size * 256 / 224)


def check_resize(resize: int, size: int) -> None:
    """Raises a ConfigError unless the shorter side `resize` is 0 (automatic) or at least the crop `size`, in pixels."""
    check(resize == 0 or resize >= size, "resize", resize, f"0 (automatic) or at least size, {size}")


def central_view(resize: int, backbone: Backbone, size: int) -> dict[str, Any]:
    """How images become central views of `size` pixels for a backbone: `resize`, the shorter side before the crop, in
    pixels, and `interpolation`. A library's model sees them as its library shows them, unless `resize` is asked for.

    Raises:
        ConfigError: `resize` is neither 0 (automatic) nor at least `size`.
    """
    check_resize(resize, size)
    how = {"resize": default_resize(size), "interpolation": "bicubic"} | backbone.central(size)
    return how | ({"resize": resize} if resize else {})


def spaced_ids(images: int, limit: int) -> np.ndarray:
    """int64 ids of at most `limit` out of `images`, evenly spaced: a sorted data set keeps its mix of classes."""
    count = min(images, limit)
    return np.arange(count, dtype=np.int64) * images // count


def open_labelled(train: str, val: str, train_key: str = "data", val_key: str = "val") -> tuple[Source, Source]:
    """Opens two data sets and checks that one can be judged by the other: all labelled, same classes.

    Args:
        train, val: a .beton file, a glob of shards, or a folder of images.
        train_key, val_key: what the messages call them.

    Raises:
        SourceError: one of them cannot be opened.
        EvaluationError: one of them has no labels, or their class lists differ.
    """
    sources = open_source(train), open_source(val)
    check_labels(*sources, f"{train_key} ({train})", f"{val_key} ({val})")
    return sources


def check_labels(train: Labelled, val: Labelled, train_name: str, val_name: str) -> int:
    """The number of classes, once it is sure that both are labelled and mean the same classes.

    Raises:
        EvaluationError: otherwise; the message uses the two names.
    """
    largest = 0
    for data, name in ((train, train_name), (val, val_name)):
        labels = np.asarray(data.labels)
        if len(labels) == 0:
            raise EvaluationError(f"{name} holds no images")
        unlabelled = np.flatnonzero(labels < 0)
        if len(unlabelled) == len(labels):
            raise EvaluationError(f"{name} has no labels; put the images of each class in a sub-folder of its own")
        if len(unlabelled):
            raise EvaluationError(
                f"{name} has no label for {len(unlabelled)} of {len(labels)} images, the first at index {unlabelled[0]}"
            )
        if data.classes and labels.max() >= len(data.classes):
            where = int(labels.argmax())
            raise EvaluationError(
                f"{name} has label {labels[where]} at index {where}, but only {len(data.classes)} classes"
            )
        largest = max(largest, int(labels.max()) + 1)
    a, b = list(train.classes), list(val.classes)
    if a and b and a != b:
        raise EvaluationError(f"the classes differ: {_difference(a, b, train_name, val_name)}")
    return max(largest, len(a), len(b))


def _difference(a: list[str], b: list[str], a_name: str, b_name: str) -> str:
    for names, others, here, there in ((a, b, a_name, b_name), (b, a, b_name, a_name)):
        extra = [name for name in names if name not in set(others)]
        if extra:
            return f"{here} has {len(names)}, {there} has {len(others)}; '{extra[0]}' is only in {here}"
    position = next(i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
    return f"class {position} is '{a[position]}' in {a_name} and '{b[position]}' in {b_name}"


def device_of(module: nn.Module) -> torch.device:
    """Where the module's parameters are; the CPU if it has none."""
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards every submodule is back in its own mode."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
