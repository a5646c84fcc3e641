"""`fastssl parts learn`: from a self-supervised checkpoint and images to a file that can tell any image's parts."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from fastssl import pictures
from fastssl.config import (
    Checked,
    ConfigError,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Range,
    Seed,
    check,
)
from fastssl.loaders.sources import Source, open_source
from fastssl.models.vit import ViT
from fastssl.prepare.parts.finder import PartFinder, normalised, whole_images
from fastssl.prepare.parts.judge import JudgeOptions, PartsReport, judge_finder
from fastssl.prepare.parts.learner import PartLearner, overlap
from fastssl.progress import progress_bar
from fastssl.training.checkpoint import CheckpointError
from fastssl.training.device import choose_device, choose_dtype
from fastssl.training.schedule import warmup_cosine
from fastssl.weights.backbone import open_backbone


@dataclass
class LearnOptions(Checked):
    """What is learned, from which features and images. All numbers but parts are ours; the paper's are not known."""

    checkpoint: str = ""
    """The frozen ViT: a checkpoint of ours or an import (iBOT's, DINO's, MAE's ...), or a library's (timm:NAME)."""
    data: str = ""
    """Images to learn from: a .beton file, a glob of shards, or a folder."""
    out: str = ""
    """File to write. Pictures of the parts go beside it, as OUT.png."""
    parts: Annotated[int, Range(at_least=2, at_most=64)] = 6
    """Parts of an image."""
    size: NonNegativeInt = 0
    """Every image is resized to this square, in pixels, whatever its shape. 0: the checkpoint's image size."""
    decoder_width: PositiveInt = 512
    """Channels of the decoder's first layer."""
    diversity: NonNegativeFloat = 0.1
    """Weight of the diversity loss."""
    steps: PositiveInt = 20000
    """Optimizer steps."""
    batch_size: PositiveInt = 128
    """Images per step."""
    lr: PositiveFloat = 1e-4
    """AdamW's learning rate; a cosine leads it to 0."""
    judge: PositiveInt = 1000
    """Images on which the learned parts are judged at the end."""
    workers: NonNegativeInt = 0
    """Decoding threads. 0: this machine's cores."""
    place_images: NonNegativeInt = 1024
    """Images over which the mean token of each place is taken; it is taken out of the tokens. 0: nothing is."""
    seed: Seed = 0
    """Seed of the start values and of the order of the images."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Arithmetic of the networks. auto: bf16 on a GPU that has it, else fp32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("checkpoint", "data", "out"):
            if not getattr(self, key):
                raise ConfigError(f"{key} is empty; fastssl parts learn --checkpoint C --data DATA --out PARTS.pt")


@dataclass(frozen=True)
class LearnedParts:
    """What came out.

    Attributes:
        out: the file written.
        painting: mean absolute error of the last steps' painted images, in standard deviations of the pixels.
        report: how the parts look on `judge` images.
        seconds: in all.
    """

    out: str
    painting: float
    report: PartsReport
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "report": self.report.as_dict()}

    def table(self) -> str:
        return (
            f"{self.out}: painting error {self.painting:.3f}, {self.seconds:.0f} s; pictures in {self.out}.png\n\n"
            f"{self.report.table()}"
        )


def learn(options: LearnOptions, say: Callable[[str], None] | None = None) -> LearnedParts:
    """Learns to split images into parts, writes the result and a picture of it, and judges it.

    Raises:
        CheckpointError, ConfigError, SourceError: the checkpoint is no ViT, a number does not fit, no such images.
        BadSampleError: an image cannot be read.
    """
    begin = time.perf_counter()
    say = say or (lambda text: tqdm.write(text, file=sys.stderr))
    device = choose_device(options.device, "device")
    dtype = choose_dtype(options.precision, device, "precision")
    source = open_source(options.data)
    torch.manual_seed(options.seed)
    finder = _new_finder(options, device, dtype)
    painting = _train(finder, source, options, say)
    finder.save(options.out)
    report, sheet = judge_finder(
        finder, source, JudgeOptions(options.out, options.data, images=options.judge, workers=options.workers)
    )
    pictures.save(Path(f"{options.out}.png"), sheet)
    return LearnedParts(options.out, painting, report, round(time.perf_counter() - begin, 1))


def _new_finder(options: LearnOptions, device: torch.device, dtype: torch.dtype) -> PartFinder:
    found = open_backbone(options.checkpoint, device)
    vit = found.module
    if not isinstance(vit, ViT):
        raise ConfigError(f"checkpoint is {options.checkpoint}, not a ViT; parts are learned from a ViT's tokens")
    size = options.size or found.image_size
    whole = size % vit.patch_size == 0 and size >= 2 * vit.patch_size
    check(whole, "size", size, f"a multiple of the checkpoint's patch side, {vit.patch_size}, and two patches or more")
    learner = PartLearner(vit.width, options.parts, options.decoder_width, int(math.log2(vit.patch_size)))
    model = found.model
    return PartFinder(model, vit.requires_grad_(False), learner.to(device), size, dtype)


def _train(finder: PartFinder, source: Source, options: LearnOptions, say: Callable[[str], None]) -> float:
    """Trains the learner in place; returns the mean painting error of the last tenth of the steps."""
    learner, device = finder.learner.train(), finder.device
    optimizer = torch.optim.AdamW(learner.parameters(), lr=options.lr, betas=(0.9, 0.99), weight_decay=0.0)
    generator = torch.Generator().manual_seed(options.seed)
    rounds = -(-options.steps * options.batch_size // len(source))
    order = np.concatenate([torch.randperm(len(source), generator=generator).numpy() for _ in range(rounds)])
    batches = whole_images(
        source, order[: options.steps * options.batch_size], finder.size, options.batch_size, options.workers
    )
    if options.place_images:
        count = min(options.place_images, len(source))
        ids = np.arange(count) * len(source) // count
        finder.learn_place(whole_images(source, ids, finder.size, options.batch_size, options.workers))
    errors: list[Tensor] = []
    for step, batch in enumerate(progress_bar(options.steps, "parts", "steps", iterable=batches)):
        for group in optimizer.param_groups:
            group["lr"] = warmup_cosine(step, options.steps, 0, options.lr, 0.0)
        images = normalised(batch, device)
        mirrored = (torch.rand(len(images), generator=generator) < 0.5).to(device)
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        tokens = finder.placeless(finder.tokens(images))
        with torch.autocast(device.type, finder.dtype, enabled=finder.dtype != torch.float32):
            maps, painted = learner(tokens)
        error = (painted.float() - F.interpolate(images, size=painted.shape[2:], mode="area")).abs().mean()
        shared = overlap(maps)
        (error + options.diversity * shared).backward()
        optimizer.step()
        optimizer.zero_grad()
        errors.append(error.detach())
        if (step + 1) % max(options.steps // 10, 1) == 0:
            recent = torch.stack(errors[-max(options.steps // 10, 1) :]).mean().item()
            if not math.isfinite(recent):
                raise CheckpointError(f"step {step + 1}: the painting error is not finite; lower lr, {options.lr}")
            say(f"step {step + 1}: painting error {recent:.4f}, mean cosine of two parts' maps {shared.item():.3f}")
    learner.eval()
    return recent
