"""Options that protocols share, each with its text once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastssl.config import Checked, ConfigError, NonNegativeInt, PositiveInt


def require(options: Any, **what: str) -> None:
    """Raises ConfigError for the first of the named options that is empty; `what` says in words what it names."""
    for key, words in what.items():
        if not getattr(options, key):
            raise ConfigError(f"{key} is empty; name {words} with --{key}")


@dataclass(kw_only=True)
class Hardware(Checked):
    """On what a network computes. As keywords, these options stand last in --help, whatever class inherits them."""

    workers: NonNegativeInt = 0
    """Decoding threads per process. 0: this machine's cores divided by the processes on it."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Arithmetic of the network. auto: bf16 on a GPU that has it, fp16 on an older GPU, fp32 on the CPU."""


@dataclass
class EvaluateOptions(Hardware):
    """What every protocol needs: a checkpoint, images, and how the images go through the network."""

    checkpoint: str = ""
    """Checkpoint of a pretraining run, e.g. runs/dino/last.pt."""
    data: str = ""
    """Labelled training images: a .beton file, a glob of shards, or a folder with one sub-folder per class."""
    val: str = ""
    """Labelled images to classify, same forms as data."""
    size: NonNegativeInt = 0
    """Side of the images that the network sees, in pixels. 0: the checkpoint's."""
    resize: NonNegativeInt = 0
    """The shorter side is resized to this before the central crop, in pixels. 0: size x 256/224, or size up to 64;
    a library's model: as the library does."""
    batch_size: PositiveInt = 64
    """Images per forward pass."""
    allow_shared: bool = False
    """Go on where images of val are in data too, as in some benchmarks' own splits, and print how many."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, checkpoint="a checkpoint", data="labelled images", val="labelled images")

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
