"""Detection and instance segmentation: Mask R-CNN is fine-tuned on a checkpoint's backbone, judged by COCO's numbers.

The protocol of CAE (Chen et al. 2022, arXiv 2202.03026): AdamW with layer-wise learning-rate decay, 12 epochs ("1x")
with two drops, two ways of cutting the training images (`coco_views.cut`); the last epoch counts. The network is
`detector.build_detector`. Cascade Mask R-CNN, which torchvision lacks, is not offered.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Generator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastssl.config import (
    Ascending,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Probability,
    Seed,
    check,
)
from fastssl.evaluation.accuracy import format_table
from fastssl.evaluation.data import EvaluationError
from fastssl.evaluation.options import Hardware, require
from fastssl.evaluation.record import recorded
from fastssl.evaluation.shared import check_shared
from fastssl.evaluation.tuned.coco import check_categories, pycocotools, read_coco
from fastssl.evaluation.tuned.coco_precision import Precision, average_precision, detect
from fastssl.evaluation.tuned.coco_views import Cuts, cut, read_ahead
from fastssl.evaluation.tuned.detector import build_detector
from fastssl.evaluation.tuned.layer_decay import layer_groups, set_rates
from fastssl.loaders.decode import Frame
from fastssl.loaders.engine import decoding_threads
from fastssl.loaders.index import batch_ids, order
from fastssl.models import AnyBackbone, build_backbone
from fastssl.training import distributed
from fastssl.training.checkpoint import Checkpoint, replace_file
from fastssl.training.device import choose_device, choose_dtype
from fastssl.training.loop import LOG_EVERY, Pace, Run, count_steps, run_folder, settings
from fastssl.weights.backbone import digest, open_backbone

WARMUP_FROM = 0.001  # of the peak learning rate
DROP = 0.1


@dataclass
class DetectOptions(Hardware):
    """Mask R-CNN on a checkpoint's backbone. Annotations are in COCO's format; sides of images are in pixels."""

    checkpoint: str = ""
    """Checkpoint of a pretraining run, e.g. runs/mae/last.pt."""
    data: str = ""
    """Annotations of the training images, e.g. coco/annotations/instances_train2017.json."""
    val: str = ""
    """Annotations of the images to be judged on; the same categories."""
    data_images: str = ""
    """Folder from which the file names in data start, e.g. coco/train2017. Empty: the folder of data."""
    val_images: str = ""
    """Folder from which the file names in val start. Empty: the folder of val."""
    dir: str = ""
    """Folder for last.pt (after every epoch), the logs, detections.json and result.json; the same command continues
    there. Empty: `detect` beside the checkpoint."""
    frame: Frame = ""
    """What the annotations of images that EXIF turns were drawn on: the upright image, or the stored pixels. Empty:
    told by height and width; an error where both fit."""
    allow_shared: bool = False
    """Go on where images of val are in data too, as in some benchmarks' own splits, and print how many."""
    scratch: bool = False
    """Start from random weights instead of the checkpoint's: the baseline that pretraining has to beat."""
    epochs: PositiveInt = 12
    """Passes over the training images that have objects."""
    drop_epochs: tuple[PositiveInt, ...] = (9, 11)
    """The learning rate falls to a tenth after each of these epochs."""
    warmup_steps: NonNegativeInt = 500
    """Optimizer steps in which the learning rate grows linearly, from a thousandth."""
    batch_size: PositiveInt = 2
    """Training images per process and micro-batch. Images are judged one at a time, since padding would change them."""
    accumulate: PositiveInt = 1
    """Micro-batches per optimizer step. The published recipe takes 32 images per step."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """adamw (0.9, 0.999), or sgd with momentum 0.9."""
    lr: PositiveFloat = 3e-4
    """Peak learning rate, as it is: not scaled with the images per step."""
    weight_decay: NonNegativeFloat = 0.05
    """Weight decay (matrices only; never biases, norms)."""
    layer_decay: Fraction = 0.75
    """Each layer (a ViT's block, a ResNet's stage) learns at this multiple of the rate of the next one."""
    drop_path: Probability = 0.2
    """Stochastic depth of a ViT's last block; earlier blocks get proportionally less."""
    checkpointing: bool = False
    """Compute a ViT's blocks anew in the backward pass: less memory, about a third more time."""
    channels: PositiveInt = 256
    """Channels of the feature pyramid and of the heads' convolutions."""
    rois: PositiveInt = 512
    """Boxes per image from which the heads learn."""
    short_sides: tuple[PositiveInt, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    """Shorter side of a training image: one of these, drawn at random."""
    long_side: PositiveInt = 1333
    """The longer side is at most this, in training and test."""
    crop_short_sides: tuple[PositiveInt, ...] = (400, 500, 600)
    """Half of the training images are resized to one of these, cropped, and resized again. Empty list: none is."""
    crop: Annotated[tuple[PositiveInt, PositiveInt], Ascending()] = (384, 600)
    """Smallest and largest side of that crop; height and width are drawn by themselves."""
    flip: Probability = 0.5
    """Probability of a horizontal flip."""
    test_side: PositiveInt = 800
    """Shorter side of the images that are judged."""
    seed: Seed = 0
    """Seed of the first weights, the order, the crops, and what the heads learn from; 0 to 2^32 - 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, checkpoint="a checkpoint", data="annotations", val="annotations")
        check(len(self.short_sides) > 0, "short_sides", self.short_sides, "one or more sides in pixels")

    @property
    def cuts(self) -> Cuts:
        """How training images are cut."""
        return Cuts(self.short_sides, self.long_side, self.crop_short_sides, self.crop, self.flip)


@dataclass(frozen=True)
class DetectEvaluation:
    """What the detector is worth.

    Attributes:
        checkpoint: path of the backbone's checkpoint; `scratch`: its weights were not used.
        step: optimizer steps of its run.
        box, mask: COCO's numbers.
        train_images, val_images: how many; training images without objects are not counted.
        steps: optimizer steps.
        detections: file with all detections, in COCO's results format.
        seconds: in all, of this start of the command.
    """

    checkpoint: str
    step: int
    scratch: bool
    box: Precision
    mask: Precision
    train_images: int
    val_images: int
    steps: int
    detections: str
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return {"box_ap": self.box.ap, "mask_ap": self.mask.ap, **asdict(self)}

    def table(self) -> str:
        rows: list[tuple[str, ...]] = [("", "AP", "AP50", "AP75", "small", "medium", "large", "recall")]
        for name, p in (("boxes", self.box), ("masks", self.mask)):
            values = (p.ap, p.ap50, p.ap75, p.small, p.medium, p.large, p.recall)
            rows.append((name, *("-" if value is None else f"{value:.1f}" for value in values)))
        start = "random weights" if self.scratch else self.checkpoint
        head = (
            f"detect, {start}: {self.train_images} training images, {self.steps} steps, {self.val_images} validation "
            f"images, {self.seconds:.0f} s"
        )
        return "\n".join([head, "", format_table(rows), "", f"all in percent; detections: {self.detections}"])


@recorded("detect")
def evaluate_detect(options: DetectOptions) -> DetectEvaluation:
    """Fine-tune Mask R-CNN on a checkpoint's backbone; average precision of boxes and masks as COCO defines it.

    Source: Chen et al. 2022, arXiv 2202.03026, section 4.
    """
    return Detection(options).train()


Images = list[tuple[Tensor, dict[str, Tensor], int]]  # image [3, H, W], its boxes and masks, its id


class Detection(Run[Images, DetectEvaluation]):
    """One fine-tuning run on this process (one of several under torchrun). `train()` brings it to its number.

    Args:
        options: the command's.

    Raises:
        ConfigError, EvaluationError, CheckpointError: something asked for does not exist or does not fit.
    """

    kind = "detect"

    def __init__(self, options: DetectOptions) -> None:
        self.options = options
        begin = time.perf_counter()
        device = choose_device(options.device, "device")
        dtype = choose_dtype(options.precision, device, "precision")
        distributed.start(device)
        self.threads = decoding_threads(options.workers, distributed.local_world())

        pycocotools("mask")
        self.data = read_coco(options.data, options.data_images, "data", "--data-images", options.frame)
        self.val = read_coco(options.val, options.val_images, "val", "--val-images", options.frame)
        check_categories(self.data, self.val)
        names = f"data ({options.data})", f"val ({options.val})"
        check_shared(self.data.files(), self.val.files(), *names, options.allow_shared)
        self.usable = [i for i, image in enumerate(self.data.images) if self.data.usable(image)]
        for data in (self.data, self.val):
            if not any(map(data.usable, data.images)):
                raise EvaluationError(
                    f"{data.path} has no object that is not a crowd and at least 1 pixel wide and high"
                )
        images_per_step, steps_per_epoch = count_steps(
            len(self.usable), options.batch_size, options.accumulate, options.data, "images with objects"
        )

        torch.manual_seed(options.seed)
        self.backbone = open_backbone(options.checkpoint)
        self.weights = "" if options.scratch else digest(self.backbone.module)
        if options.scratch:
            self.backbone.module = build_backbone(self.backbone.model)
        self.detector = build_detector(
            self.backbone.module,
            len(self.data.categories),
            channels=options.channels,
            rois=options.rois,
            short_side=options.test_side,
            long_side=options.long_side,
            drop_path=options.drop_path,
            checkpointing=options.checkpointing,
            dtype=dtype,
        ).to(device)
        optimizer = build_optimizer(self.detector, self.backbone.module, options)
        pace = Pace(
            total_steps=options.epochs * steps_per_epoch,
            steps_per_epoch=steps_per_epoch,
            images_per_step=images_per_step,
            accumulate=options.accumulate,
            seed=options.seed,
            save_every=steps_per_epoch,
            log_every=min(LOG_EVERY, steps_per_epoch),
        )
        folder = run_folder(options.dir, options.checkpoint, "detect")
        self.prepare(self.detector.train(), optimizer, pace, folder=folder, device=device, dtype=dtype)
        self.begun = begin

    # -- a step --------------------------------------------------------------------------------------------------------

    def micro_batches(self) -> Generator[Images, None, None]:
        options, size = self.options, self.options.batch_size
        epoch, done = divmod(self.step, self.pace.steps_per_epoch)
        while True:
            drawn = order(len(self.usable), options.seed, epoch)
            positions = range(done * options.accumulate, self.pace.steps_per_epoch * options.accumulate)
            mine = [batch_ids(drawn, p, size, distributed.rank(), distributed.world()) for p in positions]
            rows = [[self.usable[i] for i in ids] for ids in mine]

            def make(image: dict[str, Any], epoch: int = epoch) -> tuple[Tensor, dict[str, Tensor], int]:
                what = self.data.picture(image), self.data.target(image), options.cuts
                view, target = cut(*what, seed=options.seed, epoch=epoch, number=image["id"] % 2**32)
                return view, target, image["id"]

            with contextlib.closing(read_ahead(self.data, rows, make, self.threads)) as batches:
                yield from batches
            epoch, done = epoch + 1, 0

    def sample_ids(self, batch: Images) -> list[int]:
        return [number for _, _, number in batch]

    def schedule(self) -> dict[str, float]:
        options = self.options
        factor = lr_factor(self.step, self.pace.steps_per_epoch, options.warmup_steps, options.drop_epochs)
        return set_rates(self.optimizer, options.lr * factor)

    def on_device(self, batch: Images) -> Images:
        def move(value: Tensor) -> Tensor:
            return value.to(self.device, non_blocking=True)

        return [(move(image), {key: move(v) for key, v in target.items()}, number) for image, target, number in batch]

    def autocast(self) -> AbstractContextManager:
        """None here: the detector has its own, around backbone and heads."""
        return contextlib.nullcontext()

    def losses(self, batch: Images) -> tuple[Tensor, dict[str, Tensor]]:
        images, targets, _ = zip(*batch, strict=True)
        terms = self.parallel(list(images), list(targets))
        return torch.stack(list(terms.values())).sum(), {key: value.detach() for key, value in terms.items()}

    # -- the checkpoint ------------------------------------------------------------------------------------------------

    def fingerprint(self) -> dict[str, Any]:
        images = {"weights": self.weights, "images_per_step": self.pace.images_per_step, "images": len(self.usable)}
        return {**settings(self.options, "val_images", "checkpointing", "frame"), **images}

    def record(self) -> Checkpoint:
        name = next(name for name, part in self.detector.named_modules() if part is self.backbone.module)
        return Checkpoint(self.kind, self.backbone.config, self.detector.state_dict(), f"{name}.")

    # -- the end -------------------------------------------------------------------------------------------------------

    def describe(self) -> list[str]:
        options, pace = self.options, self.pace
        return [
            f"Mask R-CNN on {options.checkpoint}{' (random weights)' if options.scratch else ''}, "
            f"{len(self.data.categories)} categories, on {self.device}: {len(self.usable)} images with objects, "
            f"{pace.images_per_step} per step, {pace.steps_per_epoch} steps per epoch, {options.epochs} epochs"
        ]

    def finish(self) -> DetectEvaluation:
        """Judges the last network, and writes detections.json and result.json."""
        options, folder = self.options, self.folder
        assert folder is not None
        found = detect(
            self.detector, self.val, self.device, self.threads, "detections" if distributed.is_main() else ""
        )
        path = folder / "detections.json"
        judged: list[Any] = [None]
        if distributed.is_main():
            _write(path, found)
            judged = [average_precision(self.val, found)]
        if distributed.world() > 1:
            dist.broadcast_object_list(judged, device=self.device)
        box, mask = judged[0]
        result = DetectEvaluation(
            options.checkpoint,
            self.backbone.step,
            options.scratch,
            box,
            mask,
            train_images=len(self.usable),
            val_images=len(self.val.images),
            steps=self.step,
            detections=str(path),
            seconds=round(time.perf_counter() - self.begun, 1),
        )
        if distributed.is_main():
            _write(folder / "result.json", result.as_dict())
        return result


def lr_factor(step: int, steps_per_epoch: int, warmup_steps: int, drop_epochs: tuple[int, ...]) -> float:
    """Learning rate of a step, as a fraction of the peak: a tenth for each drop that has come, less in the warm-up."""
    factor = DROP ** sum(step >= epoch * steps_per_epoch for epoch in drop_epochs)
    if step < warmup_steps:
        factor *= WARMUP_FROM + (1 - WARMUP_FROM) * step / warmup_steps
    return factor


def build_optimizer(detector: nn.Module, backbone: AnyBackbone, options: DetectOptions) -> torch.optim.Optimizer:
    """The optimizer; each group's learning rate is to be multiplied by its `lr_scale`."""
    groups = layer_groups(detector, backbone, options.layer_decay, options.weight_decay)
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=options.lr, momentum=0.9)
    return torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.999))


def _write(path: Path, content: Any) -> None:
    replace_file(path, lambda part: part.write_text(json.dumps(content) + "\n"))
