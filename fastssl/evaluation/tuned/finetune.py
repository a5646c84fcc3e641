"""Fine-tuning: the whole network and a linear layer on top are trained on labelled images.

The protocol of Bao et al. 2022 (arXiv 2106.08254) as MAE, CAE and SemMAE use it: AdamW with a learning rate that
decays from layer to layer towards the input, RandAugment, random erasing, mixup, cutmix, label smoothing and stochastic
depth. Augmentation, losses, parameter groups and the moving average of the weights are timm's.
Letters: B images, N patches, D width, C classes, S side of the network's input in pixels.
"""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastssl.config import (
    BelowOne,
    ConfigError,
    Fraction,
    FractionRange,
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
from fastssl.evaluation.data import EvaluationError, check_labels, check_resize, frozen, open_labelled
from fastssl.evaluation.options import EvaluateOptions
from fastssl.evaluation.record import recorded
from fastssl.evaluation.scoring import Scored, score
from fastssl.evaluation.shared import check_shared
from fastssl.evaluation.tuned.classifier import Classifier, open_finetuned
from fastssl.evaluation.tuned.crops import (
    EpochBatches,
    TrainingImages,
    collate,
    leave_signals_to_the_run,
    training_transform,
)
from fastssl.evaluation.tuned.layer_decay import layer_groups, set_rates
from fastssl.loaders.engine import decoding_threads
from fastssl.loaders.sources import Source, open_source
from fastssl.models import build_backbone, check_image_size
from fastssl.models.vit import ViT
from fastssl.training import distributed
from fastssl.training.checkpoint import Checkpoint
from fastssl.training.device import choose_device, choose_dtype
from fastssl.training.loop import LOG_EVERY, Pace, Run, count_steps, run_folder, settings
from fastssl.training.schedule import warmup_cosine
from fastssl.weights.backbone import digest, open_backbone


@dataclass
class FinetuneOptions(EvaluateOptions):
    """Training of the whole network on labelled images."""

    batch_size: PositiveInt = 64
    """Images per process and micro-batch; even, where mixup or cutmix is on."""
    accumulate: PositiveInt = 1
    """Micro-batches per optimizer step."""
    dir: str = ""
    """Folder for last.pt and the logs; the same command continues there. Empty: `finetune` beside the checkpoint."""
    eval: bool = False
    """Judge the fine-tuned network of --checkpoint on --val, and train nothing: a last.pt of this command, or a
    fine-tuned file of MAE's or SemMAE's authors."""
    scratch: bool = False
    """Start from random weights instead of the checkpoint's: the baseline that pretraining has to beat."""

    pool: Literal["mean", "class"] = "mean"
    """What the linear layer sees of a ViT: the norm of the mean patch token, or the class token."""
    new_norm: bool = False
    """Start a ViT's last norm afresh (MAE), not from the checkpoint's (CAE)."""
    train_positions: bool = False
    """Train a ViT's fixed (sine-cosine) position table too (MAE)."""
    relative_positions: bool = False
    """Add to a ViT's attention a learned bias per relative position, zero at the start (CAE)."""
    drop_path: Probability = 0.1
    """Stochastic depth of a ViT's last block; earlier blocks get proportionally less."""

    epochs: PositiveInt = 100
    """Passes over data."""
    val_every: PositiveInt = 1
    """Epochs between two judgements on val; the last epoch is always judged."""
    warmup_epochs: NonNegativeFloat = 5
    """Epochs of linear learning-rate warm-up from 0; half a cosine follows."""
    lr: PositiveFloat = 5e-4
    """Peak learning rate of the linear layer, for a batch of lr_batch images."""
    lr_batch: NonNegativeInt = 256
    """The peak is lr x (images per optimizer step) / lr_batch. 0: lr as written."""
    min_lr: NonNegativeFloat = 1e-6
    """Learning rate at the end; not scaled by the batch."""
    layer_decay: Fraction = 0.65
    """Each layer (a ViT's block, a ResNet's stage) learns at this multiple of the rate of the next one."""
    weight_decay: NonNegativeFloat = 0.05
    """Of matrices; never of biases, norms, the class token and the position table."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """AdamW's decay rates of the two moments."""
    clip_grad: NonNegativeFloat = 0.0
    """Largest gradient norm. 0: no clipping."""
    ema: BelowOne = 0.0
    """Decay per step of a moving average of the weights, judged beside the weights. 0: none."""

    scale: FractionRange = (0.08, 1.0)
    """Range of the training crop's area, as a fraction of the image's area."""
    flip: Probability = 0.5
    """Probability of a horizontal flip."""
    augment: str = "rand-m9-mstd0.5-inc1"
    """RandAugment or AutoAugment in timm's words. Empty: none."""
    erase: Probability = 0.25
    """Probability of erasing a rectangle, by noise per pixel."""
    mixup: NonNegativeFloat = 0.8
    """Parameter of mixup's beta distribution. 0: no mixup."""
    cutmix: NonNegativeFloat = 1.0
    """Parameter of cutmix's beta distribution. 0: no cutmix."""
    mix: Probability = 1.0
    """Probability that a micro-batch is mixed."""
    switch: Probability = 0.5
    """Probability of cutmix, where both mixup and cutmix are on."""
    smoothing: BelowOne = 0.1
    """Label smoothing."""
    seed: Seed = 0
    """Seed of the linear layer, the order, the augmentation and stochastic depth."""

    def __post_init__(self) -> None:
        if self.eval:
            self.data = self.data or self.val  # not read
            check(not self.scratch, "scratch", True, "off with --eval, which trains nothing")
        super().__post_init__()
        if not self.eval and self.same_images:
            raise ConfigError(f"val is the same as data ({self.data}); name images that are not trained on")
        check(self.warmup_epochs <= self.epochs, "warmup_epochs", self.warmup_epochs, f"at most epochs ({self.epochs})")
        pairs = "even: mixup and cutmix work on pairs (--mixup 0 --cutmix 0 turns them off)"
        check(self.eval or not (self.mixes and self.batch_size % 2), "batch_size", self.batch_size, pairs)

    @property
    def mixes(self) -> bool:
        """Whether micro-batches are mixed at all."""
        return self.mix > 0 and (self.mixup > 0 or self.cutmix > 0)


# -- the run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FinetuneEvaluation:
    """Accuracy of a fine-tuned network.

    Attributes:
        checkpoint: where training started, or what was judged.
        step: optimizer steps of its run.
        path: the fine-tuned network.
        epoch: passes over the training images.
        final: after the last one.
        ema: the same of the moving average of the weights, if there is one.
        best, best_epoch: of all epochs, chosen on val itself; None where nothing was trained.
        train_images: how many; 0 where nothing was trained.
        seconds: in all.
    """

    checkpoint: str
    step: int
    path: str
    epoch: int
    final: Scored
    ema: Scored | None
    best: float | None
    best_epoch: int | None
    train_images: int
    seconds: float

    @property
    def top1(self) -> float:
        """In percent, of the weights after the last epoch."""
        return self.final.top1

    def as_dict(self) -> dict[str, Any]:
        values = {key: value for key, value in vars(self).items() if key not in ("final", "ema", "best")}
        ema = None if self.ema is None else self.ema.as_dict()
        return {**self.final.as_dict(), "best_top1": self.best, "ema": ema, **values}

    def table(self) -> str:
        rows: list[tuple[str, ...]] = [("", "epoch", "top-1 %", "95 % interval", "top-5 %", "loss")]
        for name, scored in (("weights", self.final), ("moving average", self.ema)):
            if scored is not None:
                rows.append((name, str(self.epoch), *scored.cells()))
        final = self.final
        lines = [
            f"fine-tuning of {self.checkpoint}: {self.train_images} training images, {final.images} validation images, "
            f"{self.seconds:.0f} s",
            "",
            format_table(rows),
            "",
            f"Acc@1 {final.top1:.3f} Acc@5 {final.top5:.3f} loss {final.loss:.3f}",
        ]
        if self.best is not None:
            lines.append(
                f"best of all epochs: {self.best:.3f} after {self.best_epoch} (chosen on val itself; quote the last)"
            )
        return "\n".join(lines)


@recorded("finetune")
def evaluate_finetune(options: FinetuneOptions) -> FinetuneEvaluation:
    """Train the whole network and a linear layer on labelled images, and judge it on others; under torchrun on many
    GPUs. With --eval, judge a fine-tuned network. Recipes: configs/imagenet/finetune_*.yaml.

    Sources: Bao et al. 2022; He et al. 2022, appendix A.1; Chen et al. 2024 (CAE), section 4.
    """
    device = choose_device(options.device, "device")
    distributed.start(device)
    return _judge(options, device) if options.eval else Finetuner(options, device).train()


Labelled = tuple[Tensor, Tensor, list[int]]  # images, labels or soft targets, ids


class Finetuner(Run[Labelled, FinetuneEvaluation]):
    """One fine-tuning run on this process (one of several under torchrun).

    Raises:
        ConfigError, SourceError, EvaluationError, CheckpointError: something asked for does not exist or does not fit.
    """

    kind = "finetune"
    salt = b"step"

    def __init__(self, options: FinetuneOptions, device: torch.device) -> None:
        self.options = options
        begin = time.perf_counter()
        dtype = choose_dtype(options.precision, device, "precision")

        # Data.
        self.train_source, self.val_source = sources = open_labelled(options.data, options.val)
        check_shared(*sources, f"data ({options.data})", f"val ({options.val})", options.allow_shared)
        self.classes = check_labels(self.train_source, self.val_source, "data", "val")
        images_per_step, steps_per_epoch = count_steps(
            len(self.train_source), options.batch_size, options.accumulate, options.data
        )

        # Network.
        pretrained = open_backbone(options.checkpoint)
        self.config, model, self.first_step = pretrained.config, pretrained.model, pretrained.step
        self.weights = "" if options.scratch else digest(pretrained.module)
        self.size = options.size or pretrained.image_size
        check_image_size(model, "size", self.size)
        check_resize(options.resize, self.size)
        torch.manual_seed(options.seed)
        backbone = build_backbone(model, options.drop_path)
        if not options.scratch:
            backbone.load_state_dict(pretrained.module.state_dict())
        if isinstance(backbone, ViT):
            if options.new_norm:
                backbone.norm.reset_parameters()
            if options.train_positions:
                backbone.pos_embed.requires_grad_(True)
        network = Classifier(backbone, self.classes, options.pool, self.size, options.relative_positions)
        network = network.to(device).train()
        if device.type == "cuda":
            network = network.to(memory_format=backbone.memory_format)
        self.ema = ModelEmaV3(network, options.ema) if options.ema else None

        # How it learns.
        groups = layer_groups(network, network.backbone, options.layer_decay, options.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, fused=True)
        self.peak = options.lr * (images_per_step / options.lr_batch if options.lr_batch else 1.0)
        self.mixup = None
        if options.mixes:
            self.mixup = Mixup(
                mixup_alpha=options.mixup,
                cutmix_alpha=options.cutmix,
                prob=options.mix,
                switch_prob=options.switch,
                label_smoothing=options.smoothing,
                num_classes=self.classes,
            )
        self.loss = SoftTargetCrossEntropy() if self.mixup else LabelSmoothingCrossEntropy(options.smoothing)
        self.batches = EpochBatches(
            len(self.train_source), options.batch_size, steps_per_epoch * options.accumulate, options.seed
        )
        transform = training_transform(
            self.size, scale=options.scale, flip=options.flip, augment=options.augment, erase=options.erase
        )
        dataset = TrainingImages(self.train_source, transform, options.seed)
        self.open_loader = partial(
            DataLoader,
            dataset,
            batch_sampler=self.batches,
            num_workers=decoding_threads(options.workers, distributed.local_world()),
            collate_fn=collate,
            pin_memory=device.type == "cuda",
            persistent_workers=True,
            worker_init_fn=leave_signals_to_the_run,
            multiprocessing_context="fork",  # a source cannot be sent to a new process, and is safe after a fork
        )

        # Where it stands.
        self.history: list[dict[str, Any]] = []  # one entry per epoch
        self.epoch_losses: list[float] = []  # of the present epoch's steps
        self.scored: dict[str, Scored] = {}
        pace = Pace(
            total_steps=steps_per_epoch * options.epochs,
            steps_per_epoch=steps_per_epoch,
            images_per_step=images_per_step,
            accumulate=options.accumulate,
            seed=options.seed,
            save_every=steps_per_epoch * options.epochs,  # `between` saves after every epoch
            log_every=min(LOG_EVERY, steps_per_epoch),
            clip_grad=options.clip_grad,
        )
        folder = run_folder(options.dir, options.checkpoint, "finetune")
        self.prepare(network, optimizer, pace, folder=folder, device=device, dtype=dtype)
        self.begun = begin

    # -- a step --------------------------------------------------------------------------------------------------------

    def micro_batches(self) -> Generator[Labelled, None, None]:
        epoch, done = divmod(self.step, self.pace.steps_per_epoch)
        loader = self.open_loader()  # its processes end with this stream, whose own it is
        while True:
            self.batches.epoch, self.batches.start = epoch, done * self.pace.accumulate
            for batch in loader:
                if isinstance(batch, str):
                    raise EvaluationError(f"{batch}; fastssl verify lists all that are bad in a .beton")
                yield batch
            epoch, done = epoch + 1, 0

    def sample_ids(self, batch: Labelled) -> list[int]:
        return batch[2]

    def schedule(self) -> dict[str, float]:
        warmup = round(self.options.warmup_epochs * self.pace.steps_per_epoch)
        lr = warmup_cosine(self.step, self.pace.total_steps, warmup, self.peak, self.options.min_lr)
        return set_rates(self.optimizer, lr)

    def on_device(self, batch: Labelled) -> Labelled:
        """Moved, and mixed by mixup or cutmix where they are on: soft targets [B, C] then."""
        images, labels = (part.to(self.device, non_blocking=True) for part in batch[:2])
        if self.mixup is not None:
            before = np.random.get_state()  # noqa: NPY002 - timm's Mixup draws from the global generator
            np.random.seed(torch.initial_seed() % 2**32)  # noqa: NPY002
            images, labels = self.mixup(images, labels)
            np.random.set_state(before)  # noqa: NPY002
        return images, labels, batch[2]

    def losses(self, batch: Labelled) -> tuple[Tensor, dict[str, Tensor]]:
        images, target, _ = batch
        return self.loss(self.parallel(images).float(), target), {}

    def after_step(self) -> None:
        if self.ema is not None:
            self.ema.update(self.network)

    # -- the checkpoint ------------------------------------------------------------------------------------------------

    def fingerprint(self) -> dict[str, Any]:
        images = {
            "weights": self.weights,
            "images_per_step": self.pace.images_per_step,
            "images": len(self.train_source),
        }
        return {**settings(self.options, "val_every"), **images}

    def record(self) -> Checkpoint:
        extra = {
            "options": {**plain(vars(self.options)), "size": self.size},
            "classes": list(self.train_source.classes),
            "num_classes": self.classes,
            "history": self.history,
            "epoch_losses": self.epoch_losses,
            "ema": self.ema.module.state_dict() if self.ema else None,
        }
        return Checkpoint(self.kind, self.config, self.network.state_dict(), "backbone.", extra=extra)

    def restore(self, saved: Checkpoint) -> None:
        self.history, self.epoch_losses = saved.extra["history"], saved.extra["epoch_losses"]
        if self.ema is not None:
            self.ema.module.load_state_dict(saved.extra["ema"])

    # -- between steps -------------------------------------------------------------------------------------------------

    def describe(self) -> list[str]:
        options, pace = self.options, self.pace
        start = "from random weights" if options.scratch else options.checkpoint
        return [
            f"{self.config['model']['name']} {start}, {self.classes} classes, on {self.device}: "
            f"{pace.images_per_step} images per step, {pace.steps_per_epoch} steps per epoch, {options.epochs} epochs, "
            f"peak learning rate {self.peak:.3g}"
        ]

    def begin(self) -> None:
        self.between()  # an earlier start may have been ended before it could judge its last epoch

    def observe(self, steps: list[int], rows: list[dict[str, float]]) -> None:
        self.epoch_losses += [row["loss"] for row in rows]

    def between(self) -> None:
        epoch, into = divmod(self.step, self.pace.steps_per_epoch)
        if into or len(self.history) == epoch:
            return
        judged = epoch % self.options.val_every == 0 or epoch == self.options.epochs
        self.save_last() if judged else self.read_scalars()  # judging takes long: who is killed in it keeps the epoch
        self.scored = self._judge() if judged else {}
        line: dict[str, Any] = {"epoch": epoch, "loss": sum(self.epoch_losses) / len(self.epoch_losses)}
        for name, one in self.scored.items():
            line |= _named(name, one)
        self.history.append(line)
        self.epoch_losses = []
        self.log.record({"step": self.step, **line})
        self.log.say(
            f"epoch {epoch}: training loss {line['loss']:.4f}"
            + "".join(f", {name} {one.top1:.2f} % top-1" for name, one in self.scored.items())
        )
        self.save_last(again=True)

    def _judge(self) -> dict[str, Scored]:
        networks = {"weights": self.network, **({"moving average": self.ema.module} if self.ema else {})}
        return _score(networks, self.val_source, self.options, self.size, self.device, self.dtype)

    def finish(self) -> FinetuneEvaluation:
        options, scored = self.options, self.scored or self._judge()
        best = max((line for line in self.history if "top1" in line), key=lambda line: line["top1"])
        return FinetuneEvaluation(
            checkpoint=f"{options.checkpoint}{' (random weights)' if options.scratch else ''}",
            step=self.first_step,
            path=str(self.path),
            epoch=options.epochs,
            final=scored["weights"],
            ema=scored.get("moving average"),
            best=best["top1"],
            best_epoch=best["epoch"],
            train_images=len(self.train_source),
            seconds=round(time.perf_counter() - self.begun, 1),
        )


def _score(
    networks: dict[str, nn.Module],
    source: Source,
    options: FinetuneOptions,
    size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Scored]:
    """Accuracy of each network; EvaluationError where its scores are not finite."""
    classify = _Together(networks.values())
    with frozen(classify):
        results = score(
            classify,
            source,
            size=size,
            resize=options.resize,
            classifiers=len(networks),
            batch_size=options.batch_size,
            workers=options.workers,
            device=device,
            dtype=dtype,
            progress="val",
        )
    scored = dict(zip(networks, results, strict=True))
    for name, result in scored.items():
        if not np.isfinite(result.loss):
            raise EvaluationError(f"the scores of the {name} are not finite; the network is broken")
    return scored


class _Together(nn.Module):
    """Several networks on the same images: [B, 3, S, S] -> [R, B, C]."""

    def __init__(self, networks) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([network(images) for network in self.networks])


# -- a fine-tuned network from its file ------------------------------------------------------------------------------


def _judge(options: FinetuneOptions, device: torch.device) -> FinetuneEvaluation:
    begin = time.perf_counter()
    dtype = choose_dtype(options.precision, device, "precision")
    source = open_source(options.val)
    classes = check_labels(source, source, f"val ({options.val})", f"val ({options.val})")
    networks, made_for, epoch, names, step = open_finetuned(options.checkpoint)
    network, size = networks["weights"], options.size or made_for
    known = network.head.out_features
    if classes > known:
        raise EvaluationError(
            f"val ({options.val}) has {classes} classes, but {options.checkpoint} was fine-tuned for {known}"
        )
    if names and source.classes and names != list(source.classes):
        raise EvaluationError(f"the classes of val ({options.val}) are not those of {options.checkpoint}")
    if isinstance(network.backbone, ViT):
        check(size % network.backbone.patch_size == 0, "size", size, f"a multiple of {network.backbone.patch_size}")
        positions = f"{made_for}: the relative positions were trained for it"
        check(network.index is None or size == made_for, "size", size, positions)
    scored = _score({n: net.to(device) for n, net in networks.items()}, source, options, size, device, dtype)
    return FinetuneEvaluation(
        checkpoint=options.checkpoint,
        step=step,
        path=options.checkpoint,
        epoch=epoch,
        final=scored["weights"],
        ema=scored.get("moving average"),
        best=None,
        best_epoch=None,
        train_images=0,
        seconds=round(time.perf_counter() - begin, 1),
    )


def _named(name: str, scored: Scored) -> dict[str, float]:
    prefix = "" if name == "weights" else "ema_"
    return {f"{prefix}top1": scored.top1, f"{prefix}top5": scored.top5, f"{prefix}val_loss": scored.loss}
