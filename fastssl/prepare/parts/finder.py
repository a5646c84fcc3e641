"""What finds parts: a frozen ViT with a part learner, its file, and the way images come to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastssl.augment import augment
from fastssl.batch import Batch
from fastssl.config import Model, View
from fastssl.loaders.engine import decoding_threads
from fastssl.loaders.sources import Source
from fastssl.loaders.views import central_batches
from fastssl.models.vit import ViT
from fastssl.prepare.parts.learner import PartLearner, add_background
from fastssl.training import checkpoint
from fastssl.training.checkpoint import Checkpoint
from fastssl.weights.backbone import backbone_of


class PartFinder:
    """A frozen ViT with a part learner: images to part maps.

    Args:
        model: the ViT's configuration.
        backbone: the ViT, in eval mode; it is not trained.
        learner: queries and decoder.
        size: side of the square that images are resized to, in pixels.
        dtype: of autocast; float32: none.

    Attributes:
        place: float32 [N, D], what the patch tokens say about where they are rather than what they show; it is taken
            out before parts are looked for. 0 until `learn_place`.
    """

    def __init__(
        self, model: Model, backbone: ViT, learner: PartLearner, size: int, dtype: torch.dtype = torch.float32
    ) -> None:
        self.model, self.backbone, self.learner, self.size, self.dtype = model, backbone, learner, size, dtype
        patches = (size // backbone.patch_size) ** 2
        self.place = torch.zeros(patches, backbone.width, device=self.device)

    @property
    def device(self) -> torch.device:
        return self.backbone.cls_token.device

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """Normalised images [B, 3, S, S] -> the frozen tokens, float32 [B, 1+N, D]."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.backbone.tokens(images).float()

    @torch.no_grad()
    def maps(self, tokens: Tensor, background: bool = False) -> Tensor:
        """Frozen tokens [B, 1+N, D] -> part maps, float32 [B, P, g, g] (P+1 with a background)."""
        maps = self.learner.maps(self.placeless(tokens))
        return add_background(maps) if background else maps

    def placeless(self, tokens: Tensor) -> Tensor:
        """Frozen tokens [B, 1+N, D], their patches less `place`."""
        return torch.cat([tokens[:, :1], tokens[:, 1:] - self.place], dim=1)

    def learn_place(self, batches: Iterator[Batch]) -> None:
        """Sets `place` to the mean token of each place, over images and their mirror images, less the mean of all.

        A query that finds "upper left" needs no part; tokens of MAE say much about it. Ours, not the paper's.
        """
        total, count = torch.zeros_like(self.place), 0
        for batch in batches:
            images = normalised(batch, self.device)
            total += self.tokens(torch.cat([images, images.flip(3)]))[:, 1:].sum(0)
            count += 2 * len(images)
        self.place = total / count
        self.place -= self.place.mean(0)

    def save(self, path: str | Path) -> None:
        """Writes all that `load_finder` needs; raises CheckpointError if the disk refuses."""
        decoder = self.learner.decoder
        network = {
            **{f"backbone.{key}": value for key, value in self.backbone.state_dict().items()},
            **{f"learner.{key}": value for key, value in self.learner.state_dict().items()},
            "place": self.place,
        }
        numbers = {"parts": self.learner.parts, "width": decoder.first.out_channels, "doublings": len(decoder.steps)}
        config = {"model": asdict(self.model), "learner": {**numbers, "size": self.size}}
        checkpoint.write(path, Checkpoint("parts", config, network, "backbone."))


def load_finder(path: str | Path, device: torch.device, dtype: torch.dtype) -> PartFinder:
    """Reads what `fastssl parts learn` wrote.

    Raises:
        CheckpointError: no such file, damaged, or another kind of file.
    """
    saved = checkpoint.read(path, "parts", device=device)
    found, numbers = backbone_of(saved), saved.config["learner"]
    assert isinstance(found.module, ViT)  # parts are learned from nothing else
    learner = PartLearner(found.module.width, numbers["parts"], numbers["width"], numbers["doublings"])
    start = len("learner.")
    learner.load_state_dict({k[start:]: v for k, v in saved.network.items() if k.startswith("learner.")})
    backbone = found.module.to(device).eval().requires_grad_(False)
    finder = PartFinder(found.model, backbone, learner.to(device).eval(), numbers["size"], dtype)
    finder.place = saved.network["place"]
    return finder


def whole_images(source: Source, ids: np.ndarray, size: int, batch_size: int, workers: int = 0) -> Iterator[Batch]:
    """The images `ids`, each resized as a whole to a square (bilinear, antialiased), in order.

    Yields:
        Batches with the group "whole", uint8 [B, 1, 3, size, size]; the last one may be smaller.

    Raises:
        BadSampleError: an image cannot be read; raised while iterating.
    """
    view = View(name="whole", size=size, squash=size, interpolation="bilinear")
    return central_batches(source, [view], {}, batch_size=batch_size, workers=decoding_threads(workers, 1), ids=ids)


def normalised(batch: Batch, device: torch.device) -> Tensor:
    """The images of a batch of `whole_images` as networks take them, float32 [B, 3, S, S] on the device."""
    return augment(batch.to(device)).views["whole"][:, 0].float()
