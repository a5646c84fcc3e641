"""Training images of fine-tuning: decoded, cropped and augmented by timm in worker processes.

Every draw is a function of (seed, epoch, id): the same images for any number of workers, and after a resumption.
Letters: S side of the crop in pixels.
"""

from __future__ import annotations

import random
import signal
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from fastssl.config import ConfigError
from fastssl.loaders.index import batch_ids, order
from fastssl.loaders.sources import DecodeError, Source, decode
from fastssl.training import distributed


class TrainingImages(Dataset):
    """(epoch, id) -> (image float32 [3, S, S], label, id), or a sentence about a sample that cannot be read."""

    def __init__(self, source: Source, transform: Any, seed: int) -> None:
        self.source, self.transform, self.seed = source, transform, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int] | str:
        epoch, i = key
        seed = seed_of("crop", self.seed, epoch, i)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002 - timm's transforms draw from the global generators
        torch.manual_seed(seed)
        try:
            image = Image.fromarray(decode(self.source.read(i)))
        except DecodeError as error:
            return f"sample {i} ({self.source.name(i)}) {error}"
        return self.transform(image), int(self.source.labels[i]), i


class EpochBatches(Sampler):
    """This process's micro-batches of the epoch `epoch` from number `start` on, as lists of (epoch, id)."""

    def __init__(self, images: int, batch_size: int, count: int, seed: int) -> None:
        self.images, self.batch_size, self.count, self.seed = images, batch_size, count, seed
        self.epoch = self.start = 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        ids = order(self.images, self.seed, self.epoch)
        for position in range(self.start, self.count):
            mine = batch_ids(ids, position, self.batch_size, distributed.rank(), distributed.world())
            yield [(self.epoch, int(i)) for i in mine]


def collate(items: list) -> tuple[Tensor, Tensor, list[int]] | str:
    """Images, labels and ids of a micro-batch, or the sentence about its first sample that cannot be read."""
    bad = [item for item in items if isinstance(item, str)]
    if bad:
        return bad[0]
    images, labels, ids = zip(*items, strict=True)
    return torch.stack(images), torch.tensor(labels), list(ids)


def leave_signals_to_the_run(worker: int) -> None:
    """Run by each worker process: Ctrl-C reaches all processes of a terminal, and only the run is to answer."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def training_transform(size: int, *, scale: tuple[float, float], flip: float, augment: str, erase: float) -> Any:
    """PIL image -> float32 [3, size, size], drawn from the global random generators.

    Raises:
        ConfigError: timm does not know the augmentation asked for.
    """
    try:
        transform = create_transform(
            size,
            is_training=True,
            scale=scale,
            hflip=flip,
            color_jitter=None,  # type: ignore[arg-type]  # None is none; timm declares numbers alone
            auto_augment=augment or None,
            interpolation="bicubic",
            re_prob=erase,
            re_mode="pixel",
        )
    except (AssertionError, ValueError, KeyError, NotImplementedError):
        raise ConfigError(
            f"augment is '{augment}', which timm does not know; for example rand-m9-mstd0.5-inc1, or empty"
        ) from None
    for part in transform.transforms:
        for policy in [getattr(part, "ops", []), *getattr(part, "policy", [])]:  # RandAugment's, AutoAugment's
            for op in policy:
                if op.name.startswith("Posterize"):
                    op.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """timm's operation, which with 0 bits fails under Pillow 13; nothing but black is left then."""
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits > 0 else Image.new(image.mode, image.size)


def seed_of(purpose: str, *numbers: int) -> int:
    """A 32-bit seed from what it is for."""
    return zlib.crc32(purpose.encode() + struct.pack(f"<{len(numbers)}Q", *numbers))
