"""`fastssl parts write`: a .beton with part maps, from one without."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastssl.config import Checked, ConfigError, NonNegativeInt, PositiveInt
from fastssl.loaders.beton import ARRAY, IMAGE, INT, Field
from fastssl.loaders.beton_writer import BetonWriter
from fastssl.loaders.sources import BetonSource, SourceError, open_source
from fastssl.prepare.parts.finder import load_finder, normalised, whole_images
from fastssl.prepare.parts.learner import to_bytes
from fastssl.progress import progress_bar
from fastssl.training.device import choose_device, choose_dtype


@dataclass
class WriteOptions(Checked):
    """Which parts are written to which images."""

    parts: str = ""
    """What 'fastssl parts learn' wrote."""
    data: str = ""
    """A .beton file; of a sharded data set, one shard after the other."""
    out: str = ""
    """The .beton file to write: the same images, byte for byte, and labels, with part maps."""
    background: bool = False
    """Add a map for the background, the patches that none of the parts needs to hold 60 % of its mass."""
    batch_size: PositiveInt = 64
    """Images per forward pass."""
    workers: NonNegativeInt = 0
    """Decoding threads. 0: this machine's cores."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Arithmetic of the network. auto: bf16 on a GPU that has it, else fp32."""
    overwrite: bool = False
    """Replace OUT if it exists (when the new file is whole). False: refuse."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if Path(self.out).suffix != ".beton":
            raise ConfigError(f"out is '{self.out}'; it must end in .beton")


@dataclass(frozen=True)
class WrittenParts:
    """What was written.

    Attributes:
        out: the file.
        images: samples in it.
        shape: of each sample's maps: parts, rows, columns.
        seconds: in all.
    """

    out: str
    images: int
    shape: tuple[int, ...]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def table(self) -> str:
        shape = " x ".join(map(str, self.shape))
        return (
            f"{self.out}: {self.images} images with part maps of {shape}; "
            f"{self.seconds:.1f} s, {self.images / max(self.seconds, 1e-9):.0f} img/s"
        )


def write(options: WriteOptions) -> WrittenParts:
    """Writes a .beton with the images and labels of another and the part maps of all its images.

    Maps that the other file may have are replaced; further fields are left out. Nothing is left under the name of OUT
    unless the file is whole.

    Raises:
        CheckpointError, SourceError: no such files, or not of this kind.
        BadSampleError: an image cannot be read ('fastssl verify' lists all such).
        BetonError: the disk refused.
    """
    begin = time.perf_counter()
    if Path(options.out).exists() and not options.overwrite:
        raise ConfigError(f"{options.out} exists already; --overwrite true replaces it")
    device = choose_device(options.device, "device")
    finder = load_finder(options.parts, device, choose_dtype(options.precision, device, "precision"))
    source = open_source(options.data)
    if not isinstance(source, BetonSource):
        raise SourceError(f"{options.data} is not one .beton file; 'fastssl convert' makes one of a folder of images")
    side = finder.size // finder.backbone.patch_size
    shape = (finder.learner.parts + options.background, side, side)
    fields = [Field("image", IMAGE), Field("label", INT), Field("parts", ARRAY, shape, np.dtype("u1"))]
    names = source.beton.side
    with (
        BetonWriter(options.out, fields, len(source)) as writer,
        progress_bar(len(source), "part maps") as bar,
    ):
        for batch in whole_images(source, np.arange(len(source)), finder.size, options.batch_size, options.workers):
            maps = finder.maps(finder.tokens(normalised(batch, device)), options.background)
            for sample, stored in zip(batch.id.tolist(), to_bytes(maps).cpu().numpy(), strict=True):
                writer.append(source.read(sample), int(source.labels[sample]), stored)
            bar.update(len(batch))
        writer.finish(
            source.classes,
            [names.name(i) for i in range(len(source))] if names else [""] * len(source),
            names.shard if names else (0, 1),
            names.conversion if names else 0,
        )
    return WrittenParts(options.out, len(source), shape, round(time.perf_counter() - begin, 1))
