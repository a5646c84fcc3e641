"""What the loader is measured against: each installed peer doing the same work, as a careful user would set it up.

A contender is a callable that runs one epoch over the given samples and returns the number of images; all read the same
encoded bytes from memory, keep their workers between epochs, and use as many workers as we do. None of them has our
boxes: they draw their own from the same distributions.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps

from fastssl.batch import IMAGENET_MEAN, IMAGENET_STD
from fastssl.config import View
from fastssl.loaders.masks import Mask
from fastssl.loaders.sources import Source, decode

Epoch = Callable[[], int]


class Missing(RuntimeError):
    """A contender cannot take part; the message says what is missing."""


class Case(NamedTuple):
    """What is made of each image: crops, masks and part labels as for `Loader`.

    Attributes:
        floats: whether photometric operations and normalisation to float32 are part of the work.
    """

    views: list[View]
    floats: bool
    masks: Sequence[Mask] = ()
    part_grid: dict[str, int] | None = None


class Peer:
    """What every contender gets.

    Attributes:
        source, ids: the samples.
        case: what is made of them; its `views` and `floats` also by these names.
        batch_size, workers: as for our engines.
        beton: path of a .beton file with the same samples in the same order, where there is one.
    """

    def __init__(
        self,
        source: Source,
        ids: np.ndarray,
        case: Case,
        *,
        batch_size: int,
        workers: int,
        beton: str | None,
    ) -> None:
        self.source, self.ids, self.case = source, ids, case
        self.views, self.floats = case.views, case.floats
        self.batch_size, self.workers, self.beton = batch_size, workers, beton


def torchvision_pil(peer: Peer, stack: ExitStack) -> Epoch:
    """torch's DataLoader with torchvision's transforms on PIL images, as DINO's authors have it."""
    from torchvision import transforms as t

    def transform(view: View) -> Any:
        steps = [
            t.RandomResizedCrop(view.size, view.scale, view.ratio, interpolation=t.InterpolationMode.BICUBIC),
            t.RandomHorizontalFlip(view.flip),
        ]
        if not peer.floats:
            return t.Compose([*steps, t.PILToTensor()])
        steps += [
            t.RandomApply([t.ColorJitter(*view.jitter)], view.jitter_p),
            t.RandomGrayscale(view.gray),
            _PILBlur(view.blur, view.blur_sigma),
            _PILSolarize(view.solarize, view.solarize_threshold),
        ]
        return t.Compose([*steps, t.ToTensor(), t.Normalize(IMAGENET_MEAN, IMAGENET_STD)])

    return _data_loader(peer, stack, _read_pil, transform)


def torchvision_v2(peer: Peer, stack: ExitStack) -> Epoch:
    """torch's DataLoader with torchvision's v2 transforms on tensors."""
    from torchvision.transforms import v2

    def transform(view: View) -> Any:
        steps = [
            v2.RandomResizedCrop(view.size, view.scale, view.ratio, v2.InterpolationMode.BICUBIC, antialias=True),
            v2.RandomHorizontalFlip(view.flip),
        ]
        if not peer.floats:
            return v2.Compose(steps)
        jitter, blur = v2.ColorJitter(*view.jitter), v2.GaussianBlur(13, view.blur_sigma)
        steps += [v2.RandomApply([jitter], view.jitter_p), v2.RandomGrayscale(view.gray)]
        steps += [v2.RandomApply([blur], view.blur), v2.RandomSolarize(view.solarize_threshold, view.solarize)]
        return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)])

    return _data_loader(peer, stack, _read_tensor, transform)


class _PILBlur:
    def __init__(self, p: float, sigma: tuple[float, float]) -> None:
        self.p, self.sigma = p, sigma

    def __call__(self, image: Image.Image) -> Image.Image:
        if torch.rand(()) >= self.p:
            return image
        low, high = self.sigma
        return image.filter(ImageFilter.GaussianBlur(low + (high - low) * torch.rand(()).item()))


class _PILSolarize:
    def __init__(self, p: float, threshold: float) -> None:
        self.p, self.threshold = p, threshold

    def __call__(self, image: Image.Image) -> Image.Image:
        return ImageOps.solarize(image, int(self.threshold)) if torch.rand(()) < self.p else image


def _read_pil(source: Source, i: int) -> Image.Image:
    return Image.open(io.BytesIO(source.read(i).data.tobytes())).convert("RGB")


def _read_tensor(source: Source, i: int) -> torch.Tensor:
    from torchvision.io import ImageReadMode, decode_jpeg

    return decode_jpeg(torch.from_numpy(source.read(i).data.copy()), ImageReadMode.RGB)


class _Crops(torch.utils.data.Dataset):
    def __init__(self, peer: Peer, read: Callable, transforms: list[tuple[int, Any]]) -> None:
        self.source, self.ids, self.read, self.transforms = peer.source, peer.ids, read, transforms

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, k: int) -> list[torch.Tensor]:
        image = self.read(self.source, int(self.ids[k]))
        return [transform(image) for count, transform in self.transforms for _ in range(count)]


def _data_loader(peer: Peer, stack: ExitStack, read: Callable, transform: Callable[[View], Any]) -> Epoch:
    dataset = _Crops(peer, read, [(view.count, transform(view)) for view in peer.views])
    loader = torch.utils.data.DataLoader(
        dataset, peer.batch_size, shuffle=True, num_workers=peer.workers, persistent_workers=peer.workers > 0
    )  # one thread in each worker, as DataLoader sets it
    stack.callback(_end_workers, loader)
    return lambda: sum(len(batch[0]) for batch in loader)


def _end_workers(loader: Any) -> None:
    if loader._iterator is not None:
        loader._iterator._shutdown_workers()
        loader._iterator = None


def peer_dali(peer: Peer, stack: ExitStack) -> Epoch:
    """DALI with its own random operators, on the CPU; the single crop in its fused decoder."""
    try:
        from nvidia.dali import Pipeline, fn, math, types
    except ImportError:
        raise Missing("the package nvidia-dali is not installed") from None

    data, rng = [peer.source.read(int(i)).data for i in peer.ids], np.random.default_rng(0)
    depth = min(2, -(-len(data) // peer.batch_size))
    pipe = Pipeline(peer.batch_size, peer.workers, None, prefetch_queue_depth=depth, exec_dynamic=True, seed=1)

    def chance(p: float) -> Any:
        return fn.random.coin_flip(probability=p, dtype=types.BOOL)

    def either(p: float, changed: Any, image: Any) -> Any:
        yes = fn.cast(chance(p), dtype=types.UINT8)
        return changed * yes + image * (1 - yes)

    def about_one(strength: float) -> Any:
        return fn.random.uniform(range=[max(0.0, 1 - strength), 1 + strength])

    def view_of(image: Any, view: View) -> Any:
        cubic = dict(interp_type=types.INTERP_CUBIC, antialias=True)
        if image is None:
            crop = fn.decoders.image_random_crop(encoded, random_area=view.scale, random_aspect_ratio=view.ratio)
            crop = fn.resize(crop, size=[view.size, view.size], **cubic)
        else:
            crop = fn.random_resized_crop(
                image, size=[view.size, view.size], random_area=view.scale, random_aspect_ratio=view.ratio, **cubic
            )
        mirror = fn.random.coin_flip(probability=view.flip)
        plain = dict(mirror=mirror, output_layout="CHW")
        if not peer.floats:
            return fn.crop_mirror_normalize(crop, dtype=types.UINT8, mean=[0.0] * 3, std=[1.0] * 3, **plain)
        brightness, contrast, saturation, hue = view.jitter
        jittered = fn.color_twist(
            crop,
            brightness=about_one(brightness),
            contrast=about_one(contrast),
            saturation=about_one(saturation),
            hue=fn.random.uniform(range=[-360 * hue, 360 * hue]),
        )
        crop = either(view.jitter_p, jittered, crop)
        gray = fn.cast(chance(view.gray), dtype=types.FLOAT)
        crop = fn.saturation(crop, saturation=1 - gray)
        if view.blur:
            low, high = view.blur_sigma
            crop = either(view.blur, fn.gaussian_blur(crop, sigma=fn.random.uniform(range=[low, high])), crop)
        if view.solarize:
            high = fn.cast(crop >= int(view.solarize_threshold), dtype=types.UINT8)
            solarized = fn.cast(high * (255 - crop) + (1 - high) * crop, dtype=types.UINT8)
            crop = either(view.solarize, solarized, crop)
        mean, std = [255 * value for value in IMAGENET_MEAN], [255 * value for value in IMAGENET_STD]
        return fn.crop_mirror_normalize(math.clamp(crop, 0, 255), dtype=types.FLOAT, mean=mean, std=std, **plain)

    with pipe:
        encoded = fn.external_source(name="data", dtype=types.UINT8, ndim=1)
        several = sum(view.count for view in peer.views) > 1
        image = fn.decoders.image(encoded, output_type=types.RGB) if several else None
        pipe.set_outputs(*(view_of(image, view) for view in peer.views for _ in range(view.count)))
    pipe.build()

    def batches() -> Iterator[list[np.ndarray]]:
        order = rng.permutation(len(data))
        for start in range(0, len(order), peer.batch_size):
            yield [data[k] for k in order[start : start + peer.batch_size]]

    started: list[bool] = []

    def epoch() -> int:
        images, waiting = 0, 0  # batches in the pipeline
        for number, batch in enumerate(batches()):
            pipe.feed_input("data", batch)
            waiting += 1
            if started or number == depth - 1:
                pipe.schedule_run()  # the very first call starts on `depth` batches
                started.append(True)
                if waiting == depth:
                    images, waiting = images + take(), waiting - 1
        while waiting:  # nothing is left running for the next contender's time
            images, waiting = images + take(), waiting - 1
        return images

    def take() -> int:
        outputs = pipe.outputs()
        return len(torch.from_dlpack(outputs[0].as_tensor()))

    return epoch


def peer_ffcv(peer: Peer, stack: ExitStack) -> Epoch:
    """FFCV's own loader and random-resized-crop decoder on the same .beton (it has one crop per decoding)."""
    try:
        from ffcv.fields.decoders import RandomResizedCropRGBImageDecoder
        from ffcv.loader import Loader, OrderOption
        from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage
    except ImportError:
        raise Missing("the package ffcv is not installed") from None
    if peer.floats or sum(view.count for view in peer.views) > 1:
        raise Missing("FFCV's loader makes one crop per decoding and has no such photometric operations")
    if peer.beton is None:
        raise Missing("FFCV's loader needs a .beton file")
    (view,) = peer.views
    loader = Loader(
        peer.beton,
        batch_size=peer.batch_size,
        num_workers=peer.workers,
        order=OrderOption.RANDOM,
        os_cache=True,
        indices=peer.ids,
        drop_last=False,
        pipelines={
            "image": [
                RandomResizedCropRGBImageDecoder((view.size, view.size), view.scale, view.ratio),
                RandomHorizontalFlip(view.flip),
                ToTensor(),
                ToTorchImage(),
            ],
            "label": None,
        },
    )
    return lambda: sum(len(batch[0]) for batch in loader)


def bare_decode(peer: Peer, stack: ExitStack) -> Epoch:
    """The fastest JPEG decoder here, in one thread, and nothing else: every pixel of every image."""
    decode_all = _fastest_decoder()

    def epoch() -> int:
        for i in peer.ids:
            decode_all(peer.source.read(int(i)))
        return len(peer.ids)

    return epoch


def _fastest_decoder() -> Callable:
    try:
        from fastssl.loaders import window_decoder
    except ImportError:
        return decode
    return window_decoder.decode


PEERS: dict[str, Callable[[Peer, ExitStack], Epoch]] = {
    "torchvision-pil": torchvision_pil,
    "torchvision-v2": torchvision_v2,
    "peer-dali": peer_dali,
    "peer-ffcv": peer_ffcv,
    "bare-decode": bare_decode,
}
