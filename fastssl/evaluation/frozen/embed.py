"""Embeddings: a feature per image as a NumPy table, a list of the images, and a sheet of nearest neighbours."""

from __future__ import annotations

import csv
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl import pictures
from fastssl.augment import augment
from fastssl.config import ConfigError, NonNegativeInt, PositiveInt
from fastssl.evaluation.data import EvaluationError, default_resize, spaced_ids
from fastssl.evaluation.frozen.features import extract
from fastssl.evaluation.options import Hardware
from fastssl.loaders.engine import decoding_threads
from fastssl.loaders.sources import Source, open_source
from fastssl.loaders.views import evaluation_batches
from fastssl.models import check_image_size
from fastssl.training import distributed
from fastssl.training.checkpoint import replace_file
from fastssl.training.device import choose_device, choose_dtype
from fastssl.weights.backbone import open_backbone

NEIGHBOURS = 7  # beside each query of the sheet


@dataclass
class EmbedOptions(Hardware):
    """What is embedded, and into which files."""

    checkpoint: str = ""
    """Checkpoint of a run or an import, or a library's model (timm:NAME, torchvision:NAME)."""
    data: str = ""
    """Images: a .beton file, a glob of shards, or a folder; labels are not needed."""
    out: str = ""
    """Files to write: OUT.npy (features), OUT.csv (index, name, label, class) and OUT.png (nearest neighbours)."""
    dtype: Literal["float16", "float32"] = "float16"
    """Type of the numbers in OUT.npy."""
    blocks: PositiveInt = 1
    """Concatenate the class tokens of this many last blocks (ViT)."""
    mean_patch: bool | None = None
    """Append the last block's mean patch token (ViT). None: as the run's own monitor did."""
    sheet: NonNegativeInt = 8
    """Images in OUT.png, evenly spaced, each with its 7 nearest others by cosine similarity. 0: no picture."""
    size: NonNegativeInt = 0
    """Side of the images that the network sees, in pixels. 0: the checkpoint's."""
    batch_size: PositiveInt = 64
    """Images per forward pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("checkpoint", "data", "out"):
            if not getattr(self, key):
                raise ConfigError(f"{key} is empty; fastssl embed CHECKPOINT DATA OUT")


@dataclass(frozen=True)
class Embedded:
    """What was written.

    Attributes:
        files: paths.
        images, width: rows and columns of the table.
        seconds: all in all.
    """

    files: list[str]
    images: int
    width: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def table(self) -> str:
        return f"{self.images} images, {self.width} numbers each, {self.seconds:.1f} s: {', '.join(self.files)}"


def embed(options: EmbedOptions) -> Embedded:
    """Write the features of all images of a data set as a NumPy table, with a list and a picture of neighbours.

    Raises:
        CheckpointError, SourceError, ConfigError: what was named does not exist or does not fit.
        EvaluationError: a feature is not finite, or a file cannot be written.
    """
    begin = time.perf_counter()
    source = open_source(options.data)
    device = choose_device(options.device, "device")
    distributed.start(device)
    backbone = open_backbone(options.checkpoint, device)
    size = options.size or backbone.image_size
    check_image_size(backbone.model, "size", size)
    workers = decoding_threads(options.workers, distributed.local_world())
    mean_patch = backbone.mean_patch
    found = extract(
        backbone.module,
        source,
        size=size,
        batch_size=options.batch_size,
        workers=workers,
        dtype=choose_dtype(options.precision, device, "precision"),
        blocks=options.blocks,
        mean_patch=mean_patch if options.mean_patch is None else options.mean_patch,
        progress="features",
        shared=True,
    )
    table = found.values.numpy().astype(options.dtype, copy=False)
    if not np.isfinite(table).all():
        raise EvaluationError("some features are too large for float16; write them with --dtype float32")
    files = [Path(f"{options.out}{suffix}") for suffix in (".npy", ".csv", ".png")[: 3 if options.sheet else 2]]
    if distributed.is_main():
        try:
            files[0].parent.mkdir(parents=True, exist_ok=True)
            replace_file(files[0], lambda part: _write_table(part, table))
            replace_file(files[1], lambda part: _write_list(part, source))
            if options.sheet:
                _draw(files[2], source, found.values, options.sheet, size, workers)
        except OSError as error:
            raise EvaluationError(f"{error.filename or options.out} cannot be written: {error.strerror}") from None
    images, width = table.shape
    return Embedded([str(file) for file in files], images, width, round(time.perf_counter() - begin, 1))


def nearest(values: Tensor, queries: np.ndarray, count: int) -> Tensor:
    """The rows most similar to some rows, by cosine, the most similar first; a row is not its own neighbour.

    Args:
        values: [n, F], any float type.
        queries: int64 [q], rows of the table.
        count: how many; fewer than n.

    Returns:
        int64 [q, count].
    """
    wanted = F.normalize(values[torch.as_tensor(queries)].float(), dim=1)
    similarity = torch.cat([wanted @ F.normalize(piece.float(), dim=1).T for piece in values.split(65536)], dim=1)
    similarity[torch.arange(len(queries)), torch.as_tensor(queries)] = -torch.inf
    return similarity.topk(count, dim=1).indices


def _draw(path: Path, source: Source, values: Tensor, queries: int, size: int, workers: int) -> None:
    """The sheet: a row per query, the query first."""
    asked = spaced_ids(len(source), queries)
    rows = torch.cat([torch.as_tensor(asked)[:, None], nearest(values, asked, min(NEIGHBOURS, len(source) - 1))], dim=1)
    batches = evaluation_batches(
        source, size=size, resize=default_resize(size), batch_size=64, workers=workers, ids=rows.flatten().numpy()
    )
    images = torch.cat([augment(batch).views["eval"][:, 0] for batch in batches])
    pictures.save(path, pictures.to_picture(images).unflatten(0, rows.shape))


def _write_table(path: Path, table: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.save(file, table)


def _write_list(path: Path, source: Source) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("index", "name", "label", "class"))
        for i, label in enumerate(source.labels.tolist()):
            name = source.classes[label] if 0 <= label < len(source.classes) else ""
            writer.writerow((i, source.name(i), label, name))
