"""Embeddings: a feature per image as a NumPy table, a list of the images, and a sheet of nearest neighbours.

`embed` does that for a data set, or for one part of it (`--shard`), whose parts are put together later (`--merge`).
`embed_batch` gives the features of some images in memory, for engines that spread the work over machines.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Sequence
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
from fastssl.config import ConfigError, NonNegativeInt, PositiveInt, check, printable, shard_numbers
from fastssl.evaluation.data import EvaluationError, central_view, device_of, spaced_ids
from fastssl.evaluation.frozen.features import extract, kept_table, table_key, write_table
from fastssl.evaluation.options import Hardware
from fastssl.loaders.decode import Encoded, open_image, upright_size
from fastssl.loaders.engine import decoding_threads
from fastssl.loaders.loader import BadSampleError
from fastssl.loaders.sources import Source, open_source
from fastssl.loaders.views import evaluation_batches
from fastssl.models import check_image_size
from fastssl.training import distributed
from fastssl.training.checkpoint import replace_file
from fastssl.training.device import choose_device, choose_dtype
from fastssl.weights.backbone import Backbone, open_backbone

NEIGHBOURS = 7  # beside each query of the sheet
FEWEST = 4  # images that make a map
PLANE_COMPONENTS = 50  # principal components that the map is made from
ARITHMETIC = ("float32", "bfloat16", "float16")  # that parts may have been computed in


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
    shard: str = ""
    """I/N: only the I-th of N equal runs of batches, I from 0 to N-1, as OUT.I-of-N.npy and .csv; for N jobs in any
    order, each of which may be run again. Empty: all."""
    merge: NonNegativeInt = 0
    """N: put the parts of N jobs (--shard I/N) together to the files of all images, which are those of one job. Nothing
    is computed; the parts stay. 0: off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("checkpoint", "data", "out"):
            if not getattr(self, key):
                raise ConfigError(f"{key} is empty; fastssl embed CHECKPOINT DATA OUT")
        shard_numbers(self.shard)
        check(not (self.shard and self.merge), "merge", self.merge, "0 where shard is set")


@dataclass(frozen=True)
class Embedded:
    """What was written.

    Attributes:
        files: paths.
        images, width: rows and columns of the table.
        seconds: all in all.
        note: what was not computed or drawn, and why.
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
        EvaluationError: a feature is not finite, a file cannot be written, or a part that is to be merged is missing.
    """
    begin = time.perf_counter()
    source = open_source(options.data)
    device = choose_device(options.device, "device")
    distributed.start(device)
    backbone = open_backbone(options.checkpoint, device)
    size = options.size or backbone.image_size
    check_image_size(backbone.model, "size", size)
    workers = decoding_threads(options.workers, distributed.local_world())
    view = {"size": size, **central_view(0, backbone, size)}
    mean_patch = backbone.mean_patch if options.mean_patch is None else options.mean_patch
    how = {**view, "batch_size": options.batch_size, "blocks": options.blocks, "mean_patch": mean_patch}
    settings = {name: str(value) for name, value in {**how, "stored as": options.dtype}.items()}
    key = table_key(backbone.module, source, settings) if options.shard or options.merge else ""
    ids = _part(len(source), options.batch_size, *shard_numbers(options.shard))
    out = _part_name(options.out, *shard_numbers(options.shard)) if options.shard else options.out
    files, note = [Path(f"{out}{suffix}") for suffix in (".npy", ".csv")], ""
    if options.merge:
        tables = _parts(options, source, key)
    else:
        dtype = choose_dtype(options.precision, device, "precision")
        more: dict[str, Any] = {"ids": ids, "progress": "features", "shared": True}
        key = f"{key} {str(dtype).removeprefix('torch.')}"
        if options.shard and files[1].exists() and (there := kept_table(files[0], key, len(ids))) is not None:
            (images, width), seconds = there.shape, round(time.perf_counter() - begin, 1)
            return Embedded([str(file) for file in files], images, width, seconds, "they were there already")
        found = extract(backbone.module, source, **how, **more, workers=workers, dtype=dtype)
        tables = [found.values.numpy().astype(options.dtype, copy=False)]
        if not np.isfinite(tables[0]).all():
            raise EvaluationError("some features are too large for float16; write them with --dtype float32")
    if distributed.is_main():
        try:
            files[0].parent.mkdir(parents=True, exist_ok=True)
            replace_file(files[1], lambda part: _write_list(part, source, ids))
            replace_file(files[0], lambda part: write_table(part, tables, key if options.shard else ""))
            values = torch.from_numpy(np.load(files[0], mmap_mode="c"))
            if options.sheet and not options.shard:
                files.append(Path(f"{out}.png"))
                _draw(files[-1], source, values, options.sheet, workers, **view)
            if options.map and not options.shard and len(source) >= FEWEST:
                try:
                    _draw_map(Path(f"{out}-map.png"), source, values, options.map)
                    files.append(Path(f"{out}-map.png"))
                except ModuleNotFoundError as error:
                    note = f"no map, for {error.name} is not installed: pip install 'fastssl-vision[plot]', or --map 0"
        except OSError as error:
            raise EvaluationError(
                f"{error.filename or options.out} cannot be written: {error.strerror or error}"
            ) from None
    images, width = sum(map(len, tables)), tables[0].shape[1]
    return Embedded([str(file) for file in files], images, width, round(time.perf_counter() - begin, 1), note)


def embed_batch(
    backbone: Backbone,
    images: Sequence[bytes | np.ndarray],
    *,
    size: int = 0,
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto",
    blocks: int = 1,
    mean_patch: bool | None = None,
    workers: int = 0,
    bad: list[tuple[int, str]] | None = None,
) -> np.ndarray:
    """Features of images in memory: `fastssl embed`'s numbers, to the bit where it has the same images in a batch.

    Args:
        backbone: from `fastssl.weights.backbone.open_backbone(checkpoint, device)`, opened once per process.
        images: the bytes of image files, or pixels, uint8 [H, W, 3]; one forward pass.
        size: side of the images that the network sees, in pixels. 0: the checkpoint's.
        precision, blocks, mean_patch: as in `fastssl embed`.
        workers: decoding threads; 0: this machine's cores.
        bad: gets (position, reason) of each image that cannot be decoded; its row is NaN. None: such a one is an error.

    Returns:
        float32 [n, D], a row per image, in their order.

    Raises:
        BadSampleError: an image cannot be decoded, where `bad` is None; the message has its position.
        EvaluationError: a feature is not finite.
        ValueError: no images, or pixels of another type or shape.
    """
    if not len(images):
        raise ValueError("embed_batch needs one image at least")
    size = size or backbone.image_size
    check_image_size(backbone.model, "size", size)
    source, missing = _InMemory(images), []
    how: dict[str, Any] = {"size": size, **central_view(0, backbone, size), "batch_size": len(images), "blocks": blocks}
    how["mean_patch"] = backbone.mean_patch if mean_patch is None else mean_patch
    dtype = choose_dtype(precision, device_of(backbone.module), "precision")
    while True:
        try:
            values = extract(backbone.module, source, **how, workers=workers, dtype=dtype).values.float().numpy()
            break
        except BadSampleError as error:
            if bad is None:
                raise
            bad.append((error.sample, str(error.__cause__)))
            missing.append(error.sample)
            source.images[error.sample] = np.zeros((1, 1, 3), np.uint8)  # keeps the others' places in the batch
    values[missing] = np.nan
    return values


class _InMemory(Source):
    """Image files and pixels that are in memory, unlabelled."""

    def __init__(self, images: Sequence[bytes | np.ndarray]) -> None:
        self.path, self.classes, self.images = "images in memory", [], list(images)
        self.labels = np.full(len(images), -1, np.int64)
        for i, image in enumerate(images):
            if isinstance(image, np.ndarray) and (image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3):
                raise ValueError(f"image {i} is {image.dtype} {image.shape}; pixels are uint8 [H, W, 3]")

    def sizes(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = [self.read(i) for i in ids.tolist()]
        return np.array([one.height for one in found], np.int64), np.array([one.width for one in found], np.int64)

    def read(self, i: int) -> Encoded:
        image = self.images[i]
        if isinstance(image, np.ndarray):
            return Encoded(np.ascontiguousarray(image).reshape(-1), "raw", *image.shape[:2])
        return Encoded(np.frombuffer(image, np.uint8), "file", *upright_size(open_image(image)))

    def lengths(self) -> np.ndarray:
        return np.array([image.nbytes if isinstance(image, np.ndarray) else len(image) for image in self.images])

    def name(self, i: int) -> str:
        return f"image {i}"

    def fingerprint(self) -> str:
        raise NotImplementedError("images in memory are not kept")


def _part(images: int, batch_size: int, index: int, total: int) -> np.ndarray:
    """The images of a part, int64: whole batches, so that each image has the same ones beside it as in one job.

    Raises:
        ConfigError: there are more parts than batches.
    """
    batches = -(-images // batch_size)
    if total > batches:
        raise ConfigError(f"{images} images are {batches} batches of {batch_size}, which cannot be {total} parts")
    return np.arange(*(min(batches * k // total * batch_size, images) for k in (index, index + 1)), dtype=np.int64)


def _part_name(out: str, index: int, total: int) -> str:
    return f"{out}.{index}-of-{total}"


def _parts(options: EmbedOptions, source: Source, key: str) -> list[np.ndarray]:
    """The tables that the jobs of all parts have written, in order.

    Raises:
        EvaluationError: some are missing, damaged, or of something else.
    """
    tables, missing, arithmetic = [], [], list(ARITHMETIC)
    for k in range(options.merge):
        rows = len(_part(len(source), options.batch_size, k, options.merge))
        path = Path(f"{_part_name(options.out, k, options.merge)}.npy")
        found = {kind: table for kind in arithmetic if (table := kept_table(path, f"{key} {kind}", rows)) is not None}
        if not found:
            missing.append(f"{k}/{options.merge}")
            continue
        arithmetic = list(found)  # one for all
        tables.append(found[arithmetic[0]])
    if missing:
        raise EvaluationError(
            f"{options.out} cannot be put together: of {options.merge} parts {len(missing)} are missing, damaged or of "
            f"another checkpoint, data set, setting or precision; run them again: --shard {', '.join(missing)}"
        )
    return tables


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


def _write_list(path: Path, source: Source, ids: np.ndarray) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("index", "name", "label", "class"))
        for i, label in zip(ids.tolist(), source.labels[ids].tolist(), strict=True):
            name = source.classes[label] if 0 <= label < len(source.classes) else ""
            writer.writerow((i, _cell(source.name(i)), label, _cell(printable(name))))


def _cell(text: str) -> str:
    """A cell that no spreadsheet takes for a formula: a quotation mark goes before what could be one."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@")) else text
