"""`look`: a picture per image of what a network sees: attention, patch features, what its method does, neighbours.

Letters: n images, h heads, g side of the grid of patches, S side of the network's input in pixels.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.augment import augment
from fastssl.config import ConfigError, NonNegativeInt, PositiveInt, Seed, printable
from fastssl.evaluation.data import EvaluationError, central_view, spaced_ids
from fastssl.evaluation.frozen.embed import label_of, nearest
from fastssl.evaluation.frozen.features import extract
from fastssl.evaluation.options import Hardware
from fastssl.evaluation.ssl import method_batches
from fastssl.loaders.engine import decoding_threads
from fastssl.loaders.sources import Files, Source, open_source
from fastssl.loaders.views import evaluation_batches
from fastssl.models import AnyBackbone, check_image_size
from fastssl.models.vit import ViT, patch_grid
from fastssl.pictures import Key, Sheet, heat, heat_key, stack, to_picture
from fastssl.training import checkpoint
from fastssl.training.checkpoint import CheckpointError, replace_file
from fastssl.training.device import choose_device, choose_dtype
from fastssl.weights.backbone import open_backbone, open_method

Part = tuple[str, Sheet]  # a heading and what stands under it
COLUMNS = 6  # pictures side by side
ATTENTION = "attention"  # of DINO's pictures: shown here anyway, by head


@dataclass
class LookOptions(Hardware):
    """What is looked at, and with which network."""

    checkpoint: str = ""
    """Checkpoint of a run or an import, or a library's model (timm:NAME, torchvision:NAME)."""
    images: tuple[str, ...] = ()
    """Image files."""
    data: str = ""
    """Also show the nearest images of this data set, by cosine similarity: a .beton file, a glob of shards, or a
    folder."""
    out: str = "look"
    """Folder to write to: a PNG file for each image."""
    neighbours: PositiveInt = 11
    """How many of them."""
    searched: PositiveInt = 10000
    """At most so many (evenly spaced) images of data are searched."""
    mean_patch: bool | None = None
    """Neighbours: append the last block's mean patch token (ViT). None: as the run's own monitor did."""
    size: NonNegativeInt = 0
    """Side of the images that the network sees, in pixels. 0: the checkpoint's."""
    batch_size: PositiveInt = 16
    """Images per forward pass."""
    seed: Seed = 0
    """Seed of what the method draws: masks, rotation, damage."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("checkpoint", "images", "out"):
            if not getattr(self, key):
                raise ConfigError(f"{key} is empty; fastssl look CHECKPOINT IMAGE [IMAGE ...]")


@dataclass(frozen=True)
class Looked:
    """What was written, what could not be shown, and the seconds it took."""

    files: list[str]
    notes: list[str]
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def table(self) -> str:
        lines = [f"{len(self.files)} picture(s), {self.seconds:.1f} s: {', '.join(self.files)}"]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def look(options: LookOptions) -> Looked:
    """Draw what a network sees in images: attention by head, patch features, what its method does, neighbours.

    Raises:
        CheckpointError, SourceError, ConfigError: what was named does not exist or does not fit.
        BadSampleError: an image cannot be read.
        EvaluationError: a file cannot be written.
    """
    begin = time.perf_counter()
    device = choose_device(options.device, "device")
    dtype = choose_dtype(options.precision, device, "precision")
    source = Files(options.images)
    data = open_source(options.data) if options.data else None
    backbone = open_backbone(options.checkpoint, device)
    size = options.size or backbone.image_size
    check_image_size(backbone.model, "size", size)
    workers = decoding_threads(options.workers, 1)
    view = {"size": size, **central_view(0, backbone, size)}
    mean_patch = backbone.mean_patch if options.mean_patch is None else options.mean_patch

    crops, maps, attention, features = [], [], [], []
    batches = evaluation_batches(source, batch_size=options.batch_size, workers=workers, **view)
    with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        for batch in batches:
            images = augment(batch.to(device)).views["eval"][:, 0]
            crops.append(to_picture(images).cpu())
            maps.append(_feature_map(backbone.module, images).float().cpu())
            if isinstance(backbone.module, ViT):
                attention.append(backbone.module.class_attention(images).float().cpu())
            features.append(backbone.module.represent(images, mean_patch=mean_patch).float().cpu())
    pictures, notes = torch.cat(crops), list[str]()
    first = list(_seen(pictures, torch.cat(maps), torch.cat(attention) if attention else None))
    pages: list[list[Part]] = [[] for _ in first]
    sections = [_heads(pictures, torch.cat(attention))] if attention else []
    sections += _by_method(options, source, device, workers, notes)
    if data is not None:
        ids = spaced_ids(len(data), options.searched)
        found = extract(
            backbone.module, data, workers=workers, dtype=dtype, mean_patch=mean_patch, ids=ids,
            batch_size=options.batch_size, progress="features of data", **view,
        )  # fmt: skip
        similar, rows = nearest(found.values, torch.cat(features), min(options.neighbours, len(ids)))
        sections.append(_neighbours(pictures, similar, ids[rows.numpy()], data, workers, view))
    for section in sections:
        for page, part in zip(pages, section, strict=True):
            page.append(part)

    files = []
    step = f", step {backbone.step}" if backbone.step else ""
    for i, (path, page) in enumerate(zip(_names(options), pages, strict=True)):
        heading = f"{Path(source.name(i)).name}: {printable(options.checkpoint)} ({backbone.model.name}{step})"
        image = stack([(heading, first[i]), *page])
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, partial(image.save, format="PNG"))
        except OSError as error:
            raise EvaluationError(f"{path} cannot be written: {error.strerror}") from None
        files.append(str(path))
    return Looked(files, notes, round(time.perf_counter() - begin, 1))


def principal_colours(maps: Tensor) -> Tensor:
    """Feature maps as colours: their first three principal components over all positions of all images, red the first.

    Args:
        maps: float [n, C, H, W].

    Returns:
        [n, 3, H, W]; each component from its 2nd to its 98th percentile goes from 0 to 1.
    """
    rows = maps.movedim(1, -1).flatten(0, 2).double()
    rows = rows - rows.mean(0)
    _, axes = torch.linalg.eigh(rows.T @ rows)  # ascending
    axes = axes[:, -3:].flip(1)
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()  # either sign is right; this is always one
    found = F.pad(rows @ axes, (0, 3 - axes.shape[1]))
    low, high = (torch.tensor(np.percentile(found.numpy(), q, axis=0)) for q in (2, 98))
    colours = ((found - low) / (high - low).clamp_min(1e-12)).clamp(0, 1).float()
    return colours.unflatten(0, (len(maps), *maps.shape[2:])).movedim(-1, 1)


def _feature_map(module: AnyBackbone, images: Tensor) -> Tensor:
    """The last features by place: [n, 3, S, S] -> [n, C, g, g]."""
    if not isinstance(module, ViT):
        return module.stages(images)[-1]
    grid = patch_grid(images, module.patch_size)
    return module.tokens(images)[:, 1:].transpose(1, 2).unflatten(2, grid)


def _seen(pictures: Tensor, maps: Tensor, attention: Tensor | None) -> Iterator[Sheet]:
    """Per image: the central view, patch features as colours, where the network looks."""
    colours = F.interpolate(principal_colours(maps), size=pictures.shape[-2:], mode="nearest")
    look = maps.norm(dim=1) if attention is None else attention.mean(dim=1)
    what = "length of the last features" if attention is None else "class token's attention in the last block, mean"
    titles = ["what the network is shown", "features of its places as colours", what]
    words = (
        "Colours: the first three principal components, red the first, over all images of this command: equal colours, "
    )
    legend = [(None, f"{words}like features."), heat_key(what)]
    for row in zip(pictures, colours, heat(pictures, look), strict=True):
        yield Sheet(torch.stack(row)[None], titles, legend)


def _heads(pictures: Tensor, attention: Tensor) -> Iterator[Part]:
    """Per image: the attention of every head."""
    for picture, maps in zip(pictures, attention, strict=True):
        heads = heat(picture.expand(len(maps), -1, -1, -1), maps)
        words = [f"head {k + 1}: {share:.0%} on patches" for k, share in enumerate(maps.sum((1, 2)).tolist())]
        key = heat_key("attention of the class token (the rest of it is on itself)")
        yield "Attention of the last block, by head", _rows(heads, words, [key])


def _by_method(
    options: LookOptions, source: Source, device: torch.device, workers: int, notes: list[str]
) -> Iterator[Iterator[Part]]:
    """What the checkpoint's method draws of each image (`Method.pictures`), if it is a whole method; else a note."""
    if not Path(options.checkpoint).is_file():
        return
    saved = checkpoint.read(options.checkpoint)
    try:
        if saved.kind not in ("pretrain", "import"):
            raise CheckpointError(f"{saved.path} is of {checkpoint.WHAT[saved.kind]}")
        config, method = open_method(saved)
        method = method.to(device)
        whole = bool(method.masks(config))  # it hides patches of one view; other methods compare several
        values, batches = method_batches(
            saved, config, method, source, batch_size=len(source), workers=workers, seed=options.seed, drawn=not whole
        )
        with torch.random.fork_rng(), torch.no_grad(), contextlib.closing(batches):
            torch.manual_seed(options.seed)
            batch = next(batches).to(device)
            rows = batch.id.argsort()
            sheets = method.pictures(augment(batch.map(lambda value: value[rows])), values)
    except (CheckpointError, ConfigError, EvaluationError) as error:
        notes.append(f"no picture of what the method does: {error}")
        return
    for name, sheet in sheets.items():
        if name != ATTENTION:
            heading = f"{config.method}: {name} ({'central view' if whole else 'views drawn as in training'})"
            yield ((heading, replace(sheet, pictures=row[None])) for row in sheet.pictures.cpu())


def _neighbours(
    pictures: Tensor, similar: Tensor, ids: np.ndarray, data: Source, workers: int, view: dict[str, Any]
) -> Iterator[Part]:
    """Per image: itself and the nearest of the data."""
    batches = evaluation_batches(data, batch_size=64, workers=workers, ids=ids.flatten(), **view)
    shown = torch.cat([to_picture(augment(batch).views["eval"][:, 0]) for batch in batches]).unflatten(0, ids.shape)
    for picture, others, row, cosines in zip(pictures, shown, ids.tolist(), similar.tolist(), strict=True):
        words = ["the image", *(f"{cosine:.3f} {label_of(data, i)}" for i, cosine in zip(row, cosines, strict=True))]
        note = (None, f"Of {printable(data.path)}: cosine similarity of the features, and class.")
        yield "Nearest images", _rows(torch.cat([picture[None], others]), words, [note])


def _rows(pictures: Tensor, words: list[str], legend: list[Key]) -> Sheet:
    """Pictures [n, 3, H, W] with their captions, so many side by side; white where there are no more."""
    missing = -len(pictures) % min(COLUMNS, len(pictures))
    columns = min(COLUMNS, len(pictures))
    whole = torch.cat([pictures, torch.ones_like(pictures[:1]).expand(missing, -1, -1, -1)]).unflatten(0, (-1, columns))
    captions = [*words, *[""] * missing]
    return Sheet(whole, (), legend, [captions[i : i + columns] for i in range(0, len(captions), columns)])


def _names(options: LookOptions) -> Iterator[Path]:
    """A file per image, named after it; numbered where two have one name."""
    taken: set[str] = set()
    for image in options.images:
        stem, number = Path(image).stem, 1
        while (name := stem if number == 1 else f"{stem}-{number}") in taken:
            number += 1
        taken.add(name)
        yield Path(options.out) / f"{name}.png"
