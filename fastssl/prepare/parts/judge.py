"""Are these parts? Numbers that need no truth, and, where the true parts are known, how well the maps meet them.

Letters: n images, P parts found, T true parts, N cells of a grid, D width of the ViT.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl import pictures
from fastssl.config import Checked, ConfigError, NonNegativeInt, PositiveInt
from fastssl.loaders.sources import Source, SourceError, open_source
from fastssl.models.dvae import nearest
from fastssl.prepare.kmeans import kmeans
from fastssl.prepare.parts.finder import PartFinder, load_finder, normalised, whole_images
from fastssl.prepare.parts.learner import overlap
from fastssl.progress import progress_bar
from fastssl.training.device import choose_device, choose_dtype

SHOWN = 8  # images in a picture
FITTED = 20000  # patches that the k-means over all images is fitted to
ROUNDS, TRIES = 20, 3  # of k-means
MATCHINGS = 20000  # ways to match parts with true parts that are tried


@dataclass
class JudgeOptions(Checked):
    """Which parts are judged, and on which images."""

    parts: str = ""
    """What 'fastssl parts learn' wrote."""
    data: str = ""
    """Images: a .beton file, a glob of shards, or a folder."""
    images: PositiveInt = 1000
    """Judge on so many images, evenly spaced over the data."""
    background: bool = False
    """With a map for the background, as 'fastssl parts write --background' writes it."""
    truth: bool = False
    """Compare with the part maps that DATA has, beside k-means of the same frozen tokens."""
    pictures: str = ""
    """PNG file to draw the parts of some images into. Empty: none."""
    batch_size: PositiveInt = 64
    """Images per forward pass."""
    workers: NonNegativeInt = 0
    """Decoding threads. 0: this machine's cores."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""


@dataclass(frozen=True)
class Match:
    """How well a way to split images meets their true parts; all in percent.

    Attributes:
        name: of the way.
        iou: mean intersection over union of the true parts, each image's parts matched for themselves.
        iou_fixed: the same with one matching for all images; None where parts of different images have nothing to do
            with each other.
        purity: share of cells that belong to the commonest true part of their own part.
    """

    name: str
    iou: float
    iou_fixed: float | None
    purity: float


@dataclass(frozen=True)
class PartsReport:
    """What the parts look like.

    Attributes:
        images: judged.
        cosine: mean cosine of two parts' maps.
        used: per part, the share of images in which it has a patch.
        largest: mean share of an image's largest part.
        mirror: share of patches that keep their part when the image is mirrored.
        truth: where the true parts are known, one row per way to find parts.
    """

    images: int
    cosine: float
    used: list[float]
    largest: float
    mirror: float
    truth: list[Match] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "truth": [vars(row) for row in self.truth]}

    def table(self) -> str:
        rows = [
            ("mean cosine of two parts' maps", self.cosine, "< 0.3", self.cosine < 0.3),
            ("images that use the rarest part", min(self.used), "> 0.5", min(self.used) > 0.5),
            ("share of the largest part", self.largest, "< 0.6", self.largest < 0.6),
            ("same part in the mirrored image", self.mirror, "> 0.8", self.mirror > 0.8),
        ]
        lines = [f"{'on ' + str(self.images) + ' images':<34}{'value':>8}{'good':>8}"]
        lines += [f"{name:<34}{value:>8.3f}{goal:>8}{'' if ok else '   no'}" for name, value, goal, ok in rows]
        if self.truth:
            lines += ["", f"{'against the true parts, in %':<34}{'mIoU':>8}{'mIoU, one matching':>20}{'purity':>9}"]
            for row in self.truth:
                fixed = f"{row.iou_fixed:.1f}" if row.iou_fixed is not None else "-"
                lines.append(f"{row.name:<34}{row.iou:>8.1f}{fixed:>20}{row.purity:>9.1f}")
        return "\n".join(lines)


def judge(options: JudgeOptions) -> PartsReport:
    """Judges learned parts; see `PartsReport`.

    Raises:
        CheckpointError, SourceError: no such files, or `truth` where DATA has no part maps.
        BadSampleError: an image cannot be read.
    """
    device = choose_device(options.device, "device")
    finder = load_finder(options.parts, device, choose_dtype("fp32", device))
    report, sheet = judge_finder(finder, open_source(options.data), options)
    if options.pictures:
        pictures.save(Path(options.pictures), sheet)
    return report


def judge_finder(finder: PartFinder, source: Source, options: JudgeOptions) -> tuple[PartsReport, pictures.Sheet]:
    """As `judge`, for an open file of parts; also pictures: image, parts (truth, k-means)."""
    if options.truth and not source.has_parts:
        raise SourceError(f"{options.data} has no part maps to compare with")
    count = min(options.images, len(source))
    ids = np.arange(count) * len(source) // count
    examples = np.arange(min(SHOWN, count)) * count // min(SHOWN, count)  # spread, for data is often sorted by class
    cosine, mirror, labels, maps, tokens, shown = [], [], [], [], [], []
    bar = progress_bar(count, "parts of images")
    for batch in whole_images(source, ids, finder.size, options.batch_size, options.workers):
        images = normalised(batch, finder.device)
        found = finder.tokens(images)
        here = finder.maps(found, options.background)
        there = finder.maps(finder.tokens(images.flip(3)), options.background)
        cosine.append(overlap(here[:, : finder.learner.parts]) * len(images))
        labels.append(here.argmax(1).cpu())
        mirror.append((here.argmax(1) == there.argmax(1).flip(2)).float().mean() * len(images))
        shown.append(images[np.isin(batch.id, ids[examples])].cpu())
        if options.truth:
            maps.append(here.cpu())
            tokens.append(found[:, 1:].cpu())
        bar.update(len(images))
    bar.close()
    label, parts = torch.cat(labels), maps[0].shape[1] if maps else finder.learner.parts + options.background
    share = F.one_hot(label.flatten(1), parts).float().mean(1)  # [n, P]
    views = pictures.to_picture(torch.cat(shown))
    columns = [views, pictures.tint(views, label[examples], parts)]
    rows: list[Match] = []
    if options.truth:
        rows, extra = _against_truth(torch.cat(maps), torch.cat(tokens), source, ids, views, examples)
        columns += extra
    report = PartsReport(
        count,
        float(sum(cosine) / count),
        (share > 0).float().mean(0).tolist(),
        share.amax(1).mean().item(),
        float(sum(mirror) / count),
        rows,
    )
    titles = ["image", "learned parts", "true parts", "k-means in each image"][: len(columns)]
    return report, pictures.Sheet(torch.stack(columns, dim=1), titles, [(None, "A colour per part.")])


def _against_truth(
    maps: Tensor, tokens: Tensor, source: Source, ids: np.ndarray, views: Tensor, examples: np.ndarray
) -> tuple[list[Match], list[Tensor]]:
    """The rows of the table, and tinted views of the true parts and of k-means per image."""
    stored = cast(list[np.ndarray], [source.parts(int(i)) for i in ids])  # the source has parts
    true = torch.from_numpy(np.stack(stored)).float()  # [n, T, h, w]
    count, grid = true.shape[1], true.shape[2:]
    truth = true.argmax(1)
    parts, side = maps.shape[1], maps.shape[2:]
    generator = torch.Generator().manual_seed(0)
    each = progress_bar(len(tokens), "k-means in each image", iterable=tokens)
    single = torch.stack([nearest(points, kmeans(points, parts, ROUNDS, generator, TRIES)) for points in each])
    flat = tokens.flatten(0, 1)
    sample = flat[torch.randperm(len(flat), generator=generator)[:FITTED]]
    common = nearest(flat, kmeans(sample, parts, ROUNDS, generator, TRIES)).view(len(tokens), -1)

    def spread(labels: Tensor) -> Tensor:
        return F.one_hot(labels, parts).transpose(1, 2).unflatten(2, side).float()

    ways = [
        ("learned parts", maps, True),
        ("k-means over all images", spread(common), True),
        ("k-means in each image", spread(single), False),
        ("one part for all", torch.ones_like(maps[:, :1]), True),
    ]
    rows = []
    for name, found, fixed in ways:
        sized = F.interpolate(found, size=grid, mode="bilinear", align_corners=False)
        rows.append(match(name, sized.argmax(1).flatten(1), truth.flatten(1), found.shape[1], count, fixed))
    extra = [
        pictures.tint(views, truth[examples], count),
        pictures.tint(views, single[examples].unflatten(1, side), parts),
    ]
    return rows, extra


def match(name: str, labels: Tensor, truth: Tensor, parts: int, true_parts: int, fixed: bool) -> Match:
    """How well labels meet the truth; every one-to-one matching is tried.

    Args:
        labels: int64 [n, N], from 0 to parts - 1.
        truth: int64 [n, N], from 0 to true_parts - 1; a true part that an image lacks does not count there.
        fixed: also with one matching for all images.

    Raises:
        ConfigError: too many parts to try all matchings.
    """
    size = max(parts, true_parts)
    if math.perm(size, true_parts) > MATCHINGS:
        raise ConfigError(f"{parts} parts can be matched with {true_parts} true ones in too many ways to try them all")
    a, b = F.one_hot(labels, size).double(), F.one_hot(truth, true_parts).double()  # [n, N, size], [n, N, T]
    both = a.transpose(1, 2) @ b  # [n, size, T]
    iou = both / (a.sum(1)[:, :, None] + b.sum(1)[:, None] - both).clamp_min(1)
    present = b.sum(1) > 0  # [n, T]
    ways = torch.tensor(list(itertools.permutations(range(size), true_parts)))  # [K, T]
    score = sum(iou[:, ways[:, t], t] * present[:, t, None] for t in range(true_parts)) / present.sum(1, keepdim=True)
    return Match(
        name,
        100 * score.amax(1).mean().item(),
        100 * score.mean(0).amax().item() if fixed else None,
        100 * (both.amax(2).sum(1) / truth.shape[1]).mean().item(),
    )
