"""Semantic segmentation: UPerNet is fine-tuned on a checkpoint's backbone and judged by its mean IoU.

The protocol of BEiT (Bao et al. 2022, arXiv 2106.08254) and CAE (Chen et al. 2022, arXiv 2202.03026) on ADE20K: AdamW
with layer-wise learning-rate decay, linear warm-up, then a linear fall to 0; the last step counts. The network is
`segmenter.Segmenter`, the data are `label_maps.LabelledFolder`.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as transforms

from fastssl.config import (
    Ascending,
    BelowOne,
    ConfigError,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Probability,
    Seed,
    check,
    plain,
)
from fastssl.evaluation.accuracy import format_table
from fastssl.evaluation.data import EvaluationError, frozen, spaced_ids
from fastssl.evaluation.options import Hardware, require
from fastssl.evaluation.record import recorded
from fastssl.evaluation.shared import check_shared
from fastssl.evaluation.tuned.label_maps import (
    Crop,
    LabelledFolder,
    cut,
    normalise,
    open_labelled_folder,
    read_ahead,
    read_labels,
    resized,
)
from fastssl.evaluation.tuned.layer_decay import layer_groups, set_rates
from fastssl.evaluation.tuned.segmenter import (
    Overlap,
    Segmenter,
    best_classes,
    image_counts,
    overlap,
    pixel_loss,
    slide,
    whole,
)
from fastssl.loaders.decode import Frame
from fastssl.loaders.engine import decoding_threads
from fastssl.loaders.index import batch_ids, order
from fastssl.loaders.sources import Files
from fastssl.models import build_backbone, check_image_size
from fastssl.models.pyramid import Pyramid
from fastssl.models.vit import ViT
from fastssl.pictures import Sheet, tint
from fastssl.pictures import save as save_picture
from fastssl.progress import progress_bar
from fastssl.training import distributed
from fastssl.training.checkpoint import Checkpoint
from fastssl.training.device import choose_device, choose_dtype
from fastssl.training.loop import Pace, Run, count_steps, run_folder, settings
from fastssl.weights.backbone import digest, open_backbone

WARMUP_FROM = 1e-6  # of the learning rate
RESNET_WIDTH = 512  # of the decoder on a ResNet

Labelled = tuple[Tensor, Tensor, list[str]]  # images [B, 3, S, S], classes of the pixels [B, S, S], file names


@dataclass
class SegmentOptions(Hardware):
    """UPerNet on a checkpoint's backbone. Sides of images are in pixels."""

    checkpoint: str = ""
    """Checkpoint of a pretraining run, e.g. runs/mae/last.pt, or a library's model, e.g. torchvision:resnet50."""
    data: str = ""
    """Training set: a folder that holds `images` and `labels` (or `annotations`, or `masks`), or the folder of the
    images alone. The label picture of images/a/b.jpg is labels/a/b.png and has one class index per pixel."""
    val: str = ""
    """Set to be judged on, same forms as data."""
    data_labels: str = ""
    """Folder of the label pictures of data, where data is the folder of the images alone."""
    val_labels: str = ""
    """Folder of the label pictures of val, where val is the folder of the images alone."""
    ignore: int = 255
    """Value in the label pictures of pixels that do not count."""
    reduce_zero_label: bool = False
    """True: pixels with value 0 do not count either, and value k means class k - 1 (ADE20K)."""
    values: tuple[NonNegativeInt, ...] = ()
    """The value in the label pictures that means class 0, 1, .., e.g. [0,255]; a value listed here counts, even if
    --ignore names it. Empty: a value is its class."""
    frame: Frame = ""
    """What the label pictures of images that EXIF turns were drawn on: the upright image, or the stored pixels. Empty:
    told by the sizes; an error where both fit."""
    allow_shared: bool = False
    """Go on where images of val are in data too, as in some benchmarks' own splits, and print how many."""
    classes: NonNegativeInt = 0
    """Number of classes. 0: those of names or values, else one more than the largest label in data."""
    names: str = ""
    """Text file with one class name per line, for the table. Empty: numbers."""
    dir: str = ""
    """Folder for last.pt, the logs and the pictures; the same command continues there. Empty: `segment` beside the
    checkpoint."""
    scratch: bool = False
    """True: random weights in place of the checkpoint's, all else equal: what pretraining has to beat."""

    taps: tuple[int, ...] = ()
    """Four blocks of a ViT, from 0, whose tokens make the four maps. Empty: [3, 5, 7, 11] of 12, [7, 11, 15, 23] of 24,
    else the last block of each quarter."""
    relative_positions: bool = False
    """Add to a ViT's attention a learned bias per relative position, zero at the start (CAE)."""
    drop_path: Probability = 0.1
    """Stochastic depth of a ViT's last block; earlier blocks get proportionally less."""
    channels: NonNegativeInt = 0
    """Channels of the decoder. 0: a ViT's width; 512 for a ResNet."""
    dropout: BelowOne = 0.1
    """Probability that a channel is left out before the last convolution."""
    auxiliary: NonNegativeFloat = 0.4
    """Weight of the loss of a second, small head on the third map. 0: there is none."""
    checkpointing: bool = False
    """Compute a ViT's blocks anew in the backward pass: less memory, about a third more time."""

    steps: PositiveInt = 160000
    """Optimizer steps."""
    warmup_steps: NonNegativeInt = 1500
    """Optimizer steps in which the learning rate is multiplied by a factor that grows linearly, from 1e-6 to 1."""
    batch_size: PositiveInt = 2
    """Images per process and micro-batch."""
    accumulate: PositiveInt = 1
    """Micro-batches per optimizer step. The published recipe takes 16 images per step."""
    lr: PositiveFloat = 1e-4
    """Learning rate of the decoder, as it is: not scaled with the images per step. It falls linearly to 0."""
    layer_decay: Fraction = 0.65
    """Each layer (a ViT's block, a ResNet's stage) learns at this multiple of the rate of the next one."""
    weight_decay: NonNegativeFloat = 0.05
    """Of matrices; never of biases, norms, the class token and the position table."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """AdamW's decay rates of the two moments."""

    crop: PositiveInt = 512
    """Side of the training crops and of the sliding window."""
    short_side: PositiveInt = 512
    """Images are resized so that the shorter side is this long, unless the longer one would pass long_side."""
    long_side: PositiveInt = 2048
    """See short_side."""
    scale: Annotated[tuple[PositiveFloat, PositiveFloat], Ascending()] = (0.5, 2.0)
    """In training, both are multiplied by a factor drawn from this range."""
    flip: Probability = 0.5
    """Probability of a horizontal flip."""
    distort: bool = True
    """Change brightness, contrast, saturation and hue of the training crops."""
    mode: Literal["slide", "whole"] = "slide"
    """How an image is judged: in windows of side crop that overlap, their scores averaged, or in one piece."""
    stride: NonNegativeInt = 0
    """Pixels from one window to the next. 0: two thirds of crop."""
    eval_every: NonNegativeInt = 16000
    """Optimizer steps between two measurements. 0: only after the last."""
    save_every: PositiveInt = 1000
    """Optimizer steps between two writings of last.pt."""
    pictures: NonNegativeInt = 8
    """Images of val drawn into the run folder: image, truth, answer."""
    seed: Seed = 0
    """Seed of the first weights, the order, the crops and stochastic depth; 0 to 2^32 - 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, checkpoint="a checkpoint", data="labelled images", val="labelled images")
        if Path(self.data).resolve() == Path(self.val).resolve():
            raise ConfigError(f"val is the same as data ({self.data}); name images that are not trained on")
        check(len(set(self.values)) == len(self.values) != 1, "values", self.values, "two or more different values")
        check(not (self.values and self.reduce_zero_label), "reduce_zero_label", True, "off with --values")
        check(self.classes != 1, "classes", self.classes, "2 or more, or 0 (as data has)")
        check(self.warmup_steps <= self.steps, "warmup_steps", self.warmup_steps, f"at most steps ({self.steps})")
        check(self.stride <= self.crop, "stride", self.stride, f"at most crop ({self.crop})")
        windows = "slide with relative_positions, which are made for the windows' size"
        check(not (self.relative_positions and self.mode == "whole"), "mode", self.mode, windows)

    @property
    def cutting(self) -> Crop:
        """How training images are cut."""
        return Crop(self.crop, self.short_side, self.long_side, self.scale, self.flip, self.distort)


@dataclass(frozen=True)
class SegmentEvaluation:
    """What the network is worth.

    Attributes:
        checkpoint: path of the backbone's checkpoint; `scratch`: its weights were not used.
        step: optimizer steps of its run.
        path: the trained network.
        overlap: the numbers.
        names: of the classes.
        train_images: how many.
        steps: optimizer steps.
        history: (step, miou) of the measurements on the way.
        seconds: of this call.
    """

    checkpoint: str
    step: int
    scratch: bool
    path: str
    overlap: Overlap
    names: list[str]
    train_images: int
    steps: int
    history: list[tuple[int, float]]
    seconds: float

    @property
    def miou(self) -> float:
        """Mean intersection over union, in percent."""
        return self.overlap.miou

    def as_dict(self) -> dict[str, Any]:
        numbers = {key: value for key, value in vars(self.overlap).items() if key not in ("iou", "acc", "images")}
        by_class = [
            {"name": name, "iou": iou, "acc": acc}
            for name, iou, acc in zip(self.names, self.overlap.iou, self.overlap.acc, strict=True)
        ]
        rest = {key: value for key, value in vars(self).items() if key not in ("overlap", "names")}
        return {**numbers, "val_images": self.overlap.images, **rest, "classes": by_class}

    def table(self) -> str:
        overlap, weights = self.overlap, " (random weights)" if self.scratch else ""
        low, high = overlap.interval
        head = (
            f"segmentation, {self.checkpoint}{weights}: {self.train_images} training images, {self.steps} steps, "
            f"{overlap.images} validation images, {self.seconds:.0f} s"
        )
        numbers = [
            ("mIoU %", "95 % interval", "mAcc %", "aAcc %"),
            (f"{overlap.miou:.2f}", f"{low:.2f} to {high:.2f}", f"{overlap.macc:.2f}", f"{overlap.aacc:.2f}"),
        ]
        classes: list[tuple[str, ...]] = [("class", "IoU %", "accuracy %")]
        for name, *shares in zip(self.names, overlap.iou, overlap.acc, strict=True):
            classes.append((name, *("-" if share is None else f"{share:.2f}" for share in shares)))
        constant = f"to compare: one class everywhere has at best {overlap.constant:.2f} % mIoU"
        return "\n\n".join([head, format_table(numbers), format_table(classes), constant])


# -- the run ---------------------------------------------------------------------------------------------------------


class Segmentation(Run[Labelled, SegmentEvaluation]):
    """One run on this process (one of several under torchrun). `train()` runs it to its end.

    Raises:
        ConfigError, CheckpointError, EvaluationError: something asked for does not exist or does not fit.
    """

    kind = "segment"
    salt = b"segment"

    def __init__(self, options: SegmentOptions) -> None:
        self.options = options
        begin = time.perf_counter()
        device = choose_device(options.device, "device")
        dtype = choose_dtype(options.precision, device, "precision")
        distributed.start(device)
        self.threads = decoding_threads(options.workers, distributed.local_world())

        # Data.
        meaning = (options.ignore, options.reduce_zero_label, options.frame, options.values)
        bar = "labels" if distributed.is_main() else ""
        self.data = open_labelled_folder(options.data, options.data_labels, "data", *meaning)
        self.val = open_labelled_folder(options.val, options.val_labels, "val", *meaning)
        data, val = (Files([str(path) for path in one.images]) for one in (self.data, self.val))
        check_shared(data, val, f"data ({options.data})", f"val ({options.val})", options.allow_shared)
        names = read_names(options.names)
        lines = f"{len(names)}, the lines of {options.names}"
        check(not (names and options.classes) or options.classes == len(names), "classes", options.classes, lines)
        self.classes = options.classes or len(names) or len(options.values)
        check(
            len(options.values) in (0, self.classes),
            "values",
            options.values,
            f"one for each of {self.classes} classes",
        )
        self.classes = max(self.classes, read_labels(self.data, self.classes, self.threads, device, bar))
        check(self.classes > 1, "data", options.data, "label pictures of two classes or more")
        read_labels(self.val, self.classes, self.threads, device, bar)  # now, not after hours of training
        self.names = names or [str(i) for i in range(self.classes)]
        images_per_step, steps_per_epoch = count_steps(
            len(self.data), options.batch_size, options.accumulate, options.data
        )
        if options.batch_size * distributed.world() < 2:
            raise ConfigError("batch_size is 1 on one process; batch norm over a whole image needs two images at least")

        # What is trained, and how.
        torch.manual_seed(options.seed)
        self.segmenter = self._build().to(device).train()
        groups = layer_groups(
            self.segmenter, self.segmenter.pyramid.backbone, options.layer_decay, options.weight_decay
        )
        optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, fused=True)
        self.history: list[tuple[int, float]] = []  # (step, miou) of the measurements on the way
        pace = Pace(
            total_steps=options.steps,
            steps_per_epoch=steps_per_epoch,
            images_per_step=images_per_step,
            accumulate=options.accumulate,
            seed=options.seed,
            save_every=options.save_every,
        )
        folder = run_folder(options.dir, options.checkpoint, "segment")
        self.prepare(self.segmenter, optimizer, pace, folder=folder, device=device, dtype=dtype)
        self.begun = begin

    def _build(self) -> Segmenter:
        options = self.options
        found = open_backbone(options.checkpoint)
        self.config, self.first_step = found.config, found.step
        self.weights = "" if options.scratch else digest(found.module)
        check_image_size(found.model, "crop", options.crop)
        backbone = build_backbone(found.model) if options.scratch else found.module
        how: dict[str, Any] = {"taps": options.taps or None}
        if isinstance(backbone, ViT):
            side = options.crop // backbone.patch_size
            how["window"] = (side, side) if options.relative_positions else None
            how |= {"drop_path": options.drop_path, "checkpointing": options.checkpointing}
        else:
            check(not options.relative_positions, "relative_positions", True, "off with a ResNet")
            check(not options.checkpointing, "checkpointing", True, "off with a ResNet")
        pyramid = Pyramid(backbone, **how)
        width = options.channels or (backbone.width if isinstance(backbone, ViT) else RESNET_WIDTH)
        return Segmenter(pyramid, self.classes, width, options.dropout, options.auxiliary > 0)

    # -- a step --------------------------------------------------------------------------------------------------------

    def micro_batches(self) -> Generator[Labelled, None, None]:
        """This process's training crops from here on: images of one optimizer step depend on the step alone."""
        options, data = self.options, self.data

        def keys() -> Iterator[tuple[int, int]]:
            for step in range(self.step, options.steps):
                epoch, into = divmod(step, self.pace.steps_per_epoch)
                ids = order(len(data), options.seed, epoch)
                for micro in range(options.accumulate):
                    position = into * options.accumulate + micro
                    mine = batch_ids(ids, position, options.batch_size, distributed.rank(), distributed.world())
                    yield from ((epoch, int(i)) for i in mine)

        def make(key: tuple[int, int]) -> tuple[Tensor, Tensor, str]:
            epoch, i = key
            pair = data.pair(i, self.classes)
            picture, labels = cut(*pair, options.cutting, seed=options.seed, epoch=epoch, number=i)
            return picture, labels, str(data.images[i])

        ahead = read_ahead(keys(), make, self.threads, prefetch=2 * max(self.threads, options.batch_size))
        with contextlib.closing(ahead) as crops:
            while taken := list(itertools.islice(crops, options.batch_size)):
                pictures, labels, names = zip(*taken, strict=True)
                yield torch.stack(pictures), torch.stack(labels), list(names)

    def sample_ids(self, batch: Labelled) -> list[str]:
        return batch[2]

    def schedule(self) -> dict[str, float]:
        options = self.options
        return set_rates(self.optimizer, options.lr * lr_factor(self.step, options.steps, options.warmup_steps))

    def on_device(self, batch: Labelled) -> Labelled:
        images, labels, names = batch
        return images.to(self.device), labels.to(self.device), names

    def losses(self, batch: Labelled) -> tuple[Tensor, dict[str, Tensor]]:
        images, labels, _ = batch
        scores, small = self.parallel(images)
        with torch.autocast(self.device.type, enabled=False):
            main = pixel_loss(scores, labels)
            loss = main if small is None else main + self.options.auxiliary * pixel_loss(small, labels)
        return loss, {"loss_decoder": main.detach()}

    # -- the checkpoint ------------------------------------------------------------------------------------------------

    def fingerprint(self) -> dict[str, Any]:
        free = ("val_labels", "names", "mode", "stride", "pictures", "eval_every", "save_every", "checkpointing")
        images = {
            "weights": self.weights,
            "classes": self.classes,
            "images_per_step": self.pace.images_per_step,
            "images": len(self.data),
        }
        return {**settings(self.options, *free), **images}

    def record(self) -> Checkpoint:
        extra = {"history": plain(self.history)}
        return Checkpoint(self.kind, self.config, self.segmenter.state_dict(), "pyramid.backbone.", extra=extra)

    def restore(self, saved: Checkpoint) -> None:
        self.history = [(int(step), miou) for step, miou in saved.extra["history"]]

    # -- between steps -------------------------------------------------------------------------------------------------

    def describe(self) -> list[str]:
        options = self.options
        return [
            f"UPerNet on {options.checkpoint}{' (random weights)' if options.scratch else ''}, {self.classes} classes, "
            f"on {self.device}: {len(self.data)} images, {self.pace.images_per_step} per step, {options.steps} steps"
        ]

    def begin(self) -> None:
        self.between()  # an earlier start may have been ended before it could measure

    def between(self) -> None:
        every, step = self.options.eval_every, self.step
        measured = self.history and self.history[-1][0] == step
        if not every or step == 0 or step % every or step == self.options.steps or measured:
            return
        self.history.append((step, self.judge().miou))
        self.log.record({"step": step, "miou": self.history[-1][1]})
        self.log.say(f"step {step}: {self.history[-1][1]:.2f} % mIoU")
        self.save_last(again=True)

    def finish(self) -> SegmentEvaluation:
        options, found = self.options, self.judge(self.options.pictures)
        self.log.record({"step": self.step, "miou": found.miou, "macc": found.macc, "aacc": found.aacc})
        return SegmentEvaluation(
            checkpoint=options.checkpoint,
            step=self.first_step,
            scratch=options.scratch,
            path=str(self.path),
            overlap=found,
            names=self.names,
            train_images=len(self.data),
            steps=self.step,
            history=self.history,
            seconds=round(time.perf_counter() - self.begun, 1),
        )

    # -- judging -------------------------------------------------------------------------------------------------------

    def judge(self, pictures: int = 0) -> Overlap:
        """The numbers on val, the same on every process; `pictures` of its images are drawn."""
        options = self.options
        assert self.folder is not None
        with frozen(self.segmenter):
            return judge(
                self._classify,
                self.val,
                self.classes,
                workers=self.threads,
                device=self.device,
                draw=spaced_ids(len(self.val), pictures).tolist(),
                folder=self.folder / "pictures",
                progress="val" if distributed.is_main() else "",
                seed=options.seed,
            )

    @torch.no_grad()
    def _classify(self, picture: Tensor) -> Tensor:
        """uint8 [3, H, W] on the CPU -> class of each pixel, int64 [H, W] on the device."""
        options, (height, width) = self.options, picture.shape[1:]
        size = list(resized(height, width, options.short_side, options.long_side))
        seen = transforms.resize(picture, size, InterpolationMode.BILINEAR, antialias=True)
        image = normalise(seen).to(self.device)

        def look(images: Tensor) -> Tensor:
            with self.autocast():
                return self.segmenter(images)[0]

        if options.mode == "slide":
            scores = slide(look, image, options.crop, options.stride or max(options.crop * 2 // 3, 1))
        else:
            scores = whole(look, image, int(self.segmenter.pyramid.strides[-1]))
        if not torch.isfinite(scores).all():
            raise EvaluationError("the network's scores are not finite; its weights are broken")
        return best_classes(scores, height, width)


def judge(
    classify: Any,
    data: LabelledFolder,
    classes: int,
    *,
    workers: int = 1,
    device: torch.device | str = "cpu",
    draw: list[int] | None = None,
    folder: Path | None = None,
    progress: str = "",
    seed: int = 0,
) -> Overlap:
    """The numbers of a classifier of pixels; the images are dealt to the processes, each counts once.

    Args:
        classify: uint8 [3, H, W] -> int64 [H, W].
        data: the images and their labels.
        classes: K.
        workers: decoding threads.
        device: where the classes that `classify` finds are, and where the process group communicates.
        draw: positions of images that are drawn into `folder`: image, truth, answer.
        progress: label of the progress bar; empty shows none.
        seed: of the bootstrap.

    Returns:
        The same on every process.
    """
    own = range(distributed.rank(), len(data), distributed.world())
    counts = torch.zeros(len(own), 3, classes, dtype=torch.int64)
    bar = progress_bar(len(own), progress)
    with bar, contextlib.closing(read_ahead(own, lambda i: data.pair(i, classes), workers)) as pairs:
        for row, i, (picture, labels) in zip(counts, own, pairs, strict=True):
            found = classify(picture)
            row.copy_(image_counts(found, labels.to(found.device), classes))
            if folder is not None and i in (draw or ()):
                _draw(folder / f"{i:05d}-{data.images[i].stem}.png", picture, labels, found.cpu(), classes)
            bar.update()
    return overlap(distributed.gather_rows(counts, len(data), torch.device(device)), seed)


def _draw(path: Path, picture: Tensor, labels: Tensor, found: Tensor, classes: int) -> None:
    """Image, truth and answer side by side; classes in evenly spaced colours, ignored pixels as they are."""
    plain = picture.float() / 255
    rows = torch.stack([plain, tint(plain, labels, classes), tint(plain, found, classes)])[None]
    words = "A colour per class; pixels that do not count keep their own."
    save_picture(path, Sheet(rows, ["image", "truth", "answer"], [(None, words)]))


def lr_factor(step: int, steps: int, warmup_steps: int) -> float:
    """Learning rate of a step as a fraction of the first: linear to 0, times a linear warm-up from 1e-6 to 1."""
    factor = 1 - step / steps
    if step < warmup_steps:
        factor *= WARMUP_FROM + (1 - WARMUP_FROM) * step / warmup_steps
    return factor


def read_names(path: str) -> list[str]:
    """The lines of a text file, without empty ones; none for an empty path. ConfigError if it cannot be read."""
    if not path:
        return []
    try:
        return [line.strip() for line in Path(path).read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"names is {path!r}, which cannot be read ({error})") from None


@recorded("segment")
def evaluate_segment(options: SegmentOptions) -> SegmentEvaluation:
    """Train UPerNet on a checkpoint's backbone on labelled pixels and measure its mean IoU on others.

    Sources: Xiao et al. 2018 (arXiv 1807.10221); Bao et al. 2022 (arXiv 2106.08254), semantic segmentation.
    """
    return Segmentation(options).train()
