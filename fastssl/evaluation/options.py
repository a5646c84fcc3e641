"""Options that protocols share, each with its text once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fastssl.config import ConfigError


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
