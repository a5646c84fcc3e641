"""Detection and instance segmentation: Mask R-CNN is fine-tuned on a checkpoint's backbone, judged by COCO's numbers.

The protocol of CAE (Chen et al. 2022, arXiv 2202.03026): AdamW with layer-wise learning-rate decay, 12 epochs ("1x")
with two drops, two ways of cutting the training images (`coco_views.cut`); the last epoch counts. The network is
`detector.build_detector`. Cascade Mask R-CNN, which torchvision lacks, is not offered.
"""

from __future__ import annotations

import contextlib
import json
import math
import struct
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastssl.config import ConfigError, Model, check, check_probability
from fastssl.evaluation.accuracy import format_table
from fastssl.evaluation.data import EvaluationError
from fastssl.evaluation.tuned.coco import check_categories, pycocotools, read_coco
from fastssl.evaluation.tuned.coco_precision import Precision, average_precision, detect
from fastssl.evaluation.tuned.coco_views import Cuts, cut, read_ahead
from fastssl.evaluation.tuned.detector import build_detector
from fastssl.evaluation.tuned.layer_decay import layer_groups
from fastssl.loaders.engine import decoding_threads
from fastssl.loaders.index import batch_ids, order
from fastssl.models import build_backbone
from fastssl.training import checkpoint, distributed
from fastssl.training.batch_norm import synchronise_batch_norm
from fastssl.training.checkpoint import Backbone, replace_file
from fastssl.training.device import choose_device, choose_dtype
from fastssl.training.log import Clock, MetricRing, RunLog
from fastssl.weights.libraries import open_backbone

WARMUP_FROM = 0.001  # of the peak learning rate
DROP = 0.1
LOG_EVERY = 50  # optimizer steps between two readings of the losses
FREE = ("dir", "val", "val_images", "workers", "device", "precision")  # options that may change when a run goes on


@dataclass
class DetectOptions:
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
    scratch: bool = False
    """Start from random weights instead of the checkpoint's: the baseline that pretraining has to beat."""
    epochs: int = 12
    """Passes over the training images that have objects."""
    drop_epochs: tuple[int, ...] = (9, 11)
    """The learning rate falls to a tenth after each of these epochs."""
    warmup_steps: int = 500
    """Optimizer steps in which the learning rate grows linearly, from a thousandth."""
    batch_size: int = 2
    """Training images per process and micro-batch. Images are judged one at a time, since padding would change them."""
    accumulate: int = 1
    """Micro-batches per optimizer step. The published recipe takes 32 images per step."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """adamw (0.9, 0.999), or sgd with momentum 0.9."""
    lr: float = 3e-4
    """Peak learning rate, as it is: not scaled with the images per step."""
    weight_decay: float = 0.05
    """Weight decay (matrices only; never biases, norms)."""
    layer_decay: float = 0.75
    """Each layer (a ViT's block, a ResNet's stage) learns at this multiple of the rate of the next one."""
    drop_path: float = 0.2
    """Stochastic depth of a ViT's last block; earlier blocks get proportionally less."""
    checkpointing: bool = False
    """Compute a ViT's blocks anew in the backward pass: less memory, about a third more time."""
    channels: int = 256
    """Channels of the feature pyramid and of the heads' convolutions."""
    rois: int = 512
    """Boxes per image from which the heads learn."""
    short_sides: tuple[int, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    """Shorter side of a training image: one of these, drawn at random."""
    long_side: int = 1333
    """The longer side is at most this, in training and test."""
    crop_short_sides: tuple[int, ...] = (400, 500, 600)
    """Half of the training images are resized to one of these, cropped, and resized again. Empty list: none is."""
    crop: tuple[int, int] = (384, 600)
    """Smallest and largest side of that crop; height and width are drawn by themselves."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    test_side: int = 800
    """Shorter side of the images that are judged."""
    workers: int = 0
    """Decoding threads per process. 0: this machine's cores divided by the processes on it."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Arithmetic of backbone and heads (boxes and losses are fp32). auto: bf16 on a GPU that has it, fp16 on an older
    GPU, fp32 on the CPU."""
    seed: int = 0
    """Seed of the first weights, the order, the crops, and what the heads learn from; 0 to 2^32 - 1."""

    def __post_init__(self) -> None:
        for key, what in (("checkpoint", "a checkpoint"), ("data", "annotations"), ("val", "annotations")):
            if not getattr(self, key):
                raise ConfigError(f"{key} is empty; name {what} with --{key}")
        for key in ("epochs", "batch_size", "accumulate", "channels", "rois", "long_side", "test_side"):
            check(getattr(self, key) >= 1, key, getattr(self, key), "1 or more")
        check(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "0 or more")
        check(all(e >= 1 for e in self.drop_epochs), "drop_epochs", self.drop_epochs, "epochs from 1 on")
        check(math.isfinite(self.lr) and self.lr > 0, "lr", self.lr, "positive")
        check(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        check(0 < self.layer_decay <= 1, "layer_decay", self.layer_decay, "in (0, 1]")
        check_probability("drop_path", self.drop_path)
        check_probability("flip", self.flip)
        check(len(self.short_sides) > 0 and min(self.short_sides) >= 1, "short_sides", self.short_sides,
              "one or more sides in pixels")  # fmt: skip
        check(min(self.crop_short_sides, default=1) >= 1, "crop_short_sides", self.crop_short_sides, "sides in pixels")
        check(1 <= self.crop[0] <= self.crop[1], "crop", self.crop, "a smallest and a largest side in pixels")
        check(0 <= self.seed < 2**32, "seed", self.seed, "a whole number from 0 to 4294967295")

    @property
    def cuts(self) -> Cuts:
        """How training images are cut."""
        return Cuts(self.short_sides, self.long_side, self.crop_short_sides, self.crop, self.flip)


@dataclass(frozen=True)
class DetectEvaluation:
    """What the detector is worth.

    Attributes:
        checkpoint: path of the backbone's checkpoint; `scratch`: its weights were not used.
        box, mask: COCO's numbers.
        train_images, val_images: how many; training images without objects are not counted.
        steps: optimizer steps.
        detections: file with all detections, in COCO's results format.
        seconds: in all, of this start of the command.
    """

    checkpoint: str
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
        rows = [("", "AP", "AP50", "AP75", "small", "medium", "large", "recall")]
        for name, p in (("boxes", self.box), ("masks", self.mask)):
            values = (p.ap, p.ap50, p.ap75, p.small, p.medium, p.large, p.recall)
            rows.append((name, *("-" if value is None else f"{value:.1f}" for value in values)))
        start = "random weights" if self.scratch else self.checkpoint
        head = (
            f"detect, {start}: {self.train_images} training images, {self.steps} steps, {self.val_images} validation "
            f"images, {self.seconds:.0f} s"
        )
        return "\n".join([head, "", format_table(rows), "", f"all in percent; detections: {self.detections}"])


def evaluate_detect(options: DetectOptions) -> DetectEvaluation:
    """Fine-tune Mask R-CNN on a checkpoint's backbone; average precision of boxes and masks as COCO defines it.

    Source: Chen et al. 2022, arXiv 2202.03026, section 4.
    """
    return Detection(options).run()


class Detection:
    """One fine-tuning run on this process (one of several under torchrun). `run()` brings it to its number.

    Args:
        options: the command's.

    Raises:
        ConfigError, EvaluationError, CheckpointError: something asked for does not exist or does not fit.
    """

    def __init__(self, options: DetectOptions) -> None:
        self.options = options
        self.begin = time.perf_counter()
        self.device = choose_device(options.device, "device")
        self.dtype = choose_dtype(options.precision, self.device, "precision")
        distributed.start(self.device)
        self.threads = decoding_threads(options.workers, distributed.local_world())
        self.folder = Path(options.dir or Path(options.checkpoint).parent / "detect")

        pycocotools("mask")
        self.data = read_coco(options.data, options.data_images, "data", "--data-images")
        self.val = read_coco(options.val, options.val_images, "val", "--val-images")
        check_categories(self.data, self.val)
        self.usable = [i for i, image in enumerate(self.data.images) if self.data.usable(image)]
        for data in (self.data, self.val):
            if not any(map(data.usable, data.images)):
                raise EvaluationError(
                    f"{data.path} has no object that is not a crowd and at least 1 pixel wide and high"
                )
        self.images_per_step = options.batch_size * options.accumulate * distributed.world()
        self.steps_per_epoch = len(self.usable) // self.images_per_step
        if self.steps_per_epoch == 0:
            raise ConfigError(
                f"{options.data} has {len(self.usable)} images with objects, fewer than one optimizer step takes: "
                f"{self.images_per_step} (batch_size x accumulate x processes)"
            )

        torch.manual_seed(options.seed)
        self.backbone = self._backbone()
        self.detector = build_detector(
            self.backbone.module,
            len(self.data.categories),
            channels=options.channels,
            rois=options.rois,
            short_side=options.test_side,
            long_side=options.long_side,
            drop_path=options.drop_path,
            checkpointing=options.checkpointing,
            dtype=self.dtype,
        ).to(self.device)
        if distributed.world() > 1:
            synchronise(self.detector, self.device)
        self.optimizer = build_optimizer(self.detector, self.backbone.module, options)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.epoch = 0
        self._resume()

    def _backbone(self) -> Backbone:
        """The checkpoint's backbone, with its weights or with random ones."""
        found = open_backbone(self.options.checkpoint)
        if self.options.scratch:
            found.module = build_backbone(Model(**found.config["model"]))
        return found

    # -- checkpoint -------------------------------------------------------------------------------------------------

    def _fit(self) -> dict[str, Any]:
        values = {key: value for key, value in asdict(self.options).items() if key not in FREE}
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
        return {**values, "images per step": self.images_per_step, "training images": len(self.usable)}

    def _resume(self) -> None:
        path = self.folder / "last.pt"
        if not path.exists():
            return
        content = checkpoint.load(path)
        checkpoint.check_fit(path, content.get("fit", {}), self._fit(), "--dir")
        self.detector.load_state_dict(content["method"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        self.epoch = content["epoch"]

    def save(self) -> None:
        """Writes last.pt (main process; the others wait)."""
        if distributed.is_main():
            prefix = next(name for name, part in self.detector.named_modules() if part is self.backbone.module)
            content = {
                "config": self.backbone.config,
                "step": self.epoch * self.steps_per_epoch,
                "backbone_prefix": f"{prefix}.",
                "method": self.detector.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "epoch": self.epoch,
                "fit": self._fit(),
            }
            checkpoint.save(self.folder / "last.pt", content)
        distributed.barrier()

    # -- the run ----------------------------------------------------------------------------------------------------

    def run(self) -> DetectEvaluation:
        """Trains what is left to train, then judges."""
        options = self.options
        self.folder.mkdir(parents=True, exist_ok=True)
        parallel: nn.Module = self.detector
        if distributed.world() > 1:
            devices = [self.device] if self.device.type == "cuda" else None
            parallel = DistributedDataParallel(self.detector, device_ids=devices, broadcast_buffers=False)
        total = options.epochs * self.steps_per_epoch
        log = RunLog(self.folder, self.epoch * self.steps_per_epoch, total)
        with contextlib.closing(log):
            while self.epoch < options.epochs:
                self.train_epoch(parallel, log)
                self.epoch += 1
                share_buffers(self.detector)
                self.save()

        progress = "detections" if distributed.is_main() else ""
        found = detect(self.detector, self.val, self.device, self.threads, progress)
        path = self.folder / "detections.json"
        judged: list[Any] = [None]
        if distributed.is_main():
            _write(path, found)
            judged = [average_precision(self.val, found)]
        if distributed.world() > 1:
            dist.broadcast_object_list(judged, device=self.device)
        result = DetectEvaluation(
            options.checkpoint,
            options.scratch,
            *judged[0],
            train_images=len(self.usable),
            val_images=len(self.val.images),
            steps=total,
            detections=str(path),
            seconds=round(time.perf_counter() - self.begin, 1),
        )
        if distributed.is_main():
            _write(self.folder / "result.json", result.as_dict())
        return result

    def train_epoch(self, parallel: nn.Module, log: RunLog) -> None:
        """One pass over the training images that have objects."""
        options, epoch = self.options, self.epoch
        size, rank, world = options.batch_size, distributed.rank(), distributed.world()
        drawn = order(len(self.usable), options.seed, epoch)
        micro_batches = self.steps_per_epoch * options.accumulate
        rows = [[self.usable[i] for i in batch_ids(drawn, p, size, rank, world)] for p in range(micro_batches)]

        def make(image: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
            what = self.data.picture(image), self.data.target(image), options.cuts
            return cut(*what, seed=options.seed, epoch=epoch, number=image["id"] % 2**32)

        self.detector.train()
        ring, clock = MetricRing(), Clock()
        with contextlib.closing(read_ahead(self.data, rows, make, self.threads)) as batches:
            for position in range(self.steps_per_epoch):
                step = epoch * self.steps_per_epoch + position
                lr = options.lr * lr_factor(step, self.steps_per_epoch, options.warmup_steps, options.drop_epochs)
                for group in self.optimizer.param_groups:
                    group["lr"] = lr * group["lr_scale"]
                ring.add(step + 1, self._step(parallel, batches, step, clock))
                log.progress()
                if (position + 1) % LOG_EVERY == 0 or position + 1 == self.steps_per_epoch:
                    self._record(ring, clock, log, lr)

    def _step(self, parallel: nn.Module, batches: Iterator[list[Any]], step: int, clock: Clock) -> dict[str, Tensor]:
        """One optimizer step; asks the device nothing of its own (torchvision's detector does)."""
        accumulate = self.options.accumulate
        losses: dict[str, Tensor] = {}
        for micro in range(accumulate):
            waiting = time.perf_counter()
            images, targets = zip(*next(batches), strict=True)
            clock.wait(time.perf_counter() - waiting)
            images = [image.to(self.device, non_blocking=True) for image in images]
            targets = [{k: v.to(self.device, non_blocking=True) for k, v in t.items()} for t in targets]
            # Drop path and the boxes that the heads learn from.
            torch.manual_seed(zlib.crc32(struct.pack("<4Q", self.options.seed, step, micro, distributed.rank())))
            quiet = distributed.world() > 1 and micro < accumulate - 1
            with parallel.no_sync() if quiet else contextlib.nullcontext():
                parts = parallel(images, targets)
                loss = torch.stack(list(parts.values())).sum()
                self.scaler.scale(loss / accumulate).backward()
            for key, value in {"loss": loss, **parts}.items():
                losses[key] = losses.get(key, 0.0) + value.detach() / accumulate
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return losses

    def _record(self, ring: MetricRing, clock: Clock, log: RunLog, lr: float) -> None:
        """Writes one log line: means over the steps since the last one. Stops where the loss is not finite."""
        steps, _, mean = ring.drain()
        broken = [step for step, row in zip(steps, mean, strict=True) if not math.isfinite(row["loss"])]
        if broken:
            kept = f"{self.folder / 'last.pt'} (epoch {self.epoch})" if self.epoch else "no checkpoint yet"
            raise EvaluationError(f"step {broken[0]}: the loss is not finite; try a smaller --lr; kept: {kept}")
        elapsed, waited = clock.read()
        log.record(
            {
                "step": steps[-1],
                "epoch": steps[-1] / self.steps_per_epoch,
                **{key: sum(row[key] for row in mean) / len(mean) for key in mean[0]},
                "lr": lr,
                "images_per_s": len(steps) * self.images_per_step / elapsed,
                "data_wait": waited,
            }
        )


def lr_factor(step: int, steps_per_epoch: int, warmup_steps: int, drop_epochs: tuple[int, ...]) -> float:
    """Learning rate of a step, as a fraction of the peak: a tenth for each drop that has come, less in the warm-up."""
    factor = DROP ** sum(step >= epoch * steps_per_epoch for epoch in drop_epochs)
    if step < warmup_steps:
        factor *= WARMUP_FROM + (1 - WARMUP_FROM) * step / warmup_steps
    return factor


def build_optimizer(detector: nn.Module, backbone: nn.Module, options: DetectOptions) -> torch.optim.Optimizer:
    """The optimizer; each group's learning rate is to be multiplied by its `lr_scale`."""
    groups = layer_groups(detector, backbone, options.layer_decay, options.weight_decay)
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=options.lr, momentum=0.9)
    return torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.999))


def synchronise(detector: nn.Module, device: torch.device) -> None:
    """Batch norm over all processes; on the CPU not in the box head, whose number of boxes differs between them."""
    if device.type == "cuda":
        synchronise_batch_norm(detector, device)
    else:
        synchronise_batch_norm(detector.backbone, device)


def share_buffers(module: nn.Module) -> None:
    """Gives all processes the main one's buffers (running statistics), so that all judge with the same network."""
    if distributed.world() > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, 0)


def _write(path: Path, content: Any) -> None:
    replace_file(path, lambda part: part.write_text(json.dumps(content) + "\n"))
