"""Embeddings: a feature per image as a NumPy table, a list of the images, and a sheet of nearest neighbours."""

from __future__ import annotations

import csv
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl import pictures
from fastssl.augment import augment
from fastssl.config import ConfigError, NonNegativeInt, PositiveInt, printable
from fastssl.evaluation.data import EvaluationError, central_view, spaced_ids
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
FEWEST = 4  # images that make a map
PLANE_COMPONENTS = 50  # principal components that the map is made from


@dataclass
class EmbedOptions(Hardware):
    """What is embedded, and into which files."""

    checkpoint: str = ""
    """Checkpoint of a run or an import, or a library's model (timm:NAME, torchvision:NAME)."""
    data: str = ""
    """Images: a .beton file, a glob of shards, or a folder; labels are not needed."""
    out: str = ""
    """Files to write: OUT.npy (features), OUT.csv (index, name, label, class), OUT.png (nearest neighbours) and
    OUT-map.png."""
    dtype: Literal["float16", "float32"] = "float16"
    """Type of the numbers in OUT.npy."""
    blocks: PositiveInt = 1
    """Concatenate the class tokens of this many last blocks (ViT)."""
    mean_patch: bool | None = None
    """Append the last block's mean patch token (ViT). None: as the run's own monitor did."""
    sheet: NonNegativeInt = 8
    """Images in OUT.png, evenly spaced, each with its 7 nearest others by cosine similarity. 0: no picture."""
    map: NonNegativeInt = 2000
    """At most so many (evenly spaced) images are points of a 2-D map, OUT-map.png: t-SNE, in colours by class. Needs
    scikit-learn and matplotlib. 0: no map."""
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
        note: what could not be drawn, and why.
    """

    files: list[str]
    images: int
    width: int
    seconds: float
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def table(self) -> str:
        return f"{self.images} images, {self.width} numbers each, {self.seconds:.1f} s: {', '.join(self.files)}" + (
            f"\nnote: {self.note}" if self.note else ""
        )


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
    mean_patch, view = backbone.mean_patch, central_view(0, backbone, size)
    found = extract(
        backbone.module,
        source,
        size=size,
        **view,
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
    drawn, note = Path(f"{options.out}-map.png"), ""
    if distributed.is_main():
        try:
            files[0].parent.mkdir(parents=True, exist_ok=True)
            replace_file(files[0], lambda part: _write_table(part, table))
            replace_file(files[1], lambda part: _write_list(part, source))
            if options.map and len(source) >= FEWEST:
                try:
                    _draw_map(drawn, source, found.values, options.map)
                    files.append(drawn)
                except ModuleNotFoundError as error:
                    note = f"no map, for {error.name} is not installed: pip install 'fastssl-vision[plot]', or --map 0"
            if options.sheet:
                _draw(files[2], source, found.values, options.sheet, workers, size=size, **view)
        except OSError as error:
            raise EvaluationError(
                f"{error.filename or options.out} cannot be written: {error.strerror or error}"
            ) from None
    images, width = table.shape
    return Embedded([str(file) for file in files], images, width, round(time.perf_counter() - begin, 1), note)


def nearest(values: Tensor, wanted: Tensor, count: int, own: np.ndarray | None = None) -> tuple[Tensor, Tensor]:
    """The rows of a table most similar to some features, by cosine, the most similar first.

    Args:
        values: [n, F], any float type.
        wanted: [q, F].
        count: how many; at most n, with `own` fewer.
        own: int64 [q], the rows that `wanted` are: none is its own neighbour.

    Returns:
        Cosine similarities, float32, and rows, int64, both [q, count].
    """
    wanted = F.normalize(wanted.float(), dim=1)
    similarity = torch.cat([wanted @ F.normalize(piece.float(), dim=1).T for piece in values.split(65536)], dim=1)
    if own is not None:
        similarity[torch.arange(len(own)), torch.as_tensor(own)] = -torch.inf
    found = similarity.topk(count, dim=1)
    return found.values, found.indices


def label_of(source: Source, i: int) -> str:
    """The name of an image's class, its number where it has no name, nothing where it has none."""
    label = int(source.labels[i])
    return printable(source.classes[label]) if 0 <= label < len(source.classes) else "" if label < 0 else str(label)


def _draw(path: Path, source: Source, values: Tensor, queries: int, workers: int, **view: Any) -> None:
    """The sheet: a row per query, the query first."""
    asked = spaced_ids(len(source), queries)
    similar, found = nearest(values, values[torch.as_tensor(asked)], min(NEIGHBOURS, len(source) - 1), asked)
    rows = torch.cat([torch.as_tensor(asked)[:, None], found], dim=1)
    batches = evaluation_batches(source, batch_size=64, workers=workers, ids=rows.flatten().numpy(), **view)
    images = torch.cat([augment(batch).views["eval"][:, 0] for batch in batches])
    captions = [
        [
            label_of(source, row[0]),
            *(f"{cosine:.2f} {label_of(source, i)}" for i, cosine in zip(row[1:], cosines, strict=True)),
        ]
        for row, cosines in zip(rows.tolist(), similar.tolist(), strict=True)
    ]
    titles = ["image", *(f"nearest {k + 1}" for k in range(found.shape[1]))]
    legend: list[pictures.Key] = [
        (None, "Under each picture: cosine similarity of its features to the image's, and class.")
    ]
    sheet = pictures.Sheet(pictures.to_picture(images).unflatten(0, rows.shape), titles, legend, captions)
    replace_file(path, partial(pictures.draw(sheet).save, format="PNG"))


def place(values: Tensor) -> np.ndarray:
    """Features as points of a plane, like ones near each other: t-SNE (van der Maaten, Hinton 2008) of directions.

    Args:
        values: [n, F], n at least 4.

    Returns:
        float32 [n, 2]; the same for the same features.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    table = F.normalize(values.float(), dim=1).numpy()
    if not np.ptp(table, axis=0).any():  # t-SNE would divide by their deviation
        return np.zeros((len(table), 2), np.float32)
    if min(table.shape) > PLANE_COMPONENTS:
        table = PCA(PLANE_COMPONENTS, random_state=0).fit_transform(table)
    perplexity = min(30.0, (len(table) - 1) / 3)
    return TSNE(init="pca", perplexity=perplexity, random_state=0).fit_transform(table)


def _draw_map(path: Path, source: Source, values: Tensor, images: int) -> None:
    """The map: a point per image in the colour of its class.

    Raises:
        ModuleNotFoundError: scikit-learn or matplotlib is not installed.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    ids = spaced_ids(len(source), images)
    points, labels = place(values[torch.as_tensor(ids)]), source.labels[ids]
    figure = Figure(figsize=(10, 8), layout="constrained")
    axes = figure.subplots()
    known = sorted(set(labels[labels >= 0].tolist()))
    colours = colormaps["tab10" if len(known) <= 10 else "tab20" if len(known) <= 20 else "hsv"]
    axes.scatter(points[labels < 0, 0], points[labels < 0, 1], s=8, color="gray")
    for k, label in enumerate(known):
        mine = labels == label
        colour = colours(k if len(known) <= 20 else k / len(known))
        name = " " + label_of(source, ids[mine.argmax()])  # a label that begins with _ would not be shown
        axes.scatter(points[mine, 0], points[mine, 1], s=8, color=colour, label=name)
    if 1 < len(known) <= 20:
        for text in axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), markerscale=2).get_texts():
            text.set_parse_math(False)
    axes.set(xticks=[], yticks=[])
    words = "near points have like features; distances between far groups mean nothing"
    axes.set_title(f"t-SNE of the features of {len(ids)} images: {words}", fontsize=10)
    replace_file(path, partial(figure.savefig, format="png", dpi=110))


def _write_table(path: Path, table: np.ndarray) -> None:
    with open(path, "wb") as file:  # np.save would not say why it failed
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(table))
        file.write(np.ascontiguousarray(table).data)


def _write_list(path: Path, source: Source) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("index", "name", "label", "class"))
        for i, label in enumerate(source.labels.tolist()):
            name = source.classes[label] if 0 <= label < len(source.classes) else ""
            writer.writerow((i, _cell(source.name(i)), label, _cell(printable(name))))


def _cell(text: str) -> str:
    """A cell that no spreadsheet takes for a formula: a quotation mark goes before what could be one."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
