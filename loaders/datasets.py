"""Data sets by the names that users know them by, as torchvision lays them out on disk: `stl10:/data/stl10`.

Their images go the same way through the converter as those of a folder: sets of decoded arrays (STL10, CIFAR) as
lossless image files made in memory, the others as the files that they are.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastssl.loaders.decode import read_file
from fastssl.loaders.sources import SourceError

SPLITS = {  # the first one is the default
    "stl10": ("train", "test", "unlabeled", "train+unlabeled"),
    "cifar10": ("train", "test"),
    "cifar100": ("train", "test"),
    "pets": ("trainval", "test"),
    "imagenet": ("train", "val"),
}


@dataclass
class NamedSet:
    """The images of one split, in torchvision's order.

    Attributes:
        classes: class names in the order of the labels.
        names: of the samples, as messages and the .beton's side file show them.
        labels: int64 [n]; -1 for unlabelled images.
        images: uint8 [n, H, W, 3], or the paths of image files.
    """

    classes: list[str]
    names: list[str]
    labels: np.ndarray
    images: np.ndarray | Sequence[str]

    def read(self, i: int, space: memoryview | None = None) -> bytes | memoryview:
        """Sample `i` as the bytes of an image file (an array: of a PPM); see `read_file` for `space` and errors."""
        if not isinstance(self.images, np.ndarray):
            return read_file(self.images[i], space)
        height, width, _ = self.images[i].shape
        return f"P6 {width} {height} 255\n".encode() + self.images[i].tobytes()


def open_named(src: str, split: str = "", download: bool = False) -> NamedSet | None:
    """The data set that `src` names as NAME:FOLDER (in any case), or None where it is a plain path.

    Args:
        src: what to open; an existing path is never taken for a name.
        split: one of the set's `SPLITS`; empty: its first one.
        download: let torchvision fetch the set into FOLDER if it is not there.

    Raises:
        SourceError: unknown name or split, or a folder that does not hold the set.
    """
    name, colon, root = src.partition(":")
    if os.path.exists(src) or not colon or len(name) < 2 or os.sep in name:
        if split or download:
            raise SourceError(f"{src} is a path; split and download are for data sets by name ({', '.join(SPLITS)})")
        return None
    kind = name.lower()
    if kind not in SPLITS:
        raise SourceError(f"{src} does not exist, and no data set is known as '{name}' (known: {', '.join(SPLITS)})")
    split = split or SPLITS[kind][0]
    if split not in SPLITS[kind]:
        raise SourceError(f"{name} has no split '{split}'; it has {', '.join(SPLITS[kind])}")
    if kind == "imagenet" and download:
        raise SourceError("ImageNet cannot be downloaded; put the archives of image-net.org into the folder")
    try:
        return _open(kind, root, split, download)
    except (RuntimeError, OSError) as error:
        hint = "" if kind == "imagenet" or download else "; --download true fetches it"
        raise SourceError(f"{root} does not hold {name} as torchvision stores it ({_line(error)}){hint}") from None


def _open(kind: str, root: str, split: str, download: bool) -> NamedSet:
    from torchvision import datasets

    if kind == "stl10":
        data: Any = datasets.STL10(root, split, download=download)
        return _arrays(data.classes, split, data.labels, data.data.transpose(0, 2, 3, 1))
    if kind in ("cifar10", "cifar100"):
        data = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[kind](
            root, split == "train", download=download
        )
        return _arrays(data.classes, split, data.targets, data.data)
    if kind == "pets":
        data = datasets.OxfordIIITPet(root, split, download=download)
        return _files(data.classes, root, [os.fspath(path) for path in data._images], data._labels)
    data = datasets.ImageNet(root, split)
    return _files(data.wnids, root, [path for path, _ in data.samples], data.targets)


def _arrays(classes: Sequence[str], split: str, labels: Sequence[int], images: np.ndarray) -> NamedSet:
    names = [f"{split}/{i:06d}" for i in range(len(images))]
    return NamedSet(list(classes), names, np.asarray(labels, np.int64), images)


def _files(classes: Sequence[str], root: str, paths: list[str], labels: Sequence[int]) -> NamedSet:
    return NamedSet(list(classes), [os.path.relpath(p, root) for p in paths], np.asarray(labels, np.int64), paths)


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
