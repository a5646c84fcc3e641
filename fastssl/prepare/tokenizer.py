"""`fastssl tokenizer`: a small stand-in for DALL-E's encoder, k-means over patches, for trials without its 215 MB.

Its codes say which small patch it is; DALL-E's, learned with a decoder from 250 million images, say more. So a run with
this tokenizer shows that a method works, not what it reaches.

Letters: T patches, K codes, s side of a cell in pixels, F numbers compared per patch.
"""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastssl.config import Checked, ConfigError, Data, FractionRange, NonNegativeInt, PositiveInt, Seed, View, check
from fastssl.loaders.engine import decoding_threads, open_loader
from fastssl.loaders.sources import open_source
from fastssl.models.dvae import describe, nearest
from fastssl.models.vit import cut_patches
from fastssl.prepare.kmeans import kmeans
from fastssl.progress import progress_bar
from fastssl.training import checkpoint
from fastssl.training.checkpoint import Checkpoint

BATCH = 64


@dataclass
class TokenizerOptions(Checked):
    """What is learned, and from what."""

    data: str = ""
    """Images: a .beton file, a glob of shards, or a folder."""
    out: str = ""
    """File to write; cae.tokenizer takes it."""
    codes: PositiveInt = 512
    """Codes of the codebook (cae.codes)."""
    cell: PositiveInt = 8
    """Side of a cell, in pixels of the tokenizer's view: its side divided by the patches in a row."""
    size: PositiveInt = 112
    """Side of the crops (views.tokenizer.size)."""
    scale: FractionRange = (0.08, 1.0)
    """Range of the crops' area, as a fraction of the image's (views.tokenizer.scale)."""
    patches: PositiveInt = 100000
    """Patches to learn from, spread over as many images as there are."""
    steps: PositiveInt = 20
    """Rounds of k-means over all patches."""
    workers: NonNegativeInt = 0
    """Decoding threads. 0: this machine's cores."""
    seed: Seed = 0
    """Seed of the crops and of the first centres."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.size % self.cell == 0, "size", self.size, f"a multiple of cell, {self.cell}")
        check(self.patches >= self.codes, "patches", self.patches, f"at least codes, {self.codes}")


@dataclass(frozen=True)
class Learned:
    """A codebook and how well it fits.

    Attributes:
        out: the file written.
        codes: how many.
        patches: learned from.
        perplexity: codes in effective use: exp of the entropy of their frequencies.
        explained: share of the pixels' variance that the codes' mean patches explain, from 0 to 1.
        seconds: in all.
    """

    out: str
    codes: int
    patches: int
    perplexity: float
    explained: float
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def table(self) -> str:
        return (
            f"{self.out}: a stand-in tokenizer of {self.codes} codes (k-means of {self.patches} patches), "
            f"perplexity {self.perplexity:.0f}; their mean patches explain {100 * self.explained:.1f} % of the pixels' "
            f"variance; {self.seconds:.0f} s"
        )


def train_tokenizer(options: TokenizerOptions) -> Learned:
    """Learns a codebook of small patches by k-means and writes it: a stand-in for a learned tokenizer.

    Raises:
        SourceError, ConfigError, CheckpointError: no such data, too few patches, or the file cannot be written.
    """
    begin = time.perf_counter()
    generator = torch.Generator().manual_seed(options.seed)
    pixels = _patches(options, generator)  # [T, 3 s s]
    points = describe(pixels)
    centres = kmeans(points, options.codes, options.steps, generator, progress="k-means")
    codes = nearest(points, centres)
    count = torch.zeros(options.codes).index_add_(0, codes, torch.ones(len(codes)))
    means = torch.zeros(options.codes, pixels.shape[1]).index_add_(0, codes, pixels) / count.clamp_min(1)[:, None]

    order = means.mean(dim=1).argsort()  # from dark to light, so that colours of a code map mean something
    centres, means, count = centres[order], means[order], count[order]
    rank = order.argsort()[codes]
    share = count[count > 0] / len(codes)
    left = (pixels - means[rank]).square().mean() / (pixels - pixels.mean(dim=0)).square().mean()
    patches = means.unflatten(1, (3, options.cell, options.cell))
    checkpoint.write(options.out, Checkpoint("tokenizer", {}, {"centres": centres, "patches": patches}, None))
    return Learned(
        out=options.out,
        codes=options.codes,
        patches=len(pixels),
        perplexity=math.exp(-(share * share.log()).sum().item()),
        explained=1 - left.item(),
        seconds=round(time.perf_counter() - begin, 1),
    )


def _patches(options: TokenizerOptions, generator: torch.Generator) -> Tensor:
    """float [T, 3 s s], from 0 to 1: patches of random crops as training draws them, the same number from each."""
    source = open_source(options.data)
    cells = (options.size // options.cell) ** 2
    each = min(cells, max(1, math.ceil(options.patches / len(source))))
    view = View(size=options.size, scale=options.scale, interpolation="lanczos", name="tokenizer")
    loader = open_loader(
        source,
        [view],
        Data(batch_size=min(BATCH, len(source))),
        seed=options.seed,
        rank=0,
        world=1,
        threads=decoding_threads(options.workers, 1),
        pin_memory=False,
    )
    found, total = [], 0
    with contextlib.closing(loader.epoch(0)) as stream, progress_bar(options.patches, "patches", "patches") as bar:
        for batch in stream:
            patches = cut_patches(batch.views["tokenizer"][:, 0].float() / 255, options.cell)  # [B, N, 3 s s]
            take = torch.rand(patches.shape[:2], generator=generator).argsort(dim=1)[:, :each]
            found.append(patches.gather(1, take[..., None].expand(-1, -1, patches.shape[2])).flatten(0, 1))
            total += len(found[-1])
            bar.update(len(found[-1]))
            if total >= options.patches:
                break
    loader.close()
    if total < options.codes:
        raise ConfigError(
            f"{options.data} gives {total} patches, fewer than codes, {options.codes}; ask for fewer codes"
        )
    return torch.cat(found)[: options.patches]
